"""TFLite files compute what the network does; LiteRT times them."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.bundles.parity import Parity
from hwnas.bundles.quantise import within_drop
from hwnas.devices import load_device
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import Form, Pixels, exporter, file_bytes, random_tensors, rings
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

SPACES = ["bignas", "attentivenas", "ofa-mbv3", "tiny"]


def small(name, resolution=64, num_classes=None):
    """The layers of the smallest network of a space, for images smaller than it has."""
    space = SearchSpace.load(name) if num_classes is None else SearchSpace.load(name, num_classes=num_classes)
    return lower(space, replace(space.smallest(), resolution=resolution))


def pixels_of(layers):
    channels = layers[0].in_channels
    return Pixels((0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels])


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


def delegated(path):
    """The parts of a network that XNNPACK takes; the numbers of its input and output."""
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    image, logits = (d()[0]["index"] for d in (interpreter.get_input_details, interpreter.get_output_details))
    return [op for op in interpreter._get_ops_details() if op["op_name"] == "DELEGATE"], image, logits


def operators(path):
    """How many of each a file has."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    names = {value: key for key, value in vars(schema.BuiltinOperator).items()}
    return Counter(names[model.operatorCodes[op.opcodeIndex].builtinCode] for op in model.subgraphs[0].operators)


@pytest.mark.parametrize("what", ["normalised", "pixels"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", SPACES)
def test_xnnpack_takes_the_network(name, precision, what, path):
    """All of it in one part; but it has no average pool of int8, and makes no int8 of uint8."""
    layers = small(name)
    form = Form(precision=precision, pixels=pixels_of(layers) if what == "pixels" else None)
    TfliteExporter(form).write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    parts, image, logits = delegated(path)
    assert any(logits in part["outputs"] for part in parts)
    assert any(image in part["inputs"] for part in parts) == (precision != "int8" or what == "normalised")
    pools = sum(layer.kind == "avg_pool" for layer in layers)
    assert len(parts) == (1 + pools if precision == "int8" else 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_file_is_what_the_schema_says(precision, batch, path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.smallest())
    artifact = TfliteExporter(Form(precision=precision, batch=batch)).write(
        layers, random_tensors(layers, np.random.default_rng(0)), path
    )
    data = path.read_bytes()
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert schema.Model.ModelBufferHasIdentifier(data, 0)
    model = schema.Model.GetRootAs(data)
    graph = model.Subgraphs(0)
    tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
    image, logits = tensors[graph.Inputs(0)], tensors[graph.Outputs(0)]
    assert (image.Name(), image.ShapeAsNumpy().tolist()) == (b"image", [batch, layers[0].in_size, layers[0].in_size, 3])
    assert (logits.Name(), logits.ShapeAsNumpy().tolist()) == (b"logits", [batch, 1000])
    assert image.Type() == logits.Type() == schema.TensorType.FLOAT32
    names = {tensor.Name().decode() for tensor in tensors}
    assert len(names) == len(tensors)
    assert names >= {layer.name for layer in layers[:-1]}
    assert model.Buffers(0).DataLength() == 0
    start = np.frombuffer(data, dtype=np.uint8).ctypes.data
    for index in range(1, model.BuffersLength()):
        assert (model.Buffers(index).DataAsNumpy().ctypes.data - start) % 16 == 0
    between = {tensor.Type() for tensor in tensors if tensor not in (image, logits)}
    assert (schema.TensorType.FLOAT32 in between) == (precision != "int8")
    assert (schema.TensorType.FLOAT16 in between) == (precision == "fp16")


# -------------------------------------------------------------------- fp16


@pytest.mark.parametrize("name", SPACES)
def test_fp16_passes_its_gate(name, path):
    layers = small(name, num_classes=10)
    network = trained_network(layers)
    images = random_images(layers, 64, seed=1)
    tensors = tensors_with_ranges(layers, network, images[:1])
    sizes = {}
    for precision in ("fp32", "fp16"):
        writer = TfliteExporter(Form(precision=precision))
        writer.write(layers, tensors, path)
        sizes[precision] = path.stat().st_size
    assert sizes["fp16"] / sizes["fp32"] < (0.7 if name == "tiny" else 0.53)  # names and shapes stay as they are
    found = writer.infer(path, images)
    parity = Parity.of(network(torch.from_numpy(images)).numpy(), found, "fp16", "LiteRT")
    assert parity.passed, str(parity)
    assert parity.max_abs_diff > 0  # it did round


def test_fp16_says_which_weight_it_cannot_hold(path):
    layers = lower(tiny_space(), tiny_space().smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["stage1.block1.project.norm.weight"][3] = 1e6
    with pytest.raises(ExportError, match=r"stage1\.block1\.project\.weight reaches .*: export fp32"):
        TfliteExporter(Form(precision="fp16")).write(layers, tensors, path)
    tensors["stage1.block1.project.norm.weight"][3] = 1
    tensors["classifier.bias"][0] = -7e4
    with pytest.raises(ExportError, match=r"classifier\.bias reaches 70000, and fp16 ends at 65504"):
        TfliteExporter(Form(precision="fp16")).write(layers, tensors, path)
    assert not path.exists()


# -------------------------------------------------------------------- the GPU delegate

# What LiteRT's GPU delegate takes, of float32 or float16 values unless said otherwise, and the newest version of each:
# tflite/tools/versioning/gpu_compatibility.cc and tflite/delegates/gpu/common/model_builder.cc of
# https://github.com/google-ai-edge/LiteRT/tree/f67457790c9c2ab67347d6fe53270e8d3df20868; -1 is any.
ON_GPU = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "CONV_2D": 6,
    "DEPTHWISE_CONV_2D": 6,
    "DEQUANTIZE": 3,  # also of uint8
    "FULLY_CONNECTED": 9,
    "HARD_SWISH": -1,
    "LOGISTIC": 2,
    "MEAN": -1,  # constant axes of int32
    "MUL": 3,
    "PAD": 2,  # constant paddings of shape (4, 2)
}
BROADCASTS = {"ADD", "MUL"}  # a scalar constant, or maps of as many dimensions


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", SPACES)
def test_gpu_delegate_lists_every_operator(name, precision, path):
    layers = small(name, resolution=62)  # of odd maps, which need PAD
    writer = TfliteExporter(Form(precision=precision, pixels=pixels_of(layers)))
    writer.write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    graph = model.subgraphs[0]
    names = {value: key for key, value in vars(schema.BuiltinOperator).items()}
    types = schema.TensorType
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = names[code.builtinCode]
        assert kind in ON_GPU
        assert ON_GPU[kind] in (-1, code.version) or code.version < ON_GPU[kind]
        inputs = [graph.tensors[index] for index in operator.inputs]
        constant = [model.buffers[tensor.buffer].data is not None for tensor in inputs]
        values = [tensor for tensor, fixed in zip(inputs, constant, strict=True) if not fixed]
        made = {index for other in graph.operators for index in other.outputs} | set(graph.inputs)
        assert {index for index, fixed in zip(operator.inputs, constant, strict=True) if not fixed} <= made
        allowed = {types.FLOAT32, types.UINT8} if kind == "DEQUANTIZE" else {types.FLOAT32}
        assert {tensor.type for tensor in values} <= allowed
        if kind in BROADCASTS:
            assert len({len(tensor.shape) for tensor in values}) == 1
            assert all(np.prod(tensor.shape) == 1 for tensor, fixed in zip(inputs, constant, strict=True) if fixed)
        if kind in ("MEAN", "PAD"):
            assert constant == [False, True]
            assert inputs[1].type == types.INT32
            assert kind == "MEAN" or list(inputs[1].shape) == [4, 2]
        if kind == "FULLY_CONNECTED":
            assert list(inputs[0].shape[1:3]) == [1, 1]


ON_A_GPU = """
import sys
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

model = CompiledModel.from_file("model.tflite", hardware_accel=HardwareAccelerator.GPU)
assert model.is_fully_accelerated()
inputs, outputs = model.create_input_buffers(0), model.create_output_buffers(0)
inputs[0].write(np.load("pixels.npy"))
model.run_by_index(0, inputs, outputs)
np.save("logits.npy", outputs[0].read(20, np.float32).reshape(2, 10))
"""


@pytest.mark.parametrize(("activation", "gate"), [("swish", "sigmoid"), ("h-swish", "h-sigmoid")])
def test_a_gpu_computes_the_same(activation, gate, path):
    """In LiteRT's own GPU accelerator, on a GPU in software: SwiftShader, as Debian's chromium-common brings it."""
    driver = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
    if not driver.exists():
        pytest.skip("needs a GPU in software: apt-get install chromium-common")
    if find_library("vulkan") is None:
        pytest.skip("needs Vulkan's loader: apt-get install libvulkan1")
    space = replace(tiny_space(), activation=activation)
    space = replace(space, squeeze_excite=replace(space.squeeze_excite, gate=gate))
    layers = lower(space, replace(space.smallest(), resolution=30))
    form = Form(precision="fp16", pixels=pixels_of(layers), batch=2)
    writer, images = TfliteExporter(form), random_images(layers, 2, seed=1)
    writer.write(layers, tensors_with_ranges(layers, trained_network(layers), images), path)
    expected = {"PAD", "MEAN", "MUL", "ADD", "AVERAGE_POOL_2D", "FULLY_CONNECTED", "DEQUANTIZE"}
    assert operators(path).keys() > expected | {"HARD_SWISH" if activation == "h-swish" else "LOGISTIC"}
    pixels = form.pixels.of(images).transpose(0, 2, 3, 1).astype(np.uint8)
    np.save(path.with_name("pixels.npy"), np.ascontiguousarray(pixels))
    environment = os.environ | {"VK_ICD_FILENAMES": str(driver), "VK_DRIVER_FILES": str(driver)}
    command = [sys.executable, "-c", ON_A_GPU]
    done = subprocess.run(command, env=environment, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = writer.infer(path, images)
    # A GPU may compute in 16 bits.
    np.testing.assert_allclose(np.load(path.with_name("logits.npy")), expected, atol=0.01 * np.abs(expected).max())


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


# -------------------------------------------------------------------- int8 with layers in float32


@pytest.mark.parametrize("what", ["normalised", "pixels"])
def test_kept_layers_compute_in_float(quantised, what, path):
    """The more of them, the closer; all of them is the network itself."""
    network, tensors, images, _ = quantised
    pixels = Pixels((0.5,), (0.25,)) if what == "pixels" else None
    images = images if pixels is None else ((pixels.of(images) / 255 - 0.5) / 0.25).astype(np.float32)
    expected = network(torch.from_numpy(images)).numpy()
    errors = []
    for share in (0, 0.5, 1):
        keep = [layer.name for layer in network.layers[: round(share * len(network.layers))]]
        writer = exporter("tflite", "int8", keep, pixels=pixels)
        found = writer.infer(writer.write(network.layers, tensors, path).path, images)
        errors.append(float(((found - expected) ** 2).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10
    assert "QUANTIZE" not in operators(path)
    assert operators(path).get("DEQUANTIZE", 0) == (what == "pixels")


@pytest.mark.parametrize("name", ["stage1.block1.add", "stage3.block1.se.scale", "stem", "head.pool", "classifier"])
def test_any_layer_can_be_kept(quantised, name, path):
    """XNNPACK still takes all but the average pools, and no other value is converted than those at its borders."""
    network, tensors, _, accuracy = quantised
    writer = exporter("tflite", "int8", [name])
    assert accuracy(writer, writer.write(network.layers, tensors, path).path) > 0.7
    kept = next(layer for layer in network.layers if layer.name == name)
    pools = sum(layer.kind == "avg_pool" for layer in network.layers)
    assert len(delegated(path)[0]) == 1 + pools
    found = operators(path)
    ends = name in ("stem", "classifier")  # they have the image and the logits as they are
    assert (found["QUANTIZE"], found["DEQUANTIZE"]) == ((1, 1) if ends else (2, 1 + len(kept.inputs)))


def test_a_value_is_converted_once(quantised, path):
    """However many layers read it on the other side."""
    network, tensors, _, _ = quantised
    readers = Counter(name for layer in network.layers for name in layer.inputs)
    shared = next(name for name, count in readers.items() if count > 1 and name != IMAGE)
    for keep in ([shared], [layer.name for layer in network.layers if shared in layer.inputs]):
        exporter("tflite", "int8", keep).write(network.layers, tensors, path)
        model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
        names = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
        assert len(set(names)) == len(names)
        assert sum(name.startswith(f"{shared}.int8") or name.startswith(f"{shared}.float32") for name in names) == 1


def test_sensitive_blocks_stay_in_float32(quantised):
    network, tensors, images, accuracy = quantised
    tensors = {**tensors, "stage2.block1.depthwise.range": np.float32([-1e4, 1e4])}  # steps far too coarse
    whole = exporter("tflite", "int8")
    writer, found = within_drop(network, tensors, whole, images[:16], accuracy, least=0.9)
    assert found >= 0.9
    assert "stage2.block1.depthwise" in writer.form.keep
    assert len(writer.form.keep) < len(network.layers)
    assert within_drop(network, tensors, whole, images[:16], accuracy, least=0.0)[0].form.keep == frozenset()


# -------------------------------------------------------------------- the rest


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_size_is_known_beforehand(precision, path):
    for name in SPACES:
        layers = small(name)
        TfliteExporter(Form(precision=precision)).write(layers, random_tensors(layers, np.random.default_rng(0)), path)
        assert file_bytes(layers, "tflite", precision) == pytest.approx(path.stat().st_size, rel=0.02)


def test_unknown_precision():
    with pytest.raises(InputError, match="format tflite has no precision 'bf16', only fp32, fp16, int8"):
        exporter("tflite", "bf16")


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


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9, 11])
def test_rings_are_the_whole_kernel(kernel):
    """Each weight is in one piece, and no piece has more than XNNPACK's depthwise kernels take."""
    times = np.zeros((kernel, kernel), dtype=int)
    for rows, columns in rings(kernel):
        piece = times[rows, columns]
        piece += 1
        assert piece.size <= 25
        for part in (rows, columns):  # around the centre, so that the padding is the same on both sides
            assert part.start + part.stop == kernel
    assert (times == 1).all()


@pytest.mark.parametrize("name", ["tflite", "executorch"])
@pytest.mark.parametrize(("stride", "size"), [(1, 9), (2, 9), (2, 14)])
@pytest.mark.parametrize("activation", [None, "relu", "h-sigmoid", "h-swish"])
def test_large_depthwise_kernels(name, stride, size, activation, tmp_path):
    """In pieces, with the activation after their sum."""
    if name == "executorch":
        pytest.importorskip("executorch")
    out = -(-size // stride)
    layers = [
        Layer(name="wide", kind="conv", inputs=(IMAGE,), in_channels=3, out_channels=4, in_size=size, bias=True),
        Layer(
            name="large", kind="conv", inputs=("wide",), in_channels=4, out_channels=4, in_size=size, kernel=9,
            stride=stride, groups=4, norm=True, activation=activation,
        ),
        Layer(name="pool", kind="global_pool", inputs=("large",), in_channels=4, out_channels=4, in_size=out),
        Layer(name="classes", kind="linear", inputs=("pool",), in_channels=4, out_channels=6, in_size=1, bias=True),
    ]  # fmt: skip
    writer = exporter(name)
    assert largest_difference(writer, layers, tmp_path / f"model{writer.suffix}") < 1e-5
    integers = writer.but(precision="int8", keep=frozenset({"wide", "pool", "classes"}))
    assert integers.kept(layers) == {layer.name for layer in layers}  # in float32 without being asked to
    assert largest_difference(integers, layers, tmp_path / f"model{writer.suffix}") < 1e-5
