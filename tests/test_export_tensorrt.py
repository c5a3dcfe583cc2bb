"""Bundles for TensorRT: the file is what its parser takes, and the script builds with the flags of each version."""

import pytest

from hwnas.exporters.base import exporter
from hwnas.exporters.tensorrt import TensorrtExporter
from hwnas.testing import ExporterContract


class TestTensorrtExporter(ExporterContract):
    @pytest.fixture(params=TensorrtExporter.precisions)
    def exporter(self, request):
        return exporter("tensorrt", request.param)


def test_suits_devices_that_take_its_files():
    assert exporter("tensorrt").suits("onnx", "fp32")
    assert not exporter("tensorrt").suits("onnx", "int8-symmetric")
    assert exporter("onnx").suits("onnx", "fp32")
    assert not exporter("tflite").suits("onnx", "fp32")
