"""TFLite files compute what the network does; LiteRT times them."""

import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.devices import load_device
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import Form, exporter, random_tensors
from hwnas.exporters.tflite import TfliteExporter
from hwnas.layers import IMAGE, Layer, lower
from hwnas.space import SearchSpace
from hwnas.testing import (
    QUICK,
    DeviceContract,
    ExporterContract,
    largest_difference,
    random_images,
    tensors_with_ranges,
    tiny_space,
    trained_network,
)

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs hwnas[litert]")
from ai_edge_litert.interpreter import Interpreter  # noqa: E402


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.tflite"


class TestTfliteExporter(ExporterContract):
    @pytest.fixture(params=["fp32", "fp16", "int8"])
    def exporter(self, request):
        return exporter("tflite", request.param)


class TestLiteRt(DeviceContract):
    @pytest.fixture(params=["fp32", "int8"])
    def device(self, request, tmp_path):
        (tmp_path / "mine.yaml").write_text(f"transport: host\nruntime: litert\nprecision: {request.param}\n")
        with load_device("mine", tmp_path) as device:
            yield device


# -------------------------------------------------------------------- fp32


def alone(*layers):
    """Layers whose output is pooled and classified by an identity, so that all of it is seen."""
    last = layers[-1].output
    pool = Layer(
        name="pool", kind="global_pool", inputs=(last.name,), in_channels=last.channels, out_channels=last.channels,
        in_size=last.size,
    )  # fmt: skip
    classes = Layer(
        name="classifier", kind="linear", inputs=("pool",), in_channels=last.channels, out_channels=last.channels,
        in_size=1, bias=True,
    )  # fmt: skip
    return (*layers, pool, classes)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_padding_is_symmetric(size, kernel, stride, groups, path):
    layers = alone(
        Layer(
            name="a", kind="conv", inputs=(IMAGE,), in_channels=4, out_channels=4, in_size=size, kernel=kernel,
            stride=stride, groups=groups, norm=True,
        )
    )  # fmt: skip
    assert largest_difference(TfliteExporter(), layers, path) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("size", range(1, 12))
def test_average_pool_of_every_size(size, precision, path):
    """Each image has one pixel, so that the weight of each in the mean is seen."""
    options = {"in_channels": 3, "out_channels": 3}
    layers = alone(
        Layer(name="a", kind="conv", inputs=(IMAGE,), in_size=size, **options),
        Layer(name="b", kind="avg_pool", inputs=("a",), in_size=size, kernel=2, stride=2, **options),
    )
    tensors = {
        "a.conv.weight": np.eye(3, dtype=np.float32)[:, :, None, None],
        "classifier.weight": np.eye(3, dtype=np.float32),
        "classifier.bias": np.zeros(3, dtype=np.float32),
    } | {f"{name}.range": np.array([0, 1], dtype=np.float32) for name in (IMAGE, "a", "b", "pool", "classifier")}
    TfliteExporter(Form(precision=precision)).write(layers, tensors, path)
    pixels = np.eye(size * size, dtype=np.float32).reshape(-1, 1, size, size).repeat(3, axis=1)
    means = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(torch.from_numpy(pixels))
    expected = means.mean((2, 3)).numpy()
    np.testing.assert_allclose(
        TfliteExporter().infer(path, pixels), expected, atol=1e-6 if precision == "fp32" else 0.004
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3", "tiny"])
def test_xnnpack_takes_the_network(name, precision, path):
    """All of it in one part; but it has no average pool of int8."""
    space = SearchSpace.load(name)
    layers = lower(space, replace(space.smallest(), resolution=64))
    TfliteExporter(Form(precision=precision)).write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    image, logits = (d()[0]["index"] for d in (interpreter.get_input_details, interpreter.get_output_details))
    parts = [op for op in interpreter._get_ops_details() if op["op_name"] == "DELEGATE"]
    if precision == "fp32":
        assert len(parts) == 1
        assert image in parts[0]["inputs"]
        assert logits in parts[0]["outputs"]
    else:
        assert len(parts) == 1 + sum(layer.kind == "avg_pool" for layer in layers)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_file_is_what_the_schema_says(precision, path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.smallest())
    artifact = TfliteExporter(Form(precision=precision)).write(
        layers, random_tensors(layers, np.random.default_rng(0)), path
    )
    data = path.read_bytes()
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert schema.Model.ModelBufferHasIdentifier(data, 0)
    model = schema.Model.GetRootAs(data)
    graph = model.Subgraphs(0)
    tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
    image, logits = tensors[graph.Inputs(0)], tensors[graph.Outputs(0)]
    assert (image.Name(), image.ShapeAsNumpy().tolist()) == (b"image", [1, layers[0].in_size, layers[0].in_size, 3])
    assert (logits.Name(), logits.ShapeAsNumpy().tolist()) == (b"logits", [1, 1000])
    assert image.Type() == logits.Type() == schema.TensorType.FLOAT32
    names = {tensor.Name().decode() for tensor in tensors}
    assert len(names) == len(tensors)
    assert names >= {layer.name for layer in layers[:-1]}
    assert model.Buffers(0).DataLength() == 0
    start = np.frombuffer(data, dtype=np.uint8).ctypes.data
    for index in range(1, model.BuffersLength()):
        assert (model.Buffers(index).DataAsNumpy().ctypes.data - start) % 16 == 0
    between = {tensor.Type() for tensor in tensors if tensor not in (image, logits)}
    assert (schema.TensorType.FLOAT32 in between) == (precision == "fp32")


# -------------------------------------------------------------------- int8


def int8_logits(layers, network, path, ranges_of):
    """Of the network and of its file, (32, num_classes), on images of seed 1; ranges of those of `ranges_of`."""
    tensors = tensors_with_ranges(layers, network, random_images(layers, 32, seed=ranges_of))
    TfliteExporter(Form(precision="int8")).write(layers, tensors, path)
    images = random_images(layers, 32, seed=1)
    return network(torch.from_numpy(images)).numpy(), TfliteExporter().infer(path, images)


def grids(path):
    """Scale and zero point of the values between the layers, by name."""
    interpreter = Interpreter(str(path))
    return {tensor["name"]: tensor["quantization"] for tensor in interpreter.get_tensor_details()}


@pytest.mark.parametrize(
    ("activation", "se", "gate"),
    [("swish", "swish", "sigmoid"), ("h-swish", "relu", "h-sigmoid"), ("relu", "relu", "sigmoid")],
)
def test_int8_agrees_with_fp32(activation, se, gate, path):
    space = tiny_space()
    excite = replace(space.squeeze_excite, activation=se, gate=gate)
    space = replace(space, activation=activation, squeeze_excite=excite)
    layers = lower(space, space.largest())
    assert {layer.activation for layer in layers} >= {activation, gate}
    expected, found = int8_logits(layers, trained_network(layers), path, ranges_of=2)
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.99
    # Without what all images share, which for a network that has learnt nothing is the most.
    expected, found = expected - expected.mean(axis=0), found - found.mean(axis=0)
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("activation", [None, "relu", "swish", "h-swish", "sigmoid", "h-sigmoid"])
@pytest.mark.parametrize(("kernel", "stride", "size", "groups"), [(1, 1, 4, 1), (3, 2, 6, 1), (5, 2, 7, 8)])
def test_int8_layer_is_as_exact_as_its_grid(activation, kernel, stride, size, groups, path):
    layers = alone(
        Layer(
            name="a", kind="conv", inputs=(IMAGE,), in_channels=8, out_channels=8, in_size=size, kernel=kernel,
            stride=stride, groups=groups, norm=True, activation=activation,
        )
    )  # fmt: skip
    network = trained_network(layers)
    network.classifier.weight.copy_(torch.eye(8))
    expected, found = int8_logits(layers, network, path, ranges_of=1)
    steps = sum(scale for name, (scale, _) in grids(path).items() if name in ("a", "pool", "classifier"))
    assert np.abs(found - expected).max() < 2 * steps
    assert np.abs((found - expected).mean()) < 0.5 * steps


def test_int8_grids(path):
    """As LiteRT's specification demands: zero is met exactly, pads and pools stay on their input's grid."""
    space = replace(tiny_space(), activation="h-swish")
    layers = lower(space, space.largest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["stem.range"] = np.array([0.5, 4.0], dtype=np.float32)
    tensors["stage1.block1.project.range"] = np.array([-5.0, -1.0], dtype=np.float32)
    TfliteExporter(Form(precision="int8")).write(layers, tensors, path)
    found = grids(path)
    assert found["stem"] == (pytest.approx(4 / 255), -128)
    assert found["stage1.block1.project"] == (pytest.approx(5 / 255), 127)
    for layer in layers:
        if layer.kind == "avg_pool":
            assert found[layer.name] == found[layer.inputs[0]]
        if layer.activation == "sigmoid":
            assert found[layer.name] == (1 / 256, -128)
        if f"{layer.name}.padded" in found:
            source = layer.inputs[0] if layer.inputs[0] != IMAGE else f"{IMAGE}.int8"
            assert found[f"{layer.name}.padded"] == found[source]
    assert any(name.endswith(".padded") for name in found)


def test_int8_channels_that_are_nothing_but_their_bias(path):
    """Weights next to zero: neither the scale nor the bias leaves what int8 kernels can do."""
    layers = alone(Layer(name="a", kind="conv", inputs=(IMAGE,), in_channels=2, out_channels=4, in_size=3, bias=True))
    weight = np.array([[1, -1], [0, 0], [1e-30, 1e-38], [1e-9, 0]], dtype=np.float32)[:, :, None, None]
    bias = np.array([0.5, 2, -1, 1.5], dtype=np.float32)
    values = {"a": (-4, 4), "pool": (-4, 4), "classifier": (-4, 4), IMAGE: (-3, 3)}
    tensors = {
        "a.conv.weight": weight,
        "a.conv.bias": bias,
        "classifier.weight": np.eye(4, dtype=np.float32),
        "classifier.bias": np.zeros(4, dtype=np.float32),
    } | {f"{name}.range": np.array(value, dtype=np.float32) for name, value in values.items()}
    TfliteExporter(Form(precision="int8")).write(layers, tensors, path)
    flat = np.ones((1, 2, 3, 3), dtype=np.float32)
    np.testing.assert_allclose(TfliteExporter().infer(path, flat)[0], bias, atol=0.04)


def test_int8_needs_ranges(path):
    layers = lower(tiny_space(), tiny_space().smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    for name in ("image.range", "stem.preactivation.range", "classifier.range"):
        with pytest.raises(ExportError, match=f"no tensor '{name}'"):
            TfliteExporter(Form(precision="int8")).write(layers, {k: v for k, v in tensors.items() if k != name}, path)
    assert not path.exists()


# -------------------------------------------------------------------- the rest


def test_unknown_precision():
    with pytest.raises(InputError, match="format tflite has no precision 'fp16', only fp32, int8"):
        exporter("tflite", "fp16")


def test_writing_needs_no_package(path, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "ai_edge_litert"] or ["ai_edge_litert"]:
        monkeypatch.setitem(sys.modules, module, None)
    layers = lower(tiny_space(), tiny_space().smallest())
    TfliteExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    with pytest.raises(ExportError, match=r"pip install 'hwnas\[litert\]'"):
        TfliteExporter().infer(path, np.zeros((1, 1, 28, 28), dtype=np.float32))


def test_wrong_resolution_is_one_line(path):
    layers = lower(tiny_space(), tiny_space().smallest())
    TfliteExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    with pytest.raises(ExportError, match=r"^LiteRT cannot run \S+model\.tflite: [^\n]+$"):
        TfliteExporter().infer(path, np.zeros((1, 1, 5, 5), dtype=np.float32))


def test_is_fast(path):
    layers = lower(tiny_space(), tiny_space().largest())
    tensors = random_tensors(layers, np.random.default_rng(0))

    def seconds():
        started = time.perf_counter()
        TfliteExporter().write(layers, tensors, path)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.1  # 0.015 s on a quiet machine


def device(folder, precision):
    (folder / "mine.yaml").write_text(f"transport: host\nruntime: litert\nprecision: {precision}\n")
    return load_device("mine", folder)


def test_says_its_version(tmp_path):
    with device(tmp_path, "fp32") as litert:
        assert set(litert.versions()) == {"litert", "processor"}


def test_fp16(tmp_path):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not {"avx512_fp16", "asimdhp"} & set(cpuinfo.read_text().split()):
        pytest.skip("this processor has no arithmetic in fp16")
    with device(tmp_path, "fp16") as litert:
        assert litert.run(DeviceContract.write(litert, tmp_path), QUICK).latency_ms > 0


def test_fp16_that_is_not_is_refused(tmp_path, monkeypatch):
    from hwnas.devices.runtimes import litert

    layers = lower(tiny_space(), tiny_space().smallest())
    network = TfliteExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.tflite")
    monkeypatch.setattr(litert, "_FORCE_FP16", 0)
    with pytest.raises(RuntimeError, match="precision fp16: XNNPACK computes in fp32 on this processor"):
        litert.Runtime("fp16").load(str(network.path), 1)
