"""Bundles for TensorRT: the file is what its parser takes, and the script builds with the flags of each version."""

import os
import subprocess

import numpy as np
import pytest

from hwnas.bundles.manifest import Accuracy, ImagePreprocessing
from hwnas.bundles.write import About, write_bundle
from hwnas.devices.tools.trtexec import Program
from hwnas.exporters.base import Pixels, exporter, random_tensors
from hwnas.exporters.tensorrt import TensorrtExporter
from hwnas.layers import lower
from hwnas.space import SearchSpace
from hwnas.testing import ExporterContract, random_images, tensors_with_ranges, tiny_space, trained_network

PIXELS = Pixels((0.5,), (0.2,))
BYTES = {"pixels": PIXELS, "batch": None}


class TestTensorrtExporter(ExporterContract):
    @pytest.fixture(params=TensorrtExporter.precisions)
    def exporter(self, request):
        return exporter("tensorrt", request.param)


def test_suits_devices_that_take_its_files():
    assert exporter("tensorrt").misfit("onnx", "fp32") is None
    assert exporter("tensorrt").misfit("onnx", Program.int8) is not None
    assert exporter("tensorrt", batch=2).misfit("onnx", "fp32") is not None
    assert exporter("tensorrt", "int8").misfit("onnx", Program.int8) is None
    assert exporter("tensorrt", "int8").misfit("onnx", "int8") is not None  # a processor's
    assert exporter("tensorrt", "fp16").misfit("onnx", "fp32") is not None
    assert exporter("onnx").misfit("onnx", "fp32") is None
    assert exporter("tflite").misfit("onnx", "fp32") is not None


@pytest.mark.parametrize(("precision", "of_file"), [("fp16", "fp16"), ("int8", "int8-symmetric")])
def test_its_files_are_those_of_onnx(precision, of_file, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    made = exporter("tensorrt", precision, batch=None).write(layers, tensors, tmp_path / "m.onnx")
    assert made.sha256 == exporter("onnx", of_file, batch=None).write(layers, tensors, tmp_path / "m.onnx").sha256


# -------------------------------------------------------------------- TensorRT itself


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13", exc_type=ImportError)


@pytest.mark.parametrize("form", [{}, {"batch": None}, {"batch": 4}, {"pixels": PIXELS}, BYTES], ids=str)
@pytest.mark.parametrize("precision", TensorrtExporter.precisions)
def test_tensorrt_builds_every_form(rtx, precision, form, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    path = exporter("tensorrt", precision, **form).write(layers, tensors, tmp_path / "m.onnx").path
    check_engine(rtx, path.read_bytes(), precision, form)


@pytest.mark.parametrize("name", ["bignas", "ofa-mbv3"])
def test_tensorrt_builds_other_spaces_in_float16(rtx, name, tmp_path):
    space = SearchSpace.load(name)
    layers = lower(space, space.smallest())
    pixels = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    writer = exporter("tensorrt", "fp16", pixels=pixels, batch=None)
    path = writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.onnx").path
    check_engine(rtx, path.read_bytes(), "fp16", BYTES)


def check_engine(rtx, onnx, precision, form):
    """It is built, for batches of 1 to 32 where it takes any, and computes in the types of the file."""
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse(onnx), parser.get_error(0).desc()
    image, logits = network.get_input(0), network.get_output(0)
    batch = form.get("batch", 1) or -1
    assert (image.shape[0], logits.shape[0]) == (batch, batch)
    assert (image.dtype, logits.dtype) == (rtx.uint8 if "pixels" in form else rtx.float32, rtx.float32)
    made = map(network.get_layer, range(network.num_layers))
    types = {layer.get_output(0).dtype for layer in made if layer.type == rtx.LayerType.CONVOLUTION}
    assert types == {rtx.float16 if precision == "fp16" else rtx.float32}
    config = builder.create_builder_config()
    if batch == -1:
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, *((count, *image.shape[1:]) for count in (1, 8, 32)))
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


# -------------------------------------------------------------------- build.sh


@pytest.fixture
def build(tmp_path):
    """Writes a bundle, and gives what runs its script with a `trtexec` that prints its arguments."""
    fake = tmp_path / "trtexec"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    space = tiny_space()
    network = trained_network(lower(space, space.smallest()))
    images = random_images(network.layers, 8, seed=0)
    size = network.layers[0].in_size
    about = About(
        architecture={},
        architecture_text="",
        space=space.name,
        classes=tuple(map(str, range(space.num_classes))),
        preprocessing=ImagePreprocessing(channels=1, size=size, resolution=size, mean=PIXELS.mean, std=PIXELS.std),
        accuracy=Accuracy(split="test", value=0.5, num_images=10, computed_by="torch"),
        latency=None,
        limits=(),
        training={},
        licences={},
        front=None,
    )

    def write(precision, **form):
        writer, bundle = exporter("tensorrt", precision, **form), tmp_path / "bundle"
        tensors = tensors_with_ranges(network.layers, network, images)
        write_bundle(network, tensors, writer, images, bundle, lambda artifact: about)

        def run(*words, **variables):
            command, own = ["sh", bundle / "build.sh", *words], {"TRTEXEC": str(fake), **variables}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **own})
            return done.returncode, done.stdout.splitlines(), done.stderr

        return run

    return write


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_version_builds_the_file_in_its_precision(build, precision):
    run = build(precision)
    for number in (8, 9, 10, 11):
        code, flags, _ = run(str(number), precision)
        assert code == 0
        assert ("--fp16" in flags) == (number < 11)
        assert ("--int8" in flags) == (number < 11 and precision == "int8")
        assert f"--saveEngine=model-{precision}.engine" in flags
        assert not [flag for flag in flags if "Shapes" in flag]
    code, flags, said = run("10", "fp32")
    assert (code, flags, said) == (2, [], f"usage: sh build.sh 8|9|10|11 {precision}\n")


def test_a_range_of_batches(build):
    run = build("fp32", batch=None)
    code, flags, _ = run("10", "fp16")
    assert code == 0
    assert flags[-3:] == ["--minShapes=image:1x1x28x28", "--optShapes=image:8x1x28x28", "--maxShapes=image:32x1x28x28"]
    _, flags, _ = run("11", "fp32", BATCH="2", MAX_BATCH="4; touch here $(touch there) '")
    assert flags[-2:] == ["--optShapes=image:2x1x28x28", "--maxShapes=image:4; touch here $(touch there) 'x1x28x28"]


def test_a_range_of_batches_of_pixels(build):
    run = build("int8", **BYTES)
    assert run("8", "int8")[1][-1] == "--maxShapes=image:32x28x28x1"
