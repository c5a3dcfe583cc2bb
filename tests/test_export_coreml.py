"""Core ML packages say what the network computes, as far as one can tell without macOS."""

import hashlib
import json
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.errors import ExportError, InputError
from hwnas.exporters import mil
from hwnas.exporters.base import Pixels, exporter, random_tensors
from hwnas.layers import IMAGE, lower
from hwnas.space import SearchSpace
from hwnas.testing import ExporterContract, random_images, tensors_with_ranges, tiny_space, trained_network


class TestCoremlExporter(ExporterContract):
    @pytest.fixture(params=["fp32", "fp16"])
    def exporter(self, request):
        return exporter("coreml", request.param)


@pytest.fixture
def written(tmp_path):
    """A package of tiny's smallest child, its exporter, and images."""
    space = tiny_space()
    layers = lower(space, space.smallest())
    writer = exporter("coreml")
    path = writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.mlpackage").path
    return path, writer, random_images(layers, 2, seed=1)


def test_fp16_is_half_as_big_and_rounds(tmp_path):
    space = tiny_space()
    network = trained_network(lower(space, space.largest()))
    images = random_images(network.layers, 16, seed=1)
    tensors = tensors_with_ranges(network.layers, network, images)
    sizes, logits = {}, {}
    for precision in ("fp32", "fp16"):
        writer = exporter("coreml", precision)
        path = writer.write(network.layers, tensors, tmp_path / f"{precision}.mlpackage").path
        sizes[precision] = (path / mil.WEIGHTS).stat().st_size
        logits[precision] = writer.infer(path, images)
    assert 0.5 < sizes["fp16"] / sizes["fp32"] < 0.55
    assert 0 < np.abs(logits["fp16"] - logits["fp32"]).max() < 0.05


def test_hash_is_that_of_the_files_in_their_order(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    artifact = exporter("coreml").write(layers, tensors, tmp_path / "m.mlpackage")
    files = sorted(file for file in artifact.path.rglob("*") if file.is_file())
    assert [file.relative_to(artifact.path).as_posix() for file in files] == [mil.MODEL, mil.WEIGHTS, "Manifest.json"]
    assert artifact.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_a_failed_write_leaves_the_old_package(written, monkeypatch):
    path, writer, images = written
    before = writer.infer(path, images)
    layers = lower(tiny_space(), tiny_space().largest())
    monkeypatch.setattr(mil, "WEIGHTS", f"{mil.MODEL}/weights")  # cannot be made: its folder is a file
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        writer.write(layers, random_tensors(layers, np.random.default_rng(1)), path)
    monkeypatch.undo()
    assert [*path.parent.iterdir()] == [path]
    np.testing.assert_array_equal(writer.infer(path, images), before)


# ---------------------------------------------------------------- what coremltools makes of them

# Without packages that coremltools takes seconds to import.
QUIET = """
import json, logging, sys
import numpy as np
sys.modules.update(dict.fromkeys(["executorch", "sklearn", "tensorflow", "torch", "xgboost"]))
logging.disable()
import coremltools
"""
READ = """
from coremltools.converters.mil.frontend.milproto.load import load

def shape(sides):
    return [int(side) if isinstance(side, (int, np.integer)) else None for side in sides]

found = {}
for path in sys.argv[1:]:
    model = coremltools.models.MLModel(path, skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)  # infers every type and shape
    operations = program.functions["main"].operations
    found[path] = {
        "values": {o.outputs[0].name: shape(o.outputs[0].shape) for o in operations if o.op_type != "const"},
        "kinds": sorted({o.op_type for o in operations}),
        "output": str(program.functions["main"].outputs[0].name),
        "sums": {
            o.outputs[0].name: float(np.abs(o.outputs[0].val.astype(np.float64)).sum())
            for o in operations if o.op_type == "const" and isinstance(o.outputs[0].val, np.ndarray)
        },
        "input": " ".join(str(spec.description.input[0].type).split()),
    }
print(json.dumps(found))
"""


def in_coremltools(code, *words):
    """What a program prints as JSON in a process of its own."""
    if find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed: pip install 'hwnas[coreml]'")
    command = [sys.executable, "-W", "ignore", "-c", QUIET + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_coremltools_reads_the_same_program(tmp_path):
    """It finds every operation, and gives each value the shape that the package says; the weights are the same."""
    declared, weights = {}, {}
    forms = {"tiny": {"pixels": 1}, "bignas": {"batch": 3}, "ofa-mbv3": {"batch": None}, "attentivenas": {"pixels": 3}}
    for name, form in forms.items():
        space = SearchSpace.load(name, num_classes=10)
        space = replace(space, in_channels=form.get("pixels", 3))
        layers = lower(space, replace(space.smallest(), resolution=33))
        pixels = Pixels((0.5,) * space.in_channels, (0.2,) * space.in_channels) if "pixels" in form else None
        precision = "fp16" if pixels is None else "fp32"
        writer = exporter("coreml", precision, batch=form.get("batch", 1), pixels=pixels)
        tensors = random_tensors(layers, np.random.default_rng(0))
        path = str(writer.write(layers, tensors, tmp_path / f"{name}.mlpackage").path)
        model = mil.messages().Model.FromString((Path(path) / mil.MODEL).read_bytes())
        declared[path] = {
            o.outputs[0].name: [
                side.constant.size if side.HasField("constant") else None
                for side in o.outputs[0].type.tensorType.dimensions
            ]
            for o in operations_of(model)
            if o.type != "const"
        }
        total = np.abs(tensors["classifier.weight"].astype(mil.DTYPES[precision]).astype(np.float64)).sum()
        weights[path] = pytest.approx(total, rel=1e-9)
    found = in_coremltools(READ, *declared)
    for path, values in declared.items():
        assert found[path]["values"] == values
        assert found[path]["output"] == "logits"
        last = "logits_fp16_weight" if "logits_fp16" in values else "logits_weight"
        assert found[path]["sums"][last] == weights[path]
    assert {kind for one in found.values() for kind in one["kinds"]} >= {"avg_pool", "silu", "sigmoid_hard", "squeeze"}
    inputs = {Path(path).stem: one["input"] for path, one in found.items()}
    assert inputs["tiny"] == "imageType { width: 33 height: 33 colorSpace: GRAYSCALE }"
    assert inputs["attentivenas"] == "imageType { width: 33 height: 33 colorSpace: RGB }"
    assert inputs["bignas"].startswith("multiArrayType { shape: 3 shape: 3 shape: 33 shape: 33 dataType: FLOAT32")
    assert "sizeRanges { lowerBound: 1 upperBound: 1024 }" in inputs["ofa-mbv3"]


OPERATIONS = {  # with the arguments that we write
    "add": {"y": "other"},
    "mul": {"y": "other"},
    "relu": {},
    "sigmoid": {},
    "sigmoid_hard": {"alpha": 1 / 6, "beta": 0.5},
    "reduce_mean": {"axes": [2, 3], "keep_dims": True},
}
COMPUTE = """
from coremltools.converters.mil import Builder as mb
wanted, x, other = json.loads(sys.argv[1]), np.load(sys.argv[2])["x"], np.load(sys.argv[2])["other"]
found = {}

@mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=coremltools.target.iOS15)
def program(unused):
    for name, arguments in wanted.items():
        given = {key: other if value == "other" else value for key, value in arguments.items()}
        found[name] = getattr(mb, name)(x=x, **given).val.tolist()
    flat = mb.squeeze(x=x[:, :, :1, :1], axes=[2, 3])
    found["linear"] = mb.linear(x=flat, weight=other[0, :, :, 0], bias=other[0, :, 0, 0]).val.tolist()
    return unused

print(json.dumps(found))
"""


def test_operations_compute_what_those_of_coremltools_do(tmp_path):
    """Those that it computes on constants; of the others it knows only types and shapes."""
    rng = np.random.default_rng(0)
    x, other = (rng.normal(0, 3, shape).astype(np.float32) for shape in ((2, 4, 4, 4), (1, 4, 4, 4)))
    np.savez(tmp_path / "given.npz", x=x, other=other)
    found = in_coremltools(COMPUTE, json.dumps(OPERATIONS), tmp_path / "given.npz")
    values = {"other": torch.from_numpy(other)}
    for name, arguments in OPERATIONS.items():
        given = {key: values.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()}
        expected = mil.OPERATIONS[name](torch.from_numpy(x), **given)
        np.testing.assert_allclose(expected, found[name], rtol=1e-5, atol=1e-6)
    flat = mil.OPERATIONS["squeeze"](torch.from_numpy(x[:, :, :1, :1]), [2, 3])
    weight, bias = values["other"][0, :, :, 0], values["other"][0, :, 0, 0]
    np.testing.assert_allclose(mil.OPERATIONS["linear"](flat, weight, bias), found["linear"], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is refused


def operations_of(model):
    return model.mlProgram.functions[0].value.block_specializations[0].value.operations


def first(model, kind):
    return next(operation for operation in operations_of(model) if operation.type == kind)


def rename(operation, **names):
    for entry in operation.inputs:
        if entry.key in names:
            entry.value.arguments[0].name = names[entry.key]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda m: setattr(first(m, "reduce_mean"), "type", "gelu"), "hwnas writes no operation 'gelu'"),
        (lambda m: setattr(m, "specificationVersion", 9), "not an ML program of specification 6"),
        (lambda m: m.description.output[0].type.multiArrayType.shape.__setitem__(1, 9), r"described as fp32 \(1, 9\)"),
        (lambda m: m.description.input[0].type.multiArrayType.shape.__setitem__(0, 9), r"described to take fp32 \(9,"),
        (lambda m: setattr(m.description.input[0], "name", "x"), "not image and logits"),
        (lambda m: setattr(first(m, "conv").outputs[0].type.tensorType.dimensions[1].constant, "size", 99), "99"),
        (lambda m: setattr(first(m, "conv").outputs[0].type.tensorType, "dataType", 10), "is made of"),
        (lambda m: rename(first(m, "reduce_mean"), x="nothing"), r"reads \['nothing'\], not what is made before it"),
        (
            lambda m: rename(first(m, "reduce_mean"), x=first(m, "reduce_mean").outputs[0].name),
            "not what is made before it",
        ),
        (lambda m: first(m, "conv").inputs.pop(), "conv.* missing 1 required"),
        (lambda m: operations_of(m).append(first(m, "reduce_mean")), "does not make one value that is new"),
        (lambda m: operations_of(m).pop(), "logits are not made"),
        (lambda m: weight_of(m).__setattr__("offset", 128), "there is no fp32 tensor at 128"),
        (lambda m: weight_of(m).__setattr__("offset", 2**40), "unpack_from requires"),
        (lambda m: weight_of(m).__setattr__("fileName", "/etc/passwd"), "its weights are in '/etc/passwd'"),
        (lambda m: m.MergeFromString(b"\xa2\x1f\x01x"), "has fields that hwnas does not write"),  # field 500
    ],
)
def test_programs_that_are_wrong_are_refused(written, harm, message):
    path, writer, images = written
    model = mil.messages().Model.FromString((path / mil.MODEL).read_bytes())
    (path / mil.MODEL).write_bytes(model.SerializeToString())
    writer.infer(path, images)
    harm(model)
    (path / mil.MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=f"hwnas's interpreter of Core ML programs .* cannot run .*{message}"):
        writer.infer(path, images)


def weight_of(model):
    return next(entry.value.blobFileValue for entry in first_weight(model).attributes if entry.key == "val")


def first_weight(model):
    return next(o for o in operations_of(model) if o.type == "const" and o.outputs[0].name == "stem_weight")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: (path / mil.WEIGHTS).write_bytes((path / mil.WEIGHTS).read_bytes()[:-40]), "reshape"),
        (lambda path: (path / mil.WEIGHTS).write_bytes(bytes(9)), "buffer"),
        (lambda path: (path / mil.WEIGHTS).write_bytes(b"\3\0\0\0\1" + bytes(500)), "not of version 2"),
        (lambda path: (path / mil.WEIGHTS).unlink(), "No such file"),
        (lambda path: (path / mil.MODEL).write_bytes(b"\xff" * 9), "Error parsing message"),
    ],
)
def test_damaged_packages_are_refused(written, harm, message):
    path, writer, images = written
    harm(path)
    with pytest.raises(ExportError, match=message):
        writer.infer(path, images)


def test_pictures_come_one_at_a_time_in_grey_or_colour(tmp_path):
    with pytest.raises(InputError, match="Core ML takes pictures one at a time: give batch 1, or normalised images"):
        exporter("coreml", batch=None, pixels=Pixels((0.5,), (0.2,)))
    space = replace(tiny_space(), in_channels=2)
    layers = lower(space, space.smallest())
    writer = exporter("coreml", pixels=Pixels((0.5,) * 2, (0.2,) * 2))
    with pytest.raises(ExportError, match="pictures of 1 or 3 channels, not 2: export it without pixels"):
        writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.mlpackage")


# ---------------------------------------------------------------- on macOS


@pytest.fixture
def on_macos(monkeypatch):
    """A stand-in for Core ML, with the arguments and results that coremltools documents."""

    class MLModel:
        def __init__(self, model, compute_units):
            self._path, self._units = Path(model), compute_units

        def get_spec(self):
            return mil.messages().Model.FromString((self._path / mil.MODEL).read_bytes())

        def predict(self, data):
            assert self._units == "CPU_ONLY"
            image = data[IMAGE]
            if not isinstance(image, np.ndarray):
                image = np.asarray(image).reshape(1, *image.size[::-1], -1)
            return {"logits": mil.interpreter(self._path)(image)}

    fake = types.ModuleType("coremltools")
    fake.models = types.SimpleNamespace(MLModel=MLModel)
    fake.ComputeUnit = types.SimpleNamespace(CPU_ONLY="CPU_ONLY")
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pictures", [False, True])
def test_runs_in_core_ml(on_macos, channels, pictures, tmp_path, monkeypatch):
    space = replace(tiny_space(), in_channels=channels)
    layers = lower(space, space.smallest())
    pixels = Pixels((0.5,) * channels, (0.2,) * channels) if pictures else None
    writer, images = exporter("coreml", pixels=pixels), random_images(layers, 3, seed=1)
    path = writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.mlpackage").path
    found = writer.infer(path, images)
    monkeypatch.setattr(sys, "platform", "linux")
    np.testing.assert_array_equal(found, writer.infer(path, images))


def test_without_coremltools_on_macos(on_macos, written, monkeypatch):
    path, writer, images = written
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ExportError, match=r"is not installed: pip install ('hwnas\[coreml\]'|coremltools)"):
        writer.infer(path, images)
