"""What an exporter is: it writes a network, given as layers and tensors, into a file of one format."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import ExportError, InputError
from hwnas.files import replacing
from hwnas.layers import BN_EPS, IMAGE, Layer, lower
from hwnas.space import Architecture, SearchSpace

# The class of each format, imported when asked for: some need a package of their own.
_EXPORTERS = {
    "coreml": "hwnas.exporters.coreml:CoremlExporter",
    "executorch": "hwnas.exporters.executorch:ExecutorchExporter",
    "ncnn": "hwnas.exporters.ncnn:NcnnExporter",
    "onnx": "hwnas.exporters.onnx:OnnxExporter",
    "openvino": "hwnas.exporters.openvino:OpenvinoExporter",
    "tensorrt": "hwnas.exporters.tensorrt:TensorrtExporter",
    "tflite": "hwnas.exporters.tflite:TfliteExporter",
    "torch": "hwnas.exporters.torch:TorchExporter",
}
T = TypeVar("T")
Run: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
NORMALISED = "normalised"  # the layer that a file of pixels starts with
LOGITS = "logits"  # the output's name in formats that have names; the input's is `IMAGE`
_POOL_SIZE = 65_537
_CENTRE = 5  # side of the largest kernel that `rings` leaves whole
_ANY_BATCH = 16  # images in a call of a file that takes any number
_RANGES = {  # of values within four standard deviations of 1, after an activation
    None: (-4.0, 4.0),
    "relu": (0.0, 4.0),
    "swish": (-0.279, 3.93),
    "h-swish": (-0.375, 4.0),
    "sigmoid": (0.0, 1.0),
    "h-sigmoid": (0.0, 1.0),
}


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


@dataclass(frozen=True, slots=True)
class _Bytes:
    """What a network takes in files of one format and precision: bytes of each of these.

    Attributes:
        weight: an element of a weight tensor.
        conv, linear: an output channel of such a layer, beside its bias of four bytes: the scales of int8.
        layer: a layer, for its names, shapes and options.
        activation: an operator of an activation; swish has two, the others one.
        zero_bias: whether layers without a bias get one of zeros.
        in_rings: see `Exporter`.
    """

    weight: int
    conv: int
    linear: int
    layer: int
    activation: int
    zero_bias: bool = False
    in_rings: bool = False


# The last two are fitted to files of 20 children of bignas, ofa-mbv3, attentivenas and tiny, which the sums meet within
# 0.5% (2% where the file is smaller than 1 MB).
_BYTES = {
    ("executorch", "fp32"): _Bytes(4, 0, 0, 224, 117, in_rings=True),
    ("executorch", "int8"): _Bytes(1, 8, 8, 334, 155, zero_bias=True, in_rings=True),
    ("ncnn", "fp32"): _Bytes(4, 0, 0, 119, 73),
    ("ncnn", "fp16"): _Bytes(2, 0, 0, 119, 73),
    ("ncnn", "int8"): _Bytes(1, 4, 4, 130, 66),
    ("onnx", "fp32"): _Bytes(4, 0, 0, 265, 69),
    ("onnx", "fp16"): _Bytes(2, -2, -2, 272, 63),  # biases of two bytes
    ("onnx", "int8"): _Bytes(1, 13, 13, 646, 1200),
    ("onnx", "int8-symmetric"): _Bytes(1, 5, 5, 985, 1),
    ("tflite", "fp32"): _Bytes(4, 0, 0, 338, 151, zero_bias=True, in_rings=True),
    ("tflite", "fp16"): _Bytes(2, -2, -2, 619, 13, zero_bias=True, in_rings=True),  # biases of two bytes
    ("tflite", "int8"): _Bytes(1, 24, 0, 655, 0, zero_bias=True, in_rings=True),
}


def file_bytes(layers: Iterable[Layer], format: str = "onnx", precision: str = "fp32") -> int:
    """The size of a network's file, or of its two files, worked out from its layers; nearly exact.

    Weights and biases (batch norm is folded into them) are exact, names and options a mean for each layer.

    Raises:
        InputError: the size of such files is not known.
    """
    takes = _BYTES.get((format, precision))
    if takes is None:
        known = ", ".join(f"{format} {precision}" for format, precision in _BYTES)
        raise InputError(f"the size of {format} files in {precision} is not known beforehand, only that of {known}")
    size = 0
    for layer in layers:
        of = takes
        if takes.in_rings and layer.depthwise and layer.kernel > _CENTRE:
            of = _BYTES[format, "fp32"] if precision == "int8" else takes
            # Every other piece is a layer, and so is its sum.
            size += (layer.kernel - _CENTRE) * (2 * of.layer + of.weight * layer.out_channels * of.zero_bias)
        size += of.layer + of.weight * layer.num_weights
        if layer.weight_shape:
            has_bias = layer.bias or layer.norm or of.zero_bias
            size += layer.out_channels * (4 * has_bias + (of.linear if layer.kind == "linear" else of.conv))
        if layer.activation is not None:
            size += of.activation * (2 if layer.activation == "swish" else 1)
    return size


@dataclass(frozen=True, slots=True)
class Pixels:
    """Pixels as a file's input, 0 to 255, which it normalises itself: (pixel / 255 - mean) / std.

    Attributes:
        mean, std: by channel, in units where white is 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The pixels, whole numbers, that became normalised images (num_images, channels, height, width)."""
        mean, std = (np.array(values, dtype=np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return np.rint((images * std + mean) * 255).clip(0, 255)  # type: ignore[no-any-return]

    def normalise(
        self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]]
    ) -> tuple[list[Layer], dict[str, NDArray[Any]]]:
        """A network with the normalisation ahead of it, as a depthwise convolution of one pixel; and its tensors.

        It is no part of the stem's convolution, whose padding is zero *after* normalisation.

        Raises:
            ExportError: the network has another number of channels.
        """
        first = layers[0]
        if len(self.mean) != first.in_channels:
            raise ExportError(f"the network takes {first.in_channels} channels, mean and std have {len(self.mean)}")
        channels = first.in_channels
        ahead = Layer(
            name=NORMALISED, kind="conv", inputs=(IMAGE,), in_channels=channels, out_channels=channels,
            in_size=first.in_size, groups=channels, bias=True,
        )  # fmt: skip
        mean, std = np.array(self.mean), np.array(self.std)
        more: dict[str, NDArray[Any]] = {
            f"{NORMALISED}.conv.weight": (1 / (255 * std)).astype(np.float32).reshape(ahead.weight_shape),
            f"{NORMALISED}.conv.bias": (-mean / std).astype(np.float32),
            f"{IMAGE}.range": np.array([0, 255], dtype=np.float32),
        }
        if f"{IMAGE}.range" in tensors:
            more[f"{NORMALISED}.range"] = tensors[f"{IMAGE}.range"]
        names = {IMAGE: NORMALISED}
        rest = [replace(layer, inputs=tuple(names.get(name, name) for name in layer.inputs)) for layer in layers]
        return [ahead, *rest], {**tensors, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What one file is like, among those of its format.

    Attributes:
        precision: one of the format's.
        keep: names of layers that stay in float32 in an int8 file.
        batch: images that one call takes; None for any number.
        pixels: how the file normalises the pixels that it takes; None where it takes normalised images.
    """

    precision: str = "fp32"
    keep: frozenset[str] = frozenset()
    batch: int | None = 1
    pixels: Pixels | None = None


class Input(NamedTuple):
    """The axes of a file's input in their order, and the type of its elements."""

    layout: Literal["NCHW", "NHWC"]
    dtype: Literal["float32", "uint8"]


class Exporter(ABC):
    """Writes networks in one format.

    Profiling calls `write` once a child, with random tensors. Export calls it with trained ones, and then `infer`, to
    compare what the file computes with what the network does. The source of `load` goes into every bundle, where it
    runs the file without hwnas.

    Args:
        form: of the files.

    Attributes:
        format: the format's name, as the user writes it.
        file_format: as `Device.accepts` writes it; another one where a bundle of the format holds files of that.
        suffix: of its files, `.onnx`.
        input: of the files: NCHW, (batch, in_channels, resolution, resolution), or NHWC; float32.
        pixel_input: the same where they take pixels; None where they cannot.
        precisions: that it can write: `fp32`, `fp16`, `int8` (weights per output channel, activations per tensor).
        batches: how many images one call of a file can take: `one`; a `fixed` number, chosen here; or `any` number.
        mixes: whether its int8 files can keep layers in float32.
        in_rings: whether its large depthwise kernels are written in pieces (`rings`), which int8 cannot add up finely
            enough: they stay in float32.
        runtime: what runs the files, for messages.
        packages: of PyPI, that `load` needs beside numpy.
        extra: of hwnas, that brings them; empty where they come with it.

    Raises:
        InputError: the format has no such files.
    """

    format: ClassVar[str]
    file_format: ClassVar[str] = ""
    suffix: ClassVar[str]
    input: ClassVar[Input] = Input("NCHW", "float32")
    pixel_input: ClassVar[Input | None] = None
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    batches: ClassVar[Literal["one", "fixed", "any"]] = "one"
    mixes: ClassVar[bool] = False
    in_rings: ClassVar[bool] = False
    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str] = ""

    def __init__(self, form: Form = Form()) -> None:
        name, precision, batch = self.format, form.precision, form.batch
        if precision not in self.precisions:
            raise InputError(f"format {name} has no precision {precision!r}, only {', '.join(self.precisions)}")
        if form.keep and not self.mixes:
            raise InputError(f"format {name} cannot keep some layers in float32")
        if form.keep and not precision.startswith("int8"):
            raise InputError(f"layers stay in float32 in int8 files, not in {precision}: leave out keep")
        if batch is not None and batch < 1:
            raise InputError(f"batch={batch} is not a number of images: give 1 or more")
        if (batch is None and self.batches != "any") or (batch != 1 and self.batches == "one"):
            able = "one image" if self.batches == "one" else "a fixed number of images"
            raise InputError(f"files of format {name} take {able} at a time, not {batch or 'any number'}")
        if form.pixels is not None and self.pixel_input is None:
            raise InputError(f"files of format {name} cannot take pixels, only normalised images")
        self.form, self.precision = form, precision

    @property
    def takes(self) -> Input:
        """The input of this exporter's files."""
        return self.input if self.form.pixels is None else self.pixel_input or self.input

    def but(self, **changes: Any) -> Exporter:
        """An exporter of the same format, for files of a form with other fields.

        Raises:
            InputError: the format has no such files.
        """
        return type(self)(replace(self.form, **changes))

    def kept(self, layers: Iterable[Layer]) -> frozenset[str]:
        """The layers of a network that compute in float32 in this exporter's int8 files, those to keep among them."""
        large = {layer.name for layer in layers if layer.depthwise and layer.kernel > _CENTRE}
        return self.form.keep | large if self.in_rings and self.precision == "int8" else self.form.keep

    @property
    def file_precision(self) -> str:
        """As `Device.file_precision` writes it; another one where a format has its own name for it."""
        return self.precision

    def misfit(self, accepts: str, precision: str) -> str | None:
        """Why a device that takes files of a format and a precision does not take these; None where it does."""
        if (self.file_format or self.format) != accepts:
            return f"runs {accepts} files, not {self.format}: use --format {accepts}"
        if self.file_precision != precision:
            return f"takes {precision} files, not {self.precision}: use --precision {precision}, or another device"
        if self.form.batch != 1 or self.form.pixels is not None:
            return "is timed with files of one normalised image: leave --batch and --pixels out"
        return None

    def write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """Write a network's file.

        The file at `path` is complete at any time, the old one or the new one (`hwnas.files.replacing`). A format of
        several files writes the others beside it with the same stem (`hwnas.files.parts`).

        Args:
            layers: what `hwnas.layers.lower` gives.
            tensors: by the names that `Layer.tensors` gives, and `{layer}.norm.running_mean` and `running_var` of
                every layer with batch norm. For int8, and for fp16 if known, `{layer}.range`, (2,), the extremes of
                what each layer puts out, `{layer}.preactivation.range` of those with an activation, before it, and
                `image.range`.
            path: the file to write; its folder exists.

        Raises:
            ExportError: a tensor is missing or has the wrong shape, or the format cannot express the network.
            OSError: the file cannot be written.
        """
        if self.precision == "fp16":  # what the layers put out has to fit, too
            for name in [name for name in tensors if name.endswith(".range")]:
                half(f"the output of {name.removesuffix('.range')}", tensors[name])
        if self.form.pixels is not None:
            layers, tensors = self.form.pixels.normalise(layers, tensors)
        return self._write(layers, tensors, path)

    @abstractmethod
    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """`write` a network that starts with the normalisation where the file takes pixels.

        The input is `takes`, for `form.batch` images; bytes have to become floating-point numbers, and the layers
        compute in NCHW or NHWC as the format likes it.
        """

    @staticmethod
    @abstractmethod
    def load(path: Path) -> Run:
        """Load a file into the format's own runtime, on one thread of this machine.

        Its source is copied into bundles: it imports what it needs beside numpy (`np`), and uses nothing of hwnas. It
        may raise anything.

        Returns:
            A function from images, as many as the file takes and as its input is, to logits (batch, num_classes).
        """

    def runner(self, path: Path) -> Run:
        """`load`, for several images and with errors for people.

        Args:
            path: what `write` wrote.

        Returns:
            A function from images (num_images, in_channels, resolution, resolution), preprocessed, to logits
            (num_images, num_classes). It raises `ExportError` where the runtime fails.

        Raises:
            ExportError: the runtime is missing, or refuses the file.
        """
        run = self._explained(path, lambda: self._open(path))

        def infer(images: NDArray[np.float32]) -> NDArray[np.float32]:
            inputs = images if self.form.pixels is None else self.form.pixels.of(images)
            if self.takes.layout == "NHWC":
                inputs = inputs.transpose(0, 2, 3, 1)
            batch = self.form.batch or _ANY_BATCH
            chunks = [inputs[start : start + batch] for start in range(0, len(inputs), batch)]
            if self.form.batch is not None:  # the last one is filled up with copies of its last image
                missing = -len(inputs) % batch
                chunks[-1] = np.concatenate([chunks[-1], np.repeat(chunks[-1][-1:], missing, 0)])
            chunks = [np.ascontiguousarray(chunk, dtype=self.takes.dtype) for chunk in chunks]
            return self._explained(path, lambda: np.concatenate([run(chunk) for chunk in chunks])[: len(images)])

        return infer

    def _open(self, path: Path) -> Run:
        """`load`, or what does the same where the runtime cannot be; it may look through the file first."""
        return self.load(path)

    def infer(self, path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a file in the format's own runtime on this machine.

        Args:
            path: what `write` wrote.
            images: (num_images, in_channels, resolution, resolution), preprocessed.

        Returns:
            Logits, (num_images, num_classes).

        Raises:
            ExportError: the runtime is missing, refuses the file, or fails.
        """
        return self.runner(path)(images)

    def _explained(self, path: Path, call: Callable[[], T]) -> T:
        """What a call of the runtime gives; `ExportError` where that raises anything."""
        try:
            return call()
        except ImportError as error:
            raise ExportError(f"{self.runtime} is not installed: {self.install} ({error})") from None
        except Exception as error:  # the runtimes' own exceptions have no common base
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ExportError(f"{self.runtime} cannot run {path}: {reason}") from None

    @property
    def install(self) -> str:
        """The command that brings the packages."""
        return f"pip install 'hwnas[{self.extra}]'" if self.extra else f"pip install {' '.join(self.packages)}"


def formats() -> tuple[str, ...]:
    """The formats that `exporter` knows."""
    return tuple(sorted(_EXPORTERS))


def exporter(
    format: str,
    precision: str = "fp32",
    keep: Collection[str] = (),
    *,
    batch: int | None = 1,
    pixels: Pixels | None = None,
) -> Exporter:
    """The exporter of a format, for files of a `Form`.

    Raises:
        InputError: there is none.
    """
    if format not in _EXPORTERS:
        raise InputError(f"format {format!r} is not one of {', '.join(formats())}")
    module, _, name = _EXPORTERS[format].partition(":")
    form = Form(precision=precision, keep=frozenset(keep), batch=batch, pixels=pixels)
    made: Exporter = getattr(import_module(module), name)(form)
    return made


def write_random(
    writer: Exporter, space: SearchSpace, arch: Architecture, stem: Path, rng: np.random.Generator
) -> Path:
    """Write a child's file with random weights, for timing; its path, which is `stem` with the format's suffix.

    Raises:
        ExportError: the format cannot express the network.
        OSError: the file cannot be written.
    """
    layers = lower(space, arch)
    return writer.write(layers, random_tensors(layers, rng), stem.with_name(stem.name + writer.suffix)).path


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file piece by piece, whole or not at all; the SHA-256 of its bytes, hexadecimal.

    Raises:
        OSError: it cannot be written.
    """
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def tensor(tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """One of the tensors that `Exporter.write` gets.

    Raises:
        ExportError: it is missing, or has another shape.
    """
    value = tensors.get(name)
    if value is None:
        hint = ": calibrate its batch norm first" if ".norm.running_" in name else ""
        raise ExportError(f"the network has no tensor {name!r}{hint}")
    if value.shape != shape:
        raise ExportError(f"tensor {name!r} has shape {value.shape}, the architecture needs {shape}")
    return value


def folded(layer: Layer, tensors: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Weight and bias of a convolution with batch norm folded in, in double precision; None where it has no bias.

    Raises:
        ExportError: a tensor is missing, or has another shape.
    """
    conv, channels = f"{layer.name}.conv", (layer.out_channels,)
    weight = tensor(tensors, f"{conv}.weight", layer.weight_shape)
    bias = tensor(tensors, f"{conv}.bias", channels) if layer.bias else None
    if not layer.norm:
        return weight, bias
    gamma, beta, mean, var = (
        tensor(tensors, f"{layer.name}.norm.{part}", channels).astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(var + BN_EPS)
    shift = beta + ((0 if bias is None else bias) - mean) * scale
    # In double precision block by block: a large float64 copy would take longer than all the rest.
    scaled = np.empty(weight.shape, dtype=np.float32)
    np.multiply(weight, scale.reshape(-1, 1, 1, 1), out=scaled, dtype=np.float64, casting="same_kind")
    return scaled, shift


def half(what: str, values: NDArray[Any]) -> NDArray[np.float16]:
    """Values in half precision; those too small for it become zero, as rounding does.

    Args:
        what: they are, for the message.
        values: of any shape.

    Raises:
        ExportError: one is beyond its range, or no number.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype("<f2")
    if not np.isfinite(rounded).all():
        most, limit = np.abs(values).max(), np.finfo(np.float16).max
        raise ExportError(f"{what} reaches {most:.6g}, and fp16 ends at {limit:g}: export fp32")
    return rounded


def rings(kernel: int) -> Iterator[tuple[slice, slice]]:
    """A large square kernel in pieces that XNNPACK has fast depthwise kernels for, of up to 25 weights.

    The centre of 5x5; then of each ring around it the top and bottom row, and what lies between them of the left and
    right column. Two rows, or columns, are one kernel with a gap: the slice's step is its dilation. The sum of all is
    the whole convolution: 49 weights of 7x7 are 25 + 14 + 10.

    Yields:
        Rows and columns of the kernel, both around its centre.
    """
    edge = max(0, kernel - _CENTRE) // 2
    yield slice(edge, kernel - edge), slice(edge, kernel - edge)
    for start in reversed(range(edge)):
        stop = kernel - start
        two = slice(start, stop, stop - start - 1)
        yield two, slice(start, stop)
        yield slice(start + 1, stop - 1), two


def random_tensors(layers: Sequence[Layer], rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Tensors for timing: He-normal weights (arXiv 1502.01852, fan-in), biases zero, batch norm nearly the identity.

    Branches that are added to a shortcut end in a gamma of 0.25, so that activations keep their size through the
    network, and no value overflows or becomes denormal. The weights repeat the same 65,537 random numbers, a prime
    count, from another start in each layer: drawing them all takes longer than writing a file.

    The ranges of activations, for int8, are those of four standard deviations: what a kernel of integers takes does
    not depend on them.
    """
    pool = rng.standard_normal(_POOL_SIZE, dtype=np.float32)
    tensors = {f"{IMAGE}.range": np.array([-4, 4], dtype=np.float32)}
    for layer in layers:
        for name, shape in layer.tensors.items():
            if len(shape) > 1:
                std = math.sqrt((2 if layer.activation else 1) / math.prod(shape[1:]))
                numbers = np.roll(pool, int(rng.integers(_POOL_SIZE))) * np.float32(std)
                tensors[name] = np.empty(shape, dtype=np.float32)
                repeats, rest = divmod(tensors[name].size, _POOL_SIZE)
                flat = tensors[name].reshape(-1)
                flat[: repeats * _POOL_SIZE].reshape(repeats, _POOL_SIZE)[:] = numbers
                flat[repeats * _POOL_SIZE :] = numbers[:rest]
            else:
                gamma = 0.25 if layer.residual else 1.0
                tensors[name] = np.full(shape, gamma if name.endswith(".norm.weight") else 0.0, dtype=np.float32)
        low, high = _RANGES[layer.activation]
        tensors[f"{layer.name}.range"] = np.array([low, high], dtype=np.float32)
        if layer.activation:
            tensors[f"{layer.name}.preactivation.range"] = np.array([-4, 4], dtype=np.float32)
        if layer.norm:
            tensors[f"{layer.name}.norm.running_mean"] = np.zeros(layer.out_channels, dtype=np.float32)
            tensors[f"{layer.name}.norm.running_var"] = np.ones(layer.out_channels, dtype=np.float32)
    return tensors
