"""What an exporter is: it writes a network, given as layers and tensors, into a file of one format."""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from hwnas.errors import InputError
from hwnas.layers import Layer

# The class of each format, imported when asked for: some need a package of their own.
_EXPORTERS = {"onnx": "hwnas.export.onnx:OnnxExporter"}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A network in a file.

    Attributes:
        path: the file.
        format: `onnx`, `tflite`, ...: what a device's `accepts` says.
        precision: `fp32`, `int8`, ...
        sha256: of the file's bytes, hexadecimal.
    """

    path: Path
    format: str
    precision: str
    sha256: str

    @classmethod
    def of(cls, path: Path, format: str, precision: str) -> Artifact:
        """The record of a file that is there.

        Raises:
            OSError: the file cannot be read.
        """
        with path.open("rb") as file:
            return cls(path, format, precision, hashlib.file_digest(file, "sha256").hexdigest())


class Exporter(ABC):
    """Writes networks in one format.

    Profiling calls `write` once a child, with random tensors; export calls it once with trained ones.

    Attributes:
        format: the format's name, as the user and `Device.accepts` write it.
        suffix: of its files, `.onnx`.
        precision: that of the weights and the arithmetic in the files it writes.
    """

    format: ClassVar[str]
    suffix: ClassVar[str]
    precision: str = "fp32"

    @abstractmethod
    def write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """Write a network's file.

        The file at `path` is complete at any time: a reader sees the old one or the new one (see `replacing`).

        Args:
            layers: what `hwnas.layers.lower` gives.
            tensors: by the names that `Layer.tensors` gives, and `{layer}.norm.running_mean` and `running_var` of
                every layer with batch norm.
            path: the file to write; its folder exists.

        Raises:
            ExportError: a tensor is missing or has the wrong shape, or the format cannot express the network.
            OSError: the file cannot be written.
        """


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place when the block ends without an exception.

        with replacing(path) as temporary:
            temporary.write_bytes(data)

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets only the owner read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def formats() -> tuple[str, ...]:
    """The formats that `exporter` knows."""
    return tuple(sorted(_EXPORTERS))


def exporter(format: str) -> Exporter:
    """The exporter of a format.

    Raises:
        InputError: there is none.
    """
    if format not in _EXPORTERS:
        raise InputError(f"format {format!r} is not one of {', '.join(formats())}")
    module, _, name = _EXPORTERS[format].partition(":")
    made: Exporter = getattr(import_module(module), name)()
    return made
