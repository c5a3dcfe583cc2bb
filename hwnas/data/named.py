"""Data sets known by name: scikit-learn's digits, and those that torchvision downloads."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hwnas.data.splits import Source, TensorSplit, plain
from hwnas.errors import InputError

Notice: TypeAlias = Callable[[str], None]
Arrays: TypeAlias = tuple[Any, Any]  # images (n, size, size[, 3]) or (n, 3, size, size), and labels (n,)

NUMERALS = tuple("0123456789")
PARTS = ("train", "test")

NETWORK_TIMEOUT_S = 10.0  # that a server may be silent


@dataclass(frozen=True, slots=True)
class TorchvisionSet:
    """A class of `torchvision.datasets`, and the augmentation that keeps its labels true."""

    class_name: str
    pad: int
    flip: bool
    by_split: bool = False  # takes split="test" and has `labels`, rather than train=False and `targets`


TORCHVISION = {
    "cifar10": TorchvisionSet("CIFAR10", pad=4, flip=True),
    "cifar100": TorchvisionSet("CIFAR100", pad=4, flip=True),
    "kmnist": TorchvisionSet("KMNIST", pad=2, flip=False),
    "mnist": TorchvisionSet("MNIST", pad=2, flip=False),
    "stl10": TorchvisionSet("STL10", pad=12, flip=True, by_split=True),
    "svhn": TorchvisionSet("SVHN", pad=2, flip=False, by_split=True),
    "usps": TorchvisionSet("USPS", pad=1, flip=False),
}


def open_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey pixels. Nothing is downloaded."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    return source_of("digits", NUMERALS, (images, data.target), pad=1, flip=False)


def open_torchvision(name: str, cache: Path, *, download: bool, notice: Notice) -> Source:
    """A set of `TORCHVISION`, kept in `cache/name` in torchvision's own layout.

    Raises:
        InputError: it is not there and cannot be downloaded, or what is there is damaged.
    """
    kind, folder = TORCHVISION[name], cache / name
    if folder.is_dir():
        try:
            classes, train, test = _read(kind, folder, download=False)
        except InputError as error:
            raise InputError(f"{folder} is damaged ({error}): delete it, and it is downloaded again") from None
    elif download:
        notice(f"downloading {name} through torchvision")
        with download_folder(cache) as scratch:
            (scratch / name).mkdir()
            try:
                classes, train, test = _read(kind, scratch / name, download=True)
            except InputError as error:
                raise InputError(f"cannot download {name} ({error}): put its files into {folder}") from None
            keep(scratch / name, folder)
    else:
        raise InputError(f"there is no {folder}, and downloading is off: put torchvision's files for {name} there")
    return source_of(name, classes, train, test, pad=kind.pad, flip=kind.flip)


def _read(kind: TorchvisionSet, root: Path, *, download: bool) -> tuple[tuple[str, ...], Arrays, Arrays]:
    """Classes, training part and test part in torchvision's layout. Raises `InputError` with its reason."""
    try:
        with quiet_network():
            from torchvision import datasets

            make = getattr(datasets, kind.class_name)
            arguments = [{"split": part} if kind.by_split else {"train": part == "train"} for part in PARTS]
            train, test = (make(root, download=download, **argument) for argument in arguments)
    except Exception as error:  # of urllib, of archive readers, or torchvision's own RuntimeError
        raise InputError(one_line(error)) from None
    classes = getattr(train, "classes", NUMERALS)  # only sets of digits come without
    labels = "labels" if kind.by_split else "targets"
    return tuple(classes), (train.data, getattr(train, labels)), (test.data, getattr(test, labels))


def source_of(
    name: str, classes: Sequence[str], train: Arrays, test: Arrays | None = None, *, pad: int, flip: bool
) -> Source:
    """Arrays of bytes and labels as a source. The images are square."""
    parts = [_tensors(*part) for part in (train, test) if part is not None]
    preprocessing = plain(parts[0][0].shape[2], parts[0][0].shape[1])
    splits = [TensorSplit(images, labels, preprocessing, pad=pad, flip=flip) for images, labels in parts]
    return Source(name=name, classes=tuple(classes), train=splits[0], test=splits[1] if test is not None else None)


def _tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    pixels = torch.as_tensor(images)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.as_tensor(labels, dtype=torch.int64)


@contextmanager
def download_folder(cache: Path) -> Iterator[Path]:
    """A folder inside the cache that is gone afterwards, so that nothing half-written is ever found there.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(dir=cache, prefix=".download-")
    except OSError as error:
        raise InputError(f"{cache}: cannot be written ({error.strerror}): choose another cache folder") from None
    with scratch as folder:
        yield Path(folder)


def keep(downloaded: Path, target: Path) -> None:
    """Move a complete download to its place in the cache, unless another process was there first."""
    try:
        downloaded.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def quiet_network(timeout_s: float = NETWORK_TIMEOUT_S) -> Iterator[None]:
    """Bounds the silence of servers for code that sets no limit of its own, and hides its progress bars."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def one_line(error: Exception) -> str:
    """The message of another library's error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
