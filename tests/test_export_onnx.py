"""ONNX files compute what the network does."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import exporter, formats, random_tensors
from hwnas.exporters.onnx import OnnxExporter, onnx_model
from hwnas.layers import Layer, lower
from hwnas.space import SearchSpace
from hwnas.testing import ExporterContract, read_layers, tiny_space


class TestOnnxExporter(ExporterContract):
    @pytest.fixture(params=OnnxExporter.precisions)
    def exporter(self, request):
        return exporter("onnx", request.param)


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("channels", [3, 16, 24])  # onnxruntime has two implementations
def test_average_pool_of_every_size(size, channels, tmp_path):
    options = {"in_channels": channels, "out_channels": channels, "in_size": size}
    layers = (
        Layer(name="a", kind="conv", inputs=("image",), **options),
        Layer(name="b", kind="avg_pool", inputs=("a",), kernel=2, stride=2, **options),
        Layer(name="c", kind="conv", inputs=("b",), **options | {"in_size": -(-size // 2)}),
    )
    weight = np.eye(channels, dtype=np.float32)[:, :, None, None]
    # The pooled map itself, as the "logits" of a flat graph: the identity before and after keeps onnxruntime's layout.
    model = onnx_model(layers, {"a.conv.weight": weight, "c.conv.weight": weight})
    model.graph.output[0].type.tensor_type.ClearField("shape")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))
    expected = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(images)
    np.testing.assert_allclose(OnnxExporter().infer(path, images.numpy()), expected.numpy(), atol=1e-6)


def test_model_is_valid_and_named():
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.smallest())
    model = onnx_model(layers, random_tensors(layers, np.random.default_rng(0)))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["logits"]
    made = {name for node in model.graph.node for name in node.output}
    assert made >= {layer.name for layer in layers[:-1]}
    assert {node.op_type for node in model.graph.node}.isdisjoint({"BatchNormalization"})


def test_file_holds_the_model(tmp_path):
    space = tiny_space()
    layers = lower(space, space.largest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    artifact = OnnxExporter().write(layers, tensors, tmp_path / "model.onnx")
    data = artifact.path.read_bytes()
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    model = onnx_model(layers, tensors)
    assert onnx.load_from_string(data) == model
    assert len(model.SerializeToString()) == len(data)  # one canonical encoding, not merely one that parses


@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3", "tiny"])
def test_layers_can_be_read_back(name, tmp_path):
    space = SearchSpace.load(name)
    layers = lower(space, space.sample(np.random.default_rng(0)))
    path = tmp_path / "model.onnx"
    OnnxExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    folded = [replace(layer, norm=False, residual=False, bias=layer.bias or layer.norm) for layer in layers]
    assert list(read_layers(path)) == folded


def test_folds_in_double_precision():
    layers = (Layer(name="a", kind="conv", inputs=("image",), in_channels=1, out_channels=2, in_size=1, norm=True),)
    tensors = {
        "a.conv.weight": np.array([[[[3.0]]], [[[1e-3]]]], dtype=np.float32),
        "a.norm.weight": np.array([2.0, 1.0], dtype=np.float32),
        "a.norm.bias": np.array([0.5, 1e3], dtype=np.float32),
        "a.norm.running_mean": np.array([1.0, 7.0], dtype=np.float32),
        "a.norm.running_var": np.array([4.0, 1e-6], dtype=np.float32),
    }
    weight, bias = (onnx.numpy_helper.to_array(t) for t in onnx_model(layers, tensors).graph.initializer)
    scale = np.array([2, 1]) / np.sqrt(tensors["a.norm.running_var"].astype(np.float64) + 1e-5)
    np.testing.assert_array_equal(weight.ravel(), (np.array([3, np.float32(1e-3)]) * scale).astype(np.float32))
    np.testing.assert_array_equal(bias, (np.array([0.5, 1e3]) - np.array([1, 7]) * scale).astype(np.float32))


@pytest.mark.parametrize("name", SearchSpace.names())
@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_random_activations_keep_their_size(name, end, tmp_path):
    space = SearchSpace.load(name)
    layers = lower(space, replace(getattr(space, end)(), resolution=64))
    OnnxExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.onnx")
    images = np.random.default_rng(1).standard_normal((1, 3, 64, 64), dtype=np.float32)
    logits = OnnxExporter().infer(tmp_path / "m.onnx", images)
    assert 1e-4 < logits.std() < 10


def test_uncalibrated_network():
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    del tensors["stem.norm.running_mean"]
    with pytest.raises(ExportError, match=r"no tensor 'stem\.norm\.running_mean': calibrate"):
        onnx_model(layers, tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    path = tmp_path / "model.onnx"
    old = OnnxExporter().write(layers, tensors, path)
    with pytest.raises(ExportError):
        OnnxExporter().write(layers, tensors | {"classifier.bias": np.zeros(3)}, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == old.sha256
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_format():
    assert {"executorch", "ncnn", "onnx", "openvino", "tensorrt", "tflite", "torch"} <= set(formats())
    with pytest.raises(InputError, match=f"format 'tflight' is not one of {', '.join(formats())}"):
        exporter("tflight")


def test_is_fast(tmp_path):
    space = tiny_space()
    layers = lower(space, space.largest())

    def seconds():
        started = time.perf_counter()
        OnnxExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.onnx")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.05  # 0.01 s on a quiet machine
