"""Images in folders, one folder a class, decoded when they are needed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from statistics import median_low
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hwnas.data.splits import (
    AREA,
    FLIP,
    LEFT,
    PHOTO_SIZE,
    RATIO,
    TOP,
    Preprocessing,
    Source,
    Split,
    plain,
    shift_and_flip,
)
from hwnas.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

DEFAULT_SIZE = 224
SHORTER_SIDE = 256 / 224  # of the image to the side of its centre crop: He et al. 2016, section 3.4
LEAST_AREA = 0.25  # share of the photo that a random crop shows at least
MOST_RATIO = 4 / 3  # of a random crop's width to its height, or the reverse: Szegedy et al. 2015, section 6

KEPT_BYTES = 2**30  # a split that fits, as evaluated (ImageNet: 7,100 images at 224), is decoded only once
NUM_CHECKED = 2000  # images whose headers are read at the start

Box: TypeAlias = tuple[float, float, float, float]


class FolderSplit(Split):
    """Image files, decoded on demand in a few threads.

    Photos (`PHOTO_SIZE` and up) are augmented by a random crop of random size, and mirrored; smaller images
    like those of `TensorSplit`. As evaluated, images are kept in memory if all of them fit into `KEPT_BYTES`.
    Rotation marks in EXIF data are ignored, as torchvision does.
    """

    def __init__(
        self, files: Sequence[str], labels: Tensor, preprocessing: Preprocessing, threads: ThreadPoolExecutor
    ) -> None:
        super().__init__(labels, preprocessing)
        self.files, self.threads = files, threads
        shape = (len(files), preprocessing.channels, preprocessing.size, preprocessing.size)
        # Memory is taken only when pixels are written.
        self._kept = torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= KEPT_BYTES else None
        self._is_kept = torch.zeros(len(files), dtype=torch.bool)

    def pixels(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """See `Split`."""
        if draws is None:
            return self._as_evaluated(indices)
        size = self.preprocessing.size
        if size < PHOTO_SIZE:
            return shift_and_flip(self._as_evaluated(indices), draws, pad=max(1, size // 8), flip=True)
        return self._decoded(indices, draws.tolist())

    def _as_evaluated(self, indices: Tensor) -> Tensor:
        if self._kept is None:
            return self._decoded(indices, [None] * len(indices))
        missing = indices[~self._is_kept[indices]]
        self._kept[missing] = self._decoded(missing, [None] * len(missing))
        self._is_kept[missing] = True
        return self._kept[indices]

    def _decoded(self, indices: Tensor, draws: Sequence[Sequence[float] | None]) -> Tensor:
        size, shorter_side = self.preprocessing.size, self.preprocessing.shorter_side
        images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)

        def fill(image: Tensor, index: int, draws: Sequence[float] | None) -> None:
            path = self.files[index]
            pixels = read_centre(path, size, shorter_side) if draws is None else read_crop(path, size, draws)
            image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))

        for _ in self.threads.map(fill, images, indices.tolist(), draws):
            pass  # raises what `fill` raised
        return images

    def subset(self, indices: Tensor, preprocessing: Preprocessing) -> FolderSplit:
        """The files at `indices` as a split of their own."""
        files = [self.files[index] for index in indices.tolist()]
        return FolderSplit(files, self.labels[indices], preprocessing, self.threads)


def open_folder(root: Path, notice: Callable[[str], None]) -> Source:
    """Image files under `root/train/<class>` and `root/val` or `root/test`, or under `root/<class>`.

    Without `test`, `val` (or `validation`) is the test part, as is usual with ImageNet.

    Raises:
        InputError: the folders are not as above, a class has no images, or an image cannot be read.
    """
    try:
        parts = _parts(root, notice)
        images = {part: _scan(folder) for part, folder in parts.items()}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    labels = {name: label for label, name in enumerate(images["train"])}
    if len(labels) == 1:
        raise InputError(f"{parts['train']} has only one class, {min(labels)!r}: at least two are needed")
    for part, of_class in images.items():
        if unknown := sorted(of_class.keys() - labels.keys()):
            raise InputError(f"{parts[part]} has the class {unknown[0]!r}, which {parts['train']} lacks: add it there")

    threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hwnas-decode")
    files = {part: list(chain.from_iterable(of_class.values())) for part, of_class in images.items()}
    shorter_sides = {part: _check(paths, threads) for part, paths in files.items()}
    preprocessing = plain(min(DEFAULT_SIZE, median_low(shorter_sides["train"])), 3)

    def split(part: str) -> FolderSplit:
        of_images = torch.tensor([labels[name] for name, paths in images[part].items() for _ in paths])
        return FolderSplit(files[part], of_images, preprocessing, threads)

    return Source(
        name=root.resolve().name,
        classes=tuple(labels),
        train=split("train"),
        validation=split("validation") if "validation" in parts else None,
        test=split("test") if "test" in parts else None,
        shorter_side=lambda size: round(size * SHORTER_SIDE) if size >= PHOTO_SIZE else None,
    )


def _parts(root: Path, notice: Callable[[str], None]) -> dict[str, Path]:
    """Where the class folders of train, and perhaps of validation and test, are."""
    found = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    nested = [name for name, folder in found.items() if _folders(folder)]
    # A class may be called train: then there are others beside it, and images right in it.
    if "train" not in nested and not ("train" in found and len(found) == len(_folders(root))):
        if nested:
            raise InputError(f"{root} has {nested[0]!r}, but no class folders under 'train': add them")
        return {"train": root}
    parts = {"train": root / "train"} | {
        "validation" if name == "val" else name: folder for name, folder in found.items()
    }
    if "test" in parts and "test" not in nested:  # ImageNet's comes without labels
        notice(f"{parts.pop('test')} is ignored: it has no class folders")
    if "validation" in parts and "test" not in parts:
        parts["test"] = parts.pop("validation")
        notice(f"{parts['test']} is the test part; images for validation are taken off {parts['train']}")
    return parts


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _scan(folder: Path) -> dict[str, list[str]]:
    """The image files of every class folder, both in alphabetical order."""
    files = {name: list(_images(str(folder / name))) for name in _folders(folder)}
    if not files:
        raise InputError(f"{folder} has no class folders: put the images into one folder a class")
    for name, paths in files.items():
        if not paths:
            raise InputError(
                f"class folder {folder / name} has no images ({', '.join(SUFFIXES)}; links do not count): "
                "add some or remove it"
            )
    return files


def _images(folder: str) -> Iterator[str]:
    """Image files under the folder, at any depth. Links and hidden files are left out."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _images(entry.path)
            elif entry.is_file(follow_symlinks=False) and entry.name.lower().endswith(SUFFIXES):
                yield entry.path


def _check(files: Sequence[str], threads: ThreadPoolExecutor) -> list[int]:
    """The shorter sides of (a sample of) the images. Raises `InputError` for a file that is no image."""
    sample = files[:: math.ceil(len(files) / NUM_CHECKED)]
    return list(threads.map(_shorter_side, sample))


def _shorter_side(path: str) -> int:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception as error:
        raise _unreadable(path, error) from None


def read_centre(path: str, size: int, shorter_side: int | None) -> NDArray[np.uint8]:
    """(size, size, 3) of an image as it is evaluated, see `Preprocessing`.

    Raises:
        InputError: the file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as opened:
            image = _rgb(opened)
    except Exception as error:  # what decoders raise on damaged files is not documented
        raise _unreadable(path, error) from None
    if shorter_side is None:
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    width, height = (shorter_side * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))


def read_crop(path: str, size: int, draws: Sequence[float]) -> NDArray[np.uint8]:
    """(size, size, 3) of a random part of an image, chosen by the (NUM_DRAWS,) draws, perhaps mirrored.

    Raises:
        InputError: the file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as opened:
            full = opened.size
            box = crop_box(*full, draws)
            shown = min(box[2] - box[0], box[3] - box[1])
            # Have the JPEG decoder shrink the image, by at most what the crop will shrink anyway.
            opened.draft(opened.mode, (math.ceil(full[0] * size / shown), math.ceil(full[1] * size / shown)))
            image = _rgb(opened)
    except Exception as error:
        raise _unreadable(path, error) from None
    scale = (image.width / full[0], image.height / full[1])
    left, top, right, bottom = (min(edge * scale[axis % 2], image.size[axis % 2]) for axis, edge in enumerate(box))
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    pixels = np.array(image)
    return pixels[:, ::-1].copy() if draws[FLIP] < 0.5 else pixels


def crop_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Left, top, right, bottom of the part of a (width, height) image that the draws choose, in pixels.

    Area and aspect ratio are drawn once and clipped to the image, where torchvision draws until they fit.
    """
    area = width * height * (LEAST_AREA + (1 - LEAST_AREA) * draws[AREA])
    ratio = MOST_RATIO ** (2 * draws[RATIO] - 1)
    shown_width, shown_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draws[LEFT] * (width - shown_width), draws[TOP] * (height - shown_height)
    return left, top, left + shown_width, top + shown_height


def _rgb(image: Image.Image) -> Image.Image:
    """Decode and convert to RGB. Transparency is dropped; 16-bit grey is brought to 8."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns where a transparent palette goes to RGB directly
    return image.convert("RGB")


def _unreadable(path: str, error: Exception) -> InputError:
    reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
    return InputError(f"{path}: cannot be read as an image ({reason}): replace or remove it")
