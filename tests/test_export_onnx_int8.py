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
from hwnas.exporters.base import Pixels, exporter, random_tensors
from hwnas.layers import IMAGE, lower
from hwnas.space import SearchSpace
from hwnas.testing import random_images, tensors_with_ranges, tiny_space, trained_network

PRECISIONS = ("int8", "int8-symmetric")


def calibrated(layers):
    """A network, its tensors, and images other than those whose ranges are among them."""
    network = trained_network(layers)
    return network, tensors_with_ranges(layers, network, random_images(layers, 8, seed=0)), random_images(layers, 4, 1)


def space_of(name):
    if name != "h-swish":
        return SearchSpace.load(name, num_classes=100)
    space = SearchSpace.load("tiny", num_classes=100)
    gates = replace(space.squeeze_excite, activation="relu", gate="h-sigmoid")
    return replace(space, activation="h-swish", squeeze_excite=gates)


def correlation(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(  # deep networks that were never trained magnify every rounding
    ("name", "least"), [("tiny", 0.99), ("h-swish", 0.99), ("bignas", 0.97), ("attentivenas", 0.97)]
)
def test_computes_nearly_what_the_network_does(precision, name, least, tmp_path):
    space = space_of(name)
    layers = lower(space, replace(space.smallest(), resolution=64))
    network, tensors, images = calibrated(layers)
    expected = network(torch.from_numpy(images)).numpy()
    writer = exporter("onnx", precision)
    found = writer.infer(writer.write(layers, tensors, tmp_path / "int8.onnx").path, images)
    assert correlation(expected, found) > least
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
    network, tensors, images = calibrated(layers)
    expected = network(torch.from_numpy(images)).numpy()
    writer = exporter("onnx", "int8")
    ours = writer.infer(writer.write(layers, tensors, tmp_path / "int8.onnx").path, images)
    quantize_static(
        exporter("onnx").write(layers, tensors, tmp_path / "float.onnx").path,
        tmp_path / "theirs.onnx",
        Images(random_images(layers, 8, seed=0)),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    theirs = writer.infer(tmp_path / "theirs.onnx", images)
    assert correlation(expected, ours) > correlation(expected, theirs) - 0.02
    assert correlation(ours, theirs) > 0.95


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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_int8_model_is_valid_and_small(precision, tmp_path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    sizes = []
    for each in ("fp32", precision):
        artifact = exporter("onnx", each).write(layers, tensors, tmp_path / f"{each}.onnx")
        sizes.append(artifact.path.stat().st_size)
        onnx.checker.check_model(artifact.path, full_check=True)
    assert sizes[1] < 0.3 * sizes[0]


def initialisers(layers, tensors, precision, tmp_path):
    artifact = exporter("onnx", precision).write(layers, tensors, tmp_path / "m.onnx")
    return {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(artifact.path).graph.initializer}


def test_quantises_as_it_says(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["image.range"] = np.array([-1, 2], dtype=np.float32)
    tensors["stem.conv.weight"][0] = 0  # a channel without weights
    tensors["stem.norm.bias"][:] = np.linspace(-3, 3, len(tensors["stem.norm.bias"]))
    weight = tensors["stem.conv.weight"] / np.float32(np.sqrt(1 + 1e-5))
    for precision in PRECISIONS:
        found = initialisers(layers, tensors, precision, tmp_path)
        scale = found["stem.weight.scale"]
        assert found["stem.weight"].dtype == np.int8
        assert np.abs(found["stem.weight"]).reshape(len(weight), -1).max(axis=1)[1:].tolist() == [127] * (
            len(scale) - 1
        )
        error = found["stem.weight"] * scale[:, None, None, None] - weight
        assert (np.abs(error).reshape(len(weight), -1).max(axis=1) <= scale / 2 * 1.0001).all()
    assert (found["image.zero_point"], found["image.scale"]) == (0, pytest.approx(2 / 127))
    np.testing.assert_allclose(found["stem.bias"], tensors["stem.norm.bias"], rtol=1e-6)
    found = initialisers(layers, tensors, "int8", tmp_path)
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
    for precision in PRECISIONS:
        writer = exporter("onnx", precision)
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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pixels_change_nothing(precision, tmp_path):
    """What they become is quantised as normalised images are; with all layers in float32 it is the network itself."""
    space = SearchSpace.load("tiny", num_classes=100)
    layers = lower(space, replace(space.smallest(), resolution=64))
    pixels = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    taken = np.random.default_rng(0).integers(0, 256, (6, 3, 64, 64)).astype(np.float32)
    mean, std = (np.float32(values).reshape(-1, 1, 1) for values in (pixels.mean, pixels.std))
    images = (taken / np.float32(255) - mean) / std
    network = trained_network(layers)
    tensors = tensors_with_ranges(layers, network, images)

    def logits(writer):
        return writer.infer(writer.write(layers, tensors, tmp_path / "m.onnx").path, images)

    plain = exporter("onnx", precision)
    assert correlation(logits(plain), logits(plain.but(pixels=pixels))) > 0.9999
    exact = exporter("onnx", precision, [layer.name for layer in layers], pixels=pixels)
    np.testing.assert_allclose(logits(exact), network(torch.from_numpy(images)).numpy(), atol=1e-4)


def test_is_fast(tmp_path):
    space = tiny_space()
    layers = lower(space, space.largest())
    tensors = random_tensors(layers, np.random.default_rng(0))

    def seconds():
        started = time.perf_counter()
        exporter("onnx", "int8").write(layers, tensors, tmp_path / "m.onnx")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.1  # 0.02 s on a quiet machine
