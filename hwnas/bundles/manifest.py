"""What `manifest.json` of a bundle says: the schema, described for users in docs/export.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import ConfigDict, with_config

from hwnas.bundles.parity import Parity
from hwnas.config import check
from hwnas.errors import ExportError, InputError

SCHEMA = 3
MANIFEST = "manifest.json"
CHECK = "check.npz"
MOST_CHARACTERS, MOST_FOLDERS = 200, 8  # of a file's name; a Core ML package needs 60 and 5

_strict = with_config(ConfigDict(extra="forbid"))


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the bundle.

    Attributes:
        name: its path in the bundle, plain names with `/` between them, on every system.
        size_bytes: its size.
        sha256: of its bytes, hexadecimal.
    """

    name: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        plain = self.name.isprintable() and not {*self.name} & {*"\\:"} and not {*parts} & {"", ".", ".."}
        if not plain or len(self.name) > MOST_CHARACTERS or len(parts) > MOST_FOLDERS or self.name == MANIFEST:
            raise ValueError(f"name={self.name[:MOST_CHARACTERS]!r} is not the name of a file in a bundle")
        if self.size_bytes < 0 or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"size_bytes={self.size_bytes} or sha256={self.sha256!r} cannot be")


def folders(names: Iterable[str]) -> set[str]:
    """The folders that files of these names are in."""
    return {str(folder) for name in names for folder in PurePosixPath(name).parents} - {"."}


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """The network's file.

    Attributes:
        name: of the file, or the folder, to load.
        parts: all files that belong to it, `name` among them, or those in that folder.
        format: as `hwnas export --format` takes it.
        precision: of weights and arithmetic.
        float32_layers: in an int8 file, the layers that stay in float32.
        size_bytes: of all parts.
    """

    name: str
    parts: tuple[str, ...]
    format: str
    precision: str
    float32_layers: tuple[str, ...]
    size_bytes: int


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The network's input.

    Attributes:
        name: in formats that have names.
        shape: in the order of `layout`; the number of images is None where the file takes any.
        layout: of the axes.
        dtype: of the elements.
        values: whether the file takes what the preprocessing gives in the end, or the pixels before `mean` and `std`.
    """

    name: str
    shape: tuple[int | None, int, int, int]
    layout: Literal["NCHW", "NHWC"]
    dtype: Literal["float32", "uint8"]
    values: Literal["normalised", "pixels"]


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The network's output: logits of the classes, (num_images, num_classes) float32; None images for any number."""

    name: str
    shape: tuple[int | None, int]
    dtype: Literal["float32"] = "float32"


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePreprocessing:
    """From an image to the network's input; see `hwnas.bundles.classify.preprocess`.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        shorter_side: what the shorter side is resized to before the centre is cut out, pixels; None to resize the
            whole image to the square.
        size: side of the square, pixels.
        resolution: what the square is resized to, pixels.
        resize: the filter of every resize, antialiased when it shrinks.
        mean, std: by channel, in units where white is 1: (pixel / 255 - mean) / std.
    """

    channels: Literal[1, 3]
    size: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter_side: int | None = None
    resize: Literal["bicubic"] = "bicubic"


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of images whose highest logit is their label, 0 to 1.

    Attributes:
        split: of the data set.
        value: the share.
        num_images: how many.
        computed_by: `torch`, the network that the file was checked against; or the runtime, the file itself.
    """

    split: str
    value: float
    num_images: int
    computed_by: str


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Of the file on a device, milliseconds.

    Attributes:
        device, runtime, versions, precision: where and how it ran, or would; versions are known of what was reached.
        timing: the protocol, see `hwnas.Timing`.
        measured_ms: the median; None where the device could not be reached.
        relative_iqr: inter-quartile range over median.
        rejection: why the measurement should not be trusted; None where nothing speaks against it.
        predicted_ms, std_ms: by the device's predictor; None without one.
    """

    device: str
    runtime: str
    versions: dict[str, str]
    precision: str
    timing: dict[str, Any]
    measured_ms: float | None
    relative_iqr: float | None
    rejection: str | None
    predicted_ms: float | None
    std_ms: float | None


@_strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that a bundle says about itself.

    Attributes:
        schema: of this file; another number means other keys.
        created: date and time, UTC, ISO 8601.
        file, input, output, preprocessing: what a program needs to run it.
        classes: names of the logits.
        architecture, architecture_text, space: the network, for machines and for people, and where it is from.
        macs, params: multiply-adds and parameters.
        accuracy: on the test images.
        latency: on a device; None if it was not measured.
        limits: that it was searched under.
        parity: how far the file's logits are from the network's.
        training: the data, and the digest of the supernet's weights.
        versions: of what made the bundle.
        licences: of its parts, where known.
        files: of the bundle, but for this one.
    """

    schema: int
    created: str
    file: ModelFile
    input: Input
    output: Output
    preprocessing: ImagePreprocessing
    classes: tuple[str, ...]
    architecture: dict[str, Any]
    architecture_text: str
    space: str
    macs: int
    params: int
    accuracy: Accuracy
    latency: Latency | None
    limits: tuple[dict[str, Any], ...]
    parity: Parity
    training: dict[str, Any]
    versions: dict[str, str]
    licences: dict[str, str]
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        names = [file.name for file in self.files]
        missing = sorted({*self.file.parts, CHECK} - {*names})
        if missing or len({*names}) != len(names):
            raise ValueError(f"files={names} lacks {missing}, or names one twice")
        inside = {name for name in self.file.parts if name.startswith(f"{self.file.name}/")}
        if self.file.name not in self.file.parts and not inside:
            raise ValueError(f"file.parts={self.file.parts} lacks file.name={self.file.name!r}")
        if astray := sorted({name for name in names if "/" in name} - inside):
            raise ValueError(f"files has {astray} in folders that are not the network")
        if twice := folders(names) & {*names, MANIFEST}:
            raise ValueError(f"files has {sorted(twice)} as files and as folders")
        if len(self.classes) != self.output.shape[1]:
            raise ValueError(f"there are {len(self.classes)} classes, but {self.output.shape[1]} logits")
        side, channels = self.preprocessing.resolution, self.preprocessing.channels
        shape = {"N": self.output.shape[0], "C": channels, "H": side, "W": side}
        if self.input.shape != tuple(shape[axis] for axis in self.input.layout):
            raise ValueError(f"input.shape={self.input.shape} does not fit the preprocessing")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def read_manifest(content: bytes, source: str) -> Manifest:
    """The manifest in the bytes of its file.

    Args:
        content: of `manifest.json`.
        source: the bundle's name, for messages.

    Raises:
        ExportError: they are none, or one of another schema.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{source}: {MANIFEST} is not JSON ({error}): export it again") from None
    found = value.get("schema") if isinstance(value, Mapping) else None
    if found != SCHEMA:
        raise ExportError(
            f"{source}: {MANIFEST} has schema {found!r}, this hwnas reads {SCHEMA}: export it again, or use the "
            "version of hwnas that made it"
        )
    try:
        return check(Manifest, value, source=f"{source}: {MANIFEST}")
    except InputError as error:
        raise ExportError(str(error)) from None
