"""ONNX, written straight from the list of layers: no torch, no tracing, milliseconds a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from hwnas.errors import ExportError
from hwnas.exporters.base import Artifact, Exporter, folded, tensor
from hwnas.files import replacing
from hwnas.layers import IMAGE, Layer

_Weights: TypeAlias = dict[str, NDArray[Any]]

LOGITS = "logits"
_OPSET, _IR_VERSION = 17, 8  # the oldest pair with all we need: every runtime's converter reads it

# What onnxruntime 1.31's optimiser makes of them on a CPU, and why they are written so (x86-64, AVX-512, 1 thread):
# h-swish, relu, sigmoid and h-sigmoid become part of the convolution; swish becomes one QuickGelu after it (tiny's
# biggest child 0.58 ms; as Sigmoid and Mul unfused 0.73, as opset 24's Swish, which it unrolls with casts, 0.92).
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "h-sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "h-swish": ("HardSwish", {}),
}


def onnx_model(layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """The network as an ONNX model with batch norm folded into the convolutions.

    Its input is `image`, float32 (1, in_channels, resolution, resolution), normalised; its output `logits`, float32
    (1, num_classes). The values in between have the layers' names.

    Args:
        layers: what `hwnas.layers.lower` gives.
        tensors: see `Exporter.write`.

    Raises:
        ExportError: a tensor is missing or has the wrong shape.
    """
    model: onnx.ModelProto = onnx.ModelProto.FromString(b"".join(_encode(*_graph(layers, tensors))))
    return model


def _graph(layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]]) -> tuple[onnx.GraphProto, _Weights]:
    """The graph without its weights, and these."""
    first, last = layers[0], layers[-1]
    graph = onnx.GraphProto(name="hwnas")
    for values, name, shape in (
        (graph.input, IMAGE, [1, first.in_channels, first.in_size, first.in_size]),
        (graph.output, LOGITS, [1, last.out_channels]),
    ):
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    writer = _Writer(graph, tensors)
    outputs = {last.name: LOGITS}
    for layer in layers:
        writer.add(layer, [outputs.get(name, name) for name in layer.inputs], outputs.get(layer.name, layer.name))
    return graph, writer.weights


def _encode(graph: onnx.GraphProto, weights: _Weights) -> Iterator[bytes | memoryview]:
    """The bytes of the model in pieces, the weights straight from their arrays.

    Protobuf's own serialisation copies every weight five times on the way to the file, which takes longer than all
    the rest. Here only the lengths of the enclosing messages are written by hand
    (https://protobuf.dev/programming-guides/encoding).
    """
    parts: list[bytes | memoryview] = [graph.SerializeToString()]
    for name, value in weights.items():
        fields = TensorProto(name=name, dims=value.shape, data_type=TensorProto.FLOAT).SerializeToString()
        raw = np.ascontiguousarray(value, dtype="<f4")
        head = fields + _open(TensorProto.RAW_DATA_FIELD_NUMBER, raw.nbytes)
        parts.append(_open(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + raw.nbytes) + head)
        parts.append(raw.data.cast("B"))
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

    def __init__(self, graph: onnx.GraphProto, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._graph, self._tensors = graph, tensors
        self.weights: _Weights = {}

    def add(self, layer: Layer, inputs: list[str], output: str) -> None:
        match layer.kind:
            case "conv":
                weight, bias = folded(layer, self._tensors)
                inputs = [*inputs, self._weight(f"{layer.name}.weight", weight)]
                if bias is not None:
                    inputs.append(self._weight(f"{layer.name}.bias", bias))
                sizes = {
                    "kernel_shape": [layer.kernel] * 2,
                    "strides": [layer.stride] * 2,
                    "pads": [layer.kernel // 2] * 4,
                }
                conv = f"{output}.preactivation" if layer.activation else output
                self._node("Conv", inputs, conv, group=layer.groups, **sizes)
                if layer.activation:
                    self._activation(layer.activation, conv, output)
            case "linear":
                weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
                inputs = [self._node("Flatten", inputs, f"{layer.name}.flatten")]
                inputs.append(self._weight(f"{layer.name}.weight", weight))
                if layer.bias:
                    bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,))
                    inputs.append(self._weight(f"{layer.name}.bias", bias))
                self._node("Gemm", inputs, output, transB=1)
            case "avg_pool":
                sizes = {"kernel_shape": [2, 2], "strides": [2, 2]}
                self._node("AveragePool", inputs, output, ceil_mode=1, count_include_pad=0, **sizes)
            case "global_pool":
                self._node("GlobalAveragePool", inputs, output)
            case "scale":
                self._node("Mul", inputs, output)
            case "add":
                self._node("Add", inputs, output)

    def _activation(self, activation: str, source: str, output: str) -> None:
        if activation == "swish":
            gate = self._node("Sigmoid", [source], f"{output}.gate")
            self._node("Mul", [source, gate], output)
        else:
            op, options = _ACTIVATIONS[activation]
            self._node(op, [source], output, **options)

    def _node(self, op: str, inputs: list[str], output: str, **options: Any) -> str:
        self._graph.node.append(helper.make_node(op, inputs, [output], name=output, **options))
        return output

    def _weight(self, name: str, value: NDArray[Any]) -> str:
        self.weights[name] = value
        return name


class OnnxExporter(Exporter):
    """Writes ONNX files of opset 17 with float32 weights."""

    format: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"

    def write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`."""
        digest = hashlib.sha256()
        with replacing(path) as temporary, temporary.open("wb") as file:
            for part in _encode(*_graph(layers, tensors)):
                digest.update(part)
                file.write(part)
        return Artifact(path, self.format, self.precision, digest.hexdigest())

    def infer(self, path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Exporter`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # more would spin against torch's
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return np.concatenate([session.run([LOGITS], {IMAGE: image[None]})[0] for image in images])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ExportError(f"onnxruntime cannot run {path}: {error}") from None
