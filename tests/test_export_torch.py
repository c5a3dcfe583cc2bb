"""PyTorch's exported programs compute what the network does."""

import io
import zipfile

import numpy as np
import pytest
import torch

from hwnas.errors import ExportError
from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import lower
from hwnas.testing import ExporterContract, tiny_space


class TestTorchExporter(ExporterContract):
    @pytest.fixture(params=["fp32", "fp16"])
    def exporter(self, request):
        return exporter("torch", request.param)


def test_batch_norm_is_folded(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    path = exporter("torch").write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.pt2").path
    operators = {str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in operators)
    assert not any("batch_norm" in name for name in operators)


class Harm:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("archive/data/sample_inputs/model.pt", "pickle", "Weights only load failed"),
        ("archive/data/weights/model_weights_config.json", "flag", "asks for unpickling"),
        ("archive/data/constants/custom_obj_0", "pickle", "was not written by hwnas: archive/data/constants"),
    ],
)
def test_nothing_is_unpickled(member, change, message, tmp_path):
    """Where torch.export.load would."""
    space = tiny_space()
    layers = lower(space, space.smallest())
    path = exporter("torch").write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.pt2").path
    with zipfile.ZipFile(path) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    if change == "pickle":
        content = io.BytesIO()
        torch.save(Harm(), content)
        members[member] = content.getvalue()
    else:
        members[member] = members[member].replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    with zipfile.ZipFile(path, "w") as packed:
        for name, value in members.items():
            packed.writestr(name, value)
    with pytest.raises(ExportError, match=message):
        exporter("torch").infer(path, np.zeros((1, 1, 28, 28), dtype=np.float32))
