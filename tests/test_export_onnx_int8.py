"""int8 ONNX files compute nearly what the network does, with integer kernels."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hwnas.errors import ExportError
from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import IMAGE, lower
from hwnas.network import Network, batch_norms, initialise
from hwnas.space import SearchSpace
from hwnas.testing import ExporterContract, tiny_space

FORMATS = ("onnx", "onnx-symmetric")


class TestInt8(ExporterContract):
    @pytest.fixture(params=FORMATS)
    def exporter(self, request):
        return exporter(request.param, "int8")


def images_for(layers, num_images, seed):
    first = layers[0]
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_images, first.in_channels, 4, 4, generator=generator)  # white noise is lost in pooling
    return torch.nn.functional.interpolate(coarse, size=first.in_size, mode="bilinear")


def calibrated(layers, tmp_path):
    """The tensors of a network that has seen something, with the range of every value on random images."""
    network = Network(layers)
    initialise(layers, network.state_dict(), torch.Generator().manual_seed(0))
    for norm in batch_norms(network):
        norm.momentum = None
    images = images_for(layers, 8, 0)
    with torch.no_grad():
        network(images)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    path = tmp_path / "float.onnx"
    exporter("onnx").write(layers, tensors, path)
    model = onnx.load(path)
    names = [layer.name for layer in layers[:-1]]
    names += [f"{layer.name}.preactivation" for layer in layers if layer.activation]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    seen = [session.run(names, {IMAGE: image[None]}) for image in images.numpy()]
    for name, values in zip([IMAGE, *names], [images.numpy(), *zip(*seen, strict=True)], strict=True):
        tensors[f"{name}.range"] = np.array([np.min(values), np.max(values)], dtype=np.float32)
    return tensors


def space_of(name):
    if name != "h-swish":
        return SearchSpace.load(name, num_classes=100)
    space = SearchSpace.load("tiny", num_classes=100)
    gates = replace(space.squeeze_excite, activation="relu", gate="h-sigmoid")
    return replace(space, activation="h-swish", squeeze_excite=gates)


def correlation(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["tiny", "h-swish", "bignas", "attentivenas"])
def test_computes_nearly_what_the_network_does(format, name, tmp_path):
    space = space_of(name)
    layers = lower(space, replace(space.smallest(), resolution=64))
    tensors = calibrated(layers, tmp_path)
    images = images_for(layers, 4, 1).numpy()
    expected = exporter("onnx").infer(tmp_path / "float.onnx", images)
    writer = exporter(format, "int8")
    found = writer.infer(writer.write(layers, tensors, tmp_path / "int8.onnx").path, images)
    assert correlation(expected, found) > 0.99
    assert not np.array_equal(expected, found)


def test_is_as_exact_as_other_quantisers(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self, images):
            self.images = iter(images)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {IMAGE: image[None]}

    space = SearchSpace.load("ofa-mbv3", num_classes=100)  # the hardest: even its smallest child is deep
    layers = lower(space, replace(space.smallest(), resolution=64))
    tensors = calibrated(layers, tmp_path)
    images = images_for(layers, 4, 1).numpy()
    writer = exporter("onnx", "int8")
    expected = writer.infer(tmp_path / "float.onnx", images)
    ours = writer.infer(writer.write(layers, tensors, tmp_path / "int8.onnx").path, images)
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        Images(images_for(layers, 8, 0).numpy()),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    theirs = writer.infer(tmp_path / "theirs.onnx", images)
    assert correlation(expected, ours) > correlation(expected, theirs) - 0.02
    assert correlation(ours, theirs) > 0.7


@pytest.mark.parametrize("activation", ["relu", "swish", "h-swish", "sigmoid", "h-sigmoid"])
def test_computes_on_integers(activation, tmp_path):
    space = replace(tiny_space(), activation=activation)
    layers = lower(space, space.smallest())
    artifact = exporter("onnx", "int8").write(
        layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.onnx"
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that what it optimises for this processor should not be kept
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(artifact.path, options, providers=["CPUExecutionProvider"])
    kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kernels["QLinearConv"] == sum(layer.kind == "conv" for layer in layers)
    assert kernels["QLinearAdd"] == sum(layer.kind == "add" for layer in layers)
    assert kernels["QGemm"] == 1
    assert kernels.keys().isdisjoint({"Conv", "FusedConv", "Gemm", "Add", "Relu", "Sigmoid", "GlobalAveragePool"})


@pytest.mark.parametrize("format", FORMATS)
def test_int8_model_is_valid_and_small(format, tmp_path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    sizes = []
    for precision in ("fp32", "int8"):
        artifact = exporter(format, precision).write(layers, tensors, tmp_path / f"{precision}.onnx")
        sizes.append(artifact.path.stat().st_size)
        onnx.checker.check_model(artifact.path, full_check=True)
    assert sizes[1] < 0.3 * sizes[0]


def initialisers(layers, tensors, format, tmp_path):
    artifact = exporter(format, "int8").write(layers, tensors, tmp_path / "m.onnx")
    return {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(artifact.path).graph.initializer}


def test_quantises_as_it_says(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["image.range"] = np.array([-1, 2], dtype=np.float32)
    tensors["stem.conv.weight"][0] = 0  # a channel without weights
    tensors["stem.norm.bias"][:] = np.linspace(-3, 3, len(tensors["stem.norm.bias"]))
    weight = tensors["stem.conv.weight"] / np.float32(np.sqrt(1 + 1e-5))
    for format in FORMATS:
        found = initialisers(layers, tensors, format, tmp_path)
        scale = found["stem.weight.scale"]
        assert found["stem.weight"].dtype == np.int8
        assert np.abs(found["stem.weight"]).reshape(len(weight), -1).max(axis=1)[1:].tolist() == [127] * (
            len(scale) - 1
        )
        error = found["stem.weight"] * scale[:, None, None, None] - weight
        assert (np.abs(error).reshape(len(weight), -1).max(axis=1) <= scale / 2 * 1.0001).all()
    assert (found["image.zero_point"], found["image.scale"]) == (0, pytest.approx(2 / 127))
    np.testing.assert_allclose(found["stem.bias"], tensors["stem.norm.bias"], rtol=1e-6)
    found = initialisers(layers, tensors, "onnx", tmp_path)
    assert (found["image.zero_point"], found["image.scale"]) == (85, pytest.approx(3 / 255))
    np.testing.assert_allclose(found["stem.bias.scale"], found["stem.weight.scale"] * found["image.scale"], rtol=1e-6)
    bias = found["stem.bias"] * found["stem.bias.scale"]
    np.testing.assert_allclose(bias, tensors["stem.norm.bias"], atol=found["stem.bias.scale"].max())


def test_dead_values(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    for name in tensors:
        if name.endswith((".range", "conv.weight")):
            tensors[name] = np.zeros_like(tensors[name])
    for format in FORMATS:
        writer = exporter(format, "int8")
        logits = writer.infer(
            writer.write(layers, tensors, tmp_path / "m.onnx").path, np.ones((1, 1, 28, 28), dtype=np.float32)
        )
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["image.range", "stem.range", "stem.preactivation.range", "head.pool.range"])
def test_needs_every_range(name, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    with pytest.raises(ExportError, match=f"no tensor '{name}'"):
        exporter("onnx", "int8").write(
            layers, {key: value for key, value in tensors.items() if key != name}, tmp_path / "m.onnx"
        )


def test_is_fast(tmp_path):
    space = tiny_space()
    layers = lower(space, space.largest())
    tensors = random_tensors(layers, np.random.default_rng(0))

    def seconds():
        started = time.perf_counter()
        exporter("onnx", "int8").write(layers, tensors, tmp_path / "m.onnx")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.1  # 0.02 s on a quiet machine
