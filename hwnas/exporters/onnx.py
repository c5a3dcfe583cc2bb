"""ONNX, written straight from the list of layers: no torch, no tracing, milliseconds a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

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
    tensor,
    write_pieces,
)
from hwnas.layers import IMAGE, Layer

_Weights: TypeAlias = dict[str, NDArray[Any]]

_PLAIN = Form()
_OPSET, _IR_VERSION = 17, 8  # the oldest pair with all we need: every runtime's converter reads it

# What onnxruntime 1.31's optimiser makes of them on a CPU, and why they are written so (x86-64, AVX-512, 1 thread):
# h-swish, relu, sigmoid and h-sigmoid become part of the convolution; swish becomes one QuickGelu after it (tiny's
# biggest child 0.58 ms; as Sigmoid and Mul unfused 0.73, as opset 24's Swish, which it unrolls with casts, 0.92).
# In int8, swish becomes QLinearSigmoid and QLinearMul, relu vanishes into the convolution's rescaling, and h-swish
# and h-sigmoid are computed in float32 between a dequantisation and a quantisation.
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "h-sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "h-swish": ("HardSwish", {}),
}


@dataclass(frozen=True, slots=True)
class _Quantisation:
    """How activations are quantised, per tensor, and biases; weights are symmetric int8, per output channel.

    Attributes:
        symmetric: activations are int8 with zero point 0, and biases stay float32; else activations are uint8 with the
            zero point that their range gives, and biases int32 in steps of input scale times weight scale.
        dense: also between a convolution and its activation, and within a swish, so that every operator has integers
            on both sides; else only what layers pass on, so that a runtime can fuse a convolution with its activation.
        keep: names of layers that compute in float32 on what others pass on.
    """

    symmetric: bool
    dense: bool
    keep: frozenset[str] = frozenset()


def onnx_model(layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], form: Form = _PLAIN) -> onnx.ModelProto:
    """The network as an ONNX model with batch norm folded into the convolutions.

    Its input is `image`, (batch, in_channels, resolution, resolution) float32, or the pixels (batch, resolution,
    resolution, in_channels) uint8; its output `logits`, (batch, num_classes) float32. Any batch is the symbol `batch`.
    The values in between have the layers' names.

    Args:
        layers: what `hwnas.layers.lower` gives, after the normalisation where the form takes pixels.
        tensors: see `Exporter.write`.
        form: of one of `OnnxExporter`'s precisions.

    Raises:
        ExportError: a tensor is missing or has the wrong shape, or is beyond the range of float16 in such a file.
    """
    model: onnx.ModelProto = onnx.ModelProto.FromString(onnx_bytes(layers, tensors, form))
    return model


def onnx_bytes(layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], form: Form) -> bytes:
    """The bytes of the file that `OnnxExporter` writes, of `onnx_model`.

    Raises:
        ExportError: see `onnx_model`.
    """
    return b"".join(_encode(*_graph(layers, tensors, form)))


def _graph(
    layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], form: Form
) -> tuple[onnx.GraphProto, _Weights]:
    """The graph without its weights, and these."""
    first, last = layers[0], layers[-1]
    batch = form.batch or "batch"
    shape: list[int | str] = [batch, first.in_channels, first.in_size, first.in_size]
    element = TensorProto.FLOAT
    if form.pixels is not None:
        shape, element = [batch, first.in_size, first.in_size, first.in_channels], TensorProto.UINT8
    graph = onnx.GraphProto(name="hwnas")
    graph.input.append(helper.make_tensor_value_info(IMAGE, element, shape))
    graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [batch, last.out_channels]))
    # Normalised in float32, what follows is the same as in a file that takes normalised images.
    quantisation = _quantisation(form.precision, form.keep | {NORMALISED})
    is_half = form.precision == "fp16"
    writer = _Writer(graph, tensors, quantisation, half=is_half)
    integers = _passed_as_integers(layers, quantisation)
    made = {IMAGE: writer.image(pixels=form.pixels is not None)}  # what carries each layer's output
    if IMAGE in integers:
        made[IMAGE] = writer.quantised(IMAGE)
    for layer in layers:
        output = layer.name if layer is not last else f"{LOGITS}.half" if is_half else LOGITS
        writer.add(layer, [made[name] for name in layer.inputs], output)
        made[layer.name] = writer.quantised(layer.name) if layer.name in integers else output
    if is_half:
        writer.cast(f"{LOGITS}.half", LOGITS, TensorProto.FLOAT)
    return graph, writer.weights


def _passed_as_integers(layers: Sequence[Layer], quantisation: _Quantisation | None) -> set[str]:
    """The layers, and perhaps the image, whose output is quantised: those that are, or that such a layer reads."""
    if quantisation is None:
        return set()
    quantised = [layer for layer in layers if layer.name not in quantisation.keep]
    return {name for layer in quantised for name in (layer.name, *layer.inputs)} - {layers[-1].name}


def _encode(graph: onnx.GraphProto, weights: _Weights) -> Iterator[bytes | memoryview]:
    """The bytes of the model in pieces, the weights straight from their arrays.

    Protobuf's own serialisation copies every weight five times on the way to the file, which takes longer than all
    the rest. Here only the lengths of the enclosing messages are written by hand
    (https://protobuf.dev/programming-guides/encoding).
    """
    parts: list[bytes | memoryview] = [graph.SerializeToString()]
    for name, value in weights.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        fields = TensorProto(name=name, dims=value.shape, data_type=kind).SerializeToString()
        head = fields + _open(TensorProto.RAW_DATA_FIELD_NUMBER, value.nbytes)
        parts.append(_open(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + value.nbytes) + head)
        parts.append(value.reshape(-1).data.cast("B"))
    model = onnx.ModelProto(producer_name="hwnas", ir_version=_IR_VERSION)
    model.opset_import.append(helper.make_opsetid("", _OPSET))
    yield model.SerializeToString()
    yield _open(onnx.ModelProto.GRAPH_FIELD_NUMBER, sum(len(part) for part in parts))
    yield from parts


def _open(field: int, num_bytes: int) -> bytes:
    """What protobuf writes ahead of a message or byte string of `num_bytes`: the field's tag, and the length."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return varint(field << 3 | 2) + varint(num_bytes)


class _Writer:
    """Adds layers to a graph, and collects their weights."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        tensors: Mapping[str, NDArray[Any]],
        quantisation: _Quantisation | None,
        *,
        half: bool,
    ) -> None:
        self._graph, self._tensors, self._quantisation, self._half = graph, tensors, quantisation, half
        self.weights: _Weights = {}
        self._scales: dict[str, np.float32] = {}  # of dequantised values

    def image(self, *, pixels: bool) -> str:
        """The input as what the first layer reads: NCHW, in the type of the weights."""
        if not pixels and not self._half:
            return IMAGE
        # The cast is first: TensorRT takes bytes as an input, but does nothing else with them.
        number = self.cast(IMAGE, f"{IMAGE}.cast", TensorProto.FLOAT16 if self._half else TensorProto.FLOAT)
        return self._node("Transpose", [number], f"{IMAGE}.nchw", perm=[0, 3, 1, 2]) if pixels else number

    def cast(self, value: str, output: str, element: int) -> str:
        return self._node("Cast", [value], output, to=element)

    def add(self, layer: Layer, inputs: list[str], output: str) -> None:
        match layer.kind:
            case "conv":
                inputs = [*inputs, *self._weights(layer, inputs[0], *folded(layer, self._tensors))]
                sizes = {
                    "kernel_shape": [layer.kernel] * 2,
                    "strides": [layer.stride] * 2,
                    "pads": [layer.kernel // 2] * 4,
                }
                conv = f"{output}.preactivation" if layer.activation else output
                self._node("Conv", inputs, conv, group=layer.groups, **sizes)
                if layer.activation:
                    self._activation(layer, conv, output)
            case "linear":
                weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
                bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,)) if layer.bias else None
                flat = self._node("Flatten", inputs, f"{layer.name}.flatten")
                if self._is_quantised(layer):
                    flat = self.quantised(flat, self._range(layer.inputs[0]))
                self._node("Gemm", [flat, *self._weights(layer, flat, weight, bias)], output, transB=1)
            case "avg_pool":
                sizes = {"kernel_shape": [2, 2], "strides": [2, 2]}
                self._node("AveragePool", inputs, output, ceil_mode=1, count_include_pad=0, **sizes)
            case "global_pool":
                self._node("GlobalAveragePool", inputs, output)
            case "scale":
                self._node("Mul", inputs, output)
            case "add":
                self._node("Add", inputs, output)

    def quantised(self, value: str, limits: tuple[float, float] | None = None) -> str:
        """The value after quantisation and dequantisation, by default in the range of its name; itself in float32."""
        if self._quantisation is None:
            return value
        low, high = limits or self._range(value)
        low, high = min(low, 0.0), max(high, 0.0)  # zero, which pads, is exact
        symmetric = self._quantisation.symmetric
        scale = (max(-low, high) / 127 if symmetric else (high - low) / 255) or 1.0
        zero = 0 if symmetric else round(-low / scale)
        self._scales[f"{value}.dequantised"] = np.float32(scale)
        how = [
            self._weight(f"{value}.scale", scale, "<f4"),
            self._weight(f"{value}.zero_point", zero, np.int8 if symmetric else np.uint8),
        ]
        integers = self._node("QuantizeLinear", [value, *how], f"{value}.quantised")
        return self._node("DequantizeLinear", [integers, *how], f"{value}.dequantised")

    def _activation(self, layer: Layer, source: str, output: str) -> None:
        dense = self._quantisation is not None and self._quantisation.dense and self._is_quantised(layer)
        if dense and layer.activation != "relu":  # which a convolution's rescaling does in passing
            source = self.quantised(source, self._range(f"{layer.name}.preactivation"))
        if layer.activation == "swish":
            gate = self._node("Sigmoid", [source], f"{output}.gate")
            self._node("Mul", [source, self.quantised(gate, (0.0, 1.0)) if dense else gate], output)
        else:
            op, options = _ACTIVATIONS[str(layer.activation)]
            self._node(op, [source], output, **options)

    def _weights(self, layer: Layer, source: str, weight: NDArray[Any], bias: NDArray[Any] | None) -> list[str]:
        """The weight and the bias of a layer that reads `source`, as its operator's further inputs."""
        names = f"{layer.name}.weight", f"{layer.name}.bias"
        if self._quantisation is None or not self._is_quantised(layer):
            inputs = [self._number(names[0], weight)]
            return inputs if bias is None else [*inputs, self._number(names[1], bias)]
        rows = weight.reshape(len(weight), -1)
        scale = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / 127
        input_scale = self._scales[source]
        if bias is not None:  # it has to fit into an int32 also where the weights are tiny
            scale = np.maximum(scale, np.abs(bias) / (input_scale * 2.0**30))
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        integers = rows / scale[:, None]
        np.rint(integers, out=integers)
        inputs = [self._dequantised(names[0], integers.astype(np.int8).reshape(weight.shape), scale)]
        if bias is not None and self._quantisation.symmetric:
            inputs.append(self._weight(names[1], bias, "<f4"))
        elif bias is not None:
            scale = scale * input_scale
            inputs.append(self._dequantised(names[1], np.rint(bias / scale).astype(np.int32), scale))
        return inputs

    def _is_quantised(self, layer: Layer) -> bool:
        return self._quantisation is not None and layer.name not in self._quantisation.keep

    def _dequantised(self, name: str, integers: NDArray[Any], scale: NDArray[np.float32]) -> str:
        inputs = [
            self._weight(name, integers, integers.dtype),
            self._weight(f"{name}.scale", scale, "<f4"),
            self._weight(f"{name}.zero_point", np.zeros(len(scale), integers.dtype), integers.dtype),
        ]
        return self._node("DequantizeLinear", inputs, f"{name}.dequantised", axis=0)

    def _node(self, op: str, inputs: list[str], output: str, **options: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [output], name=output, **options))
        return output

    def _number(self, name: str, value: NDArray[Any]) -> str:
        """A weight or bias of a layer that computes in floating point."""
        return self._weight(name, half(name, value) if self._half else value, "<f2" if self._half else "<f4")

    def _weight(self, name: str, value: Any, dtype: Any) -> str:
        self.weights[name] = np.asarray(value, dtype=dtype, order="C")
        return name

    def _range(self, name: str) -> tuple[float, float]:
        if self._quantisation is None:
            return 0.0, 0.0
        low, high = tensor(self._tensors, f"{name}.range", (2,)).tolist()
        return low, high


_QUANTISATIONS = {
    "int8": _Quantisation(symmetric=False, dense=True),
    "int8-symmetric": _Quantisation(symmetric=True, dense=False),
}


def _quantisation(precision: str, keep: frozenset[str]) -> _Quantisation | None:
    return replace(_QUANTISATIONS[precision], keep=keep) if precision in _QUANTISATIONS else None


class OnnxExporter(Exporter):
    """Writes ONNX files of opset 17.

    `int8` suits onnxruntime on processors: every operator has integers on both sides. `int8-symmetric` suits TensorRT
    and OpenVINO: both fuse a convolution with its activation as long as nothing is between them, and TensorRT refuses
    zero points other than 0, and integer biases. Three children of bignas on one thread of a Xeon with AMX, ms:

        | runtime          | fp32               | int8               | int8-symmetric     |
        |------------------|--------------------|--------------------|--------------------|
        | onnxruntime 1.31 | 7.0 / 20.5 / 30.8  | 6.7 / 16.5 / 24.9  | over twice float32 |
        | OpenVINO 2026.4  | 7.2 / 19.5 / 30.1  | 10.3 / 25.0 / 37.9 | 5.3 / 12.8 / 20.4  |

    `fp16` suits GPUs and NPUs: weights and arithmetic are float16, input and output are not. On a processor onnxruntime
    computes it in float32, in about the time of `fp32`: that shows what rounding the weights does, not whether a value
    in between overflows, so those are checked by their ranges where `tensors` has them.
    """

    format: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    pixel_input: ClassVar[Input | None] = Input("NHWC", "uint8")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", *_QUANTISATIONS)
    batches: ClassVar[Literal["one", "fixed", "any"]] = "any"
    mixes: ClassVar[bool] = True
    runtime: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`."""
        graph = _graph(layers, tensors, replace(self.form, precision=self.file_precision))
        return Artifact(path, self.format, self.precision, write_pieces(path, _encode(*graph)))

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda image: session.run(["logits"], {"image": image})[0]
