"""TFLite, written straight from the list of layers: no torch, no TensorFlow, milliseconds a network.

Only running a file needs a package, ai-edge-litert; writing one needs none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.exporters.base import (
    LOGITS,
    NORMALISED,
    Artifact,
    Exporter,
    Form,
    Input,
    Run,
    folded,
    half,
    rings,
    tensor,
    write_pieces,
)
from hwnas.exporters.integers import LOGISTIC, PIXELS, Grid, Integers
from hwnas.layers import IMAGE, Layer

# Numbers of the schema, https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs:
# an operator's code, its oldest versions in float and in int8 files, the type of its table of options (0: it has none)
# and that table's fields: b is an int8, i an int32.
_OPERATORS = {
    "ADD": (0, 1, 2, 11, "b"),  # activation
    "AVERAGE_POOL_2D": (1, 1, 2, 5, "biiii"),  # padding, stride x and y, window x and y
    "CONV_2D": (3, 1, 3, 1, "biib"),  # padding, stride x and y, activation
    "DEPTHWISE_CONV_2D": (4, 2, 3, 2, "biiibii"),  # padding, stride x and y, multiplier, activation, dilation x and y
    "DEQUANTIZE": (6, 3, 2, 0, ""),
    "FULLY_CONNECTED": (9, 1, 4, 8, "b"),  # activation
    "HARD_SWISH": (117, 1, 1, 0, ""),
    "LOGISTIC": (14, 1, 2, 0, ""),
    "MEAN": (40, 1, 2, 27, "b"),  # whether the axes stay, of size 1
    "MUL": (18, 1, 2, 21, "b"),  # activation
    "PAD": (34, 1, 2, 0, ""),
    "QUANTIZE": (114, 1, 1, 0, ""),
}
_TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int8": 9}
_SAME, _VALID = 0, 1
_NONE, _RELU, _RELU6 = 0, 1, 3

_Piece: TypeAlias = bytes | memoryview


class _Flatbuffer:
    """Writes a flatbuffer (https://flatbuffers.dev/internals) from its end to its start, weights without a copy.

    Parts that others refer to come first. A part's position is its distance from the end.
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._size = 0

    def vector(self, values: NDArray[Any], align: int = 4) -> int:
        """A vector of numbers, from a flat array."""
        self._align(values.nbytes, align)
        self._put(values.view(np.uint8).data)
        return self._put(struct.pack("<I", values.size))

    def vector_of(self, parts: Sequence[int]) -> int:
        """A vector of references."""
        self._align(0, 4)
        start = self._size + 4 * len(parts)
        self._put(struct.pack(f"<{len(parts)}I", *(start - 4 * i - part for i, part in enumerate(parts))))
        return self._put(struct.pack("<I", len(parts)))

    def string(self, text: str) -> int:
        """A string."""
        data = text.encode()
        self._align(len(data) + 1, 4)
        return self._put(struct.pack("<I", len(data)) + data + b"\0")

    def table(self, fields: str, *values: int) -> int:
        """A table; `fields` has a letter for each: b an int8, i an int32, o another part, - absent, without a value."""
        layout, order, vtable = _layout(fields)
        self._align(layout.size, 4)
        start = self._size + layout.size
        packed = (start - place - values[index] if is_part else values[index] for index, place, is_part in order)
        self._put(vtable + layout.pack(len(vtable), *packed))
        return start

    def finish(self, root: int, identifier: bytes) -> Iterator[_Piece]:
        """The whole, piece by piece."""
        self._align(len(identifier) + 4, 16)
        self._put(identifier)
        self._put(struct.pack("<I", self._size + 4 - root))
        return reversed(self._pieces)

    def _align(self, ahead: int, align: int) -> None:
        """What follows after `ahead` bytes will start at a multiple of `align`."""
        self._put(bytes(-(self._size + ahead) % align))

    def _put(self, data: _Piece) -> int:
        if data:
            self._pieces.append(data)
            self._size += len(data)
        return self._size


@cache
def _layout(fields: str) -> tuple[struct.Struct, list[tuple[int, int, bool]], bytes]:
    """How a table is packed: its bytes, (index of the value, place, whether it is a reference) in order, its vtable."""
    present = [(slot, kind) for slot, kind in enumerate(fields) if kind != "-"]
    indices = sorted(range(len(present)), key=lambda index: present[index][1] == "b")  # those of four bytes first
    places, order, place = [0] * len(fields), [], 4
    for index in indices:
        slot, kind = present[index]
        places[slot] = place
        order.append((index, place, kind == "o"))
        place += 1 if kind == "b" else 4
    letters = "".join("b" if present[index][1] == "b" else "i" for index in indices)
    layout = struct.Struct(f"<i{letters}{-place % 4}x")
    return layout, order, struct.pack(f"<{2 + len(fields)}H", 4 + 2 * len(fields), layout.size, *places)


_TO_ONE, _TO_SIX = Grid.of(0, 1), Grid.of(0, 6)


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor between two operators: its number, shape, and grid if it is of integers."""

    index: int
    shape: tuple[int, ...]
    grid: Grid | None


def _type(grid: Grid | None) -> str:
    if grid is None:
        return "float32"
    return "int8" if grid.signed else "uint8"


class _Writer:
    """Adds layers to a model.

    int8 follows LiteRT's quantisation specification
    (https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec): activations on a grid a
    tensor, a convolution's weights on a symmetric one an output channel, the classifier's on one (one a channel is
    newer than many phones' runtimes), the biases in 32 bits. What passes between layers of int8 and those that are kept
    is converted once each way.

    fp16 is how converters write it: weights and biases of 16 bits, each made float32 by an operator, which XNNPACK and
    the GPU delegate fold away.

    Float files have no operator that the GPU delegate refuses, as LiteRT's `gpu_compatibility.cc` and
    `model_builder.cc` have it: pixels become numbers by DEQUANTIZE, as neither it nor XNNPACK takes a CAST from uint8.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], form: Form) -> None:
        self._tensors, self._form, self._batch = tensors, form, form.batch or 1
        self._file = _Flatbuffer()
        self._buffers = [self._file.table("")]  # the first one is empty, and that of all values
        self._values: list[int] = []
        self._operators: list[int] = []
        self._codes: dict[str, int] = {}
        self._constants: dict[str, int] = {}
        self._made: dict[str, _Value] = {}  # by the layer's name, and what was converted by its own

    def model(self, layers: Sequence[Layer]) -> Iterator[_Piece]:
        """The file of a network, piece by piece."""
        first, last = layers[0], layers[-1]
        shape = (self._batch, first.in_size, first.in_size, first.in_channels)
        image = self._made[IMAGE] = self._value(IMAGE, shape, PIXELS if self._form.pixels else None)
        int8 = self._form.precision == "int8"
        kept = self._kept(layers)
        for layer in layers:
            dtype = "int8" if int8 and layer.name not in kept else "float32"
            self._made[layer.name] = self._add(layer, [self._converted(name, dtype) for name in layer.inputs])
        logits = self._made[last.name]
        if logits.grid:
            logits = self._operator("DEQUANTIZE", [logits.index], self._value(LOGITS, logits.shape, None))
        file, ints = self._file, self._ints
        graph = file.table(
            "oooo", file.vector_of(self._values), ints(image.index), ints(logits.index), file.vector_of(self._operators)
        )
        codes = [
            file.table("b-ii", min(code, 127), version8 if int8 else version, code)
            for code, version, version8, _, _ in map(_OPERATORS.__getitem__, self._codes)
        ]
        parts = (file.vector_of(codes), file.vector_of([graph]), file.string("hwnas"), file.vector_of(self._buffers))
        return file.finish(file.table("ioooo", 3, *parts), b"TFL3")

    # ------------------------------------------------------------ layers

    def _kept(self, layers: Sequence[Layer]) -> frozenset[str]:
        """The layers that compute in float32; the normalisation does where the layer that reads it does."""
        keep = self._form.keep
        return keep | {NORMALISED for layer in layers if layer.name in keep and NORMALISED in layer.inputs}

    def _converted(self, name: str, dtype: str) -> _Value:
        """What a layer puts out, in int8 or float32."""
        value = self._made[name]
        if dtype == (_type(value.grid)):
            return value
        converted = f"{name}.{dtype}"
        if converted not in self._made:
            output = self._value(converted, value.shape, self._grid(name) if dtype == "int8" else None)
            operator = "QUANTIZE" if dtype == "int8" else "DEQUANTIZE"
            self._made[converted] = self._operator(operator, [value.index], output)
        return self._made[converted]

    def _add(self, layer: Layer, inputs: list[_Value]) -> _Value:
        source = inputs[0]
        shape = (self._batch, layer.out_size, layer.out_size, layer.out_channels)
        match layer.kind:
            case "conv":
                return self._conv(layer, source)
            case "linear":
                classes = (self._batch, layer.out_channels)
                logits = self._output(layer, classes, source) if source.grid else self._value(LOGITS, classes, None)
                weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
                bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,)) if layer.bias else None
                constants = self._weights(layer, weight, bias, source, logits, per_channel=False)
                return self._operator("FULLY_CONNECTED", [source.index, *constants], logits, _NONE)
            case "avg_pool":  # SAME leaves out what is beyond the border; int8 has to stay on its input's grid
                pooled = self._value(layer.name, shape, source.grid)
                return self._operator("AVERAGE_POOL_2D", [source.index], pooled, _SAME, 2, 2, 2, 2)
            case "global_pool":
                axes = self._constant("axes", np.array([1, 2], dtype=np.int32))
                return self._operator("MEAN", [source.index, axes], self._output(layer, shape, source), True)
            case "scale":
                return self._operator(
                    "MUL", [value.index for value in inputs], self._output(layer, shape, source), _NONE
                )
            case "add":
                return self._operator(
                    "ADD", [value.index for value in inputs], self._output(layer, shape, source), _NONE
                )

    def _conv(self, layer: Layer, source: _Value) -> _Value:
        """A convolution and its activation."""
        weight, bias = folded(layer, self._tensors)
        weight = weight.transpose((1, 2, 3, 0) if layer.depthwise else (0, 2, 3, 1))
        fused = layer.activation in (None, "relu")
        shape = (self._batch, layer.out_size, layer.out_size, layer.out_channels)
        output = self._output(layer, shape, source, "" if fused else ".preactivation")
        activation = _RELU if layer.activation == "relu" else _NONE
        whole = slice(0, layer.kernel), slice(0, layer.kernel)
        first, *others = rings(layer.kernel) if layer.depthwise else [whole]
        if not others:
            self._window(layer, source, weight, bias, first, output, activation)
        else:
            summed = self._window(layer, source, weight, bias, first, self._value(f"{layer.name}.0", shape, None))
            for number, piece in enumerate(others, 1):
                part = replace(layer, name=f"{layer.name}.{number}")
                made = self._window(part, source, weight, None, piece, self._value(part.name, shape, None))
                last = number == len(others)
                total = output if last else self._value(f"{part.name}.sum", shape, None)
                summed = self._operator("ADD", [summed.index, made.index], total, activation if last else _NONE)
        return output if fused else self._activation(layer, output)

    def _window(
        self,
        layer: Layer,
        source: _Value,
        weight: NDArray[Any],
        bias: NDArray[Any] | None,
        piece: tuple[slice, slice],
        output: _Value,
        activation: int = _NONE,
    ) -> _Value:
        """The convolution with a piece of the kernel: its rows and columns."""
        amounts, is_same = [], True
        for part in piece:
            before = layer.kernel // 2 - part.start
            total = max(0, (layer.out_size - 1) * layer.stride + part.stop - part.start - layer.in_size)
            amounts.append((before, total - before))
            is_same &= before == total // 2  # not at stride 2 and even sizes
        if not is_same:
            source = self._padded(source, f"{layer.name}.padded", *amounts)
        inputs = [source.index, *self._weights(layer, weight[:, piece[0], piece[1]], bias, source, output)]
        options = [_SAME if is_same else _VALID, layer.stride, layer.stride]
        if layer.depthwise:
            height, width = (part.step or 1 for part in piece)
            return self._operator("DEPTHWISE_CONV_2D", inputs, output, *options, 1, activation, width, height)
        return self._operator("CONV_2D", inputs, output, *options, activation)

    def _padded(self, source: _Value, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> _Value:
        batch, height, width, channels = source.shape
        output = self._value(name, (batch, height + sum(rows), width + sum(columns), channels), source.grid)
        sides = np.array([(0, 0), rows, columns, (0, 0)], dtype=np.int32)
        amounts = self._constant("padding.{}.{}.{}.{}".format(*rows, *columns), sides)
        return self._operator("PAD", [source.index, amounts], output)

    def _activation(self, layer: Layer, source: _Value) -> _Value:
        if layer.activation in ("sigmoid", "h-sigmoid"):
            return self._gate(layer.activation, source, layer.name)
        output = self._output(layer, source.shape, source)
        if layer.activation == "h-swish" and not source.grid:
            return self._operator("HARD_SWISH", [source.index], output)
        # XNNPACK has no HARD_SWISH of int8: every one would cut the network in two, and take twice as long as these.
        gate = self._gate("sigmoid" if layer.activation == "swish" else "h-sigmoid", source, f"{layer.name}.gate")
        return self._operator("MUL", [source.index, gate.index], output, _NONE)

    def _gate(self, kind: str, source: _Value, name: str) -> _Value:
        if kind == "sigmoid":
            gate = self._value(name, source.shape, LOGISTIC if source.grid else None)
            return self._operator("LOGISTIC", [source.index], gate)
        sixfold = self._value(f"{name}.sixfold", source.shape, _TO_SIX if source.grid else None)
        self._operator("ADD", [source.index, self._scalar("three", 3, source)], sixfold, _RELU6)
        gate = self._value(name, source.shape, _TO_ONE if source.grid else None)
        return self._operator("MUL", [sixfold.index, self._scalar("sixth", 1 / 6, source)], gate, _NONE)

    # ------------------------------------------------------------ tensors

    def _grid(self, name: str) -> Grid:
        """Of the values that a range is given for."""
        low, high = map(float, tensor(self._tensors, f"{name}.range", (2,)))
        return Grid.of(low, high)

    def _output(self, layer: Layer, shape: tuple[int, ...], source: _Value, part: str = "") -> _Value:
        """Of integers if the source is."""
        name = f"{layer.name}{part}"
        return self._value(name, shape, self._grid(name) if source.grid else None)

    def _value(self, name: str, shape: tuple[int, ...], grid: Grid | None) -> _Value:
        if grid is None:
            return _Value(self._tensor(name, shape, "float32"), shape, None)
        quantised = self._quantised(np.array([grid.scale]), grid.zero_point)
        return _Value(self._tensor(name, shape, _type(grid), quantised=quantised), shape, grid)

    def _weights(
        self,
        layer: Layer,
        weight: NDArray[Any],
        bias: NDArray[Any] | None,
        source: _Value,
        output: _Value,
        *,
        per_channel: bool = True,
    ) -> tuple[int, int]:
        """The numbers of the weight's and the bias's tensor; XNNPACK wants a bias, zeros if need be."""
        name, channels = layer.name, layer.out_channels
        bias = np.zeros(channels) if bias is None else bias
        if source.grid is None or output.grid is None:
            return self._floats(layer, "weight", weight), self._floats(layer, "bias", bias)
        axis = 3 if layer.depthwise else 0  # of the output channels
        of = Integers.of(weight, bias, axis if per_channel else None, source.grid, output.grid)
        return (
            self._constant(f"{name}.weight", of.weight, self._quantised(of.scale, 0, axis)),
            self._constant(f"{name}.bias", of.bias, self._quantised(of.units, 0)),
        )

    def _floats(self, layer: Layer, part: str, value: NDArray[Any]) -> int:
        """The number of a constant tensor of float32, or of what is made of one of float16."""
        name = f"{layer.name}.{part}"
        if self._form.precision != "fp16":
            return self._constant(name, value.astype(np.float32, copy=False))
        constant = self._constant(f"{name}.float16", half(name, value))
        return self._operator("DEQUANTIZE", [constant], self._value(name, value.shape, None)).index

    def _scalar(self, name: str, value: float, source: _Value) -> int:
        """A constant that is added to, or multiplied with, the source."""
        if not source.grid:
            return self._constant(name, np.array([value], dtype=np.float32))
        grid = self._quantised(np.array([value / 127]), 0)
        return self._constant(f"{name}.int8", np.array([127], dtype=np.int8), grid)

    def _constant(self, name: str, value: NDArray[Any], quantised: int | None = None) -> int:
        if name not in self._constants:
            data = self._file.vector(np.ascontiguousarray(value).reshape(-1).view(np.uint8), align=16)
            self._buffers.append(self._file.table("o", data))
            buffer = len(self._buffers) - 1
            self._constants[name] = self._tensor(name, value.shape, value.dtype.name, buffer, quantised)
        return self._constants[name]

    def _quantised(self, scale: NDArray[Any], zero_point: int, axis: int = 0) -> int:
        """The table of one grid, or of one each along an axis."""
        scales = self._file.vector(scale.astype(np.float32))
        zero_points = self._file.vector(np.full(scale.shape, zero_point, dtype=np.int64), align=8)
        return self._file.table("--oo--i", scales, zero_points, axis)

    def _tensor(
        self, name: str, shape: tuple[int, ...], dtype: str, buffer: int = 0, quantised: int | None = None
    ) -> int:
        parts = [self._ints(*shape), _TYPES[dtype], buffer, self._file.string(name)]
        table = self._file.table("obio", *parts) if quantised is None else self._file.table("obioo", *parts, quantised)
        self._values.append(table)
        return len(self._values) - 1

    def _operator(self, name: str, inputs: Sequence[int], output: _Value, *options: int) -> _Value:
        _, _, _, options_type, fields = _OPERATORS[name]
        parts = [self._codes.setdefault(name, len(self._codes)), self._ints(*inputs), self._ints(output.index)]
        if options_type:
            self._operators.append(self._file.table("ioobo", *parts, options_type, self._file.table(fields, *options)))
        else:
            self._operators.append(self._file.table("ioo", *parts))
        return output

    def _ints(self, *values: int) -> int:
        return self._file.vector(np.array(values, dtype=np.int32))


class TfliteExporter(Exporter):
    """Writes TFLite files.

    Their input is `image`, (batch, resolution, resolution, in_channels), float32 and normalised, or pixels in uint8;
    their output `logits`, float32 (batch, num_classes). The values in between have the layers' names. fp16 files hold
    weights of 16 bits; what they are computed in is the runtime's choice, float32 of XNNPACK unless it is told to. int8
    files compute in integers but for the layers that are kept.
    """

    format: ClassVar[str] = "tflite"
    suffix: ClassVar[str] = ".tflite"
    input: ClassVar[Input] = Input("NHWC", "float32")
    pixel_input: ClassVar[Input | None] = Input("NHWC", "uint8")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    batches: ClassVar[Literal["one", "fixed", "any"]] = "fixed"
    mixes: ClassVar[bool] = True
    in_rings: ClassVar[bool] = True
    runtime: ClassVar[str] = "LiteRT"
    packages: ClassVar[tuple[str, ...]] = ("ai-edge-litert",)
    extra: ClassVar[str] = "litert"

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`."""
        pieces = _Writer(tensors, replace(self.form, keep=self.kept(layers))).model(layers)
        return Artifact(path, self.format, self.precision, write_pieces(path, pieces))

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        source, logits = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

        def run(image: NDArray[Any]) -> NDArray[np.float32]:
            interpreter.set_tensor(source["index"], image)
            interpreter.invoke()
            return interpreter.get_tensor(logits["index"])  # type: ignore[no-any-return]

        return run
