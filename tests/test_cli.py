"""The command line as a user meets it: a whole small run, wrong input, and kill -9 at random moments."""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from hwnas import api
from hwnas.cli import main
from hwnas.errors import InputError
from hwnas.evaluator import Evaluator
from hwnas.exporters.onnx import OnnxExporter
from hwnas.run import Run
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet

DEVICES = ["--device", "cpu", "--device", "pixel"]
DEVICE = {
    "transport": "host",
    "runtime": "onnxruntime",
    "timing": {
        "rounds": 2,
        "max_rounds": 2,
        "min_duration_s": 0.001,
        "warmup_s": 0.0,
        "max_drift": 10.0,
        "max_error": 10.0,
    },
}
SPACE = {"base": "tiny", "resolution": [8, 12]}
EXTRAS = ("manifest.json", "README.md", "run.py", "check.npz")  # of every bundle
TRAIN = ["--data", "digits", "-o", "data.size=12", "-o", "train.epochs=0.5", "-o", "train.threads=1"]


def hwnas(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys, *words: object) -> dict:
    code, out, err = hwnas(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def add_device(folder: Path) -> None:
    (folder / "devices").mkdir(parents=True, exist_ok=True)
    (folder / "devices" / "quick.yaml").write_text(yaml.safe_dump(DEVICE))


@pytest.fixture(scope="module")
def space_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("space") / "mine.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, space_file) -> Path:
    """A run with everything: trained, profiled, searched. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    add_device(folder)
    for words in (
        ["train", "--space", space_file, *TRAIN],
        ["profile", "--device", "quick", "--children", 12, "--holdout", 3],
        ["search", "--device", "quick", "--latency-ms", 50, "--evaluations", 6],
    ):
        assert main([*map(str, words), "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---------------------------------------------------------------- the whole job


def test_cost_needs_no_run(capsys):
    found = document(capsys, "cost", "--space", "bignas", "--arch", "smallest")
    assert f"{found['macs'] / 1e6:.1f}" == "217.6"
    assert found["macs"] == sum(layer["macs"] for layer in found["layers"])
    assert found["params"] == sum(layer["params"] for layer in found["layers"])
    biggest = document(capsys, "cost", "--space", "bignas", "--arch", "biggest")
    assert f"{biggest['macs'] / 1e6:.1f} {biggest['params'] / 1e6:.2f}" == "1891.5 11.02"


def test_cost_of_a_file(capsys, tmp_path):
    arch = SearchSpace.load("bignas").smallest().to_dict() | {"resolution": 100}
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    found = document(capsys, "cost", "--space", "bignas", "--arch", tmp_path / "arch.json")
    assert found["in_space"] is False
    assert found["architecture"] == arch
    code, out, _ = hwnas(capsys, "cost", "--space", "bignas", "--arch", tmp_path / "arch.json")
    assert code == 0
    assert "stage7.block1.project" in out
    assert "not a member of space bignas" in out


def test_search_document(capsys, finished):
    found = json.loads((finished / "results" / "quick-50ms.json").read_text())
    keys = {"architecture", "architecture_text", "accuracy", "macs", "params", "file_bytes", "peak_bytes"}
    keys |= {"latency", "energy"}
    assert all(set(entry) == keys for entry in [*found["front"], found["best"], found["random"]])
    assert found["limits"] == [{"kind": "latency", "device": "quick", "value": 50, "unit": "ms"}]
    assert found["best"]["latency"]["quick"]["measured"] <= 50
    estimates = [entry["latency"]["quick"] for entry in found["front"]]
    latencies = [estimate["measured"] or estimate["predicted"] for estimate in estimates]
    assert latencies == sorted(latencies)
    accuracies = [entry["accuracy"] for entry in found["front"]]
    assert accuracies == sorted(accuracies)
    space = Run(finished).space
    assert space.check(type(space.smallest()).from_dict(found["best"]["architecture"]))


def test_repeating_commands_repeats_no_work(capsys, run):
    before = counts(run)
    again = document(capsys, "train", "--run", run)
    assert again["space"] == "mine"
    first = json.loads((run / "results" / "quick-50ms.json").read_text())
    found = document(capsys, "search", "--run", run, "--device", "quick", "--latency-ms", 50, "--evaluations", 6)
    assert found["best"]["architecture"] == first["best"]["architecture"]
    document(capsys, "profile", "--run", run, "--device", "quick", "--children", 12, "--holdout", 3)
    assert counts(run) == before


def counts(run: Path) -> dict[str, int]:
    with sqlite3.connect(run / "hwnas.db") as database:
        tables = ("hwnas_measurements", "hwnas_evaluations", "trials")
        return {t: database.execute(f"select count(*) from {t}").fetchone()[0] for t in tables}


def test_predict(capsys, run):
    words = ["predict", "--run", run, "--device", "quick", "--arch", "smallest", "--arch", "biggest"]
    for found in document(capsys, *words, "--layers")["predictions"]:
        assert sum(layer["ms"] for layer in found["layers"]) == pytest.approx(found["predicted_ms"])
    assert "stage1.block1.depthwise" in hwnas(capsys, *words, "--layers")[1]
    small, big = document(capsys, *words)["predictions"]
    assert 0 < small["predicted_ms"] < big["predicted_ms"]
    assert small["std_ms"] > 0
    code, out, _ = hwnas(capsys, *words)
    assert code == 0
    assert "smallest" in out


def test_export_runs_on_its_own(capsys, run, tmp_path):
    """The bundle alone gives the accuracy its manifest states."""
    target = tmp_path / "bundle"
    found = document(capsys, "export", "--run", run, "--output", target)
    manifest = json.loads((target / "manifest.json").read_text())
    assert found["bundle"] == str(target)
    assert {p.name for p in target.iterdir()} == {"model.onnx", "front.svg", *EXTRAS}
    assert manifest["parity"]["passed"]
    assert manifest["parity"]["num_images"] == 64
    assert manifest["latency"]["device"] == "quick"
    assert manifest["latency"]["measured_ms"] > 0
    assert manifest["classes"] == [str(i) for i in range(10)]
    from hwnas.data import batches, load_dataset

    data = load_dataset("digits", cache=tmp_path, size=12)
    assert manifest["preprocessing"]["mean"] == list(data.preprocessing.mean)
    images, labels = next(batches(data.test, len(data.test), manifest["preprocessing"]["resolution"]))
    logits = OnnxExporter().infer(target / "model.onnx", images.numpy())
    accuracy = float((logits.argmax(1) == labels.numpy()).mean())
    assert accuracy == pytest.approx(manifest["accuracy"]["value"], abs=1e-9)
    document(capsys, "export", "--run", run, "--output", target)  # replaces a bundle


@pytest.mark.parametrize(
    ("format", "files", "shape"),
    [
        ("tflite", ["model.tflite"], [1, 8, 8, 1]),
        ("ncnn", ["model.bin", "model.param"], [1, 1, 8, 8]),
        ("executorch", ["model.pte"], [1, 1, 8, 8]),
    ],
)
def test_export_in_other_formats(capsys, run, tmp_path, format, files, shape):
    """Run in its own runtime, and measured where that is."""
    measured = "cpu-litert" if format == "tflite" else f"cpu-{format}"
    words = ["--arch", "smallest", "--device", measured, "--output", tmp_path / "bundle"]
    manifest = document(capsys, "export", "--run", run, "--format", format, *words)
    assert manifest["parity"]["passed"]
    assert manifest["latency"]["device"] == measured
    assert manifest["file"]["parts"] == files
    snippets = {"tflite": ["run.kt"], "ncnn": ["run.cc"]}.get(format, [])
    assert {p.name for p in (tmp_path / "bundle").iterdir()} == {*files, *snippets, *EXTRAS}
    assert manifest["file"]["size_bytes"] == sum((tmp_path / "bundle" / name).stat().st_size for name in files)
    assert manifest["input"]["shape"] == shape
    code, _, err = hwnas(capsys, "export", "--run", run, "--format", format, "--arch", "smallest", "--device", "cpu")
    assert code == 2
    assert "device 'cpu' runs onnx files" in err


def test_export_of_a_broken_file_fails_its_parity_check(capsys, run, tmp_path, monkeypatch):
    honest = OnnxExporter.write

    def swapped(self, layers, tensors, path):
        broken = {**tensors, "classifier.bias": tensors["classifier.bias"] + 0.01}
        return honest(self, layers, broken, path)

    monkeypatch.setattr(OnnxExporter, "write", swapped)
    target = tmp_path / "bundle"
    code, out, err = hwnas(capsys, "export", "--run", run, "--arch", "smallest", "--output", target)
    assert code == 5
    assert "logits differ by up to 0.01" in err
    assert not target.exists()
    assert [p for p in tmp_path.iterdir() if "bundle" in p.name] == []
    assert out == ""


def test_several_formats_share_the_work(capsys, run, tmp_path, monkeypatch):
    calibrated = []
    honest = Evaluator.child

    def counted(self, arch):
        calibrated.append(arch)
        return honest(self, arch)

    monkeypatch.setattr(Evaluator, "child", counted)
    words = ["--format", "onnx", "--format", "tflite", "--output", tmp_path / "all"]
    found = document(capsys, "export", "--run", run, *words)["bundles"]
    assert [bundle["file"]["format"] for bundle in found] == ["onnx", "tflite"]
    assert len(calibrated) == 1
    assert found[0]["latency"]["device"] == "quick"
    assert found[1]["latency"] is None
    for bundle in found:
        assert document(capsys, "verify", bundle["bundle"])["parity"]["passed"]
    code, out, _ = hwnas(capsys, "verify", found[0]["bundle"])
    assert code == 0
    assert "as exported" in out


def test_export_in_int8_to_a_zip(capsys, run, tmp_path):
    """Its accuracy is that of the file in its runtime, and close to the network's."""
    target = tmp_path / "bundle.zip"
    words = ["export", "--run", run, "--arch", "biggest", "--precision", "int8", "--max-accuracy-drop", 0.02]
    code, out, err = hwnas(capsys, *words, "--output", target)
    assert code == 0, err
    assert re.search(r"onnx: validation accuracy [\d.]+% in int8, [\d.]+% in fp32", err)
    assert "(in onnxruntime)" in out
    manifest = document(capsys, "verify", target)["manifest"]
    assert manifest["file"]["precision"] == "int8"
    expected = api.accuracy(Run(run).space.largest(), run, split="test")
    assert manifest["accuracy"]["value"] == pytest.approx(expected, abs=0.1)
    assert manifest["accuracy"]["computed_by"] == "onnxruntime"


def test_export_for_pixels_in_batches(capsys, run, tmp_path):
    """As accurate as without, and not measured on a device, which is timed with files of one normalised image."""
    words = ["export", "--run", run, "--output", tmp_path / "bundle"]
    plain = document(capsys, *words)
    code, out, err = hwnas(capsys, *words, "--pixels", "--batch", "any")
    assert code == 0, err
    assert "is timed with files of one normalised image" in err
    assert "not measured" in out
    manifest = document(capsys, "verify", tmp_path / "bundle")["manifest"]
    side = manifest["preprocessing"]["resolution"]
    assert manifest["input"]["shape"] == [None, side, side, 1]
    assert (manifest["input"]["dtype"], manifest["input"]["values"]) == ("uint8", "pixels")
    assert manifest["output"]["shape"] == [None, 10]
    assert manifest["accuracy"] == plain["accuracy"]
    assert "the last step in the file itself" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_device_that_cannot_be_reached(capsys, run, tmp_path):
    """Where it was only the search's, the bundle says what is predicted; where it was asked for, that is an error."""
    broken = DEVICE | {"python": "/nowhere/python"}
    (run / "devices" / "quick.yaml").write_text(yaml.safe_dump(broken))
    words = ["export", "--run", run, "--output", tmp_path / "bundle"]
    code, out, err = hwnas(capsys, *words)
    assert code == 0, err
    assert "the file is not measured: " in err
    assert "ms predicted on quick, not measured" in out
    manifest = document(capsys, "verify", tmp_path / "bundle")["manifest"]
    assert manifest["latency"]["measured_ms"] is None
    assert manifest["latency"]["predicted_ms"] > 0
    (run / "predictors" / "quick.json").unlink()
    found = document(capsys, *words)  # what the search said
    assert found["latency"]["predicted_ms"] == pytest.approx(manifest["latency"]["predicted_ms"], rel=0.5)
    assert hwnas(capsys, *words, "--device", "quick")[0] == 4


def test_a_runtime_that_is_missing(capsys, run, tmp_path, monkeypatch):
    from hwnas.api import exporting

    def missing(package):
        raise exporting.PackageNotFoundError

    monkeypatch.setattr(exporting, "version", missing)
    code, _, err = hwnas(capsys, "export", "--run", run, "--format", "ncnn", "--output", tmp_path / "bundle")
    assert code == 2
    assert err.splitlines()[-1] == "hwnas: format ncnn needs ncnn: pip install 'hwnas[ncnn]'"


def test_data_of_other_classes_is_refused(capsys, run, tmp_path, monkeypatch):
    from hwnas.api import exporting

    honest = exporting.open_evaluator

    def fewer(*arguments):
        evaluator = honest(*arguments)
        evaluator.data = replace(evaluator.data, classes=evaluator.data.classes[:9])
        return evaluator

    monkeypatch.setattr(exporting, "open_evaluator", fewer)
    code, _, err = hwnas(capsys, "export", "--run", run, "--output", tmp_path / "bundle")
    assert code == 2
    assert "the network has 10 classes, but digits has 9" in err


def test_devices(capsys, run):
    listed = {entry["name"]: entry for entry in document(capsys, "devices", "--run", run)["devices"]}
    assert listed["cpu"]["predictor"] is False
    assert listed["quick"]["predictor"] is True
    assert listed["cpu"]["runtime"] == "onnxruntime"


def test_profile_before_training(capsys, tmp_path, space_file):
    run = tmp_path / "run"
    add_device(run)
    words = ["--run", run, "--device", "quick", "--children", 8]
    found = document(capsys, "profile", *words, "--space", space_file)
    assert found["num_children"] == 8
    assert document(capsys, "fit", "--run", run, "--device", "quick")["num_children"] == 8


def test_a_greater_profile_measures_what_is_missing(tmp_path, space_file):
    """Children that are measured stay among those that the predictor is fitted to, whatever is chosen beside them."""
    run = tmp_path / "run"
    add_device(run)
    api.profile("quick", run, space=space_file, children=14)
    with Run(run).store() as store:
        first = [m.arch for m in store.measurements()]
    made = api.profile("quick", run, children=25, holdout=4)
    with Run(run).store() as store:
        measured = [m.arch for m in store.measurements()]
        tested = {m.arch for m in store.measurements(role="holdout")}
    assert measured[:14] == first
    assert len(measured) == len(set(measured)) == 29
    assert made.num_children == 25
    assert len(tested) == 4
    space = Run(run).space
    assert {space.smallest(), space.largest()} <= set(first[:10])


# ---------------------------------------------------------------- training and data


def test_dry_run_tells_configuration_and_cost_and_keeps_nothing(capsys, tmp_path):
    words = ["train", "--run", tmp_path / "run", *TRAIN, "--recipe", "alphanet", "-o", "train.biggest.dropout=0.3"]
    words += ["-o", "train.batch_size=32", "--dry-run"]
    found = document(capsys, *words)
    assert found["train"]["biggest"] == {"label_smoothing": 0.1, "dropout": 0.3, "drop_connect": 0.2}
    assert found["train"]["distillation"] == "alpha-divergence"
    assert found["space"]["in_channels"] == 1
    assert found["plan"]["total_s"] > found["plan"]["num_steps"] * found["plan"]["step_s"] * 0.99
    assert not (tmp_path / "run" / "run.yaml").exists()
    code, out, _ = hwnas(capsys, *words)
    assert code == 0
    assert "alpha-divergence" in out
    assert re.search(r"a step +[\d.]+ ms", out)
    assert re.search(r"the whole +\d+ steps and 1 evaluations: [\d.]+ min", out)


def test_training_shows_the_watched_children(capsys, tmp_path, space_file):
    child = tmp_path / "mine.json"
    child.write_text(json.dumps(SearchSpace.load(space_file).smallest().to_dict()))
    words = ["train", "--run", tmp_path / "run", "--space", space_file, *TRAIN, "-o", f"train.watch=[biggest,{child}]"]
    code, out, err = hwnas(capsys, *words)
    assert code == 0, err
    assert re.search(r"mine +0\.5\d +\d+\.\d\d%", out)
    assert "mine child" in err
    again = document(capsys, *words)  # finished: nothing is trained again, and the table is still there
    assert {one["child"] for one in again["evaluations"]} == {"biggest", "mine"}


def test_options_without_effect_on_the_weights_may_change(capsys, tmp_path, space_file):
    words = ["train", "--run", tmp_path / "run", "--space", space_file, *TRAIN]
    document(capsys, *words)
    document(capsys, *words, "-o", "train.watch_images=20")
    assert Run(tmp_path / "run").config.train.watch_images == 20
    code, _, err = hwnas(capsys, *words, "-o", "train.lr=0.1")
    assert code == 2
    assert "another train (lr=0.2 there, 0.1 now)" in err


def test_data_is_shown_and_checked(capsys, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    words = ["data", tmp_path / "pets", "--run", tmp_path / "run"]
    found = document(capsys, *words, "--check")
    assert found["classes"] == ["cat", "dog"]
    assert sum(part["images"] for part in found["splits"].values()) == 20
    assert found["unreadable"] == []
    broken = tmp_path / "pets" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    code, _, err = hwnas(capsys, *words, "--check")
    assert code == 2
    assert f"{broken}: cannot be read as an image" in err
    assert err.splitlines()[-1] == "hwnas: 1 images cannot be read: replace or remove them"


def test_a_dataset_of_pytorch_goes_through_every_verb(tmp_path, space_file):
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    pixels = [Image.fromarray(image) for image in images]
    data = list(zip(pixels, digits.target.tolist(), strict=True))
    options = {"train.epochs": 0.3, "train.threads": 1, "data.size": 12}
    run = api.train(tmp_path / "run", space=space_file, data=data, changes=options)
    smallest = run.space.smallest()
    assert 0 <= api.accuracy(smallest, run.path, data=data) <= 1
    folder, manifest = api.export(run.path, arch="smallest", data=data)
    assert manifest["classes"] == [str(number) for number in range(10)]
    assert (folder / "model.onnx").is_file()
    with pytest.raises(InputError, match="has the images of a dataset of PyTorch: give that as data, in Python"):
        api.accuracy(smallest, run.path)


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "digits", "--space", "bignass"], "unknown space 'bignass': not one of"),
        (["train", "--data", "nowhere/"], "no such folder"),
        (["train", "--data", "digitz"], "did you mean"),
        (["train"], "--data"),
        (["train", "--data", "digits", "-o", "train.lr=fast"], "lr: .*not 'fast'"),
        (["train", "--data", "digits", "-o", "train.speed=1"], "speed: is not a known key"),
        (["train", "--data", "digits", "-o", "lr=1"], "options are named"),
        (["train", "--data", "digits", "-o", "train.lr"], "write key=value"),
        (
            ["train", "--data", "digits", "--recipe", "cake"],
            "recipe 'cake' is not one of bignas, sgd_cosine, alphanet, short",
        ),
        (["train", "--data", "digits", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["profile", "--device", "cpu"], "no run at .*: start one with"),
        (["search", "--device", "cpu", "--latency-ms", "1"], "no run at"),
        (["export"], "no run at"),
        (["search", "--device", "cpu", "--latency-ms", "abc"], "'abc' is not a valid float"),
        (
            ["search", "--device", "cpu"],
            "--device cpu: give it a limit, such as --latency-ms 20, or look for its --front",
        ),
        (["search"], "nothing asked for: give a limit"),
        (["search", "--front"], "nothing asked for: give a limit"),
        (["search", "--latency-ms", "3"], "--latency-ms 3: on which device"),
        (["search", *DEVICES, "--latency-ms", "1", "--latency-ms", "2", "--latency-ms", "3"], "given 3 times"),
        (["search", *DEVICES, "--latency-ms", "1", "--together", "--front"], "--together looks for one child"),
        (["search", "--max-macs", "lots"], "'lots' is not a number such as 600M"),
        (["cost", "--space", "bignas", "--arch", "none.json"], "none.json: cannot be read"),
        (["cost", "--arch", "smallest"], "no run at"),
        (["fly"], "No such command 'fly'"),
        (["devices", "--json", "--loud"], "No such option"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = hwnas(capsys, *words)
    last = err.splitlines()[-1]
    assert code == 2
    assert last.startswith("hwnas: ")
    assert "Traceback" not in err
    assert out == ""
    assert re.search(message, last), last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", "--device", "cpux"], "unknown device 'cpux': not one of .*quick.*; did you mean 'cpu'"),
        (["profile", "--device", "quick", "--children", 2], "children=2: at least 5"),
        (["profile", "--device", "quick", "--kind", "oracle"], "oracle"),
        (["search", "--device", "cpu", "--latency-ms", 1], "no latency predictor for 'cpu'"),
        (["search", "--device", "quick", "--latency-ms", 0], "latency limit 0.0 ms: must be a finite number over 0"),
        (["search", "--device", "quick", "--latency-ms", "nan"], "latency limit nan ms"),
        (["search", "--device", "quick", "--latency-ms", 1, "--confidence", 2], "confidence 2.0"),
        (["search", "--device", "quick", "--latency-ms", 1, "--evaluations", 0], "evaluations=0"),
        (["search", "--device", "quick", "--latency-ms", 1, "--strategy", "oracle"], "unknown strategy 'oracle'"),
        (["search", "--device", "quick", "--energy-mj", 1], "no energy predictor for 'quick'"),
        (["export", "--format", "gif"], "format 'gif' is not one of .*onnx"),
        (["export", "--precision", "int3"], "format onnx has no precision 'int3', only fp32, fp16, int8"),
        (
            ["export", "--format", "torch", "--precision", "int8"],
            "format torch has no precision 'int8', only fp32, fp16",
        ),
        (["export", "--batch", "none"], "--batch 'none' is not a number of images"),
        (["export", "--batch", "0"], "batch=0 is not a number of images"),
        (["export", "--format", "ncnn", "--batch", "4"], "files of format ncnn take one image at a time, not 4"),
        (["export", "--format", "tflite", "--batch", "any"], "tflite take .* at a time, not any number"),
        (["export", "--format", "onnx", "--format", "onnx"], "onnx, onnx: one is there twice"),
        (["export", "--max-accuracy-drop", 2], "max_accuracy_drop=2.0 is not a share"),
        (
            ["export", "--device", "quick", "--precision", "int8"],
            "device .quick. takes fp32 files, not int8: use --precision fp32",
        ),
        (["export", "--device", "quick", "--format", "tflite"], "runs onnx files, not tflite: use --format onnx"),
        (["verify", "nowhere"], "nowhere: there is no such bundle"),
        (["export", "--result", "none"], "no result 'none' .*quick-50ms"),
        (["export", "--output", "/proc/none"], "/proc/none: cannot be written"),
        (["predict", "--device", "quick", "--arch", "none.json"], "none.json: cannot be read"),
        (["train", "--data", "digits"], "holds a run with another space"),
        (["train", "--data", "digits", "--space", "SPACE", "-o", "data.size=12"], "another train"),
    ],
)
def test_wrong_input_with_a_run(capsys, words, message, run, space_file):
    before = counts(run)
    words = [space_file if word == "SPACE" else word for word in words]
    where = [] if words[0] == "verify" else ["--run", run]
    code, out, err = hwnas(capsys, *words, *where)
    assert code == 2, err
    assert re.search(message, err.splitlines()[-1]), err
    assert out == ""
    assert counts(run) == before


def test_a_limit_below_the_smallest_child(capsys, run):
    code, out, err = hwnas(capsys, "search", "--run", run, "--device", "quick", "--latency-ms", 1e-6)
    assert code == 3
    assert "the least possible is 0.0" in err.splitlines()[-1]
    assert out == ""


def test_a_limit_above_the_biggest_child_is_said(capsys, run):
    words = ["search", "--run", run, "--device", "quick", "--latency-ms", 1000, "--evaluations", 2]
    code, _, err = hwnas(capsys, *words)
    assert code == 0
    assert "above the biggest child" in err


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_files_are_named(capsys, run, damage):
    for name, words in (
        ("hwnas.db", ["search", "--device", "quick", "--latency-ms", 50]),
        ("supernet.safetensors", ["search", "--device", "quick", "--latency-ms", 50]),
        ("run.yaml", ["search", "--device", "quick", "--latency-ms", 50]),
        ("predictors/quick.json", ["predict", "--device", "quick", "--arch", "smallest"]),
        ("results/quick-50ms.json", ["export"]),
    ):
        path = run / name
        original = path.read_bytes()
        for extra in run.glob("hwnas.db-*"):
            extra.unlink()
        half = original[: len(original) // 2]
        path.write_bytes(half if damage == "truncated" else b"\x00\xff garbage" * 50)
        code, out, err = hwnas(capsys, *words, "--run", run)
        assert (code, out) == (2, ""), (name, err)
        assert Path(name).name in err.splitlines()[-1]
        path.write_bytes(original)


def test_a_damaged_checkpoint_is_named(capsys, run):
    (run / "supernet.safetensors").unlink()
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:500])
    code, _, err = hwnas(capsys, "train", "--run", run)
    assert code == 2
    assert newest.name in err
    assert "delete it" in err


# ---------------------------------------------------------------- kill -9


def kill_at_random(words: list[object], seconds: tuple[float, float], times: int, seed: int) -> None:
    """Start the command and kill it with SIGKILL somewhere, a few times; then let it finish."""
    command = [sys.executable, "-m", "hwnas", *map(str, words)]
    rng = random.Random(seed)
    for _ in range(times):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(*seconds))
            os.kill(process.pid, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_killed_profile_goes_on(tmp_path, space_file):
    run = tmp_path / "run"
    add_device(run)
    words = ["profile", "--run", run, "--device", "quick", "--children", 40, "--holdout", 5, "--space", space_file]
    kill_at_random(words, (1.0, 3.0), 3, seed=0)
    with sqlite3.connect(run / "hwnas.db") as database:
        rows = database.execute("select arch_id, error from hwnas_measurements").fetchall()
    assert len(rows) == len({arch for arch, _ in rows}) == 45  # each child once, none lost
    assert {error for _, error in rows} == {None}


def test_killed_search_goes_on(run, finished):
    words = ["search", "--run", run, "--device", "quick", "--latency-ms", 40, "--evaluations", 30]
    kill_at_random(words, (2.0, 5.0), 3, seed=1)
    with sqlite3.connect(run / "hwnas.db") as database:
        evaluated = database.execute("select arch_id from hwnas_evaluations").fetchall()
        trials = database.execute("select count(*) from trials").fetchone()[0]
    assert len(evaluated) == len(set(evaluated))
    assert trials - counts(finished)["trials"] == 60  # both studies whole, nothing twice
    result = json.loads((run / "results" / "quick-40ms.json").read_text())
    assert [len(accuracies) for accuracies in result["history"].values()] == [30, 30]


def test_killed_training_goes_on(tmp_path, space_file, finished):
    run = tmp_path / "run"
    words = ["train", "--run", run, "--space", space_file, *TRAIN]
    kill_at_random(words, (1.5, 4.0), 2, seed=2)
    assert Supernet.load(run).identity() == Supernet.load(finished).identity()
