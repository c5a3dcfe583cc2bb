"""Parquet files of encoded images and labels, as Hugging Face's datasets are stored.

A row of Parquet cannot be reached alone: its whole row group is read. For an image of 75 KB that took 3 ms in row
groups of 100 and 70 ms in those of 1,000, from memory; from a disk it is 100 or 1,000 times the bytes. So the images
are copied once (600 MB/s), one after the other, into a plain file in the cache, of which each is read in 0.02 ms.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hwnas.data.images import Images, name_parts, source_of_images
from hwnas.data.named import download_folder, keep, one_line
from hwnas.data.splits import Source
from hwnas.errors import InputError

PARTS = ("train", "val", "validation", "test")
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
ROWS = 64  # read at a time when copying


class PackedImages(Images):
    """Encoded images one after the other in a file.

    Args:
        path: `<part>.bin`, with `<part>.npy` beside it: (num_images + 1,) int64, where each begins and ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends = np.load(path.with_suffix(".npy"))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._ends) - 1

    def read(self, index: int) -> bytes:
        """See `Images`."""
        start, end = self._ends[index : index + 2].tolist()
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)

    def name(self, index: int) -> str:
        """The part and the row, counted over the part's files in alphabetical order, from 0."""
        return f"{self.path.stem}, row {index}"


def find_parquet(path: Path) -> dict[str, list[Path]]:
    """The Parquet files of each part: a single file, or those in a folder, its `data`, or a folder a part.

    A file belongs to the part that its name begins with (`test-00000-of-00002.parquet`) or that its folder is called;
    otherwise to train.
    """
    if path.is_file():
        return {"train": [path]} if path.suffix == ".parquet" else {}
    found: dict[str, list[Path]] = {}
    for pattern in ("*.parquet", "data/*.parquet", *(f"{part}/*.parquet" for part in PARTS)):
        for file in sorted(path.glob(pattern)):
            prefix = re.split(r"[-._]", file.name)[0]
            part = next((name for name in (prefix, file.parent.name) if name in PARTS), "train")
            found.setdefault(part, []).append(file)
    return found


def open_parquet(path: Path, cache: Path, notice: Callable[[str], None]) -> Source:
    """The images of `find_parquet`, copied to the cache the first time.

    The column `image` (or `img`) holds encoded images, as binary or as a struct with `bytes`; `label` (or `labels`,
    `fine_label`) holds integers, whose names are in the metadata that Hugging Face writes, or strings.

    Raises:
        InputError: pyarrow is not installed, a file is damaged or lacks a column, a row lacks its image or label, or
            the cache cannot be written.
    """
    if find_spec("pyarrow") is None:
        raise InputError(f"{path}: reading Parquet files needs pyarrow: pip install 'hwnas[parquet]'")
    found = find_parquet(path)
    if "train" not in found:
        raise InputError(f"{path} has Parquet files of {min(found)}, but none of train: add them")
    values = {part: [value for file in files for value in _labels(file)] for part, files in found.items()}
    for part in [part for part in found if part != "train" and set(values[part]) <= {None, -1}]:
        notice(f"{path}: {part} is ignored: it has no labels")  # as Hugging Face's ImageNet; -1 stands for none
        del found[part]
    classes = _class_names(found["train"][0])
    distinct = range(len(classes)) if classes else sorted(set(values["train"]) - {None})
    number_of = {value: number for number, value in enumerate(distinct)}
    for part in found:
        for row, value in enumerate(values[part]):
            if value not in number_of:
                raise InputError(f"{path}: {part}, row {row} has the label {value!r}, which is none of the classes")
    labels = {part: torch.tensor([number_of[value] for value in values[part]]) for part in found}
    name = path.resolve().stem
    folder = _packed(name, found, cache, notice)
    parts = {part: (PackedImages(folder / f"{part}.bin"), labels[part]) for part in found}
    return source_of_images(name, classes or tuple(map(str, distinct)), name_parts(parts, str(path), notice))


def _labels(file: Path) -> list[Any]:
    with _opened(file) as parquet:
        column = _column(parquet, file, LABEL_COLUMNS)
        values: list[Any] = parquet.read(columns=[column]).column(0).to_pylist()
    if wrong := [value for value in values if not isinstance(value, int | str | None)]:
        raise InputError(f"{file}: the column {column!r} has {wrong[0]!r}, which is no integer or string")
    return values


def _class_names(file: Path) -> tuple[str, ...] | None:
    """The names of the integer labels, where Hugging Face wrote them into the schema (`ClassLabel`)."""
    with _opened(file) as parquet:
        metadata = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        label = metadata.get("info", {}).get("features", {}).get(_column(parquet, file, LABEL_COLUMNS), {})
    return tuple(label["names"]) if label.get("names") else None


def _packed(name: str, found: Mapping[str, Sequence[Path]], cache: Path, notice: Callable[[str], None]) -> Path:
    """The folder in the cache with `<part>.bin` and `<part>.npy`, made if it is not there."""
    digest = hashlib.blake2b(digest_size=8)
    for part, files in found.items():
        for file in files:
            stat = file.stat()
            digest.update(f"{part} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    folder = cache / f"{name}-{digest.hexdigest()}"
    if folder.is_dir():
        return folder
    size = sum(file.stat().st_size for files in found.values() for file in files)
    with download_folder(cache) as scratch:
        if size > (free := shutil.disk_usage(scratch).free):
            raise InputError(f"{cache}: has {free / 1e9:.1f} GB free, but {name} takes {size / 1e9:.1f}: make room")
        notice(f"copying the images of {name} ({size / 1e9:.1f} GB) to {folder}, once")
        (scratch / "images").mkdir()
        for part, files in found.items():
            with (scratch / "images" / f"{part}.bin").open("wb") as target:
                sizes = [size for file in files for size in _copy(file, target)]
            np.save(scratch / "images" / f"{part}.npy", np.cumsum([0, *sizes], dtype=np.int64))
        keep(scratch / "images", folder)
    return folder


def _copy(file: Path, target: BinaryIO) -> Iterator[int]:
    """Append the images of a Parquet file to the target; their sizes in bytes."""
    row = 0
    with _opened(file) as parquet:
        column = _column(parquet, file, IMAGE_COLUMNS)
        is_struct = parquet.schema_arrow.field(column).type.num_fields > 0
        for batch in parquet.iter_batches(ROWS, columns=[f"{column}.bytes" if is_struct else column]):
            array = batch.column(0)
            for image in array.field("bytes") if is_struct else array:
                if not (data := image.as_buffer()):
                    raise InputError(f"{file}: row {row} has no bytes in the column {column!r}: remove it")
                target.write(data)
                yield data.size
                row += 1


def _column(parquet: Any, file: Path, names: Sequence[str]) -> str:
    """The first of the names that the file has."""
    found = parquet.schema_arrow.names
    for name in names:
        if name in found:
            return name
    raise InputError(f"{file}: has no column {' or '.join(map(repr, names))}, but {', '.join(found)}: rename one")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: is damaged, or no Parquet file ({one_line(error)})") from None
