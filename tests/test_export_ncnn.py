"""ncnn files compute what the network does."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

import hwnas
from hwnas.bundles import classify
from hwnas.bundles.manifest import Accuracy, ImagePreprocessing
from hwnas.bundles.parity import Parity, correlation
from hwnas.bundles.quantise import within_drop
from hwnas.bundles.write import About, write_bundle
from hwnas.devices import load_device
from hwnas.devices.base import DeviceGoneError
from hwnas.devices.runtimes.ncnn import VULKAN_CPU, Runtime
from hwnas.devices.transports.host import Host
from hwnas.devices.worker_device import WorkerDevice
from hwnas.errors import DeviceError, ExportError, InputError
from hwnas.exporters.base import Form, Pixels, exporter, folded, random_tensors
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
    @pytest.fixture(params=["fp32", "fp16", "int8"])
    def exporter(self, request):
        return exporter("ncnn", request.param)


# -------------------------------------------------------------------- int8


def quantised(layers, tensors, images, keep=()):
    """The last layer's output where inputs and weights of all products are rounded as int8 says, else in float32.

    Layers in `keep` are not rounded.
    """

    def rounded(values, largest, integer=127):
        step = np.where(largest > 0, largest, 1) / integer
        return torch.from_numpy((np.rint(np.asarray(values) / step).clip(-integer, integer) * step).astype(np.float32))

    def call(layer, x, *others):
        if layer.kind not in ("conv", "linear"):
            return function(layer, {}, False, x, *others)
        rounds = layer.name not in keep
        x = rounded(x, np.abs(tensors[f"{layer.inputs[0]}.range"]).max()) if rounds else x
        name = f"{layer.name}.conv" if layer.kind == "conv" else layer.name
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        if layer.kind == "conv":
            weight, bias = folded(layer, tensors)
        largest = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True)
        six_bits = layer.kernel == 3 and layer.stride == 1 and not layer.depthwise
        weight = rounded(weight, largest, 31 if six_bits else 127) if rounds else torch.from_numpy(weight)
        changed = {f"{name}.weight": weight}
        if bias is not None:
            changed[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))
        return function(replace(layer, norm=False), changed, False, x)

    return run(layers, call, images).numpy()


def int8_logits(layers, path, keep=()):
    """Of the file, of the ideal int8, and of the network, (8, num_classes); the ranges are those of the images."""
    network, images = trained_network(layers), random_images(layers, 8, seed=1)
    tensors = tensors_with_ranges(layers, network, images)
    writer = exporter("ncnn", "int8", keep)
    writer.write(layers, tensors, path)
    inputs = torch.from_numpy(images)
    expected = network(inputs).numpy()
    assert np.ptp(expected) > 0
    return writer.infer(path, images), quantised(layers, tensors, inputs, keep), expected


# ncnn's depthwise kernels for x86 divide by the scales with rcpps, which is that inexact (Intel: 1.5 * 2**-12).
RECIPROCAL = 4e-4


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


@pytest.fixture(scope="module")
def biggest():
    """A network with values that can stay integers, its tensors with ranges, images, and the logits of them."""
    space = replace(tiny_space(), activation="h-swish")
    network = trained_network(lower(space, space.largest()))
    tensors = tensors_with_ranges(network.layers, network, random_images(network.layers, 16, seed=0))
    images = random_images(network.layers, 64, seed=1)
    return network, tensors, images, network(torch.from_numpy(images)).numpy()


def test_kept_layers_compute_in_float(biggest, tmp_path):
    """The more of them, the closer; all of them is the network itself."""
    network, tensors, images, expected = biggest
    errors = []
    for share in (0, 0.5, 1):
        keep = [layer.name for layer in network.layers[: round(share * len(network.layers))]]
        writer = exporter("ncnn", "int8", keep)
        found = writer.infer(writer.write(network.layers, tensors, tmp_path / "m.param").path, images)
        errors.append(float(((found - expected) ** 2).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 1e-9


def test_any_layers_can_be_kept(biggest, tmp_path):
    """Half of them, so that values of every type go to layers of every other."""
    network, tensors, images, expected = biggest
    errors, rng = [], np.random.default_rng(0)
    for share in (0, *[0.5] * 12):
        keep = [layer.name for layer in network.layers if rng.random() < share]
        writer = exporter("ncnn", "int8", keep)
        found = writer.infer(writer.write(network.layers, tensors, tmp_path / "m.param").path, images[:8])
        errors.append(float(((found - expected[:8]) ** 2).mean()))
    assert max(errors[1:]) < 1.2 * errors[0]


@pytest.mark.parametrize("activation", [None, "relu", "h-swish"])
@pytest.mark.parametrize(
    ("keep", "terms"),
    [("a", ["0", "101", "2"]), ("b", ["2", "0", "2"]), ("c", ["102", "1", "0"]), ("abc", ["0", "0", "0"])],
)
def test_integers_go_only_to_layers_of_integers(activation, keep, terms, tmp_path):
    layers = (
        conv("a", "image", 16, 11, activation=activation),
        conv("b", "a", 16, 11, kernel=5, groups=16, activation=activation),
        conv("c", "b", 16, 11),
    )
    found, ideal, _ = int8_logits(layers, tmp_path / "m.param", keep)
    lines = (tmp_path / "m.param").read_text().splitlines()
    assert [(re.findall(r" 8=(\d+)", line) or ["0"])[0] for line in lines if line.startswith("Conv")] == terms
    assert np.mean(np.abs(found - ideal) > RECIPROCAL * np.abs(ideal).max()) < 0.05
    assert correlation(found, ideal) > 0.9999


def test_sensitive_blocks_stay_in_float32(biggest):
    network, tensors, images, expected = biggest
    tensors = {**tensors, "stage2.block1.se.scale.range": np.float32([-1e4, 1e4])}  # steps far too coarse
    whole = exporter("ncnn", "int8")

    def accuracy(writer, path):
        found = writer.infer(path, images)
        return correlation(found - found.mean(0), expected - expected.mean(0))

    writer, found = within_drop(network, tensors, whole, images[:16], accuracy, least=0.9)
    assert found >= 0.9
    assert "stage2.block1.project" in writer.form.keep
    assert len(writer.form.keep) < len(network.layers)


def test_the_normalisation_of_pixels_is_not_rounded(tmp_path):
    """Steps of int8 are two of the 255 that pixels have: a network that only passes them on keeps all."""
    layers = (conv("a", "image", 3, 8, norm=False),)
    eye = {"a.conv.weight": np.eye(3, dtype=np.float32)[:, :, None, None], "a.range": np.float32([0, 1])}
    tensors = {**eye, "image.range": np.float32([0, 1])}
    pixels = Pixels((0.0, 0.1, 0.2), (1.0, 0.5, 0.25))
    images = np.random.default_rng(0).uniform(0, 1, (4, 3, 8, 8)).astype(np.float32)
    for precision, keep in (("int8", {"a"}), ("fp16", ())):
        writer = exporter("ncnn", precision, keep, pixels=pixels)
        found = writer.infer(writer.write(layers, tensors, tmp_path / "m.param").path, images)
        mean, std = (np.float32(values).reshape(-1, 1, 1) for values in (pixels.mean, pixels.std))
        np.testing.assert_allclose(found, (pixels.of(images) / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3"])
def test_int8_is_as_near_as_rounding_allows(name, tmp_path):
    """Deep networks that were never trained magnify every rounding: the ideal int8 is as far away."""
    space = SearchSpace.load(name, num_classes=10)
    layers = lower(space, replace(space.sample(np.random.default_rng(0)), resolution=33))
    found, ideal, expected = int8_logits(layers, tmp_path / "m.param")
    assert 1 - correlation(found, expected) < 2 * (1 - correlation(ideal, expected))


# -------------------------------------------------------------------- fp16


@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3", "tiny"])
@pytest.mark.parametrize("pick", ["smallest", "largest"])
def test_fp16_passes_the_gate(name, pick, tmp_path):
    """And it is not float32."""
    space = SearchSpace.load(name, num_classes=10)
    layers = lower(space, replace(getattr(space, pick)(), resolution=64))
    network, images = trained_network(layers), random_images(layers, 16, seed=1)
    tensors, writer = tensors_with_ranges(layers, network, images), NcnnExporter(Form(precision="fp16"))
    found = writer.infer(writer.write(layers, tensors, tmp_path / "m.param").path, images)
    parity = Parity.of(network(torch.from_numpy(images)).numpy(), found, "fp16", "ncnn")
    assert parity.passed, str(parity)
    assert parity.max_abs_diff > 1e-5


def test_fp16_weights_are_rounded_to_the_nearest(tmp_path):
    """Also subnormal ones, and an odd number of them."""
    weight = np.float32([1 / 3, 65519, 3e-6, -(2.0**-24), 1e-9, -65504, 0, 1, 2.5]).reshape(1, 1, 3, 3)
    layers = (conv("a", "image", 1, 1, kernel=3, norm=False), conv("b", "a", 1, 1, norm=False, bias=True))
    tensors = {
        "a.conv.weight": weight,
        "b.conv.weight": np.ones((1, 1, 1, 1), np.float32),
        "b.conv.bias": np.float32([1 / 3]),  # float32, as all biases
    }
    NcnnExporter(Form(precision="fp16")).write(layers, tensors, tmp_path / "m.param")
    tag = bytes([0x47, 0x6B, 0x30, 0x01])
    ones = np.float16([1]).tobytes()
    expected = (
        tag + weight.astype(np.float16).tobytes() + b"\0\0" + tag + ones + b"\0\0" + np.float32([1 / 3]).tobytes()
    )
    assert (tmp_path / "m.bin").read_bytes() == expected


def test_weights_that_are_too_large_for_fp16(tmp_path):
    writer, layers, tensors = smallest("fp16")
    tensors["classifier.weight"][3, 2] = -65520
    with pytest.raises(ExportError, match=r"classifier\.weight reaches 65520, and fp16 ends at 65504: export fp32"):
        writer.write(layers, tensors, tmp_path / "m.param")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_hash_is_of_both_files(precision, tmp_path):
    writer, layers, tensors = smallest(precision)
    artifact = writer.write(layers, tensors, tmp_path / "m.param")
    data = (tmp_path / "m.param").read_bytes() + (tmp_path / "m.bin").read_bytes()
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    other = writer.write(layers, tensors | {"stem.conv.weight": 2 * tensors["stem.conv.weight"]}, tmp_path / "n.param")
    assert (tmp_path / "m.param").read_bytes() == (tmp_path / "n.param").read_bytes()
    assert other.sha256 != artifact.sha256


def test_size_of_weights(tmp_path):
    space = SearchSpace.load("ofa-mbv3")
    layers = lower(space, space.largest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    for precision in ("fp32", "fp16", "int8"):
        NcnnExporter(Form(precision=precision)).write(layers, tensors, tmp_path / f"{precision}.param")
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.bin")}
    assert sizes["int8"] < 0.3 * sizes["fp32"]
    assert 0.5 < sizes["fp16"] / sizes["fp32"] < 0.51


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
    with pytest.raises(InputError, match="format ncnn has no precision 'bf16', only fp32, fp16, int8"):
        NcnnExporter(Form(precision="bf16"))


# -------------------------------------------------------------------- run.cc


@pytest.fixture(scope="module")
def compiler():
    """What turns a run.cc into a program: the line that is in it, but for the folder."""
    environment = dict(os.environ)
    if prefix := os.environ.get("HWNAS_TEST_NCNN"):
        environment["PKG_CONFIG_PATH"] = f"{prefix}/lib/pkgconfig"
    for command in (["g++", "--version"], ["pkg-config", "--exists", "ncnn"]):
        if not shutil.which(command[0]) or subprocess.run(command, env=environment, capture_output=True).returncode:
            pytest.skip("needs g++ and pkg-config ncnn, or $HWNAS_TEST_NCNN, where ncnn was installed")

    def build(bundle):
        line = re.search(r"^// +(g\+\+ .*)$", (bundle / "run.cc").read_text(), re.MULTILINE)[1]
        command = f"{line} -Wall -Wextra -Werror -isystem $(pkg-config --variable=includedir ncnn)/ncnn"
        done = subprocess.run(["sh", "-c", command], cwd=bundle, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return build


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("precision", "of_pixels"), [("fp32", False), ("fp16", False), ("int8", False), ("fp32", True), ("int8", True)]
)
def test_run_cc_answers_as_run_py_does(precision, of_pixels, channels, compiler, tmp_path):
    """The compiled program, of the same image files."""
    how = ImagePreprocessing(
        channels=channels, size=40, resolution=32, mean=(0.5, 0.4, 0.3)[:channels], std=(0.2, 0.25, 0.3)[:channels]
    )
    space = replace(tiny_space(), in_channels=channels, num_classes=7)
    layers = lower(space, replace(space.smallest(), resolution=32))
    network, rng = trained_network(layers), np.random.default_rng(0)
    fields = rng.integers(0, 256, (28, 4, 4, 3), dtype=np.uint8)
    photos = [Image.fromarray(colours).resize((90, 60), Image.Resampling.BICUBIC) for colours in fields]
    some = np.stack([classify.normalised(photo, asdict(how)).transpose(2, 0, 1) for photo in photos[:16]])
    network.classifier.weight *= 100  # else all images are nearly alike to it
    network.classifier.bias -= network(torch.from_numpy(some)).mean(0)
    pixels = Pixels(how.mean, how.std) if of_pixels else None
    about = About(
        architecture={},
        architecture_text="",
        space="tiny",
        classes=("a", 'q"\\"', "{0}", "%s", "größe", "\x1b\n", "//"),
        preprocessing=how,
        accuracy=Accuracy(split="test", value=0.5, num_images=10, computed_by="torch"),
        latency=None,
        limits=(),
        training={},
        licences={},
        front=None,
    )
    bundle, writer = tmp_path / "bundle", exporter("ncnn", precision, pixels=pixels)
    write_bundle(network, tensors_with_ranges(layers, network, some), writer, some, bundle, lambda artifact: about)
    compiler(bundle)
    seen, raw = set(), tmp_path / "pixels.raw"
    for photo in photos[16:]:
        raw.write_bytes(classify.pixels(photo, asdict(how)).tobytes())
        done = subprocess.run(["../classify", raw], cwd=bundle, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        name, _, percent = done.stdout.removesuffix("%\n").rpartition(" ")
        expected = hwnas.load_bundle(bundle).predict([photo])
        assert name == expected.classes[0]
        # Kernels for other processors round int8 otherwise.
        assert float(percent) == pytest.approx(
            100 * expected.probabilities.max(), abs=2 if precision == "int8" else 0.1
        )
        seen.add(name)
    assert len(seen) > 1
    for words in ([], [tmp_path / "no.raw"]):
        done = subprocess.run(["../classify", *words], cwd=bundle, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("usage: ../classify pixels.raw")
    (bundle / "model.bin").unlink()
    done = subprocess.run(["../classify", raw], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 1
    assert "model.param and model.bin cannot be read" in done.stderr


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
