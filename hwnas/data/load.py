"""From a name or a folder to a data set that is cut once, the same way every time."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwnas.data import fashion_mnist
from hwnas.data.folder import open_folder
from hwnas.data.named import TORCHVISION, open_digits, open_torchvision
from hwnas.data.parquet import find_parquet, open_parquet
from hwnas.data.splits import Dataset, Preprocessing, Source, Split, plain
from hwnas.data.torch_dataset import TorchDatasets, open_torch
from hwnas.errors import InputError

_log = logging.getLogger(__name__)

NAMES = tuple(sorted([*TORCHVISION, "digits", fashion_mnist.NAME]))

# Shares of the training images, and the most, that the other parts take where the caller does not say.
TEST_SHARE, MOST_TEST = 0.2, 10_000
VALIDATION_SHARE, MOST_VALIDATION = 0.1, 5_000
CALIBRATION_SHARE, MOST_CALIBRATION = 0.05, 2_048

NUM_MEASURED = 1_000  # training images that mean and standard deviation are measured on


def load_dataset(
    data: str | Path | TorchDatasets,
    *,
    cache: Path,
    size: int | None = None,
    seed: int = 0,
    validation: int | None = None,
    calibration: int | None = None,
    download: bool = True,
    limit: int | None = None,
    notice: Callable[[str], None] = _log.warning,
) -> Dataset:
    """Load a data set and cut it into train, calibration, validation and test.

    A folder has `train/<class>/*.jpg` and perhaps `val` and `test`, or just `<class>/*.jpg`; or Parquet files as
    Hugging Face stores them, see `open_parquet`; or a dataset of PyTorch is given, see `open_torch`. The test part
    is the data's own; where it has none, a fifth of the images is cut off. Data with `val` and no `test` is
    tested on `val`, as is usual with ImageNet. Validation and calibration images are taken off the training
    images. Every part has every class, and the cut depends only on the images, the numbers asked for and the
    seed.

    Args:
        data: one of `NAMES`, a folder, a Parquet file, or a map-style dataset of PyTorch that gives images and
            labels; or {"train": dataset, "test": dataset}, perhaps with "validation".
        cache: folder for downloads, and for the images of Parquet files.
        size: side of the square images, pixels; by default that of the images, at most 224 for folders.
        seed: of the cut.
        validation: number of images, by default a tenth of the training images, at most 5,000.
        calibration: number of images, by default a twentieth, at most 2,048.
        download: whether the network may be used.
        limit: most training images, for quick tests; the other parts are not affected.
        notice: is told, a line at a time, what the user should know.

    Raises:
        InputError: the data is not there, not to be had, or not as described; one line with the remedy.
    """
    source = _open(data, cache, download=download, notice=notice)
    num_images, num_classes = len(source.train), len(source.classes)

    def default(share: float, most: int) -> int:
        return max(num_classes, min(most, int(share * num_images)))

    counts = {}
    if source.test is None:
        counts["test"] = default(TEST_SHARE, MOST_TEST)
    if source.validation is None:
        counts["validation"] = default(VALIDATION_SHARE, MOST_VALIDATION) if validation is None else validation
    counts["calibration"] = default(CALIBRATION_SHARE, MOST_CALIBRATION) if calibration is None else calibration
    *taken, train = cut(source.train.labels, counts, source.classes, seed)
    parts = dict(zip(counts, taken, strict=True)) | {"train": train}
    if limit is not None and limit < len(train):
        parts["train"] = train[cut(source.train.labels[train], {"limit": limit}, source.classes, seed, keep=0)[0]]

    preprocessing = _measure(source, parts["train"], size)
    splits = {name: source.train.subset(indices, preprocessing) for name, indices in parts.items()}
    if source.test is not None:
        splits["test"] = source.test.subset(torch.arange(len(source.test)), preprocessing)
    if source.validation is not None:
        most = min(MOST_VALIDATION, len(source.validation)) if validation is None else validation
        indices = cut(source.validation.labels, {"validation": most}, source.classes, seed, keep=0)[0]
        splits["validation"] = source.validation.subset(indices, preprocessing)
    return Dataset(source.name, source.classes, preprocessing, **splits)


def _measure(source: Source, train: Tensor, size: int | None) -> Preprocessing:
    """The preprocessing for images of the size, with mean and deviation of (a sample of) the training images."""
    given = source.train.preprocessing
    size = given.size if size is None else size
    bare = replace(plain(size, given.channels), shorter_side=source.shorter_side(size))
    measured = train[torch.linspace(0, len(train) - 1, min(NUM_MEASURED, len(train))).long()]
    mean, std = mean_and_std(source.train.subset(measured, bare))
    return replace(bare, mean=mean, std=std)


def _open(data: str | Path | TorchDatasets, cache: Path, *, download: bool, notice: Callable[[str], None]) -> Source:
    if not isinstance(data, str | Path):
        return open_torch(data, notice)
    name = str(data).lower().replace("_", "-")
    if isinstance(data, str) and name in NAMES:
        if name == fashion_mnist.NAME:
            return fashion_mnist.open_fashion_mnist(cache, download=download, notice=notice)
        return open_digits() if name == "digits" else open_torchvision(name, cache, download=download, notice=notice)
    path = Path(data).expanduser()
    if find_parquet(path):
        return open_parquet(path, cache, notice)
    if path.is_dir():
        return open_folder(path, notice)
    if path.exists():
        raise InputError(f"{path} is a file, not of Parquet: name the folder that holds one folder of images a class")
    if isinstance(data, Path) or os.sep in data:
        raise InputError(f"no such folder: {path}")
    close = difflib.get_close_matches(name, NAMES, n=1)
    raise InputError(
        f"unknown data set {data!r}: no such folder, and not one of {', '.join(NAMES)}"
        f"{f'; did you mean {close[0]}?' if close else ''}"
    )


def cut(labels: Tensor, counts: Mapping[str, int], classes: Sequence[str], seed: int, *, keep: int = 1) -> list[Tensor]:
    """Cut parts off a set of images, each with the classes in their shares and at least one image of each.

    Args:
        labels: (num_images,) int64.
        counts: number of images of each part, by its name (for messages).
        classes: name of each label, for messages.
        seed: decides, with the labels, which images go where.
        keep: images of each class that must remain.

    Returns:
        Indices of each part in rising order and, last, of the rest.

    Raises:
        InputError: a part is smaller than the number of classes, or there are too few images.
    """
    if seed < 0:
        raise InputError(f"seed={seed} is negative")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    present, of_image, sizes = np.unique(labels.numpy()[shuffled], return_inverse=True, return_counts=True)
    members = np.split(shuffled[np.argsort(of_image, kind="stable")], np.cumsum(sizes)[:-1])
    needed = len(counts) + keep
    if sizes.min() < needed:
        scarce = classes[present[sizes.argmin()]]
        names = ", ".join([*counts, "train"][:needed])
        raise InputError(f"class {scarce!r} has {sizes.min()} images, but {names} need one each: add images")
    parts = []
    for position, (name, count) in enumerate(counts.items()):
        remaining = np.array([len(indices) for indices in members])
        room = remaining - (needed - position - 1)
        if not len(present) <= count <= room.sum():
            raise InputError(f"{name}={count} is not between {len(present)}, one image a class, and {room.sum()}")
        shares = _apportion(count, remaining, room)
        parts.append(np.concatenate([indices[:share] for indices, share in zip(members, shares, strict=True)]))
        members = [indices[share:] for indices, share in zip(members, shares, strict=True)]
    return [torch.from_numpy(np.sort(part)) for part in [*parts, np.concatenate(members)]]


def _apportion(count: int, sizes: NDArray[np.int64], room: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide `count` in proportion to `sizes`, at least 1 and at most `room` each, by largest remainders."""
    ideal = count * sizes / sizes.sum()
    shares: NDArray[np.int64] = np.clip(ideal.astype(np.int64), 1, room)
    while missing := count - shares.sum():
        step = 1 if missing > 0 else -1
        allowed = shares < room if step > 0 else shares > 1
        shares[np.where(allowed, step * (ideal - shares), -np.inf).argmax()] += step
    return shares


def mean_and_std(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of all pixels by channel, in units where white is 1, to four digits. The deviation is 1/255 or more."""
    num_channels = split.preprocessing.channels
    histogram = torch.zeros(num_channels, 256, dtype=torch.float64)
    for indices in torch.arange(len(split)).split(100):
        for channel, pixels in enumerate(split.load(indices).unbind(1)):
            histogram[channel] += torch.bincount(pixels.flatten(), minlength=256)
    values = torch.arange(256) / 255
    share = histogram / histogram.sum(1, keepdim=True)
    mean = (share * values).sum(1, keepdim=True)
    std = (share * (values - mean) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(round(value, 4) for value in mean.flatten().tolist()), tuple(round(v, 4) for v in std.tolist())
