"""For TensorRT: the ONNX file that an engine is built from, on the GPU that it is for."""

from __future__ import annotations

from typing import ClassVar

from hwnas.exporters.onnx import OnnxExporter


class TensorrtExporter(OnnxExporter):
    """Writes the ONNX files that TensorRT's parser takes; int8 ones without zero points.

    An engine fits one kind of GPU and one version of TensorRT, and is no file to ship: a bundle has a script that
    builds it (`hwnas.bundles.scripts`). The file is run, and checked, in onnxruntime.
    """

    format: ClassVar[str] = "tensorrt"
    file_format: ClassVar[str] = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8-symmetric")
    runtime: ClassVar[str] = "onnxruntime"
