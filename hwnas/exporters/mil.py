"""Core ML's ML programs: the messages that they are stored in, and an interpreter of those that hwnas writes.

A package (`.mlpackage`) is a folder: `Manifest.json`, the model as a protobuf message, and a file with its weights. The
interpreter reads these files as they are on the disk, which is as far as one gets without macOS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwnas.exporters.base import LOGITS, Run
from hwnas.layers import IMAGE

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "Data/com.apple.CoreML/model.mlmodel"  # in the package
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
WEIGHTS_IN_PROGRAM = "@model_path/weights/weight.bin"  # what the program calls the latter

# The oldest version with ML programs, and its set of operations: iOS 15 and macOS 12.
SPECIFICATION, OPSET = 6, "CoreML5"

# Numbers of https://github.com/apple/coremltools/tree/main/mlmodel/format, in Model.proto, FeatureTypes.proto and
# MIL.proto: what we write of a model; `*` may come many times. Maps are lists of entries, which is how they are stored.
_SCHEMA = """
Model: specificationVersion 1 int32, description 2 ModelDescription, mlProgram 502 Program
ModelDescription: input 1 Feature*, output 10 Feature*, metadata 100 Metadata
Metadata: shortDescription 1 string, author 3 string
Feature: name 1 string, shortDescription 2 string, type 3 FeatureType
FeatureType: imageType 4 ImageType, multiArrayType 5 ArrayType
ImageType: width 1 int64, height 2 int64, colorSpace 3 int32
ArrayType: shape 1 int64*, dataType 2 int32, shapeRange 31 ShapeRange
ShapeRange: sizeRanges 1 SizeRange*
SizeRange: lowerBound 1 uint64, upperBound 2 int64
Program: version 1 int64, functions 2 FunctionEntry*
FunctionEntry: key 1 string, value 2 Function
Function: inputs 1 NamedType*, opset 2 string, block_specializations 3 BlockEntry*
BlockEntry: key 1 string, value 2 Block
Block: outputs 2 string*, operations 3 Operation*
Operation: type 1 string, inputs 2 ArgumentEntry*, outputs 3 NamedType*, attributes 5 ValueEntry*
ArgumentEntry: key 1 string, value 2 Argument
Argument: arguments 1 Binding*
Binding: name 1 string
NamedType: name 1 string, type 2 ValueType
ValueType: tensorType 1 TensorType
TensorType: dataType 1 int32, rank 2 int64, dimensions 3 Dimension*
Dimension: constant 1 Constant, unknown 2 Unknown
Constant: size 1 uint64
Unknown: variadic 1 bool
ValueEntry: key 1 string, value 2 Value
Value: type 2 ValueType, immediateValue 3 Immediate, blobFileValue 5 Blob
Immediate: tensor 1 TensorValue
TensorValue: floats 1 Floats, ints 2 Ints, bools 3 Bools, strings 4 Strings, bytes 7 Bytes
Floats: values 1 float*
Ints: values 1 int32*
Bools: values 1 bool*
Strings: values 1 string*
Bytes: values 1 bytes
Blob: fileName 1 string, offset 2 uint64
"""
TYPES = {"bool": 1, "string": 2, "fp16": 10, "fp32": 11, "int32": 23}
ARRAY_OF_FLOATS = 65568
GREY, RGB = 10, 20

# The weight file, MILBlob/Blob/StorageFormat.hpp there: a header, then for each tensor where it is, and itself.
ALIGN = 64
STORAGE = struct.Struct("<II56x")  # number of tensors, version
STORAGE_VERSION = 2
BLOB = struct.Struct("<IIQQ40x")  # sentinel, type, size in bytes, where it starts
SENTINEL = 0xDEADBEEF
BLOB_TYPES = {"fp16": 1, "fp32": 2}
DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}


@cache
def messages() -> SimpleNamespace:
    """The classes of Core ML's messages, by the names in `_SCHEMA`.

    coremltools has them, too, but needs seconds to import, and torch.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="coreml.proto", package="coreml", syntax="proto3")
    for line in _SCHEMA.strip().splitlines():
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            of, number, kind = field.split()
            added = message.field.add(name=of, number=int(number), label=3 if kind.endswith("*") else 1)
            kind = kind.rstrip("*")
            if kind[0].isupper():
                added.type, added.type_name = field_type.TYPE_MESSAGE, f".coreml.{kind}"
            else:
                added.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return SimpleNamespace(
        **{
            message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"coreml.{message.name}"))
            for message in file.message_type
        }
    )


class _Declared(NamedTuple):
    """What a program says of a value: its type, and its shape with None for a side that may vary."""

    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, value_type: Any) -> _Declared:
        """Of the message."""
        tensor = value_type.tensorType
        shape = tuple(side.constant.size if side.HasField("constant") else None for side in tensor.dimensions)
        names = {number: name for name, number in TYPES.items()}
        if tensor.dataType not in names or len(shape) != tensor.rank:
            raise ValueError(f"a value has type {tensor.dataType}, and {len(shape)} axes of {tensor.rank}")
        return cls(names[tensor.dataType], shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a value of this shape may be it."""
        return len(shape) == len(self.shape) and all(
            declared in (None, side) for declared, side in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}".replace("None", "any")


class _Step(NamedTuple):
    """An operation: what it makes, how, and from which values by the names of its arguments."""

    output: str
    declared: _Declared
    compute: Callable[..., Tensor]
    inputs: dict[str, str]


def interpreter(package: Path) -> Run:
    """What a package computes, with torch on the CPU.

    Types and shapes have to be those that the program declares. Values of 16 bits are rounded to these after every
    operation, which computes in float32.

    Args:
        package: the folder.

    Returns:
        A function from what the program takes, float32 (batch, channels, height, width), or where it takes pictures
        uint8 (1, height, width, channels), to logits.

    Raises:
        ValueError: it is no program that hwnas writes, or contradicts itself.
        OSError: a file of it cannot be read.
        google.protobuf.message.DecodeError: the model is damaged.
    """
    import torch

    model = _read(package / MODEL)
    main, block = _function(model)
    source, sink = _described(model.description, main.inputs)
    constants, steps = _steps(block, _Declared.of(main.inputs[0].type), np.fromfile(package / WEIGHTS, dtype=np.uint8))
    last_use = {name: step.output for step in steps for name in step.inputs.values()}

    @torch.inference_mode()
    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        values = {**constants, IMAGE: source(images)}
        for output, declared, compute, inputs in steps:
            found = compute(**{key: values[name] for key, name in inputs.items()})
            if not declared.fits(tuple(found.shape)):
                raise ValueError(f"{output} is {tuple(found.shape)}, but the program says {declared}")
            values[output] = found.half().float() if declared.dtype == "fp16" else found
            for name in {*inputs.values()}:
                if last_use[name] == output:
                    del values[name]
        return sink(values[LOGITS])

    return run


def _read(path: Path) -> Any:
    model = messages().Model.FromString(path.read_bytes())
    size = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != size:
        raise ValueError("the model has fields that hwnas does not write")
    return model


def _function(model: Any) -> tuple[Any, Any]:
    """The program's only function, and its only block."""
    functions = {entry.key: entry.value for entry in model.mlProgram.functions}
    if (model.specificationVersion, model.mlProgram.version, [*functions]) != (SPECIFICATION, 1, ["main"]):
        raise ValueError(f"it is not an ML program of specification {SPECIFICATION}")
    main = functions["main"]
    blocks = {entry.key: entry.value for entry in main.block_specializations}
    if main.opset != OPSET or [*blocks] != [OPSET] or [*blocks[OPSET].outputs] != [LOGITS]:
        raise ValueError(f"its operations are not those of {OPSET}, or it does not give {LOGITS}")
    return main, blocks[OPSET]


def _described(
    description: Any, inputs: Any
) -> tuple[Callable[[NDArray[Any]], Tensor], Callable[[Tensor], NDArray[np.float32]]]:
    """What makes the program's input of images, and logits of its output, as they are described to programs."""
    import torch

    features = [*description.input, *description.output]
    if [feature.name for feature in features] != [IMAGE, LOGITS] or [value.name for value in inputs] != [IMAGE]:
        raise ValueError(f"its input and output are not {IMAGE} and {LOGITS}")
    given, made = (feature.type for feature in features)
    is_picture = given.HasField("imageType")
    if is_picture:
        picture = given.imageType
        channels = {GREY: 1, RGB: 3}.get(picture.colorSpace)
        described = _Declared("fp32", (1, channels, picture.height, picture.width))
    else:
        described = _array(given.multiArrayType)
    if described != _Declared.of(inputs[0].type):
        raise ValueError(f"the program takes {_Declared.of(inputs[0].type)}, and is described to take {described}")
    logits = _array(made.multiArrayType)

    def source(images: NDArray[Any]) -> Tensor:
        planes = images.transpose(0, 3, 1, 2) if is_picture else images
        if images.dtype != (np.uint8 if is_picture else np.float32) or not described.fits(planes.shape):
            raise ValueError(f"it takes {described}, not {images.dtype} {planes.shape}")
        return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))

    def sink(found: Tensor) -> NDArray[np.float32]:
        if logits.shape and not logits.fits(tuple(found.shape)):
            raise ValueError(f"{LOGITS} are {tuple(found.shape)}, and are described as {logits}")
        array: NDArray[np.float32] = found.numpy()
        return array

    return source, sink


def _array(feature: Any) -> _Declared:
    """What is described as an array; the shape is empty where none is given."""
    if feature.dataType != ARRAY_OF_FLOATS:
        raise ValueError("its input or output is no array of float32")
    shape = tuple(feature.shape)
    ranges = [(size.lowerBound, size.upperBound) for size in feature.shapeRange.sizeRanges]
    if not ranges:
        return _Declared("fp32", shape)
    if ranges[0][0] != 1 or ranges[1:] != [(side, side) for side in shape[1:]]:
        raise ValueError(f"a shape varies over {ranges}: only the number of images may")
    return _Declared("fp32", (None, *shape[1:]))


def _steps(block: Any, image: _Declared, weights: NDArray[np.uint8]) -> tuple[dict[str, Any], list[_Step]]:
    """A program's constants, floating-point ones as tensors of float32, and its operations in their order."""
    declared = {IMAGE: image}
    constants: dict[str, Any] = {}
    steps = []
    for operation in block.operations:
        if len(operation.outputs) != 1 or operation.outputs[0].name in declared:
            raise ValueError(f"an operation {operation.type} does not make one value that is new")
        output, kind = operation.outputs[0].name, operation.type
        made = declared[output] = _Declared.of(operation.outputs[0].type)
        if kind == "const":
            constants[output] = _constant(operation, made, weights)
            continue
        if kind not in OPERATIONS:
            raise ValueError(f"hwnas writes no operation {kind!r}")
        inputs = {entry.key: binding.name for entry in operation.inputs for binding in entry.value.arguments}
        missing = [name for name in inputs.values() if name not in declared or name == output]
        if missing or len(inputs) != len(operation.inputs):
            raise ValueError(f"{output} reads {missing or 'several values'}, not what is made before it")
        types = {declared[name].dtype for name in inputs.values()} & {*DTYPES}
        if (constants[inputs["dtype"]] if kind == "cast" else made.dtype) != made.dtype:
            raise ValueError(f"{output} is declared to be {made}, and cast to something else")
        if kind != "cast" and types != {made.dtype}:
            raise ValueError(f"{output} is declared to be {made}, but is made of {sorted(types)}")
        steps.append(_Step(output, made, OPERATIONS[kind], inputs))
    if LOGITS not in declared or declared[LOGITS].dtype != "fp32":
        raise ValueError(f"{LOGITS} are not made, or not in fp32")
    return constants, steps


def _constant(operation: Any, declared: _Declared, weights: NDArray[np.uint8]) -> Any:
    import torch

    value = {entry.key: entry.value for entry in operation.attributes}["val"]
    dtype, tensor = declared.dtype, value.immediateValue.tensor
    if _Declared.of(value.type) != declared:
        raise ValueError(f"{operation.outputs[0].name} is declared to be {declared}, and is something else")
    found: NDArray[Any]
    if value.HasField("blobFileValue"):
        if value.blobFileValue.fileName != WEIGHTS_IN_PROGRAM:
            raise ValueError(f"its weights are in {value.blobFileValue.fileName!r}")
        found = _blob(weights, value.blobFileValue.offset, dtype)
    elif dtype == "fp16":
        found = np.frombuffer(tensor.bytes.values, DTYPES[dtype])
    else:
        kinds = {"bool": tensor.bools, "fp32": tensor.floats, "int32": tensor.ints, "string": tensor.strings}
        found = np.array([*kinds[dtype].values])
    found = found.reshape([-1 if side is None else side for side in declared.shape])
    return torch.from_numpy(found.astype(np.float32)) if dtype in DTYPES else found.tolist()


def _blob(weights: NDArray[np.uint8], offset: int, dtype: str) -> NDArray[Any]:
    if STORAGE.unpack_from(weights.data)[1] != STORAGE_VERSION:
        raise ValueError(f"the weight file is not of version {STORAGE_VERSION}")
    sentinel, kind, size, start = BLOB.unpack_from(weights.data, offset)
    if sentinel != SENTINEL or kind != BLOB_TYPES[dtype] or offset % ALIGN or start % ALIGN:
        raise ValueError(f"there is no {dtype} tensor at {offset:,} of the weight file")
    found: NDArray[Any] = weights[start : start + size].view(DTYPES[dtype])
    return found


def _conv(
    x: Tensor, weight: Tensor, strides: list[int], pad_type: str, pad: list[int], dilations: list[int], groups: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    import torch.nn.functional as F

    if pad_type != "custom" or pad[0::2] != pad[1::2]:
        raise ValueError(f"hwnas pads no convolution by {pad_type} {pad}")
    return F.conv2d(x, weight, bias, strides, pad[0::2], dilations, groups)


def _avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int],
    exclude_padding_from_average: bool,
    ceil_mode: bool,
) -> Tensor:
    import torch.nn.functional as F

    if pad_type != "custom" or ceil_mode or not exclude_padding_from_average:
        raise ValueError(f"hwnas writes no average pool of {pad_type} {pad}")
    top, bottom, left, right = pad
    sides = (left, right, top, bottom)
    # Sums of what is there, over the numbers of what is there.
    sums, counts = (
        F.avg_pool2d(F.pad(value, sides), kernel_sizes, strides) for value in (x, x.new_ones(1, 1, *x.shape[2:]))
    )
    return sums / counts


def _squeeze(x: Tensor, axes: list[int]) -> Tensor:
    if any(x.shape[axis] != 1 for axis in axes):
        raise ValueError(f"axes {axes} of {tuple(x.shape)} are not all 1")
    return x.squeeze(axes)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


# By their names and arguments in https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
OPERATIONS: Mapping[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "avg_pool": _avg_pool,
    "cast": lambda x, dtype: x,  # rounded by what it is declared to be
    "conv": _conv,
    "linear": _linear,
    "mul": lambda x, y: x * y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims),
    "relu": lambda x: x.relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "silu": lambda x: x * x.sigmoid(),
    "squeeze": _squeeze,
}
