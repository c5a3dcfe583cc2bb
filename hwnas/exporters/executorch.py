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
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import ExportError
from hwnas.exporters.base import Artifact, Exporter, Run, folded, tensor, write_pieces
from hwnas.layers import IMAGE, Layer

_BACKEND = "XnnpackBackend"
_ALIGNMENT = 16  # of constants in the graph's data: CONSTANT_TENSOR_ALIGNMENT of executorch's xnnpack_graph_serialize
_NONE = 2**32 - 1  # xnnpack.h's XNN_INVALID_VALUE_ID
_EXTERNAL_INPUT, _EXTERNAL_OUTPUT, _KEEP_DIMS = 1, 2, 64  # its flags of these names
# How torch's pytree writes the structure of `forward(image)`, and of a single tensor as its result.
_INPUTS = (
    '[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "builtins.tuple", "context": "null", '
    '"children_spec": [{"type": null, "context": null, "children_spec": []}]}, {"type": "builtins.dict", '
    '"context": "[]", "children_spec": []}]}]'
)
_OUTPUT = '[1, {"type": null, "context": null, "children_spec": []}]'


class _Graph:
    """An XNNPACK graph in the making: feature maps are values of shape (1, size, size, channels).

    Nodes and values are written as JSON with the names of executorch's `xnnpack/serialization/schema.fbs`, whose
    flatbuffer compiler reads it: the dataclasses of the same names take five times as long on the way there.

    Args:
        tensors: see `Exporter.write`.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = tensors
        self._values: list[dict[str, Any]] = []
        self._nodes: list[dict[str, Any]] = []
        self._offsets = [{"offset": 0, "size": 0}]  # the first one stands for `not constant`
        self._data = bytearray()

    def write(self, layers: Sequence[Layer]) -> bytes:
        """The graph of a network, from an image (1, channels, size, size) to logits (1, num_classes)."""
        from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary

        size, channels = layers[0].in_size, layers[0].in_channels
        image = self._value((1, channels, size, size), external_id=0, flags=_EXTERNAL_INPUT)
        maps = {IMAGE: self._value((1, size, size, channels))}
        self._node("StaticTranspose", num_dims=4, perm=[0, 2, 3, 1], input_id=image, output_id=maps[IMAGE])
        for layer in layers:
            maps[layer.name] = self._add(layer, [maps[name] for name in layer.inputs])
        graph = XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=2,
            input_ids=[image],
            output_ids=[maps[layers[-1].name]],
            constant_data=self._offsets,
        )
        binary: bytes = serialize_xnnpack_binary(graph, self._data)
        return binary

    def _add(self, layer: Layer, inputs: list[int]) -> int:
        if layer.kind == "linear":
            return self._linear(layer, inputs[0])
        out = self._value((1, layer.out_size, layer.out_size, layer.out_channels))
        match layer.kind:
            case "conv":
                return self._conv(layer, inputs[0], out)
            case "avg_pool":
                # What lies beyond the border does not count in XNNPACK's averages.
                edge = layer.in_size % 2
                self._node(
                    "AvgPooling2d", padding_right=edge, padding_bottom=edge,
                    pooling_height=2, pooling_width=2, stride_height=2, stride_width=2,
                    input_id=inputs[0], output_id=out,
                )  # fmt: skip
            case "global_pool":
                self._node("GlobalAvgPooling2d", input_id=inputs[0], output_id=out, flags=_KEEP_DIMS)
            case "scale":
                self._node("Multiply", input1_id=inputs[0], input2_id=inputs[1], output_id=out)
            case "add":
                self._node("Add", input1_id=inputs[0], input2_id=inputs[1], output_id=out)
        return out

    def _conv(self, layer: Layer, source: int, out: int) -> int:
        weight, bias = folded(layer, self._tensors)
        limits: tuple[float, float | str] | None = None
        if layer.activation == "relu":
            limits = (0.0, "inf")
        elif layer.activation == "h-sigmoid":  # clamp(x / 6 + 1 / 2, 0, 1): all of it is part of the convolution
            weight, bias = weight / 6, (0 if bias is None else bias) / 6 + np.full(layer.out_channels, 0.5)
            limits = (0.0, 1.0)
        in_channels, out_channels = (1, 1) if layer.depthwise else (layer.in_channels, layer.out_channels)
        edge, kernel, stride = layer.kernel // 2, layer.kernel, layer.stride
        self._node(
            "DepthwiseConv2d" if layer.depthwise else "Conv2d", limits,
            padding_top=edge, padding_right=edge, padding_bottom=edge, padding_left=edge,
            kernel_height=kernel, kernel_width=kernel, subsampling_height=stride, subsampling_width=stride,
            dilation_height=1, dilation_width=1, group_input_channels=in_channels, group_output_channels=out_channels,
            groups=layer.groups, input1_id=source,
            filter_id=self._constant(weight.transpose((1, 2, 3, 0) if layer.depthwise else (0, 2, 3, 1))),
            bias_id=_NONE if bias is None else self._constant(bias), output_id=out,
        )  # fmt: skip
        if layer.activation not in ("swish", "h-swish", "sigmoid"):
            return out
        activated = self._like(out)
        if layer.activation == "h-swish":
            self._node("Hardswish", input_id=out, output_id=activated)
        else:
            self._node("Sigmoid", input_id=out, output_id=activated)
        if layer.activation == "swish":
            gate, activated = activated, self._like(out)
            self._node("Multiply", input1_id=out, input2_id=gate, output_id=activated)
        return activated

    def _linear(self, layer: Layer, source: int) -> int:
        weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
        bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,)) if layer.bias else None
        flat = self._value((1, layer.in_channels))
        self._node("StaticReshape", num_dims=2, new_shape=[1, layer.in_channels], input_id=source, output_id=flat)
        logits = self._value((1, layer.out_channels), external_id=1, flags=_EXTERNAL_OUTPUT)
        self._node(
            "FullyConnected", input1_id=flat, filter_id=self._constant(weight),
            bias_id=_NONE if bias is None else self._constant(bias), output_id=logits,
        )  # fmt: skip
        return logits

    def _node(self, kind: str, limits: tuple[float, float | str] | None = None, **fields: Any) -> None:
        """Add a node; its output is clamped to `limits`."""
        node = {"xnode_union_type": f"XNN{kind}", "xnode_union": fields}
        if limits is not None:
            node["output_min_max"] = dict(zip(("output_min", "output_max"), limits, strict=True))
        self._nodes.append(node)

    def _constant(self, array: NDArray[Any]) -> int:
        """A value that holds an array, as float32."""
        data = np.ascontiguousarray(array, dtype="<f4")
        self._data += bytes(-len(self._data) % _ALIGNMENT)
        self._offsets.append({"offset": len(self._data), "size": data.nbytes})
        self._data += data.data.cast("B")
        return self._value(data.shape, constant_buffer_idx=len(self._offsets) - 1)

    def _value(self, shape: Sequence[int], *, external_id: int = _NONE, **fields: int) -> int:
        number = len(self._values)
        value = {"num_dims": len(shape), "dims": list(shape), "external_id": external_id, "id_out": number, **fields}
        value["datatype"] = "xnn_datatype_fp32"
        self._values.append({"xvalue_union_type": "XNNTensorValue", "xvalue_union": value})
        return number

    def _like(self, value: int) -> int:
        """A value of the same shape as another."""
        return self._value(self._values[value]["xvalue_union"]["dims"])


def _program(graph: bytes, first: Layer, last: Layer) -> Any:
    """An ExecuTorch program whose `forward` runs a graph on an image, and returns its logits."""
    from executorch.exir import schema
    from executorch.exir.scalar_type import ScalarType

    image = (1, first.in_channels, first.in_size, first.in_size)
    num_bytes = -(-4 * math.prod(image) // _ALIGNMENT) * _ALIGNMENT

    def value(shape: tuple[int, ...], offset: int) -> Any:
        return schema.EValue(
            schema.Tensor(
                scalar_type=ScalarType.FLOAT,
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
        values=[value(image, 0), value((1, last.out_channels), num_bytes)],
        inputs=[0],
        outputs=[1],
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[call], stacktrace=None)],
        operators=[],
        delegates=[schema.BackendDelegate(_BACKEND, inline, compile_specs=[])],
        non_const_buffer_sizes=[0, num_bytes + 4 * last.out_channels],
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
    """Writes ExecuTorch programs (.pte) that run as a whole in XNNPACK, with float32 weights.

    The input is float32 (1, in_channels, resolution, resolution), as torch lays it out.

    XNNPACK's depthwise kernels have up to 25 weights a channel: one of 7x7 takes 50 times as long as one of 5x5
    (executorch 1.5.1, x86-64, 240 channels of 14x14).
    """

    format: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    runtime: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "torch")
    extra: ClassVar[str] = "executorch"

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`."""
        with _quiet():
            from executorch.exir._serialize._program import PTEFile, serialize_pte_binary

            program = _program(_Graph(tensors).write(layers), layers[0], layers[-1])
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
