"""ncnn files compute what the network does."""

import hashlib
import os
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from hwnas.devices import load_device
from hwnas.devices.base import DeviceGoneError
from hwnas.devices.runtimes.ncnn import VULKAN_CPU, Runtime
from hwnas.devices.transports.host import Host
from hwnas.devices.worker_device import WorkerDevice
from hwnas.errors import DeviceError, ExportError, InputError
from hwnas.exporters.base import Form, exporter, folded, random_tensors
from hwnas.exporters.ncnn import NcnnExporter
from hwnas.layers import Layer, lower
from hwnas.network import function, run
from hwnas.space import Activation, SearchSpace
from hwnas.testing import (
    QUICK,
    DeviceContract,
    ExporterContract,
    random_images,
    tensors_with_ranges,
    tiny_space,
    trained_network,
)

ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed: pip install 'hwnas[ncnn]'")


class TestNcnnExporter(ExporterContract):
    @pytest.fixture(params=["fp32", "int8"])
    def exporter(self, request):
        return exporter("ncnn", request.param)


# -------------------------------------------------------------------- int8


def quantised(layers, tensors, images):
    """The last layer's output where inputs and weights of all products are rounded as int8 says, else in float32."""

    def rounded(values, largest, integer=127):
        step = np.where(largest > 0, largest, 1) / integer
        return torch.from_numpy((np.rint(np.asarray(values) / step).clip(-integer, integer) * step).astype(np.float32))

    def call(layer, x, *others):
        if layer.kind not in ("conv", "linear"):
            return function(layer, {}, False, x, *others)
        x = rounded(x, np.abs(tensors[f"{layer.inputs[0]}.range"]).max())
        name = f"{layer.name}.conv" if layer.kind == "conv" else layer.name
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        if layer.kind == "conv":
            weight, bias = folded(layer, tensors)
        largest = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True)
        six_bits = layer.kernel == 3 and layer.stride == 1 and not layer.depthwise
        changed = {f"{name}.weight": rounded(weight, largest, 31 if six_bits else 127)}
        if bias is not None:
            changed[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))
        return function(replace(layer, norm=False), changed, False, x)

    return run(layers, call, images).numpy()


def int8_logits(layers, path):
    """Of the file, of the ideal int8, and of the network, (8, num_classes); the ranges are those of the images."""
    network, images = trained_network(layers), random_images(layers, 8, seed=1)
    tensors = tensors_with_ranges(layers, network, images)
    NcnnExporter(Form(precision="int8")).write(layers, tensors, path)
    inputs = torch.from_numpy(images)
    expected = network(inputs).numpy()
    assert np.ptp(expected) > 0
    return NcnnExporter(Form(precision="int8")).infer(path, images), quantised(layers, tensors, inputs), expected


# ncnn's depthwise kernels for x86 divide by the scales with rcpps, which is that inexact (Intel: 1.5 * 2**-12).
RECIPROCAL = 4e-4


def correlation(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


def conv(name, source, channels, size, **options):
    options = {"in_channels": channels, "out_channels": channels, "in_size": size, "norm": True} | options
    return Layer(name=name, kind="conv", inputs=(source,), **options)


@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 1, "out_channels": 24},
        {"kernel": 3, "out_channels": 24},
        {"kernel": 3, "out_channels": 24, "stride": 2},
        {"kernel": 5, "groups": 16},
        {"kernel": 3, "groups": 16, "stride": 2},
    ],
)
def test_int8_of_one_convolution(options, activation, tmp_path):
    layers = (conv("a", "image", 16, 11, activation=activation, **options),)
    found, ideal, _ = int8_logits(layers, tmp_path / "m.param")
    np.testing.assert_allclose(found, ideal, atol=RECIPROCAL * np.abs(ideal).max())


@pytest.mark.parametrize("activation", [None, "relu", "h-swish"])
def test_int8_stays_int8_between_convolutions(activation, tmp_path):
    layers = (
        conv("a", "image", 16, 11, activation=activation),
        conv("b", "a", 16, 11, kernel=5, groups=16, activation=activation),
        conv("c", "b", 16, 11),
    )
    found, ideal, _ = int8_logits(layers, tmp_path / "m.param")
    lines = (tmp_path / "m.param").read_text().splitlines()
    assert re.findall(r" 8=(\d+)", "".join(lines)) == ["102", "101", "2"]
    # A value that lies between two integers may go either way, and changes what it is part of.
    assert np.mean(np.abs(found - ideal) > RECIPROCAL * np.abs(ideal).max()) < 0.05
    assert correlation(found, ideal) > 0.9999


@pytest.mark.parametrize("resolution", [33, 62])
def test_int8_computes_nearly_what_the_network_does(resolution, tmp_path):
    space = SearchSpace.load("tiny", num_classes=10)
    for arch in (space.smallest(), space.sample(np.random.default_rng(resolution))):
        layers = lower(space, replace(arch, resolution=resolution))
        found, _, expected = int8_logits(layers, tmp_path / "m.param")
        assert correlation(found, expected) > 0.99
        assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()  # it is not float32


@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3"])
def test_int8_is_as_near_as_rounding_allows(name, tmp_path):
    """Deep networks that were never trained magnify every rounding: the ideal int8 is as far away."""
    space = SearchSpace.load(name, num_classes=10)
    layers = lower(space, replace(space.sample(np.random.default_rng(0)), resolution=33))
    found, ideal, expected = int8_logits(layers, tmp_path / "m.param")
    assert 1 - correlation(found, expected) < 2 * (1 - correlation(ideal, expected))


# -------------------------------------------------------------------- single layers


def identity(name, source, channels, size):
    return Layer(name=name, kind="conv", inputs=(source,), in_channels=channels, out_channels=channels, in_size=size)


def map_of(layers, tmp_path, images):
    """The last layer's feature maps: all convolutions are the identity."""
    eye = {f"{la.name}.conv.weight": np.eye(la.in_channels, dtype=np.float32)[:, :, None, None] for la in layers}
    NcnnExporter().write(layers, eye, tmp_path / "m.param")
    return NcnnExporter().infer(tmp_path / "m.param", images.numpy())


def some_images(channels, size):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("channels", [3, 4, 8, 16])  # ncnn keeps 1, 4, 8 or 16 of them together
def test_average_pool_of_every_size(size, channels, tmp_path):
    options = {"in_channels": channels, "out_channels": channels, "in_size": size}
    layers = (
        identity("a", "image", channels, size),
        Layer(name="b", kind="avg_pool", inputs=("a",), kernel=2, stride=2, **options),
        identity("c", "b", channels, -(-size // 2)),
    )
    images = some_images(channels, size)
    expected = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(images)
    np.testing.assert_allclose(map_of(layers, tmp_path, images), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("size", [1, 3, 16])  # as wide as it has channels: the factors are still the channels'
def test_scale_is_by_channel(channels, size, tmp_path):
    options = {"in_channels": channels, "out_channels": channels, "in_size": size}
    layers = (
        identity("a", "image", channels, size),
        Layer(name="b", kind="global_pool", inputs=("a",), **options),
        Layer(name="c", kind="scale", inputs=("a", "b"), **options),
        identity("d", "c", channels, size),
    )
    images = some_images(channels, size)
    expected = images * images.mean((2, 3), keepdim=True)
    np.testing.assert_allclose(map_of(layers, tmp_path, images), expected.numpy(), atol=1e-6)


# -------------------------------------------------------------------- the files


def smallest(precision="fp32"):
    layers = lower(tiny_space(), tiny_space().smallest())
    return NcnnExporter(Form(precision=precision)), layers, random_tensors(layers, np.random.default_rng(0))


def test_graph_is_valid(tmp_path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.sample(np.random.default_rng(0)))
    NcnnExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.param")
    magic, counts, *lines = (tmp_path / "m.param").read_text().splitlines()
    assert magic == "7767517"
    made, read = [], []
    for line in lines:
        _, _, num_inputs, num_outputs, *rest = line.split()
        inputs, outputs = rest[: int(num_inputs)], rest[int(num_inputs) :][: int(num_outputs)]
        assert set(inputs) <= set(made)
        read, made = read + inputs, made + outputs
    assert counts == f"{len(lines)} {len(made)}"
    assert len(set(made)) == len(made)
    assert sorted([*read, "logits"]) == sorted(made)  # each value has exactly one reader
    assert lines[0] == f"Input image 0 1 image 0={layers[0].in_size} 1={layers[0].in_size} 2=3"
    assert {layer.name for layer in layers[:-1]} <= set(made)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_hash_is_of_both_files(precision, tmp_path):
    writer, layers, tensors = smallest(precision)
    artifact = writer.write(layers, tensors, tmp_path / "m.param")
    data = (tmp_path / "m.param").read_bytes() + (tmp_path / "m.bin").read_bytes()
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    other = writer.write(layers, tensors | {"stem.conv.weight": 2 * tensors["stem.conv.weight"]}, tmp_path / "n.param")
    assert (tmp_path / "m.param").read_bytes() == (tmp_path / "n.param").read_bytes()
    assert other.sha256 != artifact.sha256


def test_int8_weights_take_a_quarter(tmp_path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.largest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    for precision in ("fp32", "int8"):
        NcnnExporter(Form(precision=precision)).write(layers, tensors, tmp_path / f"{precision}.param")
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.bin")}
    assert sizes["int8"] < 0.3 * sizes["fp32"]


def test_int8_needs_ranges(tmp_path):
    writer, layers, tensors = smallest("int8")
    for name in ("image.range", "stem.range"):
        with pytest.raises(ExportError, match=f"no tensor '{name}'"):
            writer.write(layers, {key: value for key, value in tensors.items() if key != name}, tmp_path / "m.param")
    assert not list(tmp_path.iterdir())


def test_int8_of_dead_channels(tmp_path):
    writer, layers, tensors = smallest("int8")
    tensors["stem.conv.weight"][0] = 0
    tensors["stem.range"][:] = 0
    writer.write(layers, tensors, tmp_path / "m.param")
    size = layers[0].in_size
    assert np.isfinite(writer.infer(tmp_path / "m.param", np.ones((1, 1, size, size), dtype=np.float32))).all()


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    writer, layers, tensors = smallest()
    path = tmp_path / "m.param"
    writer.write(layers, tensors, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"m.param", "m.bin"}

    def full(self, data):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(layers, tensors | {"classifier.bias": np.ones(10, dtype=np.float32)}, path)
    with pytest.raises(ExportError):
        writer.write(layers, tensors | {"classifier.bias": np.zeros(3)}, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_bad_files(tmp_path):
    writer, layers, tensors = smallest()
    path = tmp_path / "m.param"
    image = np.zeros((1, 1, layers[0].in_size, layers[0].in_size), dtype=np.float32)
    with pytest.raises(ExportError, match=r"ncnn cannot run .*m\.param"):
        writer.infer(path, image)
    writer.write(layers, tensors, path)
    weights = (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ExportError, match=r"ncnn cannot run .*m\.param"):
        writer.infer(path, image)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ExportError, match=r"ncnn cannot run .*m\.param"):
        writer.infer(path, image)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(ExportError, match=r"pip install 'hwnas\[ncnn\]'"):
        NcnnExporter().infer(tmp_path / "m.param", np.zeros((1, 1, 8, 8), dtype=np.float32))
    with pytest.raises(InputError, match="format ncnn has no precision 'fp16', only fp32, int8"):
        NcnnExporter(Form(precision="fp16"))


# -------------------------------------------------------------------- the runtime


@pytest.fixture(scope="module", params=["fp32", "int8"])
def of_precision(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("devices") / "ncnn.yaml"
    file.write_text(f"transport: host\nruntime: ncnn\nprecision: {request.param}\n")
    with load_device(file) as device:
        yield device


class TestNcnn(DeviceContract):
    @pytest.fixture
    def device(self, of_precision):
        return of_precision


def ncnn_device(precision="fp32", **options):
    return WorkerDevice("n", Host(), "ncnn", precision=precision, options=options)


def test_precision_is_that_of_the_file(of_precision, tmp_path):
    other = "int8" if of_precision.precision == "fp32" else "fp32"
    path = tmp_path / "m.param"
    writer, layers, tensors = smallest(other)
    writer.write(layers, tensors, path)
    found = "a file of int8" if other == "int8" else "a file that is not quantised"
    with pytest.raises(DeviceError, match=f"{found}, precision {of_precision.precision}"):
        of_precision.run(path, QUICK)


@pytest.mark.parametrize(("precision", "layer"), [("fp16", "Convolution"), ("bf16", "ConvolutionDepthWise")])
def test_precisions_of_the_processor(precision, layer, tmp_path):
    with ncnn_device(precision) as device:
        path = DeviceContract.write(device, tmp_path)
        if platform.machine() in ("x86_64", "AMD64"):
            with pytest.raises(DeviceError, match=f"ncnn has no {precision} for {layer} on this processor: use fp32"):
                device.run(path, QUICK)
        elif precision == "bf16" or ncnn.cpu_support_arm_asimdhp():
            assert device.run(path, QUICK).latency_ms > 0


def test_gpu(tmp_path):
    with ncnn_device(gpu=True) as device:
        if ncnn.get_gpu_count() == 0:
            with pytest.raises(DeviceGoneError, match="no Vulkan device: install the GPU's driver and libvulkan1"):
                device.versions()
        elif ncnn.get_gpu_info(0).type() == VULKAN_CPU:
            with pytest.raises(DeviceGoneError, match="which is no GPU: leave out gpu: true"):
                device.versions()
        else:
            assert device.versions()["gpu"]
            assert device.run(DeviceContract.write(device, tmp_path), QUICK).latency_ms > 0


def test_options():
    with pytest.raises(ValueError, match="gpu=1: must be true or false"):
        Runtime("fp32", gpu=1)
    with pytest.raises(ValueError, match="precision bf16: is for processors"):
        Runtime("bf16", gpu=True)


def test_files_that_do_not_run(tmp_path):
    path, weights = tmp_path / "m.param", tmp_path / "m.bin"
    writer, layers, tensors = smallest()
    writer.write(layers, tensors, path)
    text, data = path.read_text(), weights.read_bytes()
    runtime = Runtime("fp32")
    runtime.load(str(path), 1)()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(RuntimeError, match="ncnn cannot read its weights"):
        runtime.load(str(path), 1)
    weights.write_bytes(data)
    path.write_text(text.replace("Swish", "Swash"))
    with pytest.raises(RuntimeError, match="ncnn cannot read its graph"):
        runtime.load(str(path), 1)
    path.write_text(re.sub(r"^(Input .*) 0=.*$", r"\1", text, flags=re.MULTILINE))
    with pytest.raises(ValueError, match="its Input layer has no shape"):
        runtime.load(str(path), 1)


def test_runs_what_the_file_says(tmp_path):
    path = tmp_path / "m.param"
    writer, layers, tensors = smallest()
    writer.write(layers, tensors, path)
    size = layers[0].in_size
    image = np.random.default_rng(0).standard_normal((1, 1, size, size), dtype=np.float32)  # as the runtime's own
    run_once = Runtime("fp32").load(str(path), 1)
    np.testing.assert_array_equal(np.array(run_once()), writer.infer(path, image)[0])


def test_stays_on_its_cores(tmp_path):
    with ncnn_device() as device:
        path = DeviceContract.write(device, tmp_path)
        for threads in (1, 2):
            cores = device.run(path, replace(QUICK, threads=threads)).facts["cores"]
            assert os.sched_getaffinity(device._process._process.pid) == set(cores)
