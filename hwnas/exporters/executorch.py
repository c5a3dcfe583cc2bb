"""ExecuTorch, written straight from the list of layers: one XNNPACK graph in a program of one instruction.

The usual road through torch.export takes 9 s for tiny's smallest child and 110 s for bignas's largest, where this one
takes 0.02 s and 0.3 s (2 busy x86-64 cores). It also leaves average pools with partial windows to a portable kernel,
which cuts the graph in pieces. Otherwise the graphs are the same.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import ExportError
from hwnas.exporters.base import Artifact, Exporter, Form, Input, Run, folded, half, rings, tensor, write_pieces
from hwnas.exporters.integers import LOGISTIC, PIXELS, Grid, Integers
from hwnas.layers import IMAGE, Layer

_BACKEND = "XnnpackBackend"
_ALIGNMENT = 16  # of constants in the graph's data: CONSTANT_TENSOR_ALIGNMENT of executorch's xnnpack_graph_serialize
# Between which the units of inputs (Add) or their product (Multiply), over the output's, have to be in XNNPACK.
_RESCALING = {"Add": (2.0**-10, 2.0**8), "Multiply": (2.0**-16, 2.0**8)}
_MOST_MULTIPLIER = 2.0**7  # the same of a weight and its layer's input, at most; see `LEAST_MULTIPLIER`
_NONE = 2**32 - 1  # xnnpack.h's XNN_INVALID_VALUE_ID
_EXTERNAL_INPUT, _EXTERNAL_OUTPUT, _KEEP_DIMS = 1, 2, 64  # its flags of these names
# How torch's pytree writes the structure of `forward(image)`, and of a single tensor as its result.
_INPUTS = (
    '[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "builtins.tuple", "context": "null", '
    '"children_spec": [{"type": null, "context": null, "children_spec": []}]}, {"type": "builtins.dict", '
    '"context": "[]", "children_spec": []}]}]'
)
_OUTPUT = '[1, {"type": null, "context": null, "children_spec": []}]'


_Type: TypeAlias = Grid | Literal["fp32", "fp16"]  # of a value's elements; integers on a grid
_INPUT = {"external_id": 0, "flags": _EXTERNAL_INPUT}
_LOGITS = {"external_id": 1, "flags": _EXTERNAL_OUTPUT}


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor between two nodes: its number and shape, (batch, size, size, channels), and what its elements are."""

    number: int
    shape: tuple[int, ...]
    type: _Type


class _Graph:
    """An XNNPACK graph in the making.

    Nodes and values are written as JSON with the names of executorch's `xnnpack/serialization/schema.fbs`, whose
    flatbuffer compiler reads it: the dataclasses of the same names take five times as long on the way there.

    In int8, activations are on a grid a tensor, weights on a symmetric one an output channel, the biases in 32 bits, as
    executorch's XNNPACKQuantizer has it.

    Args:
        tensors: see `Exporter.write`.
        form: of the file.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], form: Form) -> None:
        self._tensors, self._form = tensors, form
        self._values: list[dict[str, Any]] = []
        self._nodes: list[dict[str, Any]] = []
        self._offsets = [{"offset": 0, "size": 0}]  # the first one stands for `not constant`
        self._data = bytearray()
        self._converted: dict[tuple[int, _Type], _Value] = {}

    def write(self, layers: Sequence[Layer]) -> bytes:
        """The graph of a network, from images to logits (batch, num_classes)."""
        from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary

        batch, size, channels = self._form.batch or 1, layers[0].in_size, layers[0].in_channels
        image = self._value((batch, size, size, channels), "fp32")
        if self._form.pixels is None:
            given = self._value((batch, channels, size, size), "fp32", _INPUT)
            self._node("StaticTranspose", image, num_dims=4, perm=[0, 2, 3, 1], input_id=given.number)
        else:
            given = self._value(image.shape, PIXELS, _INPUT)
            self._node("Convert", image, input_id=given.number)
        maps = {IMAGE: image}
        for layer in layers:
            maps[layer.name] = self._add(layer, [maps[name] for name in layer.inputs])
        logits = maps[layers[-1].name]
        if logits.type != "fp32":
            logits = self._node("Convert", self._value(logits.shape, "fp32", _LOGITS), input_id=logits.number)
        graph = XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=2,
            input_ids=[given.number],
            output_ids=[logits.number],
            constant_data=self._offsets,
        )
        binary: bytes = serialize_xnnpack_binary(graph, self._data)
        return binary

    # ------------------------------------------------------------ layers

    def _add(self, layer: Layer, sources: list[_Value]) -> _Value:
        type = self._type(layer.name)
        if layer.kind == "avg_pool" and isinstance(type, Grid):
            type = "fp32"  # XNNPACK averages no integers
        inputs = [self._read(value, name, type) for name, value in zip(layer.inputs, sources, strict=True)]
        source = inputs[0]
        shape = (source.shape[0], layer.out_size, layer.out_size, layer.out_channels)
        match layer.kind:
            case "conv":
                return self._conv(layer, source, shape)
            case "linear":
                return self._linear(layer, source)
            case "avg_pool":
                # What lies beyond the border does not count in XNNPACK's averages.
                edge = layer.in_size % 2
                return self._node(
                    "AvgPooling2d", self._value(shape, type), padding_right=edge, padding_bottom=edge,
                    pooling_height=2, pooling_width=2, stride_height=2, stride_width=2, input_id=source.number,
                )  # fmt: skip
            case "global_pool":
                pooled = self._value(shape, type)
                return self._node("GlobalAvgPooling2d", pooled, input_id=source.number, flags=_KEEP_DIMS)
            case "scale":
                return self._pair("Multiply", inputs, type)
            case "add":
                return self._pair("Add", inputs, type)

    def _conv(self, layer: Layer, source: _Value, shape: tuple[int, ...]) -> _Value:
        weight, bias = folded(layer, self._tensors)
        name, activation = layer.name, layer.activation
        limits: tuple[float, float | str] | None = None
        separate = activation in ("swish", "h-swish", "sigmoid")
        type = self._type(f"{name}.preactivation" if separate else name)
        if activation == "relu":
            limits = (0.0, "inf")
        elif activation == "h-sigmoid":  # clamp(x / 6 + 1 / 2, 0, 1): all of it is part of the convolution
            weight, bias = weight / 6, (0 if bias is None else bias) / 6 + np.full(layer.out_channels, 0.5)
            limits = (0.0, 1.0)
            type = Grid.of(0, 1) if isinstance(type, Grid) else type
        in_channels, out_channels = (1, 1) if layer.depthwise else (layer.in_channels, layer.out_channels)
        weight = weight.transpose((1, 2, 3, 0) if layer.depthwise else (0, 2, 3, 1))
        out = self._value(shape, _reachable(type, source, weight))
        whole = slice(0, layer.kernel), slice(0, layer.kernel)
        pieces = [*rings(layer.kernel)] if layer.depthwise else [whole]
        sums: list[_Value] = []
        for rows, columns in pieces:
            made = out if len(pieces) == 1 else self._value(shape, type)
            constants = self._weights(layer, weight[:, rows, columns], None if sums else bias, source, made)
            above, beside = (layer.kernel // 2 - part.start for part in (rows, columns))
            self._node(
                "DepthwiseConv2d" if layer.depthwise else "Conv2d", made, limits if made is out else None,
                padding_top=above, padding_right=beside, padding_bottom=above, padding_left=beside,
                kernel_height=len(range(layer.kernel)[rows]), kernel_width=len(range(layer.kernel)[columns]),
                subsampling_height=layer.stride, subsampling_width=layer.stride,
                dilation_height=rows.step or 1, dilation_width=columns.step or 1, group_input_channels=in_channels,
                group_output_channels=out_channels, groups=layer.groups, input1_id=source.number, **constants,
            )  # fmt: skip
            if sums:
                last = len(sums) == len(pieces) - 1
                made, part = (out if last else self._value(shape, type)), made
                self._node("Add", made, limits if last else None, input1_id=sums[-1].number, input2_id=part.number)
            sums.append(made)
        if not separate:
            return out
        type = self._type(name)
        if activation == "h-swish":
            return self._node("Hardswish", self._value(shape, type), input_id=out.number)
        gate = self._value(shape, LOGISTIC if isinstance(type, Grid) else type)
        self._node("Sigmoid", gate, input_id=out.number)
        return self._pair("Multiply", [out, gate], type) if activation == "swish" else gate

    def _linear(self, layer: Layer, source: _Value) -> _Value:
        weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
        bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,)) if layer.bias else None
        flat = self._value((source.shape[0], layer.in_channels), source.type)
        self._node("StaticReshape", flat, num_dims=2, new_shape=[*flat.shape], input_id=source.number)
        type = self._type(layer.name)
        shape = (source.shape[0], layer.out_channels)
        out = self._value(shape, _reachable(type, source, weight), _LOGITS if type == "fp32" else {})
        constants = self._weights(layer, weight, bias, source, out)
        return self._node("FullyConnected", out, input1_id=flat.number, **constants)

    def _pair(self, kind: str, inputs: list[_Value], type: _Type) -> _Value:
        """The sum or the product of two values; in float32 where XNNPACK refuses their grids beside the output's."""
        grids = [value.type for value in inputs if isinstance(value.type, Grid)]
        if isinstance(type, Grid):
            units = [grid.scale for grid in grids] if kind == "Add" else [math.prod(grid.scale for grid in grids)]
            least, most = _RESCALING[kind]
            if not all(least <= unit / type.scale < most for unit in units):
                inputs, type = [self._as(value, "fp32") for value in inputs], "fp32"
        one, other = inputs
        return self._node(kind, self._value(one.shape, type), input1_id=one.number, input2_id=other.number)

    # ------------------------------------------------------------ types

    def _type(self, name: str) -> _Type:
        """Of the values that a layer makes, or makes before its activation."""
        if self._form.precision == "int8" and name.removesuffix(".preactivation") not in self._form.keep:
            return self._grid(name)
        return "fp16" if self._form.precision == "fp16" else "fp32"

    def _grid(self, name: str) -> Grid:
        """Of the values that a range is given for."""
        low, high = map(float, tensor(self._tensors, f"{name}.range", (2,)))
        return Grid.of(low, high)

    def _read(self, value: _Value, name: str, type: _Type) -> _Value:
        """What a layer of a type computes with: the value `name` in that type, or on its own grid in int8."""
        if isinstance(type, Grid):
            return value if isinstance(value.type, Grid) else self._as(value, self._grid(name))
        return self._as(value, type)

    def _as(self, value: _Value, type: _Type) -> _Value:
        """A value converted to another type, once."""
        if value.type == type:
            return value
        if (value.number, type) not in self._converted:
            made = self._node("Convert", self._value(value.shape, type), input_id=value.number)
            self._converted[value.number, type] = made
        return self._converted[value.number, type]

    # ------------------------------------------------------------ nodes and values

    def _node(
        self, kind: str, output: _Value, limits: tuple[float, float | str] | None = None, **fields: Any
    ) -> _Value:
        """Add a node, and give its output, which is clamped to `limits`."""
        node = {"xnode_union_type": f"XNN{kind}", "xnode_union": {**fields, "output_id": output.number}}
        if limits is not None:
            node["output_min_max"] = dict(zip(("output_min", "output_max"), limits, strict=True))
        self._nodes.append(node)
        return output

    def _weights(
        self, layer: Layer, weight: NDArray[Any], bias: NDArray[Any] | None, source: _Value, out: _Value
    ) -> dict[str, Any]:
        """The values of a weight, whose output channels come first, or last if it is depthwise, and of a bias."""
        if not (isinstance(source.type, Grid) and isinstance(out.type, Grid)):
            bias_id = _NONE if bias is None else self._constant(layer, bias, source.type)
            return {"filter_id": self._constant(layer, weight, source.type), "bias_id": bias_id}
        axis = weight.ndim - 1 if layer.depthwise else 0
        bias = np.zeros(layer.out_channels) if bias is None else bias  # XNNPACK wants one
        of = Integers.of(weight, bias, axis, source.type, out.type)
        return {
            "filter_id": self._channelwise("qcint8", of.weight, of.scale, axis),
            "bias_id": self._channelwise("qcint32", of.bias, of.units.astype(np.float32), 0),
        }

    def _channelwise(self, datatype: str, integers: NDArray[Any], scale: NDArray[np.float32], axis: int) -> int:
        """A value that holds integers, on a grid for each index along an axis."""
        params = {"scale": [], "channel_dim": axis, "scale_buffer_idx": self._stored(scale), "num_scales": len(scale)}
        fields = {"constant_buffer_idx": self._stored(integers)}
        return self._define(integers.shape, datatype, fields, ("PerChannelQuant", params))

    def _constant(self, layer: Layer, array: NDArray[Any], type: _Type) -> int:
        """A value that holds floating-point numbers."""
        data = half(layer.name, array) if type == "fp16" else array.astype("<f4", copy=False)
        return self._value(data.shape, type, {"constant_buffer_idx": self._stored(data)}).number

    def _stored(self, array: NDArray[Any]) -> int:
        """The number of an array among the graph's constants."""
        data = np.ascontiguousarray(array)
        self._data += bytes(-len(self._data) % _ALIGNMENT)
        self._offsets.append({"offset": len(self._data), "size": data.nbytes})
        self._data += data.data.cast("B")
        return len(self._offsets) - 1

    def _value(self, shape: tuple[int, ...], type: _Type, fields: Mapping[str, int] = {}) -> _Value:
        if isinstance(type, Grid):
            datatype = "qint8" if type.signed else "quint8"
            params = {"scale": type.scale, "zero_point": type.zero_point}
            return _Value(self._define(shape, datatype, fields, ("PerTensorQuant", params)), shape, type)
        return _Value(self._define(shape, type, fields), shape, type)

    def _define(
        self,
        shape: Sequence[int],
        datatype: str,
        fields: Mapping[str, int],
        quantisation: tuple[str, dict[str, Any]] | None = None,
    ) -> int:
        number = len(self._values)
        value = {"num_dims": len(shape), "dims": list(shape), "external_id": _NONE, "id_out": number, **fields}
        value["datatype"] = f"xnn_datatype_{datatype}"
        if quantisation is None:
            self._values.append({"xvalue_union_type": "XNNTensorValue", "xvalue_union": value})
        else:
            kind, params = quantisation
            value = {"tensor_value": value, "quant_params_type": kind, "quant_params": params}
            self._values.append({"xvalue_union_type": "XNNQuantizedTensorValue", "xvalue_union": value})
        return number


def _reachable(type: _Type, source: _Value, weight: NDArray[Any]) -> _Type:
    """A grid for what a layer makes of `source`: `type`, or a coarser one where that is too fine for XNNPACK."""
    if not (isinstance(type, Grid) and isinstance(source.type, Grid)):
        return type
    least = source.type.scale * float(np.abs(weight).max()) / 127 / _MOST_MULTIPLIER
    return type if type.scale >= least else replace(type, scale=least)


def _program(graph: bytes, images: tuple[int, ...], dtype: str, logits: tuple[int, int]) -> Any:
    """An ExecuTorch program whose `forward` runs a graph on images of a shape, and returns logits of another."""
    from executorch.exir import schema
    from executorch.exir.scalar_type import ScalarType

    scalar_type = {"float32": ScalarType.FLOAT, "uint8": ScalarType.BYTE}
    num_bytes = -(-np.dtype(dtype).itemsize * math.prod(images) // _ALIGNMENT) * _ALIGNMENT

    def value(shape: tuple[int, ...], dtype: str, offset: int) -> Any:
        return schema.EValue(
            schema.Tensor(
                scalar_type=scalar_type[dtype],
                storage_offset=0,
                sizes=list(shape),
                dim_order=list(range(len(shape))),
                requires_grad=False,
                layout=0,
                data_buffer_idx=0,
                allocation_info=schema.AllocationDetails(1, offset, 0),
                shape_dynamism=schema.TensorShapeDynamism.STATIC,
            )
        )

    call = schema.Instruction(schema.DelegateCall(delegate_index=0, args=[0, 1]))
    inline = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0)
    plan = schema.ExecutionPlan(
        name="forward",
        container_meta_type=schema.ContainerMetadata(_INPUTS, _OUTPUT),
        values=[value(images, dtype, 0), value(logits, "float32", num_bytes)],
        inputs=[0],
        outputs=[1],
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[call], stacktrace=None)],
        operators=[],
        delegates=[schema.BackendDelegate(_BACKEND, inline, compile_specs=[])],
        non_const_buffer_sizes=[0, num_bytes + 4 * math.prod(logits)],
    )
    return schema.Program(
        version=0,
        execution_plan=[plan],
        constant_buffer=[schema.Buffer(b"")],
        backend_delegate_data=[schema.BackendDelegateInlineData(graph)],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=[]),
    )


class ExecutorchExporter(Exporter):
    """Writes ExecuTorch programs (.pte) that run as a whole in XNNPACK.

    The input is float32 (batch, in_channels, resolution, resolution), as torch lays it out, or pixels, uint8 (batch,
    resolution, resolution, in_channels).

    fp16 files hold and compute in half precision, int8 files in integers, between such an input and float32 logits.
    fp16 is for processors with such arithmetic (ARM since v8.2); on x86-64 with AVX2 it runs, 1 to 2 times as slow as
    fp32. int8 took 0.62 for fp32's 0.68 ms (tiny's largest child), 4.6 for 9.0 ms (bignas's smallest) and 35 for 67 ms
    (bignas's largest; medians in turns on one thread, executorch 1.5.1, busy x86-64 with AMX). XNNPACK averages no
    integers: average pools compute in float32.

    executorch aborts the process where XNNPACK refuses a graph as it makes its kernels: grids that are too far apart
    for it are coarsened, or their layers compute in float32.
    """

    format: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    pixel_input: ClassVar[Input | None] = Input("NHWC", "uint8")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    batches: ClassVar[Literal["one", "fixed", "any"]] = "fixed"
    mixes: ClassVar[bool] = True
    in_rings: ClassVar[bool] = True
    runtime: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "torch")
    extra: ClassVar[str] = "executorch"

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`."""
        with _quiet():
            from executorch.exir._serialize._program import PTEFile, serialize_pte_binary

            graph = _Graph(tensors, replace(self.form, keep=self.kept(layers))).write(layers)
            batch, channels, size = self.form.batch or 1, layers[0].in_channels, layers[0].in_size
            image = (size, size, channels) if self.takes.layout == "NHWC" else (channels, size, size)
            program = _program(graph, (batch, *image), self.takes.dtype, (batch, layers[-1].out_channels))
            data = bytes(serialize_pte_binary(PTEFile(program), extract_delegate_segments=True))
        return Artifact(path, self.format, self.precision, write_pieces(path, [data]))

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        import torch
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        return lambda image: method.execute([torch.from_numpy(image)])[0].numpy()

    def runner(self, path: Path) -> Run:
        """See `Exporter`; refuses what executorch's own kernels would run, which are slow."""
        with _quiet():
            from executorch.exir._serialize._program import deserialize_pte_binary

            try:
                (plan,) = deserialize_pte_binary(path.read_bytes()).program.execution_plan
            except Exception as error:  # what is no program fails in executorch's readers in many ways
                raise ExportError(f"executorch cannot run {path}: {error}") from None
            if plan.operators or [delegate.id for delegate in plan.delegates] != [_BACKEND]:
                reason = "it does not run as a whole in XNNPACK, and executorch's own kernels are slow"
                raise ExportError(f"executorch cannot run {path}: {reason}")
            return super().runner(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Imports of executorch and calls of its Python code, without what they and torch on their behalf warn of.

    Raises:
        ExportError: executorch is not installed.
    """
    pytree = logging.getLogger("torch.utils._pytree")
    level = pytree.level
    pytree.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # executorch's ExperimentalWarning is one
            yield
    except ImportError as error:
        raise ExportError(f"executorch is not installed: pip install 'hwnas[executorch]' ({error})") from None
    finally:
        pytree.setLevel(level)
