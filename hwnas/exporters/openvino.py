"""OpenVINO's IR, a description (.xml) and the weights beside it (.bin), from our ONNX graph by OpenVINO itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray

from hwnas.errors import ExportError
from hwnas.exporters.base import Artifact, Exporter, Input, Run
from hwnas.exporters.onnx import onnx_bytes
from hwnas.layers import Layer


class OpenvinoExporter(Exporter):
    """Writes OpenVINO's `.xml` and its `.bin`.

    Their input `image` and output `logits` are those of `OnnxExporter`'s files. fp16 stores weights in 16 bits, and
    processors compute with them in float32; int8 is `OnnxExporter`'s `int8-symmetric`.
    """

    format: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    pixel_input: ClassVar[Input | None] = Input("NHWC", "uint8")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    batches: ClassVar[Literal["one", "fixed", "any"]] = "any"
    mixes: ClassVar[bool] = True
    runtime: ClassVar[str] = "OpenVINO"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`; the hash is of the `.xml` and the `.bin`, in this order."""
        precision = "int8-symmetric" if self.precision == "int8" else "fp32"
        onnx = onnx_bytes(layers, tensors, replace(self.form, precision=precision))
        try:
            import openvino
        except ImportError as error:
            raise ExportError(f"{self.runtime} is not installed: {self.install} ({error})") from None
        # Both are whole before one takes its place, first the weights.
        with TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            try:
                model = openvino.Core().read_model(onnx)
                for number, node in enumerate(model.get_ordered_ops()):
                    if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):  # counted by the process
                        node.set_friendly_name(f"{node.get_type_name()}_{number}")
                openvino.save_model(model, made, compress_to_fp16=self.precision == "fp16")
            except RuntimeError as error:
                raise ExportError(f"OpenVINO cannot write {path}: {str(error).strip().splitlines()[-1]}") from None
            digest = hashlib.sha256(made.read_bytes())
            digest.update(made.with_suffix(".bin").read_bytes())
            made.with_suffix(".bin").replace(path.with_suffix(".bin"))
            made.replace(path)
        return Artifact(path, self.format, self.precision, digest.hexdigest())

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        import openvino

        core = openvino.Core()
        # Without the first, processors with AMX compute fp32 networks in bf16.
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
        return lambda image: request.infer([image])[0]
