"""Core ML packages say what the network computes."""

import pytest

from hwnas.exporters.base import exporter
from hwnas.testing import ExporterContract


class TestCoremlExporter(ExporterContract):
    @pytest.fixture(params=["fp32", "fp16"])
    def exporter(self, request):
        return exporter("coreml", request.param)
