"""Models from published measurements: what ships, what it says of itself, and transfers from it."""

import json
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from hwnas import __version__, api
from hwnas.api.profiling import last_measurements
from hwnas.cli import main
from hwnas.devices import device_files, load_device
from hwnas.devices.base import RunTimes
from hwnas.errors import InputError
from hwnas.layers import total_macs
from hwnas.measurement import Measurement
from hwnas.predictors import load_predictor, make_predictor
from hwnas.predictors.features import FEATURE_NAMES
from hwnas.predictors.published import CATALOG, candidates, published_models, read_published
from hwnas.run import Run, RunConfig, published_model
from hwnas.space import SearchSpace
from hwnas.testing import tiny_space

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TABLES = Path(__file__).parents[2] / "shared" / "data" / "latency"
MODELS = published_models()


@pytest.fixture
def run():
    return Run.create(None, RunConfig(hwnas=__version__, space=tiny_space()))


@pytest.fixture
def tables(monkeypatch):
    """`benchmarks/published_tables.py`."""
    if not TABLES.exists():
        pytest.skip(f"no {TABLES}")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import published_tables

    yield published_tables
    for name in ("published", "published_tables", "environment"):
        sys.modules.pop(name, None)


def run_cli(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def measured(run, device, latency_ms, count, seed=0):
    """Puts measurements of random children into the run's database; the children."""
    target, rng = load_device(device), np.random.default_rng(seed)
    archs = [run.space.sample(rng) for _ in range(count)]
    with run.store() as store:
        for arch, ms in zip(archs, latency_ms(archs), strict=True):
            rounds = (RunTimes((float(ms),) * 3, (False,) * 3),) * target.timing.rounds
            what = {"runtime": target.runtime, "versions": {"it": "1"}, "precision": target.precision}
            store.add_measurement(Measurement(arch=arch, device=device, timing=target.timing, rounds=rounds, **what))
    return archs


# -------------------------------------------------------------------- what ships


def test_ships_what_was_promised():
    machines = {model.machine for model in MODELS.values()}
    boards = {"Jetson Nano", "Jetson AGX Xavier", "Jetson Orin Nano", "Jetson AGX Orin", "Raspberry Pi 4"}
    assert boards | {f"Google Pixel {n}" for n in (1, 3, 4)} | {"Samsung Galaxy Note10"} <= machines


@pytest.mark.parametrize("name", MODELS)
def test_a_model_serves_the_device_it_is_named_after(name):
    model = MODELS[name]
    assert published_model(load_device(model.devices[0])) is model
    assert set(model.devices) | set(model.stands_in_for) <= set(device_files())
    assert set(model.coefficients_ms) == set(FEATURE_NAMES)
    assert min(model.coefficients_ms.values()) > 0
    assert all(source.url.startswith("https://") and source.licence for source in model.sources)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", ["tiny", "bignas", "attentivenas", "ofa-mbv3"])
def test_predicts_any_space(name, space):
    space, model = SearchSpace.load(space), MODELS[name]
    predictor = model.predictor(space, model.devices[0])
    mean_ms, std_ms = predictor.predict([space.smallest(), space.largest()])
    assert 0 < mean_ms[0] < mean_ms[1]
    assert (std_ms >= model.relative_std * mean_ms).all()
    assert predictor.statistics.left_out_pct >= model.statistics.left_out_pct
    layers = predictor.breakdown_ms(space.largest())
    assert sum(ms for _, ms in layers) == pytest.approx(mean_ms[1])


def test_says_what_it_is():
    model = MODELS["galaxy-note10"]
    source = model.predictor(tiny_space(), "galaxy-note10").source
    assert source.startswith("estimated from published measurements of Samsung Galaxy Note10 (TensorFlow Lite")
    assert "1 thread; 480 blocks)" in source
    assert source.endswith("run `hwnas profile --device galaxy-note10` to make it exact")


def test_what_was_not_measured_widens_the_error():
    model = MODELS["pixel-3-4-threads"]
    assert {"swish_elements", "squeeze_excites"} <= set(model.unmeasured)
    plain = replace(SearchSpace.load("attentivenas"), activation="relu")
    plain = replace(plain, stages=tuple(replace(s, se=False, activation=None) for s in plain.stages))
    swish = SearchSpace.load("bignas")
    errors = []
    for space in (plain, swish):
        mean_ms, std_ms = model.predictor(space, "pixel-3-4-threads").predict([space.largest()])
        errors.append(float(std_ms[0] / mean_ms[0]))
    assert errors[0] < 1.2 * model.relative_std < errors[1]
    assert "kinds of work that these had not" in model.predictor(swish, "pixel-3-4-threads").source


def test_a_damaged_file(tmp_path):
    content = json.loads((CATALOG / "pixel-1.json").read_text()) | {"threads": "many"}
    (tmp_path / "pixel-1.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"pixel-1\.json: threads: input should be a valid integer.*'many'"):
        read_published(tmp_path / "pixel-1.json")


def test_survives_saving_and_is_gone_with_a_fit(tmp_path):
    space = tiny_space()
    predictor = MODELS["pixel-1"].predictor(space, "pixel-1")
    predictor.save(tmp_path / "p.json")
    loaded = load_predictor(tmp_path / "p.json")
    assert loaded.source == predictor.source != ""
    assert loaded.to_dict() == predictor.to_dict()
    archs = [space.sample(np.random.default_rng(seed)) for seed in range(8)]
    assert loaded.fit(archs, [1.0 + 0.1 * n for n in range(8)]).source == ""


# -------------------------------------------------------------------- which model serves which device


def test_a_fresh_machine_answers_for_a_pixel(run):
    predictor = run.predictor("pixel")
    assert "4 threads; 5 networks), for want of any of 'pixel' (others are of pixel-1, pixel-3" in predictor.source
    assert predictor.space == run.space


def test_another_runtime_is_not_used_silently(run):
    with pytest.raises(InputError, match=r"'jetson' .*--device jetson`, or take .*: .*jetson-orin-nano-ncnn \(ncnn"):
        run.predictor("jetson")
    assert "Jetson Orin Nano" in run.predictor("jetson-orin-nano-ncnn").source


def test_other_threads_are_not_used_silently(run):
    with pytest.raises(InputError, match=r"'pixel-4' .*pixel-4-4-threads \(TensorFlow Lite .*, 4 threads\)"):
        run.predictor("pixel-4")


@pytest.mark.parametrize(("key", "value"), [("precision", "int8"), ("timing", {"threads": 2})])
def test_a_device_of_ones_own_that_differs_is_not_served(run, key, value):
    run.folder("devices")
    (run.devices / "galaxy-note10.yaml").write_text(yaml.safe_dump({"base": "galaxy-note10", key: value}))
    with pytest.raises(InputError, match="no latency predictor for 'galaxy-note10'"):
        run.predictor("galaxy-note10")


def test_a_file_that_has_a_catalogue_name(run, tmp_path):
    file = tmp_path / "galaxy-note10.yaml"
    file.write_text(yaml.safe_dump({"base": "galaxy-note10"}))
    assert run.predictor(file).source
    file.write_text(yaml.safe_dump({"base": "galaxy-note10", "precision": "int8"}))
    with pytest.raises(InputError, match="no latency predictor for 'galaxy-note10'"):
        run.predictor(file)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_standing_in_needs_the_same_precision(run, precision):
    run.folder("devices")
    (run.devices / "pixel.yaml").write_text(yaml.safe_dump({"base": "pixel", "precision": precision}))
    with pytest.raises(InputError, match="no latency predictor for 'pixel'"):
        run.predictor("pixel")


@pytest.mark.parametrize(
    ("name", "meant"), [("pixel4", "pixel-4-4-threads"), ("note10", "galaxy-note10"), ("Pi4", "raspberry-pi-4-ncnn")]
)
def test_names_that_are_nearly_right(run, name, meant):
    assert meant in [model.devices[0] for model in candidates(name)]
    with pytest.raises(InputError, match=rf"no latency predictor for '{name}'.* {meant} \("):
        run.predictor(name)


def test_nothing_is_published_of_this_machine(run):
    with pytest.raises(InputError, match=r"`hwnas profile --device cpu`$"):
        run.predictor("cpu")


def test_what_was_fitted_goes_first(run):
    archs = [run.space.sample(np.random.default_rng(seed)) for seed in range(8)]
    make_predictor("prior", run.space).fit(archs, [1.0 + 0.1 * n for n in range(8)]).save(
        run.folder("predictors") / "pixel.json"
    )
    assert run.predictor("pixel").source == ""


# -------------------------------------------------------------------- transfer


def like_note10(run, factor=1.7):
    """A device whose layers cost `factor` times what those of Note10 do, with half a percent of noise."""
    predictor, rng = MODELS["galaxy-note10"].predictor(run.space, "galaxy-note10"), np.random.default_rng(5)
    return lambda archs: factor * predictor.predict(archs)[0] * np.exp(0.005 * rng.standard_normal(len(archs)))


def test_auto_takes_what_is_published_where_measurements_are_few(run):
    measured(run, "galaxy-note10", like_note10(run), 10)
    made = api.fit("galaxy-note10")
    assert made.predictor.kind == "transfer"
    assert made.choice.startswith("transfer: mean error")
    assert made.choice.endswith("; transfer is from published measurements of Samsung Galaxy Note10")
    assert made.cross_validation.mape_pct < 5
    assert run.predictor("galaxy-note10").source == ""


def test_auto_keeps_its_own_kinds_where_these_are_better(run):
    machine = MODELS["jetson-nano-ncnn"].predictor(run.space, "galaxy-note10")  # waits for launches, unlike a phone
    measured(run, "galaxy-note10", lambda archs: machine.predict(archs)[0], 24)
    (run.folder("predictors") / "cpu.json").write_text("damaged")  # another device's, so of no concern
    made = api.fit("galaxy-note10")
    assert made.predictor.kind == "auto"
    assert ", against transfer " in made.choice


def test_many_measurements_speak_for_themselves(run):
    measured(run, "galaxy-note10", like_note10(run), 31)
    made = api.fit("galaxy-note10")
    assert made.predictor.kind == "auto"
    assert "transfer" not in made.choice


def test_transfer_finds_its_sources(run, capsys):
    measured(run, "cpu", lambda archs: [arch.resolution / 20 + len(arch.stages) for arch in archs], 10)
    with pytest.raises(InputError, match=r"nothing known to transfer to 'cpu': profile another device in .* first"):
        api.fit("cpu", kind="transfer")
    measured(run, "galaxy-note10", like_note10(run), 10)
    api.fit("galaxy-note10", kind="gp")
    measured(run, "pixel-1", like_note10(run, 3.0), 10)
    api.fit("pixel-1", kind="macs")  # knows no single layers
    code, out, _ = run_cli(capsys, "fit", "--device", "cpu", "--kind", "transfer")
    assert code == 0
    assert "transfer is from galaxy-note10" in out
    (run.path / "predictors" / "cpu.energy.json").write_bytes((run.path / "predictors" / "cpu.json").read_bytes())
    made = api.fit("galaxy-note10", kind="transfer")
    assert made.choice.endswith("transfer is from cpu, published measurements of Samsung Galaxy Note10")


def test_transfer_without_sources_is_refused_before_measuring(run):
    with pytest.raises(InputError, match="nothing known to transfer to 'cpu'"):
        api.profile("cpu", kind="transfer")


def test_what_an_older_hwnas_measured_still_counts(run):
    archs = measured(run, "galaxy-note10", like_note10(run), 4)
    with sqlite3.connect(run.path / "hwnas.db") as database:  # its `Timing` had fewer keys, so it hashed other text
        (text,) = database.execute("select timing from hwnas_measurements where id = 1").fetchone()
        timing = {key: value for key, value in json.loads(text).items() if key != "max_error"}
        database.execute(
            "update hwnas_measurements set protocol = 'old', timing = ? where id = 1", [json.dumps(timing)]
        )
    with run.store() as store:
        found = last_measurements("galaxy-note10", load_device("galaxy-note10").timing, store)
    assert {m.arch for m in found} == set(archs)


# -------------------------------------------------------------------- commands


def test_predict_says_so(run, capsys):
    code, out, _ = run_cli(capsys, "predict", "--device", "pixel", "--arch", "smallest", "--layers")
    assert code == 0
    assert "estimated from published measurements of Google Pixel 4" in out
    code, out, _ = run_cli(capsys, "predict", "--device", "pixel", "--arch", "smallest", "--json")
    assert "Google Pixel 4" in json.loads(out)["predictions"][0]["source"]


def test_devices_tell(capsys):
    _, out, _ = run_cli(capsys, "devices", "--json")
    listed = {device["name"]: device for device in json.loads(out)["devices"]}
    typical = MODELS["galaxy-note10"].statistics.left_out_pct
    published = {"machine": "Samsung Galaxy Note10", "stands_in": False, "typical_error_pct": typical}
    assert listed["galaxy-note10"]["published"] == published
    assert listed["cpu"]["published"] is None
    _, out, _ = run_cli(capsys, "devices")
    assert out.count(" published") == sum(device["published"] is not None for device in listed.values())
    assert "published of Google Pixel 4" in out
    _, out, _ = run_cli(capsys, "devices", "show", "pixel-3-4-threads")
    assert "Google Pixel 3" in out
    assert "Apache-2.0" in out


# -------------------------------------------------------------------- the tables, where they are at hand


def test_networks_are_those_published(tables):
    # MMACs that the papers print: MobileNets' tables 8 and 4; 577 and 315 of MnasNet-B1 and A1 by their code.
    assert total_macs(tables.mobilenet_v1(1.0, 224)) / 1e6 == pytest.approx(569, abs=1)
    assert total_macs(tables.mobilenet_v2(1.0, 224)) / 1e6 == pytest.approx(300, abs=2)
    assert total_macs(tables.mobilenet_v2(1.4, 224)) / 1e6 == pytest.approx(585, abs=4)
    differences = tables.macs_differences()
    assert max(abs(d) for d in differences.values()) < 0.06
    assert len(tables.pixel("pixel1", "tflite", "1", "fp32")) == 47
    assert len(tables.blocks("ofa_note10")) == 480


def test_ncnn_layers_add_up(tables):
    macs = [index for index, name in enumerate(FEATURE_NAMES) if name.endswith("_macs") and "padding" not in name]
    with (TABLES / "ncnn_models.csv").open() as file:
        published = {name: float(mmacs) for name, _, _, mmacs, _ in (line.strip().split(",") for line in file)
                     if name in tables.MOBILE}  # fmt: skip
    assert len(published) == len(tables.MOBILE)
    for sample in tables.ncnn("Raspberry Pi 4", ("1",), gpu=False):
        assert sample.features[macs].sum() / 1e6 == pytest.approx(published[sample.name], rel=1e-6)


def test_a_family_left_out_is_not_known_to_any_device(tables):
    import published

    start, samples = published.CLASSES["TensorFlow Lite, GPUs"]
    data = {name: published.Measured.of(found) for name, found in samples().items()}
    mean, spread = np.log(published.DEFAULT_MACHINES[start]), published.Spread(0.4, 0.3, 0.03)
    before = published.left_out(data, mean, spread)["Pixel 3, GPU"]
    slower = {}
    for name, one in data.items():
        factor = np.where(one.families == "mnasnet_hosted", 10.0, 1.0)
        slower[name] = replace(one, latency_ms=one.latency_ms * factor)
    changed = published.left_out(slower, mean, spread)["Pixel 3, GPU"] - before
    family = data["Pixel 3, GPU"].families == "mnasnet_hosted"
    assert changed[family] == pytest.approx(np.log(10))
    assert np.abs(changed[~family]).max() > 0.1  # these were fitted beside it


def test_the_script_makes_what_ships(tables):
    import published

    made = published.fitted_class("TensorFlow Lite, GPUs").models
    assert set(made) == {"pixel-3-gpu", "pixel-4-gpu"}
    for name, model in made.items():
        shipped = MODELS[name]
        for feature, cost in model.coefficients_ms.items():
            assert cost == pytest.approx(shipped.coefficients_ms[feature], rel=0.02)
        assert model.leave_one_out_pct == pytest.approx(shipped.leave_one_out_pct, rel=0.02)
        assert model.unmeasured == shipped.unmeasured
        assert set(model.coefficients_ms) == set(FEATURE_NAMES)
