"""For TensorRT: the ONNX file that an engine is built from, on the GPU that it is for."""

from __future__ import annotations

from typing import ClassVar

from hwnas.exporters.onnx import OnnxExporter


class TensorrtExporter(OnnxExporter):
    """Writes the ONNX files that TensorRT's parser takes; int8 is `OnnxExporter`'s `int8-symmetric`.

    An engine fits one kind of GPU and one version of TensorRT, and is no file to ship: a bundle has a script that
    builds it (`hwnas.bundles.scripts`). The file is run, and checked, in onnxruntime. TensorRT reads weights in float16
    from version 8.4 on, pixels from 8.5 on (onnx-tensorrt's docs/Changelog.md); from 11 on an fp16 engine needs an fp16
    file, while older ones also make it from fp32.
    """

    format: ClassVar[str] = "tensorrt"
    file_format: ClassVar[str] = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")

    @property
    def file_precision(self) -> str:
        """That of an ONNX file."""
        return "int8-symmetric" if self.precision == "int8" else self.precision
