"""PyTorch's exported programs compute what the network does."""

import numpy as np
import pytest
import torch

from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import lower
from hwnas.testing import ExporterContract, tiny_space


class TestTorchExporter(ExporterContract):
    @pytest.fixture(params=["fp32"])
    def exporter(self, request):
        return exporter("torch", request.param)


def test_batch_norm_is_folded(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    path = exporter("torch").write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.pt2").path
    operators = {str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in operators)
    assert not any("batch_norm" in name for name in operators)
