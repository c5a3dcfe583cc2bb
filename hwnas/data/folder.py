"""Image files in folders, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch

from hwnas.data.images import Images, name_parts, source_of_images
from hwnas.data.splits import Source
from hwnas.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class FileImages(Images):
    """Image files. Their paths lie in one piece of memory: processes that share millions of them copy none.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._text = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64)

    def __len__(self) -> int:
        """Number of files."""
        return len(self._ends) - 1

    def read(self, index: int) -> bytes:
        """See `Images`."""
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """The path."""
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])


def open_folder(root: Path, notice: Callable[[str], None]) -> Source:
    """Image files under `root/train/<class>` and `root/val` or `root/test`, or under `root/<class>`.

    Without `test`, `val` (or `validation`) is the test part, as is usual with ImageNet.

    Raises:
        InputError: the folders are not as above, a class has no images, or an image cannot be read.
    """
    try:
        folders = _parts(root, notice)
        files = {part: _scan(folder) for part, folder in folders.items()}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    labels = {name: label for label, name in enumerate(files["train"])}
    for part, of_class in files.items():
        if unknown := sorted(of_class.keys() - labels.keys()):
            raise InputError(
                f"{folders[part]} has the class {unknown[0]!r}, which {folders['train']} lacks: add it there"
            )
    parts = {
        part: (
            FileImages(list(chain.from_iterable(of_class.values()))),
            torch.tensor([labels[name] for name, paths in of_class.items() for _ in paths]),
        )
        for part, of_class in files.items()
    }
    return source_of_images(root.resolve().name, tuple(labels), parts)


def _parts(root: Path, notice: Callable[[str], None]) -> dict[str, Path]:
    """Where the class folders of train, and perhaps of validation and test, are."""
    found = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    nested = [name for name, folder in found.items() if _folders(folder)]
    # A class may be called train: then there are others beside it, and images right in it.
    if "train" not in nested and not ("train" in found and len(found) == len(_folders(root))):
        if nested:
            raise InputError(f"{root} has {nested[0]!r}, but no class folders under 'train': add them")
        return {"train": root}
    found["train"] = root / "train"
    if "test" in found and "test" not in nested:  # ImageNet's comes without labels
        notice(f"{found.pop('test')} is ignored: it has no class folders")
    return name_parts(found, str(root), notice)


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
