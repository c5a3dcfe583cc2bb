"""PyTorch's exported programs compute what the network does."""

import io
import zipfile

import numpy as np
import pytest
import torch

from hwnas.bundles.parity import Parity
from hwnas.errors import ExportError
from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import lower
from hwnas.testing import ExporterContract, random_images, tensors_with_ranges, tiny_space, trained_network


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


@pytest.fixture
def layers():
    space = tiny_space()
    return lower(space, space.smallest())


def test_half_precision_holds_and_computes_in_half(layers, tmp_path):
    network, images = trained_network(layers), random_images(layers, 64, seed=1)
    tensors = tensors_with_ranges(layers, network, images)
    writer = exporter("torch", "fp16")
    path = writer.write(layers, tensors, tmp_path / "m.pt2").path
    found = writer.infer(path, images)
    assert found.dtype == np.float32
    expected = network(torch.from_numpy(images)).numpy()
    assert Parity.of(expected, found, "fp16", "torch").passed
    program = torch.export.load(path)
    assert {value.dtype for value in program.state_dict.values()} == {torch.float16}
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert {node.meta["val"].dtype for node in convolutions} == {torch.float16}


def test_weights_beyond_half_precision_are_named(layers, tmp_path):
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["stage2.block1.project.norm.bias"][3] = 1e5
    with pytest.raises(
        ExportError, match=r"stage2\.block1\.project\.conv\.bias reaches 100000, and fp16 ends at 65504"
    ):
        exporter("torch", "fp16").write(layers, tensors, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_the_batch_is_free(layers, precision, tmp_path):
    writer = exporter("torch", precision, batch=None)
    path = writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.pt2").path
    run = writer.load(path)
    for count in (1, 2, 7):
        assert run(np.zeros((count, 1, 28, 28), dtype=np.float32)).shape == (count, 10)
    with pytest.raises(ExportError, match="torch cannot run"):
        writer.infer(path, np.zeros((1, 1, 29, 29), dtype=np.float32))


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
