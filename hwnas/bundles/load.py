"""Reading bundles: whatever is in them is checked before it is used, and nothing in them is executed."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hwnas.bundles.classify import normalised, softmax
from hwnas.bundles.manifest import CHECK, MANIFEST, File, Manifest, folders, read_manifest
from hwnas.bundles.parity import GATES, Parity
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import Pixels, exporter, formats

MANIFEST_BYTES = 16 * 2**20  # at most
CHUNK_BYTES = 2**20


class Prediction(NamedTuple):
    """What a network says of images.

    Attributes:
        classes: name of the likeliest class of each image.
        probabilities: (num_images, num_classes) float32.
        logits: (num_images, num_classes) float32.
    """

    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]


class Bundle:
    """A bundle in its runtime; see `load_bundle`.

    Attributes:
        path: of the folder or zip file.
        manifest: what it says about itself.
        sha256: of `manifest.json`, which holds those of all other files; hexadecimal.
        class_names: of the logits.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{self.path}: there is no such bundle")
        if self.path.is_dir():
            folder = self.path
            content = _check_folder(folder)
        else:
            folder = Path(tempfile.mkdtemp(prefix="hwnas-bundle-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            content = _unpack(self.path, folder)
        self.manifest = read_manifest(content, str(self.path))
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.class_names = self.manifest.classes
        file = self.manifest.file
        if file.format not in formats() or file.precision not in GATES:
            raise ExportError(f"{self.path}: this hwnas knows no {file.precision} {file.format} files")
        self._folder = folder
        taken, how = self.manifest.input, self.manifest.preprocessing
        try:
            self._exporter = exporter(
                file.format,
                file.precision,
                batch=taken.shape[0],
                pixels=Pixels(how.mean, how.std) if taken.values == "pixels" else None,
            )
        except InputError as error:
            raise ExportError(f"{self.path}: its {MANIFEST} contradicts itself: {error}") from None
        self._run = self._exporter.runner(folder / file.name)

    def predict(self, images: NDArray[np.uint8] | Iterable[str | Path | Image.Image]) -> Prediction:
        """Classify images; the manifest's preprocessing is done here.

        Args:
            images: (num_images, height, width[, channels]) uint8, grey or RGB; or paths of image files, or Pillow's
                images.

        Raises:
            InputError: they are something else, or a file is no image.
            ExportError: the runtime fails.
        """
        how = self.manifest.to_dict()["preprocessing"]
        inputs = [normalised(image, how) for image in map(_opened, _each(images))]
        if not inputs:
            raise InputError("there are no images to classify")
        logits = self._run(np.stack(inputs).transpose(0, 3, 1, 2))
        best = tuple(self.class_names[index] for index in logits.argmax(1))
        return Prediction(best, softmax(logits), logits)

    def check(self) -> Parity:
        """Run the bundle's own images, and compare with the logits that it had when it was made.

        Raises:
            ExportError: they differ, or the runtime fails.
        """
        source = f"{self.path}: {CHECK}"
        try:
            with np.load(self._folder / CHECK, allow_pickle=False) as stored:
                images, expected = stored["images"], stored["logits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ExportError(f"{source} cannot be read ({error}): export the bundle again") from None
        shape = dict(zip(self.manifest.input.layout, self.manifest.input.shape, strict=True))
        wanted = (shape["C"], shape["H"], shape["W"]), (self.manifest.output.shape[1],)
        if (images.shape[1:], expected.shape[1:]) != wanted or len(images) != len(expected) or not len(images):
            raise ExportError(f"{source} holds images and logits of other shapes: export the bundle again")
        found = self._run(images.astype(np.float32))
        parity = Parity.of(expected, found, self.manifest.file.precision, self._exporter.runtime)
        if not parity.passed:
            raise ExportError(f"{self.path}: computes something else here than where it was made: {parity}")
        return parity


def load_bundle(path: str | Path) -> Bundle:
    """Load a bundle, folder or zip, into its runtime; torch is not needed unless the runtime needs it.

        bundle = hwnas.load_bundle("run/exports/cpu-0.2ms-onnx")
        bundle.predict(["photo.jpg"]).classes

    Raises:
        InputError: there is nothing at `path`.
        ExportError: it is no bundle, a file was changed, added or removed, or its runtime is missing or refuses it.
    """
    return Bundle(path)


def _each(images: NDArray[np.uint8] | Iterable[str | Path | Image.Image]) -> Sequence[object]:
    if isinstance(images, str | Path | Image.Image):
        raise InputError("predict takes several images: put the one into a list")
    if not isinstance(images, np.ndarray):
        return list(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise InputError(
            f"images are {images.dtype} {images.shape}: give (num_images, height, width, 1 or 3) uint8, or a list of "
            "paths"
        )
    return [image[:, :, 0] if image.shape[2:] == (1,) else image for image in images]


def _opened(image: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, str | Path):
        raise InputError(f"an image is {type(image).__name__}: give a path, one of Pillow's images, or an array of all")
    try:
        with Image.open(image) as opened:
            opened.load()
            return opened
    except Exception as error:  # what decoders raise on damaged files is not documented
        raise InputError(f"{image}: cannot be read as an image ({error})") from None


# -------------------------------------------------------------------- files


def manifest_bytes(bundle: Path) -> bytes:
    """Those of the manifest of a bundle, folder or zip file; nothing else of it is looked at.

    Raises:
        ExportError: there is none, it is too long, or the zip file is damaged.
        InputError: the system cannot read it.
    """
    try:
        if bundle.is_dir():
            with (bundle / MANIFEST).open("rb") as file:
                content = file.read(MANIFEST_BYTES + 1)
        else:
            with _zipped(bundle) as packed, _member(packed, MANIFEST) as file:
                content = file.read(MANIFEST_BYTES + 1)
    except (FileNotFoundError, KeyError):
        raise ExportError(f"{bundle}: is not a bundle of hwnas: it has no {MANIFEST}") from None
    except OSError as error:
        raise InputError(f"{bundle}: cannot be read ({error.strerror or error})") from None
    if len(content) > MANIFEST_BYTES:
        raise ExportError(f"{bundle}: {MANIFEST} has more than {MANIFEST_BYTES:,} bytes")
    return content


def _check_folder(folder: Path) -> bytes:
    """The bytes of the manifest of a bundle, all of whose files are as it says.

    Raises:
        ExportError: one is not, or is missing, or one is there that it does not name.
    """
    content = manifest_bytes(folder)
    manifest = read_manifest(content, str(folder))
    _compare_names(manifest, [*_entries(folder, folders(file.name for file in manifest.files))], str(folder))
    for listed in manifest.files:
        path = folder / listed.name
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{folder}: {listed.name} is no plain file: export the bundle again")
        with path.open("rb") as file:
            _copy(file, listed, str(folder))
    return content


def _unpack(path: Path, folder: Path) -> bytes:
    """The same for a zip file; its files are checked on the way into an empty folder.

    No member's name becomes a path before it has been found in the manifest, whose names lead nowhere else; and no
    more is unpacked than the manifest says.
    """
    content = manifest_bytes(path)
    manifest = read_manifest(content, str(path))
    try:
        with _zipped(path) as packed:
            members = {member.filename: member for member in packed.infolist()}
            known = {f"{inside}/" for inside in folders(file.name for file in manifest.files)}
            found = [member.filename for member in packed.infolist() if member.filename not in known]
            _compare_names(manifest, found, str(path))
            for listed in manifest.files:
                member = members[listed.name]
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise ExportError(f"{path}: {listed.name} is no plain file: export the bundle again")
                (folder / listed.name).parent.mkdir(parents=True, exist_ok=True)
                with _member(packed, listed.name) as file, (folder / listed.name).open("xb") as unpacked:
                    _copy(file, listed, str(path), unpacked)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    return content


@contextmanager
def _zipped(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file; what is damaged in it is an `ExportError`."""
    try:
        with zipfile.ZipFile(path) as packed:
            yield packed
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        raise ExportError(f"{path}: is not a bundle of hwnas, or a damaged one ({error})") from None


def _member(packed: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A member to read in pieces, of which none is larger than asked for.

    Raises:
        KeyError: there is none of this name.
        ValueError: it is packed as hwnas does not: zipfile unpacks whole blocks of bzip2 and LZMA, however large.
    """
    member = packed.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed by method {member.compress_type}")
    return packed.open(member)


def _entries(folder: Path, known: set[str], within: str = "") -> Iterator[str]:
    """The names of what is in a folder, and in those `known` in it; links are not followed."""
    for entry in (folder / within).iterdir():
        name = f"{within}/{entry.name}" if within else entry.name
        if name in known and entry.is_dir() and not entry.is_symlink():
            yield from _entries(folder, known, name)
        else:
            yield name


def _compare_names(manifest: Manifest, found: list[str], source: str) -> None:
    listed = {MANIFEST, *(file.name for file in manifest.files)}
    more, fewer = sorted({*found} - listed), sorted(listed - {*found})
    if more or len(found) != len({*found}):
        raise ExportError(f"{source}: has files that its manifest does not name: {', '.join(more) or 'some twice'}")
    if fewer:
        raise ExportError(f"{source}: lacks {', '.join(fewer)}: copy it again, or export it again")


def _copy(file: IO[bytes], listed: File, source: str, to: IO[bytes] | None = None) -> None:
    """Read a file to its end, perhaps writing it to another, and check size and hash."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if size > listed.size_bytes:
            break
        if to is not None:
            to.write(chunk)
    if size != listed.size_bytes or digest.hexdigest() != listed.sha256:
        raise ExportError(f"{source}: {listed.name} is not the file that was exported: its bytes were changed")
