"""ncnn, written straight from the list of layers: a text file of the graph, and a file of the weights beside it.

The formats are those of ncnn's `src/net.cpp` (`load_param`), `src/modelbin.cpp` and `tools/modelwriter.h`; parameters
are numbered in each layer's `load_param` in `src/layer`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hwnas.exporters.base import LOGITS, NORMALISED, Artifact, Exporter, Input, Run, folded, half, tensor
from hwnas.files import replacing
from hwnas.layers import IMAGE, Layer

_MAGIC = 7767517
# Ahead of a layer's weights, which end at a multiple of four bytes.
_FP32, _FP16, _INT8 = (tag.to_bytes(4, "little") for tag in (0, 0x01306B47, 0x000D4B38))
_MUL, _ADD = 2, 0  # BinaryOp's op_type
_ALPHA_BETA = (np.float32(1 / 6), np.float32(0.5))  # torch's h-sigmoid and h-swish; ncnn's own default is 0.2
_FUSED: dict[str, str] = {  # parameters 9 and 10 of what has weights
    "relu": " 9=1",
    "sigmoid": " 9=4",
    "h-swish": " 9=6 -23310=2,{:.9g},{:.9g}".format(*_ALPHA_BETA),
}
_LAYERS: dict[str, str] = {"swish": "Swish", "h-sigmoid": "HardSigmoid"}
_PARAMETERS = {"h-sigmoid": " 0={:.9g} 1={:.9g}".format(*_ALPHA_BETA)}


class _Writer:
    """Collects the lines of the graph, and the weights."""

    def __init__(
        self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], precision: str, keep: Collection[str]
    ) -> None:
        self._tensors = tensors
        self._precisions = {layer.name: "fp32" if layer.name in keep else precision for layer in layers}
        self._readers: dict[str, list[Layer]] = {}
        for layer in layers:
            for name in layer.inputs:
                self._readers.setdefault(name, []).append(layer)
        self._outputs = {layers[-1].name: LOGITS}
        self._copies: Counter[str] = Counter()  # of a split value that are taken
        self._flat: set[str] = set()  # values of one dimension
        self._lines: list[str] = []
        self._num_values = 0
        self.weights: list[bytes | memoryview] = []
        first = layers[0]
        self._line("Input", [], IMAGE, f" 0={first.in_size} 1={first.in_size} 2={first.in_channels}")
        self._split(IMAGE)
        for layer in layers:
            self._add(layer)
            self._split(layer.name)

    @property
    def param(self) -> bytes:
        """The text of the graph."""
        return "\n".join([str(_MAGIC), f"{len(self._lines)} {self._num_values}", *self._lines, ""]).encode()

    def _add(self, layer: Layer) -> None:
        inputs, output = [self._read(name) for name in layer.inputs], self._outputs.get(layer.name, layer.name)
        match layer.kind:
            case "conv" | "linear":
                self._weighted(layer, inputs, output)
            case "avg_pool":
                # By itself ncnn pads an odd side so that a map of one pixel gets two: here the padding is explicit
                # (mode 1), and not counted, which is the default.
                odd = layer.in_size % 2
                self._line("Pooling", inputs, output, f" 0=1 1=2 2=2 3=0 13=0 14={odd} 15={odd} 5=1")
            case "global_pool":
                self._line("Pooling", inputs, output, " 0=1 4=1")
                self._flat.add(layer.name)
            case "scale":
                self._line("BinaryOp", inputs, output, f" 0={_MUL}")
            case "add":
                self._line("BinaryOp", inputs, output, f" 0={_ADD}")

    def _weighted(self, layer: Layer, inputs: list[str], output: str) -> None:
        if layer.kind == "conv":
            weight, bias = folded(layer, self._tensors)
        else:
            weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
            bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,)) if layer.bias else None
        size = f"{int(bias is not None)} {{}}={weight.size}"
        # A convolution of what a global pool made is a product: ncnn gives such values one dimension.
        flat = layer.kind == "linear" or layer.inputs[0] in self._flat
        if flat:
            op, options = "InnerProduct", f" 0={layer.out_channels} 1={size.format(2)}"
            self._flat.add(layer.name)
        else:
            op = "ConvolutionDepthWise" if layer.depthwise else "Convolution"
            shape = f" 0={layer.out_channels} 1={layer.kernel} 3={layer.stride} 4={layer.kernel // 2}"
            options = f"{shape} 5={size.format(6)}" + (f" 7={layer.groups}" if layer.depthwise else "")
        scales: list[NDArray[Any]] = []
        if self._precisions[layer.name] == "int8":
            scales = self._quantised_scales(layer, weight, flat=flat)
            # 1 and 2 both mean one scale an output channel, but that 2 of a depthwise one would mean a single scale.
            options += f" 8={(1 if layer.depthwise else 2) + (100 if len(scales) > 2 else 0)}"
        activation = layer.activation
        if activation is None or activation in _FUSED:
            self._line(op, inputs, output, options + _FUSED.get(activation or "", ""))
        else:
            self._line(op, inputs, f"{output}.preactivation", options)
            self._line(_LAYERS[activation], [f"{output}.preactivation"], output, _PARAMETERS.get(activation, ""))
        self._write_weight(layer, weight, scales)
        for values in [*([] if bias is None else [bias]), *scales]:
            self.weights.append(_bytes(values, "<f4"))

    def _write_weight(self, layer: Layer, weight: NDArray[Any], scales: list[NDArray[Any]]) -> None:
        match self._precisions[layer.name]:
            case "int8":
                integers = np.rint(weight * scales[0].reshape(-1, *[1] * (weight.ndim - 1)))
                tag, values = _INT8, _bytes(integers, "i1")
            case "fp16":
                tag, values = _FP16, _bytes(half(f"{layer.name}.weight", weight), "<f2")
            case _:
                tag, values = _FP32, _bytes(weight, "<f4")
        self.weights += [tag, values, bytes(-len(values) % 4)]

    def _quantised_scales(self, layer: Layer, weight: NDArray[Any], *, flat: bool) -> list[NDArray[Any]]:
        """Of the weights, the input, and the output where it stays in integers; integer = value times scale."""
        # Where ncnn multiplies by Winograd's method, weights have six bits (ncnn2table.cpp, `quant_6bit`).
        winograd = layer.kernel == 3 and layer.stride == 1 and not layer.depthwise
        largest = np.abs(weight.reshape(len(weight), -1)).max(1)
        scales = [_scale(largest, 31 if winograd else 127), self._value_scale(layer.inputs[0])]
        # As ncnn2int8 does (`fuse_requantize`): between two convolutions of integers the values stay such.
        readers = [(reader.kind, self._precisions[reader.name]) for reader in self._readers.get(layer.name, [])]
        if not flat and layer.activation not in _LAYERS and readers == [("conv", "int8")]:
            scales.append(self._value_scale(layer.name))
        return scales

    def _value_scale(self, name: str) -> NDArray[Any]:
        return _scale(np.abs(tensor(self._tensors, f"{name}.range", (2,))).max(keepdims=True))

    def _line(self, op: str, inputs: Sequence[str], output: str, options: str, copies: int = 0) -> None:
        outputs = [output] if not copies else [f"{output}_{copy}" for copy in range(copies)]
        self._num_values += len(outputs)
        self._lines.append(" ".join([op, output, str(len(inputs)), str(len(outputs)), *inputs, *outputs]) + options)

    def _split(self, name: str) -> None:
        """Copy a value for each layer that reads it: in ncnn a value has one reader."""
        readers = len(self._readers.get(name, []))
        if readers > 1:
            self._line("Split", [name], f"{name}.split", "", copies=readers)

    def _read(self, name: str) -> str:
        if len(self._readers[name]) == 1:
            return name
        self._copies[name] += 1
        return f"{name}.split_{self._copies[name] - 1}"


def _scale(largest: NDArray[Any], integer: int = 127) -> NDArray[Any]:
    """What brings the largest absolute value to an integer; where all are zero, anything does."""
    return (integer / np.where(largest > 0, largest, 1)).astype(np.float32)


def _bytes(values: NDArray[Any], kind: str) -> memoryview:
    return np.ascontiguousarray(values, dtype=kind).data.cast("B")


class NcnnExporter(Exporter):
    """Writes ncnn's `.param`, and its `.bin` with the weights beside it.

    The input is `image`, the output `logits`; the values in between have the layers' names. fp16 is what weights are
    stored in, while biases are float32. Int8 is symmetric: weights by output channel, activations by tensor; what has
    no weights computes in float32. So does the normalisation of pixels, which have twice as many values as the positive
    integers of int8.
    """

    format: ClassVar[str] = "ncnn"
    suffix: ClassVar[str] = ".param"
    pixel_input: ClassVar[Input] = Input("NCHW", "float32")  # as ncnn::Mat::from_pixels gives them
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    mixes: ClassVar[bool] = True
    runtime: ClassVar[str] = "ncnn"
    packages: ClassVar[tuple[str, ...]] = ("ncnn",)
    extra: ClassVar[str] = "ncnn"

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`; the hash is of the `.param` and the `.bin`, in this order."""
        writer = _Writer(layers, tensors, self.precision, self.form.keep | {NORMALISED})
        text = writer.param
        digest = hashlib.sha256(text)
        # Both are whole before one takes its place, first the weights.
        with replacing(path) as graph, replacing(path.with_suffix(".bin")) as weights, weights.open("wb") as file:
            graph.write_bytes(text)
            for part in writer.weights:
                digest.update(part)
                file.write(part)
        return Artifact(path, self.format, self.precision, digest.hexdigest())

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = 1
        # Values are float32, or int8 and float32, also where weights are float16.
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, option, False)
        if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
            raise RuntimeError("it cannot be loaded")

        def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
            extractor = net.create_extractor()
            failed = extractor.input("image", ncnn.Mat(image[0]).clone())
            failed, logits = (failed, None) if failed else extractor.extract("logits")
            if failed:
                raise RuntimeError(f"error {failed}")
            return np.array(logits)[None]

        return run
