"""Bundles: what is shipped runs by itself, is what was checked, and nothing that is wrong gets out."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hwnas
from hwnas.bundles.card import Front
from hwnas.bundles.classify import pixels, preprocess
from hwnas.bundles.culprit import culprit
from hwnas.bundles.manifest import MANIFEST, Accuracy, ImagePreprocessing
from hwnas.bundles.parity import Parity, correlation
from hwnas.bundles.quantise import blocks_of, value_ranges, within_drop
from hwnas.bundles.write import About, write_bundle
from hwnas.cli import main
from hwnas.data.images import centre
from hwnas.data.splits import Preprocessing, TensorSplit, plain, resize
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import Form, Pixels, exporter
from hwnas.exporters.onnx import OnnxExporter
from hwnas.layers import lower
from hwnas.space import SearchSpace
from hwnas.testing import random_images, tensors_with_ranges, tiny_space, trained_network

FORMATS = ["onnx", "tflite", "ncnn", "executorch", "openvino", "torch", "coreml"]
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"  # of a network that is a folder
COLOURS = ImagePreprocessing(
    channels=3, size=48, resolution=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), shorter_side=55
)


@pytest.fixture(scope="module")
def colours():
    """A child for colour images, in torch."""
    space = SearchSpace.load("tiny", num_classes=7)
    return trained_network(lower(space, replace(space.smallest(), resolution=COLOURS.resolution)))


def told(classes=7, **changes):
    about = About(
        architecture={"resolution": 32},
        architecture_text="32px w8|16 <b>",
        space="tiny",
        classes=tuple(f"class | {number}" for number in range(classes)),
        preprocessing=COLOURS,
        accuracy=Accuracy(split="test", value=0.5, num_images=10, computed_by="torch"),
        latency=None,
        limits=({"kind": "latency", "device": "cpu", "value": 1.5, "unit": "ms"},),
        training={"data": "made <up>", "weights": "0"},
        licences={"data": "none"},
        front=Front(costs=(1.0, 2.0, 3.0), accuracies=(0.5, 0.6, 0.7), this=1, cost_name="ms on <cpu> & co"),
    )
    return replace(about, **changes)


def write(network, target, format="onnx", precision="fp32", num_images=8, about=None, writer=None):
    images = random_images(network.layers, num_images, seed=1)
    tensors = tensors_with_ranges(network.layers, network, random_images(network.layers, 8, seed=0))
    about = told() if about is None else about
    writer = writer or exporter(format, precision)
    if (pixels := writer.form.pixels) is not None:  # real images are made of bytes
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (pixels.mean, pixels.std))
        images = (pixels.of(images) / np.float32(255) - mean) / std
    return write_bundle(network, tensors, writer, images, target, lambda artifact: about)


def photos(folder, count=12):
    """Image files of all sorts: colour and grey, palettes, transparency, 16 bits, tall and wide."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        width, height = rng.integers(30, 90, 2)
        fields = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = fields.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        mode = ["RGB", "L", "P", "RGBA", "I;16", "JPEG"][number % 6]
        path = folder / f"{number}.{'jpg' if mode == 'JPEG' else 'png'}"
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode != "JPEG":
            image = image.convert(mode)
        image.save(path)
        paths.append(path)
    return paths


# ---------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def bundle(colours, tmp_path_factory):
    target = tmp_path_factory.mktemp("made") / "bundle"
    write(colours, target)
    return target


@pytest.fixture(scope="module")
def package(colours, tmp_path_factory):
    """A bundle whose network is a folder."""
    target = tmp_path_factory.mktemp("made") / "package"
    write(colours, target, "coreml")
    return target


def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy", symlinks=True)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["bundle", "package"])
def test_manifest_names_every_file_and_its_hash(kind, request):
    bundle = request.getfixturevalue(kind)
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert {file["name"] for file in manifest["files"]} == names(bundle) - {MANIFEST}
    parts = [bundle / part for part in manifest["file"]["parts"]]
    assert manifest["file"]["size_bytes"] == sum(part.stat().st_size for part in parts)
    assert {*parts} == {p for p in bundle.rglob("*") if p.is_file() and p.relative_to(bundle).parts[0][:6] == "model."}
    for file in manifest["files"]:
        content = (bundle / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size_bytes"], file["sha256"])


def test_what_is_from_outside_stays_text_in_card_and_plot(bundle):
    card = (bundle / "README.md").read_text()
    assert "<b>" not in card.replace("\\<b\\>", "")
    assert "made \\<up\\>" in card
    assert "class \\| 0" in card
    plot = (bundle / "front.svg").read_text()
    assert "ms on &lt;cpu&gt; &amp; co" in plot
    assert "this child: 60.0% at 2" in plot


def test_the_documented_schema_is_that_of_the_code(bundle):
    documented = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    manifest = json.loads((bundle / MANIFEST).read_text())
    missing = [key for key in manifest if f"`{key}`" not in documented]
    assert not missing
    assert f"schema is {manifest['schema']}" in documented


@pytest.mark.parametrize("resolution", [24, 48, 60])
@pytest.mark.parametrize("shorter_side", [None, 55])
def test_preprocessing_is_that_of_training_to_the_pixel(tmp_path, resolution, shorter_side):
    """The library decodes and crops with Pillow, and resizes squares with torch, which rounds a little differently."""
    how = replace(COLOURS, resolution=resolution, shorter_side=shorter_side)
    for path in photos(tmp_path):
        square = centre(path.read_bytes(), how.size, shorter_side)[None]
        bare = Preprocessing(how.size, 3, (0.0,) * 3, (1.0,) * 3, shorter_side)
        expected = (resize(square, resolution, bare) * 255).round()[0].permute(1, 2, 0).numpy()
        with Image.open(path) as image:
            found = pixels(image, vars_of(how)).astype(float)
        assert np.abs(found - expected).max() <= {24: 1, 48: 0, 60: 2}[resolution]


def test_preprocessing_of_grey_images():
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
    split = TensorSplit(torch.from_numpy(stored), torch.zeros(5, dtype=torch.int64), plain(28, 1))
    how = ImagePreprocessing(channels=1, size=28, resolution=28, mean=(0.3,), std=(0.2,))
    expected = resize(split.load(torch.arange(5)), 28, replace(plain(28, 1), mean=how.mean, std=how.std)).numpy()
    manifest = {"preprocessing": vars_of(how), "input": {"layout": "NCHW", "dtype": "float32", "values": "normalised"}}
    found = np.concatenate([preprocess(Image.fromarray(image[0]), manifest) for image in stored])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def vars_of(record):
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.parametrize("format", FORMATS)
def test_predicts_what_the_network_does(colours, format, tmp_path):
    """From image files, through preprocessing and the format's runtime."""
    pytest.importorskip({"tflite": "ai_edge_litert", "onnx": "onnxruntime", "coreml": "torch"}.get(format, format))
    manifest = write(colours, tmp_path / "bundle", format)
    bundle = hwnas.load_bundle(tmp_path / "bundle")
    paths = photos(tmp_path)
    found = bundle.predict(paths)
    bare = Preprocessing(COLOURS.size, 3, COLOURS.mean, COLOURS.std, COLOURS.shorter_side)
    squares = torch.stack([centre(path.read_bytes(), COLOURS.size, COLOURS.shorter_side) for path in paths])
    with torch.no_grad():
        expected = colours(resize(squares, COLOURS.resolution, bare)).numpy()
    assert found.classes == tuple(manifest.classes[index] for index in expected.argmax(1))
    np.testing.assert_allclose(found.logits, expected, atol=0.1)  # pixels may be 1 of 255 different
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    assert hwnas.verify(tmp_path / "bundle")["parity"]["passed"]


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_pixels_and_of_batches_predict_alike(colours, format, tmp_path):
    """Through `load_bundle`, and through the bundle's own run.py."""
    if format == "coreml":
        pytest.skip("its run.py needs macOS")
    pytest.importorskip({"tflite": "ai_edge_litert"}.get(format, "onnxruntime" if format == "onnx" else format))
    write(colours, tmp_path / "plain", format)
    paths = photos(tmp_path, 6)
    expected = hwnas.load_bundle(tmp_path / "plain").predict(paths)
    plain = exporter(format)
    forms = []
    if plain.pixel_input is not None:
        forms.append(plain.but(pixels=Pixels(COLOURS.mean, COLOURS.std)))
    if plain.batches != "one":
        forms.append(plain.but(batch=4))
    if plain.batches == "any":
        forms.append(plain.but(batch=None))
    if len(forms) > 1:
        forms.append(plain.but(pixels=Pixels(COLOURS.mean, COLOURS.std), batch=forms[-1].form.batch))
    for number, writer in enumerate(forms):
        target = tmp_path / f"bundle{number}"
        manifest = write(colours, target, writer=writer)
        assert manifest.input.shape[0] == manifest.output.shape[0] == writer.form.batch
        assert (manifest.input.layout, manifest.input.dtype) == writer.takes
        loaded = hwnas.load_bundle(target)
        np.testing.assert_allclose(loaded.predict(paths).logits, expected.logits, rtol=1e-3, atol=1e-3)
        assert loaded.check().passed
        told = subprocess.run([sys.executable, target / "run.py", *paths], capture_output=True, text=True, check=True)
        lines = [f"{path}: {name}" for path, name in zip(paths, expected.classes, strict=True)]
        assert [line.rpartition("%")[0].split("%")[0].rpartition(" ")[0] for line in told.stdout.splitlines()] == lines


def test_predicts_from_arrays_paths_and_pillow_alike(bundle, tmp_path):
    loaded = hwnas.load_bundle(bundle)
    array = np.random.default_rng(0).integers(0, 256, (2, 60, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in array]
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = loaded.predict(array).logits
    for given in (images, paths, map(str, paths)):
        np.testing.assert_array_equal(loaded.predict(given).logits, expected)
    assert loaded.predict(array[..., :1]).logits.shape == (2, 7)
    assert loaded.class_names[0] == "class | 0"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ("photo.jpg", "put the one into a list"),
        (["missing.jpg"], "missing.jpg: cannot be read as an image"),
        ([3], "an image is int"),
        (np.zeros((1, 8, 8, 3), np.float32), r"images are float32 \(1, 8, 8, 3\)"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"images are uint8 \(1, 3, 8, 8\)"),
    ],
)
def test_refuses_what_is_no_images(bundle, images, message):
    with pytest.raises(InputError, match=message):
        hwnas.load_bundle(bundle).predict(images)


def test_loads_without_torch(bundle):
    code = (
        "import sys, numpy, hwnas\n"
        f"hwnas.load_bundle({str(bundle)!r}).predict(numpy.zeros((1, 40, 40, 3), numpy.uint8))\n"
        f"hwnas.verify({str(bundle)!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# ---------------------------------------------------------------- run.py, with nothing but the runtime


def fresh_python(folder, packages):
    """The interpreter of a new virtual environment."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    subprocess.run(pip, check=True, timeout=280)
    return python


PACKAGES = {
    "onnx": "onnxruntime",
    "tflite": "ai-edge-litert",
    "ncnn": "ncnn",
    "openvino": "openvino",
}


@pytest.mark.parametrize(
    "format",
    [
        pytest.param(
            format,
            marks=pytest.mark.skipif(
                format != "onnx" and not os.environ.get("HWNAS_TEST_RUNTIMES"),
                reason="downloads its runtime: set $HWNAS_TEST_RUNTIMES",
            ),
        )
        for format in PACKAGES
    ],
)
def test_run_py_needs_only_its_runtime(colours, format, tmp_path):
    packages = exporter(format).packages
    assert packages == (PACKAGES[format],)
    target = tmp_path / "bundle"
    write(colours, target, format)
    paths = photos(tmp_path)
    python = fresh_python(tmp_path / "venv", [*packages, "numpy", "pillow"])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, target / "run.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = hwnas.load_bundle(target).predict(paths)
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for line, path, name, probabilities in zip(lines, paths, *expected[:2], strict=True):
        assert line.startswith(f"{path}: {name} {probabilities.max():.1%}")
    done = subprocess.run(command[:2], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "usage: python run.py IMAGE...\n")


@pytest.mark.parametrize(("format", "name"), [("ncnn", "run.cc"), ("tflite", "run.kt")])
def test_snippets_have_the_preprocessing(colours, format, name, tmp_path):
    pytest.importorskip({"tflite": "ai_edge_litert"}.get(format, format))
    write(colours, tmp_path / "bundle", format)
    text = (tmp_path / "bundle" / name).read_text()
    assert "32" in text
    mean = "{127.5, 102, 76.5}" if format == "ncnn" else "0.5f, 0.400000006f"
    assert mean in text or "0.5f, 0.4f, 0.3f" in text
    assert "{" in text
    assert "{{" not in text
    if format == "ncnn":
        assert '"class | 6"' in text


INTERPRETER_KT = """
package org.tensorflow.lite

import java.io.File
import java.nio.ByteBuffer

class Interpreter(model: File, private val options: Options) : AutoCloseable {
    class Options { fun setNumThreads(threads: Int) = this }

    init { require(model.exists()) }

    fun run(input: Any, output: Any) {
        val bytes = ByteArray((input as ByteBuffer).remaining())
        input.get(bytes)
        File("input.raw").writeBytes(bytes)
        (output as Array<*>).forEach { (it as FloatArray)[5] = it.size.toFloat() }
    }

    override fun close() = Unit
}
"""
MAIN_KT = """
import java.io.File

fun main() {
    val classifier = Classifier(File("model.tflite"), List(7) { "class $it" })
    println(classifier.classify(File("pixels.raw").readBytes()))
    classifier.close()
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["normalised", "pixels"])
def test_run_kt_gives_the_runtime_what_run_py_does(colours, what, tmp_path):
    """Compiled against a stand-in for Android's class, which keeps the bytes that it gets."""
    pytest.importorskip("ai_edge_litert")
    if not shutil.which("kotlinc"):
        pytest.skip("needs Kotlin: apt-get install kotlin")
    target = tmp_path / "bundle"
    write(
        colours,
        target,
        writer=exporter("tflite", pixels=Pixels(COLOURS.mean, COLOURS.std) if what == "pixels" else None),
    )
    (tmp_path / "interpreter.kt").write_text(INTERPRETER_KT)
    (tmp_path / "main.kt").write_text(MAIN_KT)
    sources = [target / "run.kt", tmp_path / "interpreter.kt", tmp_path / "main.kt"]
    done = subprocess.run(
        ["kotlinc", *sources, "-include-runtime", "-d", tmp_path / "run.jar"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "run.kt" not in done.stderr  # no warnings either
    image = Image.open(photos(tmp_path, 1)[0])
    manifest = json.loads((target / MANIFEST).read_text())
    (target / "pixels.raw").write_bytes(pixels(image, manifest["preprocessing"]).tobytes())
    command = ["java", "-cp", tmp_path / "run.jar", "MainKt"]
    done = subprocess.run(command, cwd=target, check=True, capture_output=True, text=True)
    assert done.stdout == "class 5\n"
    assert (target / "input.raw").read_bytes() == preprocess(image, manifest).tobytes()


def test_snippets_are_for_one_image(colours, tmp_path):
    pytest.importorskip("ai_edge_litert")
    write(colours, tmp_path / "bundle", writer=exporter("tflite", batch=2))
    assert not (tmp_path / "bundle" / "run.kt").exists()
    assert (tmp_path / "bundle" / "run.py").exists()


# ---------------------------------------------------------------- tampering


def packed(folder, path):
    """As other programs do it, which add entries for folders."""
    with zipfile.ZipFile(path, "w") as file:
        for part in folder.rglob("*"):
            file.write(part, part.relative_to(folder))
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_other_programs_may_pack_a_bundle(package, tmp_path):
    with zipfile.ZipFile(packed(package, tmp_path / "b.zip")) as file:
        assert "model.mlpackage/Data/" in file.namelist()
    assert hwnas.verify(tmp_path / "b.zip")["parity"]["max_abs_diff"] == 0


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda b: flip(b / WEIGHTS), "weight.bin is not the file that was exported"),
        (lambda b: (b / WEIGHTS).write_bytes((b / WEIGHTS).read_bytes() + b"0"), "its bytes were changed"),
        (lambda b: (b / WEIGHTS).unlink(), f"lacks {WEIGHTS}"),
        (lambda b: shutil.rmtree(b / "model.mlpackage"), r"lacks model\.mlpackage/Data.*, model\.mlpackage/Manifest"),
        (lambda b: (b / f"{WEIGHTS}.so").write_bytes(b"0"), f"its manifest does not name: {WEIGHTS}.so"),
        (lambda b: (b / "model.mlpackage/Data/more").mkdir(), "does not name: model.mlpackage/Data/more"),
        (lambda b: (b / "more/Data").mkdir(parents=True), "does not name: more"),
    ],
)
def test_tampered_packages_are_refused(package, form, harm, message, tmp_path):
    harmed = copy(package, tmp_path)
    harm(harmed)
    if form == "zip":
        harmed = packed(harmed, tmp_path / "harmed.zip")
    with pytest.raises(ExportError, match=message):
        hwnas.load_bundle(harmed)


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda b: flip(b / "model.onnx"), "model.onnx is not the file that was exported"),
        (lambda b: flip(b / "run.py"), "run.py is not the file that was exported"),
        (lambda b: flip(b / "check.npz"), "check.npz is not the file that was exported"),
        (lambda b: (b / "model.onnx").write_bytes((b / "model.onnx").read_bytes() + b"0"), "its bytes were changed"),
        (lambda b: (b / "front.svg").unlink(), "lacks front.svg"),
        (lambda b: (b / "more.so").write_bytes(b"0"), "files that its manifest does not name: more.so"),
        (lambda b: (b / MANIFEST).unlink(), "is not a bundle of hwnas: it has no manifest.json"),
        (lambda b: (b / MANIFEST).write_text("{"), "manifest.json is not JSON"),
        (lambda b: (b / MANIFEST).write_text("[]"), "manifest.json has schema None"),
        (lambda b: edit(b, schema=99), "has schema 99, this hwnas reads 3"),
        (lambda b: edit(b, classes=["one"]), "there are 1 classes, but 7 logits"),
        (lambda b: edit(b, secret=1), "secret: is not a known key here"),
        (lambda b: edit(b, macs="many"), "macs: .*not 'many'"),
    ],
)
def test_tampered_bundles_are_refused(bundle, form, harm, message, tmp_path, capsys):
    harmed = copy(bundle, tmp_path)
    harm(harmed)
    if form == "zip":
        harmed = packed(harmed, tmp_path / "harmed.zip")
    with pytest.raises(ExportError, match=message):
        hwnas.load_bundle(harmed)
    assert main(["verify", str(harmed)]) == 5
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"hwnas: {harmed}: ")


def edit(bundle, **changes):
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | changes))


def rehash(bundle, name):
    """As somebody would who knows how bundles are made."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for file in manifest["files"]:
        if file["name"] == name:
            content = (bundle / name).read_bytes()
            file |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_another_network_under_the_right_hash_is_refused(bundle, colours, tmp_path):
    harmed = copy(bundle, tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in colours.state_dict().items()}
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    OnnxExporter().write(colours.layers, tensors, harmed / "model.onnx")
    rehash(harmed, "model.onnx")
    with pytest.raises(
        ExportError, match="computes something else here than where it was made: logits differ by up to 1"
    ):
        hwnas.verify(harmed)


def test_nothing_is_unpickled(bundle, tmp_path):
    harmed = copy(bundle, tmp_path)
    objects = np.empty(1, dtype=object)
    objects[0] = "a pickled object"
    np.savez(harmed / "check.npz", images=objects, logits=objects)
    rehash(harmed, "check.npz")
    with pytest.raises(ExportError, match=r"check\.npz cannot be read .*allow_pickle=False"):
        hwnas.verify(harmed)


def test_links_are_refused(bundle, tmp_path):
    harmed = copy(bundle, tmp_path)
    (harmed / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (harmed / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ExportError, match=r"model\.onnx is no plain file"):
        hwnas.verify(harmed)


def test_links_in_a_package_are_refused(package, tmp_path):
    harmed = copy(package, tmp_path)
    (harmed / WEIGHTS).rename(tmp_path / "elsewhere.bin")
    (harmed / WEIGHTS).symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ExportError, match=rf"{WEIGHTS} is no plain file"):
        hwnas.verify(harmed)


@pytest.mark.parametrize("name", ["model.mlpackage", "model.mlpackage/Data", WEIGHTS.rpartition("/")[0]])
def test_linked_folders_are_refused(package, name, tmp_path):
    """Also where what they lead to is right."""
    harmed = copy(package, tmp_path)
    folder = harmed / name
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ExportError, match=f"does not name: {name}$"):
        hwnas.load_bundle(harmed)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py", "/tmp/evil.py", "a\\b.py", "..", "", ".", "C:evil.py", "C:/evil.py", "//host/evil.py",
        "model.mlpackage/../../evil.py", "model.mlpackage/Data/../../../evil.py", "model.mlpackage//tmp/evil.py",
        "model.mlpackage/./evil.py", "./model.mlpackage/evil.py", "model.mlpackage/", "model.mlpackage/..\\..\\evil.py",
        "model.mlpackage/C:/evil.py", "model.mlpackage/\x1b[2J", "model.mlpackage/e\0vil.py",
        "model.mlpackage" + "/a" * 8, "model.mlpackage/" + "a" * 200, "../copy/model.mlpackage/evil.py",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bundle", "package"])
def test_zip_slip_is_refused(kind, name, tmp_path, request):
    """Also where the manifest names the file, as a part of the network."""
    harmed = copy(request.getfixturevalue(kind), tmp_path)
    manifest = json.loads((harmed / MANIFEST).read_text())
    manifest["files"].append({"name": name, "size_bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()})
    manifest["file"]["parts"].append(name)
    (harmed / MANIFEST).write_text(json.dumps(manifest))
    path = packed(harmed, tmp_path / "harmed.zip")
    with zipfile.ZipFile(path, "a") as file:
        if name not in file.namelist():
            file.writestr(name or "nameless", b"evil")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="is not the name of a file in a bundle"):
        hwnas.load_bundle(path)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        (["a/b.py"], {}, r"\['a/b.py'\] in folders that are not the network"),
        (["model.mlpackage/evil.py"], {}, "evil.py'] in folders that are not the network"),
        (["model.mlpackage"], {"parts": ["model.mlpackage"]}, r"\['model.mlpackage'\] as files and as folders"),
        (["model.mlpackage/Data"], {"parts": ["model.mlpackage/Data"]}, "Data'] as files and as folders"),
        (["manifest.json/a"], {"name": MANIFEST, "parts": ["manifest.json/a"]}, "in folders that are not the network"),
        ([WEIGHTS], {}, "names one twice"),
        ([], {"name": "run"}, "lacks file.name='run'"),
        ([], {"name": "../package/model.mlpackage"}, "lacks file.name"),
        ([], {"name": "model.mlpackage/"}, "lacks file.name"),
        ([], {"name": ""}, "lacks file.name"),
    ],
)
def test_folders_are_those_of_the_network(package, more, changes, message, tmp_path):
    """Even where the manifest names them, and every hash is right."""
    harmed = copy(package, tmp_path)
    manifest = json.loads((harmed / MANIFEST).read_text())
    digest = hashlib.sha256(b"evil").hexdigest()
    manifest["files"] += [{"name": name, "size_bytes": 4, "sha256": digest} for name in more]
    manifest["file"] |= {**changes, "parts": [*manifest["file"]["parts"], *changes.get("parts", [])]}
    (harmed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=message.replace("']", r"'\]")):
        hwnas.load_bundle(harmed)


@pytest.mark.parametrize(("kind", "name"), [("bundle", "model.onnx"), ("package", WEIGHTS)])
def test_a_zip_bomb_is_not_unpacked(kind, name, tmp_path, request):
    """A member that claims to be what the manifest says, and unpacks to a thousand times that."""
    path = packed(copy(request.getfixturevalue(kind), tmp_path), tmp_path / "harmed.zip")
    with zipfile.ZipFile(path) as file:
        members = {member: file.read(member) for member in file.namelist()}
    members[name] = bytes(50_000_000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in members.items():
            file.writestr(member, content)
    with pytest.raises(ExportError, match=rf"{name} is not the file that was exported"):
        hwnas.load_bundle(path)
    members[MANIFEST] = bytes(17 * 2**20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in members.items():
            file.writestr(member, content)
    with pytest.raises(ExportError, match=r"manifest.json has more than 16,777,216 bytes"):
        hwnas.load_bundle(path)


@pytest.mark.parametrize("name", [MANIFEST, "model.onnx"])
def test_other_ways_of_packing_are_refused(bundle, name, tmp_path):
    """Of bzip2 and LZMA zipfile unpacks whole blocks, whatever size is asked for."""
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = tmp_path / "other.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for part in bundle.iterdir():
                file.write(part, part.name, method if part.name == name else None)
        with pytest.raises(ExportError, match=rf"a damaged one \({name} is packed by method {method}\)"):
            hwnas.load_bundle(path)


@pytest.mark.parametrize("name", [MANIFEST, "model.onnx"])
def test_damaged_data_is_refused(bundle, name, tmp_path):
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for part in bundle.iterdir():
            file.write(part, part.name)
        member = file.getinfo(name)
    content = bytearray(path.read_bytes())
    start = member.header_offset + 30 + len(name)
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"damaged\.zip: is not a bundle of hwnas, or a damaged one"):
        hwnas.load_bundle(path)


def test_what_is_no_zip(tmp_path):
    path = tmp_path / "no.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(ExportError, match=r"no\.zip: is not a bundle of hwnas, or a damaged one"):
        hwnas.load_bundle(path)
    with pytest.raises(InputError, match=r"missing\.zip: there is no such bundle"):
        hwnas.load_bundle(tmp_path / "missing.zip")


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("format", ["onnx", "coreml"])
def test_zip_and_folder_hold_the_same(colours, format, tmp_path):
    for target in (tmp_path / "b", tmp_path / "b.zip"):
        write(colours, target, format)
        write(colours, target, format)  # replaces a bundle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.zip"]
    with zipfile.ZipFile(tmp_path / "b.zip") as file:
        assert set(file.namelist()) == names(tmp_path / "b")
    images = np.zeros((1, 40, 40, 3), np.uint8)
    folder, zipped = (hwnas.load_bundle(tmp_path / name).predict(images).logits for name in ("b", "b.zip"))
    np.testing.assert_array_equal(folder, zipped)


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_an_interrupted_export_leaves_nothing(colours, name, tmp_path):
    class Stop(BaseException):
        pass

    def stop(artifact):
        raise Stop

    images = random_images(colours.layers, 2, seed=1)
    tensors = {key: tensor.numpy() for key, tensor in colours.state_dict().items()}
    for before in ([], [name]):
        if before:
            write(colours, tmp_path / name)
        with pytest.raises(Stop):
            write_bundle(colours, tensors, OnnxExporter(), images, tmp_path / name, stop)
        assert [path.name for path in tmp_path.iterdir()] == before
    assert hwnas.verify(tmp_path / name)["parity"]["passed"]  # the old one is whole


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_a_full_disk_is_one_line_and_leaves_nothing(colours, name, tmp_path):
    """Files may not grow past 20 kB here, which the model does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match=rf"{name}: cannot be written \(File too large\): name another"):
            write(colours, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["other", "other.zip"])
def test_other_things_are_not_replaced(colours, name, tmp_path):
    target = tmp_path / name
    if target.suffix:
        target.write_bytes(b"my holidays")
    else:
        target.mkdir()
        (target / "photo.jpg").write_bytes(b"0")
    with pytest.raises(InputError, match="exists and is not a bundle of hwnas: name another with --output"):
        write(colours, target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists and is not a bundle"):
        write(colours, tmp_path / "dangling")


def test_other_classes_are_refused(colours, tmp_path):
    with pytest.raises(InputError, match="the network has 7 classes, but the data has 5"):
        write(colours, tmp_path / "bundle", about=told(classes=5))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- parity


def test_parity_gates():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 10), dtype=np.float32)
    assert Parity.of(logits, logits + 1e-5, "fp32", "x").passed
    assert not Parity.of(logits, logits + 2e-3, "fp32", "x").passed
    assert Parity.of(logits, logits + rng.normal(0, 0.05, logits.shape).astype(np.float32), "int8", "x").passed
    assert not Parity.of(logits, logits + rng.normal(0, 0.5, logits.shape).astype(np.float32), "int8", "x").passed
    for precision in ("fp32", "fp16", "int8"):
        assert not Parity.of(logits, np.full_like(logits, np.nan), precision, "x").passed
        assert not Parity.of(logits, logits[:, :5], precision, "x").passed
    assert correlation(logits, 2 * logits + 1) == pytest.approx(1)


def corrupting(kind, name, factor=1.5):
    """An exporter that gets one layer's weights wrong."""

    class Corrupting(kind):
        def write(self, layers, tensors, path):
            wrong = {
                key: value * factor if key in (f"{name}.conv.weight", f"{name}.weight") else value
                for key, value in tensors.items()
            }
            return super().write(layers, wrong, path)

    return Corrupting


LAYERS = [
    "stem",
    "stage2.block1.depthwise",
    "stage3.block1.se.reduce",
    "stage4.block1.project",
    "head.conv",
    "classifier",
]


@pytest.mark.parametrize("format", ["onnx", "tflite", "ncnn", "executorch", "coreml"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_wrong_layer_is_named(format, name, tmp_path):
    pytest.importorskip({"tflite": "ai_edge_litert", "coreml": "torch"}.get(format, format))
    space = tiny_space()
    network = trained_network(lower(space, space.smallest()))
    names = {layer.name for layer in network.layers if layer.kind in ("conv", "linear")}
    if name not in names:
        pytest.skip(f"{name} is not in this space")
    writer = corrupting(type(exporter(format)), name)()
    target = tmp_path / "bundle"
    with pytest.raises(ExportError, match=rf"logits differ by up to .*; the first layer that is wrong is {name};"):
        write(network, target, writer=writer)
    assert list(tmp_path.iterdir()) == []


def test_the_wrong_layer_on_a_shortcut_is_named():
    space = SearchSpace.load("bignas", num_classes=10)
    network = trained_network(lower(space, replace(space.smallest(), resolution=64)))
    tensors = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    images = random_images(network.layers, 2, seed=1)
    name = next(layer.name for layer in network.layers if layer.name.endswith("shortcut.conv"))
    assert culprit(network.layers, tensors, network, corrupting(OnnxExporter, name)(), images) == name
    assert culprit(network.layers, tensors, network, OnnxExporter(), images) is None


def test_the_wrong_layer_of_an_int8_file_is_named(tmp_path):
    space = tiny_space()
    network = trained_network(lower(space, space.largest()))
    writer = corrupting(OnnxExporter, "stage3.block2.expand", factor=-1)(Form(precision="int8"))
    with pytest.raises(ExportError, match=r"the first layer that is wrong is stage3\.block2\.expand"):
        write(network, tmp_path / "bundle", writer=writer)


# ---------------------------------------------------------------- int8


def test_ranges_are_those_of_the_values():
    space = tiny_space()
    network = trained_network(lower(space, space.smallest()))
    images = random_images(network.layers, 8, seed=0)
    expected = tensors_with_ranges(network.layers, network, images)
    found = value_ranges(network, [torch.from_numpy(images)])
    assert found.keys() == {key for key in expected if key.endswith(".range")}
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-5)
    halves = value_ranges(network, torch.from_numpy(images).split(4))
    assert all(halves[key][1] <= value[1] + 1e-6 for key, value in found.items())


@pytest.mark.parametrize("precision", ["int8", "int8-symmetric"])
def test_kept_layers_compute_in_float(quantised, precision, tmp_path):
    """The more of them, the closer; all of them is the network itself."""
    network, tensors, images, _ = quantised
    with torch.no_grad():
        expected = network(torch.from_numpy(images[:8])).numpy()
    errors = []
    for share in (0, 0.5, 1):
        keep = [layer.name for layer in network.layers[: round(share * len(network.layers))]]
        writer = exporter("onnx", precision, keep)
        found = writer.infer(writer.write(network.layers, tensors, tmp_path / "m.onnx").path, images[:8])
        errors.append(float(((found - expected) ** 2).mean()))
    assert errors[0] > errors[2]
    assert errors[2] < 1e-8


@pytest.mark.parametrize("name", ["stage1.block1.add", "stage3.block1.se.scale", "stem", "head.pool", "classifier"])
def test_any_layer_can_be_kept(quantised, name, tmp_path):
    network, tensors, _, accuracy = quantised
    writer = exporter("onnx", "int8", [name])
    assert accuracy(writer, writer.write(network.layers, tensors, tmp_path / "m.onnx").path) > 0.7


def test_sensitive_blocks_stay_in_float32(quantised):
    network, tensors, images, accuracy = quantised
    tensors = {**tensors, "stage2.block1.depthwise.range": np.float32([-1e4, 1e4])}  # steps far too coarse
    whole = exporter("onnx", "int8")
    writer, found = within_drop(network, tensors, whole, images[:16], accuracy, least=0.9)
    assert found >= 0.9
    assert "stage2.block1.depthwise" in writer.form.keep
    assert len(writer.form.keep) < len(network.layers)
    assert within_drop(network, tensors, whole, images[:16], accuracy, least=0.0)[0].form.keep == frozenset()


def test_a_format_that_cannot_mix_says_so(quantised):
    class Unmixed(OnnxExporter):
        mixes = False

    network, tensors, images, accuracy = quantised
    tensors = {**tensors, "stage2.block1.depthwise.range": np.float32([-1e4, 1e4])}
    with pytest.raises(ExportError, match=r"int8 onnx file has a validation accuracy of [\d.]+%, under the 95.00%"):
        within_drop(network, tensors, Unmixed(Form(precision="int8")), images[:16], accuracy, least=0.95)
    with pytest.raises(InputError, match="format onnx cannot keep some layers in float32"):
        Unmixed(Form(precision="int8", keep=frozenset(["stem"])))


def test_blocks_are_all_layers_once(quantised):
    layers = quantised[0].layers
    blocks = list(blocks_of(layers))
    assert sorted(name for names in blocks for name in names) == sorted(layer.name for layer in layers)
    assert any(len(names) > 3 for names in blocks)


def test_int8_bundle(quantised, tmp_path):
    network, tensors, images, _ = quantised
    how = ImagePreprocessing(
        channels=1, size=network.layers[0].in_size, resolution=network.layers[0].in_size, mean=(0.5,), std=(0.2,)
    )
    about = told(classes=10, preprocessing=how)
    writer = exporter("onnx", "int8", ["stem"])
    manifest = write_bundle(network, tensors, writer, images, tmp_path / "b", lambda artifact: about)
    assert manifest.file.precision == "int8"
    assert manifest.file.float32_layers == ("stem",)
    assert manifest.parity.max_allowed is None
    assert hwnas.verify(tmp_path / "b")["parity"]["max_abs_diff"] == 0
    assert io.BytesIO((tmp_path / "b" / "check.npz").read_bytes()).getbuffer().nbytes > 0


# ---------------------------------------------------------------- Core ML


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")
def test_core_ml_bundle_says_that_it_did_not_run_in_core_ml(package):
    who = json.loads((package / MANIFEST).read_text())["parity"]["runtime"]
    assert who == "hwnas's interpreter of Core ML programs (Core ML itself runs on macOS only)"
    assert f"| checked | in {who}, against the trained network" in (package / "README.md").read_text()
    assert hwnas.verify(package)["parity"]["runtime"] == who


@pytest.mark.parametrize("options", [{"pixels": Pixels(COLOURS.mean, COLOURS.std)}, {"batch": 3}, {"batch": None}])
def test_core_ml_pictures_and_batches(colours, package, options, tmp_path):
    images = random_images(colours.layers, 8, seed=1)
    if "pixels" in options:  # real images are made of bytes
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (COLOURS.mean, COLOURS.std))
        images = (options["pixels"].of(images) / np.float32(255) - mean) / std
    tensors = {name: tensor.numpy() for name, tensor in colours.state_dict().items()}
    writer = exporter("coreml", **options)
    write_bundle(colours, tensors, writer, images, tmp_path / "b.zip", lambda artifact: told())
    paths = photos(tmp_path, 4)
    found, expected = (hwnas.load_bundle(path).predict(paths).logits for path in (tmp_path / "b.zip", package))
    np.testing.assert_allclose(found, expected, atol=1e-4)


# ---------------------------------------------------------------- TensorRT


def test_tensorrt_bundle_builds_with_the_flags_of_each_version(colours, tmp_path):
    target = tmp_path / "a bundle"
    write(colours, target, "tensorrt")
    assert hwnas.verify(target)["parity"]["runtime"] == "onnxruntime"
    fake = tmp_path / "trtexec"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def build(*words):
        command = ["sh", target / "build.sh", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRTEXEC": str(fake)})

    flags = build("10", "fp16").stdout.split()
    assert {"--onnx=model.onnx", "--fp16", "--noTF32", "--saveEngine=model-fp16.engine"} <= set(flags)
    assert "--timingCacheFile=./timing.cache" in flags
    assert "--fp16" not in build("8", "fp32").stdout.split()
    assert "--fp16" not in build("11", "fp32").stdout.split()
    for words in (("11", "fp16"), ("7", "fp32"), ("10", "int8"), ()):
        done = build(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "usage: sh build.sh 8|9|10|11 fp32|fp16" in done.stderr
