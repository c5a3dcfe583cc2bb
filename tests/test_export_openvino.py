"""OpenVINO files compute what the network does."""

import sys

import numpy as np
import pytest

from hwnas.errors import ExportError
from hwnas.exporters.base import Pixels, exporter, random_tensors
from hwnas.exporters.openvino import OpenvinoExporter
from hwnas.layers import lower
from hwnas.testing import ExporterContract, random_images, tensors_with_ranges, tiny_space, trained_network

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'hwnas[openvino]'")


class TestOpenvinoExporter(ExporterContract):
    @pytest.fixture(params=OpenvinoExporter.precisions)
    def exporter(self, request):
        return exporter("openvino", request.param)


def test_precisions(tmp_path):
    """Weights shrink, convolutions of int8 run on integers, and the logits stay close."""
    space = tiny_space()
    network = trained_network(lower(space, space.largest()))
    tensors = tensors_with_ranges(network.layers, network, random_images(network.layers, 16, seed=0))
    images = random_images(network.layers, 16, seed=1)
    sizes, logits = {}, {}
    for precision in ("fp32", "fp16", "int8"):
        writer = exporter("openvino", precision)
        path = writer.write(network.layers, tensors, tmp_path / f"{precision}.xml").path
        sizes[precision] = path.with_suffix(".bin").stat().st_size
        logits[precision] = writer.infer(path, images)
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.6
    assert sizes["int8"] / sizes["fp32"] < 0.5
    assert 0 < np.abs(logits["fp16"] - logits["fp32"]).max() < 0.05
    assert np.corrcoef(logits["int8"].ravel(), logits["fp32"].ravel())[0, 1] > 0.98
    compiled = openvino.Core().compile_model(tmp_path / "int8.xml", "CPU")
    kernels = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    ran = [k["runtimePrecision"].astype(str) for k in kernels if k["layerType"].astype(str) == "Convolution"]
    assert ran
    assert {*ran} <= {"i8", "u8"}


@pytest.mark.parametrize("precision", OpenvinoExporter.precisions)
def test_takes_pixels_in_any_number(precision, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    writer = exporter("openvino", precision, batch=None, pixels=Pixels((0.5,), (0.2,)))
    path = writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.xml").path
    model = openvino.Core().read_model(path)
    assert (str(model.input().partial_shape), model.input().element_type) == ("[?,28,28,1]", openvino.Type.u8)
    assert (str(model.output().partial_shape), model.output().element_type) == ("[?,10]", openvino.Type.f32)
    run = writer.load(path)
    images = np.random.default_rng(1).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    np.testing.assert_allclose(run(images)[3:], run(images[3:]), rtol=1e-3, atol=1e-4)


def test_without_openvino(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    space = tiny_space()
    layers = lower(space, space.smallest())
    with pytest.raises(ExportError, match=r"OpenVINO is not installed: pip install 'hwnas\[openvino\]'"):
        exporter("openvino").write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.xml")
    with pytest.raises(ExportError, match=r"OpenVINO is not installed: pip install 'hwnas\[openvino\]'"):
        exporter("openvino").infer(tmp_path / "m.xml", np.zeros((1, 1, 28, 28), dtype=np.float32))
