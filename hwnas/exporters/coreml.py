"""Core ML's ML programs (`.mlpackage`), written straight from the list of layers: no torch, no coremltools.

Only running one in Core ML needs coremltools, and macOS. Elsewhere hwnas reads the written package back, and computes
what its program says (`hwnas.exporters.mil`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import ExportError, InputError
from hwnas.exporters import mil
from hwnas.exporters.base import LOGITS, Artifact, Exporter, Form, Input, Run, folded, half, tensor, write_pieces
from hwnas.layers import IMAGE, Layer

_MOST_IMAGES = 1024  # in a call of a program that takes any number: Core ML wants a bound

_ACTIVATIONS = {"relu": "relu", "swish": "silu", "sigmoid": "sigmoid"}  # those that are one operation


class _Value(NamedTuple):
    """A tensor of the program: its name, and its shape; None for any number of images."""

    name: str
    shape: tuple[int | None, ...]


class _Writer:
    """Adds layers to a program.

    Names are those of the layers with `_` for `.`, as Core ML takes only letters, digits and `_`.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], precision: str) -> None:
        self._tensors, self._precision = tensors, precision
        self._messages = mil.messages()
        self._operations: list[Any] = []
        self._constants: dict[str, _Value] = {}
        self._blobs: list[NDArray[Any]] = []
        self._num_bytes = mil.STORAGE.size

    def model(self, layers: Sequence[Layer], form: Form) -> Any:
        """The message of a network's model; `weights` has what it refers to."""
        m, first, last = self._messages, layers[0], layers[-1]
        image = _Value(IMAGE, (form.batch, first.in_channels, first.in_size, first.in_size))
        made = {IMAGE: self._cast(image, f"{IMAGE}_fp16", "fp16") if self._precision == "fp16" else image}
        for layer in layers:
            name = re.sub(r"\W", "_", layer.name)
            if layer is last:
                name = f"{LOGITS}_fp16" if self._precision == "fp16" else LOGITS
            made[layer.name] = self._add(layer, name, [made[source] for source in layer.inputs])
        logits = made[last.name]
        if self._precision == "fp16":
            logits = self._cast(logits, LOGITS, "fp32")
        block = m.Block(outputs=[LOGITS], operations=self._operations)
        main = m.Function(
            inputs=[m.NamedType(name=IMAGE, type=self._type("fp32", image.shape))],
            opset=mil.OPSET,
            block_specializations=[m.BlockEntry(key=mil.OPSET, value=block)],
        )
        return m.Model(
            specificationVersion=mil.SPECIFICATION,
            description=m.ModelDescription(
                input=[m.Feature(name=IMAGE, **self._image(image, pixels=form.pixels is not None))],
                output=[m.Feature(name=LOGITS, shortDescription="logits of the classes", type=self._array(logits))],
                metadata=m.Metadata(shortDescription="image classifier", author="hwnas"),
            ),
            mlProgram=m.Program(version=1, functions=[m.FunctionEntry(key="main", value=main)]),
        )

    def weights(self) -> Iterator[bytes | memoryview]:
        """The weight file, piece by piece."""
        yield mil.STORAGE.pack(len(self._blobs), mil.STORAGE_VERSION)
        start = mil.STORAGE.size
        for blob in self._blobs:
            kind = mil.BLOB_TYPES[self._precision]
            yield mil.BLOB.pack(mil.SENTINEL, kind, blob.nbytes, start + mil.BLOB.size)
            yield blob.reshape(-1).view(np.uint8).data
            yield bytes(-blob.nbytes % mil.ALIGN)
            start += mil.BLOB.size + blob.nbytes + -blob.nbytes % mil.ALIGN

    # ------------------------------------------------------------ layers

    def _add(self, layer: Layer, name: str, inputs: list[_Value]) -> _Value:
        source = inputs[0]
        shape = (source.shape[0], layer.out_channels, layer.out_size, layer.out_size)
        match layer.kind:
            case "conv":
                weight, bias = folded(layer, self._tensors)
                constants = {"weight": self._weight(f"{name}_weight", weight)}
                if bias is not None:
                    constants["bias"] = self._weight(f"{name}_bias", bias)
                conv = _Value(f"{name}_preactivation" if layer.activation else name, shape)
                self._operation(
                    "conv", conv, x=source, **constants, strides=[layer.stride] * 2, pad_type="custom",
                    pad=[layer.kernel // 2] * 4, dilations=[1, 1], groups=layer.groups,
                )  # fmt: skip
                return self._activation(layer, conv, name) if layer.activation else conv
            case "linear":
                weight = tensor(self._tensors, f"{layer.name}.weight", layer.weight_shape)
                bias = tensor(self._tensors, f"{layer.name}.bias", (layer.out_channels,))
                flat = self._operation("squeeze", _Value(f"{name}_flat", source.shape[:2]), x=source, axes=[2, 3])
                constants = {"weight": self._weight(f"{name}_weight", weight)}
                constants["bias"] = self._weight(f"{name}_bias", bias)
                return self._operation("linear", _Value(name, shape[:2]), x=flat, **constants)
            case "avg_pool":
                beyond = layer.in_size % 2
                return self._operation(
                    "avg_pool", _Value(name, shape), x=source, kernel_sizes=[2, 2], strides=[2, 2], pad_type="custom",
                    pad=[0, beyond, 0, beyond], exclude_padding_from_average=True, ceil_mode=False,
                )  # fmt: skip
            case "global_pool":
                return self._operation("reduce_mean", _Value(name, shape), x=source, axes=[2, 3], keep_dims=True)
            case "scale":
                return self._operation("mul", _Value(name, shape), x=source, y=inputs[1])
            case "add":
                return self._operation("add", _Value(name, shape), x=source, y=inputs[1])

    def _activation(self, layer: Layer, source: _Value, name: str) -> _Value:
        output = _Value(name, source.shape)
        if layer.activation in _ACTIVATIONS:
            return self._operation(_ACTIVATIONS[layer.activation], output, x=source)
        slope = {"alpha": 1 / 6, "beta": 0.5}
        if layer.activation == "h-sigmoid":
            return self._operation("sigmoid_hard", output, x=source, **slope)
        gate = self._operation("sigmoid_hard", _Value(f"{name}_gate", source.shape), x=source, **slope)
        return self._operation("mul", output, x=source, y=gate)

    def _cast(self, source: _Value, name: str, dtype: Literal["fp16", "fp32"]) -> _Value:
        return self._operation("cast", _Value(name, source.shape), dtype, x=source, dtype=dtype)

    # ------------------------------------------------------------ messages

    def _operation(self, kind: str, output: _Value, output_type: str = "", /, **inputs: Any) -> _Value:
        """An operation; inputs that are no tensors of the program become constants."""
        m = self._messages
        arguments = []
        for key, value in inputs.items():
            name = (value if isinstance(value, _Value) else self._constant(key, value)).name
            arguments.append(m.ArgumentEntry(key=key, value=m.Argument(arguments=[m.Binding(name=name)])))
        made = m.NamedType(name=output.name, type=self._type(output_type or self._precision, output.shape))
        attributes = [m.ValueEntry(key="name", value=self._immediate("string", (), [output.name]))]
        self._operations.append(m.Operation(type=kind, inputs=arguments, outputs=[made], attributes=attributes))
        return output

    def _constant(self, key: str, value: str | bool | int | float | list[int]) -> _Value:
        """A constant argument, of which all operations with the same one have one."""
        values = value if isinstance(value, list) else [value]
        name = re.sub(r"\W", "_", "_".join([key, *map(str, values)]))
        shape = (len(values),) if isinstance(value, list) else ()
        types = {str: "string", bool: "bool", int: "int32", float: self._precision}
        return self._const(name, shape, self._immediate(types[type(values[0])], shape, values))

    def _weight(self, name: str, value: NDArray[Any]) -> _Value:
        m = self._messages
        value = half(name, value) if self._precision == "fp16" else value
        self._blobs.append(np.ascontiguousarray(value, dtype=mil.DTYPES[self._precision]))
        blob = m.Blob(fileName=mil.WEIGHTS_IN_PROGRAM, offset=self._num_bytes)
        size = self._blobs[-1].nbytes
        self._num_bytes += mil.BLOB.size + size + -size % mil.ALIGN
        kind = self._type(self._precision, value.shape)
        return self._const(name, value.shape, m.Value(type=kind, blobFileValue=blob))

    def _const(self, name: str, shape: tuple[int, ...], value: Any) -> _Value:
        if name not in self._constants:
            m = self._messages
            attributes = [
                m.ValueEntry(key="name", value=self._immediate("string", (), [name])),
                m.ValueEntry(key="val", value=value),
            ]
            made = m.NamedType(name=name, type=value.type)
            self._operations.append(m.Operation(type="const", outputs=[made], attributes=attributes))
            self._constants[name] = _Value(name, shape)
        return self._constants[name]

    def _immediate(self, dtype: str, shape: tuple[int, ...], values: Sequence[Any]) -> Any:
        m = self._messages
        match dtype:
            case "fp16":
                stored = {"bytes": m.Bytes(values=np.array(values, dtype=mil.DTYPES[dtype]).tobytes())}
            case "fp32":
                stored = {"floats": m.Floats(values=values)}
            case "int32":
                stored = {"ints": m.Ints(values=values)}
            case "bool":
                stored = {"bools": m.Bools(values=values)}
            case _:
                stored = {"strings": m.Strings(values=values)}
        immediate = m.Immediate(tensor=m.TensorValue(**stored))
        return m.Value(type=self._type(dtype, shape), immediateValue=immediate)

    def _type(self, dtype: str, shape: tuple[int | None, ...]) -> Any:
        m = self._messages
        sides = [
            m.Dimension(unknown=m.Unknown()) if side is None else m.Dimension(constant=m.Constant(size=side))
            for side in shape
        ]
        return m.ValueType(tensorType=m.TensorType(dataType=mil.TYPES[dtype], rank=len(shape), dimensions=sides))

    def _image(self, image: _Value, *, pixels: bool) -> dict[str, Any]:
        """How the input is described."""
        m, (_, channels, height, width) = self._messages, image.shape
        if not pixels:
            return {"shortDescription": "image, (pixel / 255 - mean) / std", "type": self._array(image, default=1)}
        space = {1: mil.GREY, 3: mil.RGB}.get(channels or 0)
        if space is None:
            raise ExportError(f"Core ML takes pictures of 1 or 3 channels, not {channels}: export it without pixels")
        picture = m.ImageType(width=width, height=height, colorSpace=space)
        return {"shortDescription": "image", "type": m.FeatureType(imageType=picture)}

    def _array(self, value: _Value, default: int | None = None) -> Any:
        """A feature of the model; one of any number of images has a range, and a `default`, only as an input."""
        m, array = self._messages, self._messages.ArrayType(dataType=mil.ARRAY_OF_FLOATS)
        if value.shape[0] is not None:
            array.shape.extend(value.shape)
        elif default is not None:
            array.shape.extend([default, *value.shape[1:]])
            ranges = [(1, _MOST_IMAGES), *((side, side) for side in value.shape[1:])]
            array.shapeRange.CopyFrom(
                m.ShapeRange(sizeRanges=[m.SizeRange(lowerBound=low, upperBound=high) for low, high in ranges])
            )
        return m.FeatureType(multiArrayType=array)


def _contents() -> str:
    """`Manifest.json` of a package; coremltools draws its identifiers anew each time."""
    model, weights = (str(uuid5(NAMESPACE_URL, f"https://hwnas/{name}")) for name in ("model.mlmodel", "weights"))
    entries = {
        model: ("CoreML Model Specification", "model.mlmodel"),
        weights: ("CoreML Model Weights", "weights"),
    }
    items = {
        key: {"author": "com.apple.CoreML", "description": text, "name": name, "path": f"com.apple.CoreML/{name}"}
        for key, (text, name) in entries.items()
    }
    whole = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": model}
    return json.dumps(whole, indent=4) + "\n"


class CoremlExporter(Exporter):
    """Writes packages for iOS 15, macOS 12 and later: the oldest with ML programs.

    The input is `image`, float32 (batch, in_channels, resolution, resolution), normalised, or a picture of `pixels`,
    one at a time, as Vision and `MLFeatureValue` give it; the output `logits`, float32 (batch, num_classes). fp16
    computes in 16 bits between the two, which the Neural Engine demands. Of programs for any number of images (up to
    1,024), it runs only the default of one (https://developer.apple.com/forums/thread/724930).
    """

    format: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage"
    pixel_input: ClassVar[Input | None] = Input("NHWC", "uint8")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    batches: ClassVar[Literal["one", "fixed", "any"]] = "any"
    runtime: ClassVar[str] = (
        "Core ML"
        if sys.platform == "darwin"
        else "hwnas's interpreter of Core ML programs (Core ML itself runs on macOS only)"
    )
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    extra: ClassVar[str] = "coreml" if sys.platform == "darwin" else ""  # elsewhere nothing of it is used

    def __init__(self, form: Form = Form()) -> None:  # noqa: B008 - it is frozen
        super().__init__(form)
        if form.pixels is not None and form.batch != 1:
            raise InputError("Core ML takes pictures one at a time: give batch 1, or normalised images")

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`; the hash is of all files of the package, in the order of their paths."""
        writer = _Writer(tensors, self.precision)
        model = writer.model(layers, self.form).SerializeToString(deterministic=True)
        files = {"Manifest.json": [_contents().encode()], mil.MODEL: [model], mil.WEIGHTS: writer.weights()}
        digest = hashlib.sha256()
        work = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
        try:
            for name in sorted(files):
                part = work / path.name / name
                part.parent.mkdir(parents=True, exist_ok=True)
                write_pieces(part, _hashed(files[name], digest))
            if path.exists():
                path.rename(work / "old")
            (work / path.name).rename(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Artifact(path, self.format, self.precision, digest.hexdigest())

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        import coremltools

        # The other units compute in 16 bits, also in fp32 programs.
        model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
        is_picture = model.get_spec().description.input[0].type.HasField("imageType")

        def run(image: NDArray[Any]) -> NDArray[np.float32]:
            if not is_picture:
                return model.predict({"image": image})["logits"]  # type: ignore[no-any-return]
            from PIL import Image

            pixels = image[0, :, :, 0] if image.shape[3] == 1 else image[0]
            return model.predict({"image": Image.fromarray(pixels)})["logits"]  # type: ignore[no-any-return]

        return run

    def _open(self, path: Path) -> Run:
        """See `Exporter`; where there is no Core ML, the interpreter of `hwnas.exporters.mil`."""
        return self.load(path) if sys.platform == "darwin" else mil.interpreter(path)


def _hashed(pieces: Any, digest: Any) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece
