"""ONNX files compute what the network does."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from hwnas.bundles.parity import Parity
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import Form, Pixels, exporter, formats, random_tensors
from hwnas.exporters.onnx import OnnxExporter, onnx_model
from hwnas.layers import Layer, lower
from hwnas.space import SearchSpace
from hwnas.testing import (
    ExporterContract,
    random_images,
    read_layers,
    tensors_with_ranges,
    tiny_space,
    trained_network,
)

PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLOAT, HALF, BYTE = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8


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


def types_and_shapes(values):
    """Of the inputs or outputs of a graph."""
    types = [value.type.tensor_type for value in values]
    return [(each.elem_type, [side.dim_param or side.dim_value for side in each.shape.dim]) for each in types]


@pytest.mark.parametrize("precision", OnnxExporter.precisions)
@pytest.mark.parametrize("batch", [1, 5, None])
@pytest.mark.parametrize("pixels", [None, PIXELS])
def test_says_what_it_takes(precision, batch, pixels, tmp_path):
    """Also in the types and shapes of what is in between, which the checker works out."""
    space = SearchSpace.load("tiny", num_classes=7)
    layers = lower(space, replace(space.smallest(), resolution=32))
    path = tmp_path / "m.onnx"
    exporter("onnx", precision, batch=batch, pixels=pixels).write(
        layers, random_tensors(layers, np.random.default_rng(0)), path
    )
    onnx.checker.check_model(path, full_check=True)
    graph, images = onnx.load(path).graph, batch or "batch"
    taken = (FLOAT, [images, 3, 32, 32]) if pixels is None else (BYTE, [images, 32, 32, 3])
    assert types_and_shapes(graph.input) == [taken]
    assert types_and_shapes(graph.output) == [(FLOAT, [images, 7])]


# -------------------------------------------------------------------- float16


@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3", "tiny"])
def test_float16_passes_the_gate(name, tmp_path):
    """What onnxruntime computes from the file, and what torch does in arithmetic that is float16 itself."""
    space = SearchSpace.load(name, num_classes=10)
    layers = lower(space, replace(space.sample(np.random.default_rng(0)), resolution=64))
    network, images = trained_network(layers), random_images(layers, 16, seed=1)
    tensors = tensors_with_ranges(layers, network, images)
    expected = network(torch.from_numpy(images)).numpy()
    sizes = [
        exporter("onnx", precision).write(layers, tensors, tmp_path / f"{precision}.onnx").path.stat().st_size
        for precision in ("fp32", "fp16")
    ]
    assert 0.49 < sizes[1] / sizes[0] < 0.56
    found = exporter("onnx", "fp16").infer(tmp_path / "fp16.onnx", images)
    in_half = network.half()(torch.from_numpy(images).half()).float().numpy()
    for logits in (found, in_half):
        assert not np.array_equal(logits, expected)
        parity = Parity.of(expected, logits, "fp16", "onnxruntime")
        assert parity.passed, str(parity)


@pytest.mark.parametrize("activation", ["relu", "swish", "h-swish", "sigmoid", "h-sigmoid"])
@pytest.mark.parametrize("pixels", [None, Pixels((0.5,), (0.2,))])
def test_float16_is_all_of_it(activation, pixels):
    """Weights and what is in between; a checker infers that, from the one cast at each end."""
    space = replace(tiny_space(), activation=activation)
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    form = Form(precision="fp16", pixels=pixels)
    if pixels is not None:
        layers, tensors = pixels.normalise(layers, tensors)
    model = onnx.shape_inference.infer_shapes(onnx_model(layers, tensors, form), check_type=True, strict_mode=True)
    assert {weight.data_type for weight in model.graph.initializer} == {HALF}
    assert {value.type.tensor_type.elem_type for value in model.graph.value_info} == {HALF}
    assert [node.op_type for node in model.graph.node].count("Cast") == 2


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("stem.conv.weight", 7e4, "stem.weight reaches 69999"),
        ("stem.norm.bias", -7e4, "stem.bias reaches 70000"),
        ("classifier.weight", 7e4, "classifier.weight reaches 70000"),
        ("classifier.bias", np.nan, "classifier.bias reaches nan"),
        ("stage1.block1.depthwise.range", [-1e5, 1], "the output of stage1.block1.depthwise reaches 100000"),
        ("stem.preactivation.range", [-1, 1e5], "the output of stem.preactivation reaches 100000"),
    ],
)
def test_float16_refuses_what_it_cannot_hold(name, value, what, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors[name] = np.broadcast_to(np.float32(value), tensors[name].shape)
    exporter("onnx").write(layers, tensors, tmp_path / "fp32.onnx")
    with pytest.raises(ExportError, match=rf"{what}.*, and fp16 ends at 65504: export fp32"):
        exporter("onnx", "fp16").write(layers, tensors, tmp_path / "fp16.onnx")
    assert not (tmp_path / "fp16.onnx").exists()


def test_float16_rounds_the_smallest_to_zero(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["classifier.weight"] = np.full_like(tensors["classifier.weight"], 1e-9)
    tensors["classifier.bias"] = np.linspace(-1, 1, 10, dtype=np.float32)
    writer = exporter("onnx", "fp16")
    path = writer.write(layers, tensors, tmp_path / "m.onnx").path
    (logits,) = writer.infer(path, np.ones((1, 1, 28, 28), dtype=np.float32))
    np.testing.assert_array_equal(logits, tensors["classifier.bias"].astype(np.float16))


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
