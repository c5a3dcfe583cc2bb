"""hwnas.search and hwnas.search_all on a small trained run: one device at hand, one that cannot be reached."""

import json
import re
import runpy
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hwnas
from hwnas.api import result_name
from hwnas.cli import main
from hwnas.errors import InputError, LimitError
from hwnas.layers import lower, total_macs
from hwnas.run import Run

ROOT = Path(__file__).parent.parent
TIMING = {
    "rounds": 2,
    "max_rounds": 2,
    "min_duration_s": 0.001,
    "warmup_s": 0.0,
    "max_drift": 10.0,
    "max_error": 10.0,
}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Path:
    """Trained for a moment, with predictors of `quick` (this machine) and `away` (a board that is not there)."""
    folder = tmp_path_factory.mktemp("search")
    run = folder / "run"
    (run / "devices").mkdir(parents=True)
    quick = {"transport": "host", "runtime": "onnxruntime", "timing": TIMING}
    (run / "devices" / "quick.yaml").write_text(yaml.safe_dump(quick))
    away = {"base": "jetson", "host": "away.invalid", "timing": TIMING}
    (run / "devices" / "away.yaml").write_text(yaml.safe_dump(away))
    space = folder / "mine.yaml"
    space.write_text(yaml.safe_dump({"base": "tiny", "resolution": [8, 12]}))
    options = {"data.size": 12, "train.epochs": 0.3, "train.threads": 1}
    hwnas.train(run, space=space, data="digits", changes=options)
    hwnas.profile("quick", run, children=12)
    shutil.copy(run / "predictors" / "quick.json", run / "predictors" / "away.json")
    return run


@pytest.fixture
def run(profiled, tmp_path) -> Path:
    return Path(shutil.copytree(profiled, tmp_path / "run"))


def num_evaluated(run: Path) -> int:
    with sqlite3.connect(run / "hwnas.db") as database:
        return int(database.execute("select count(*) from hwnas_evaluations").fetchone()[0])


def macs(run: Path, share: float) -> float:
    """A limit between the smallest and the biggest child."""
    space = Run(run).space
    small, big = (total_macs(lower(space, arch)) for arch in (space.smallest(), space.largest()))
    return small + share * (big - small)


def test_what_is_found_is_saved_with_all_that_it_depends_on(run):
    limits = [hwnas.LatencyLimit("quick", ms=50), hwnas.MacsLimit(macs(run, 0.5))]
    result = hwnas.search(limits, run, evaluations=6)
    saved = json.loads((run / "results" / f"{result_name(limits)}.json").read_text())
    assert hwnas.Result.from_dict(saved) == result
    assert result.best.macs <= limits[1].macs
    assert result.best.latency["quick"].measured <= 50
    assert result.best.file_bytes > 4 * result.best.params
    assert result.best.peak_bytes > 0
    assert result.measured
    assert saved["devices"]["quick"]["runtime"] == "onnxruntime, fp32"
    assert saved["devices"]["quick"]["versions"]
    assert saved["versions"]["hwnas"] == hwnas.__version__
    assert set(saved["question"]) > {"space", "limits", "confidence", "strategy", "seed", "evaluations", "predictors"}
    assert saved["question"]["weights"] == saved["weights"] != ""


def test_the_same_question_gets_the_same_answer_without_work(run):
    limit = hwnas.MacsLimit(macs(run, 0.5))
    first = hwnas.search(limit, run, evaluations=6)
    hwnas.search(hwnas.MacsLimit(macs(run, 0.9)), run, evaluations=6)
    evaluated = num_evaluated(run)
    assert hwnas.search(limit, run, evaluations=6) == first
    assert num_evaluated(run) == evaluated
    other = hwnas.search(limit, run, evaluations=6, seed=1)
    assert other.num_known >= 6
    assert other.best.accuracy >= first.best.accuracy


def test_an_answer_for_each_device_and_the_fewest_for_all(run):
    told: list[str] = []
    questions = [hwnas.LatencyLimit("quick", 50), [hwnas.LatencyLimit("away", 40)]]
    portfolio = hwnas.search_all(questions, run, evaluations=10, baseline=False, notice=told.append)
    names = ["quick-50ms", "away-40ms"]
    assert list(portfolio.results) == names
    assert [result.num_evaluations for result in portfolio.results.values()] == [10, 2]
    assert num_evaluated(run) == 12
    assert portfolio.exact
    away = portfolio.results["away-40ms"]
    assert away.num_known == 10  # all keep this limit
    assert away.best.accuracy >= portfolio.results["quick-50ms"].best.accuracy
    for name in names:
        assert portfolio.child_for(name).accuracy >= portfolio.results[name].best.accuracy - portfolio.tolerance
        assert hwnas.Result.from_dict(json.loads((run / "results" / f"{name}.json").read_text()))
    saved = json.loads((run / "results" / "portfolio-quick-50ms+away-40ms.json").read_text())
    assert saved == json.loads(json.dumps(portfolio.to_dict()))
    # The board cannot be reached: predicted, and said everywhere.
    assert (portfolio.results["quick-50ms"].measured, away.measured) == (True, False)
    assert away.best.latency["away"].measured is None
    assert away.devices["away"].error_pct > 0
    assert "away.invalid" in away.devices["away"].reason
    (text,) = [text for text in told if text.startswith("away: latencies are predicted, not measured")]
    assert re.search(r"typical error \d+\.\d%.*away\.invalid.*hwnas devices check away", text)


def test_all_winners_of_the_last_search_are_exported(run, capsys):
    """Each as its device takes it, measured where the device is at hand; of the last search only."""
    hwnas.search(hwnas.MacsLimit(macs(run, 0.5)), run, evaluations=4, baseline=False)
    assert main(["export", "--all", "--run", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["limits"][0]["kind"] == "macs"
    hwnas.search_all([hwnas.LatencyLimit("quick", 50), hwnas.LatencyLimit("away", 40)], run, evaluations=4)
    assert main(["export", "--all", "--run", str(run), "--json"]) == 0
    quick, away = json.loads(capsys.readouterr().out)["bundles"]
    assert quick["latency"]["measured_ms"] > 0
    assert away["latency"]["measured_ms"] is None
    assert away["latency"]["predicted_ms"] > 0
    assert (Path(quick["bundle"]).name, Path(away["bundle"]).name) == ("quick-50ms-onnx", "away-40ms-onnx")
    assert main(["export", "--all", "--arch", "smallest", "--run", str(run)]) == 2
    assert "leave out --result, --arch, --device, --output" in capsys.readouterr().err


def test_the_loosest_limit_is_searched_first(run):
    """It gets the evaluations; the answers come in the order they were asked for."""
    questions = [hwnas.MacsLimit(macs(run, share)) for share in (0.2, 0.8)]
    portfolio = hwnas.search_all(questions, run, evaluations=10, baseline=False)
    assert list(portfolio.results) == [result_name([limit]) for limit in questions]
    assert [result.num_evaluations for result in portfolio.results.values()] == [2, 10]


def test_one_limit_that_cannot_be_kept_ends_all_before_they_begin(run):
    questions = [hwnas.LatencyLimit("quick", 50), hwnas.LatencyLimit("away", 1e-6)]
    with pytest.raises(LimitError, match=r"1e-06 ms on away with 95% confidence: the least possible is 0\.0"):
        hwnas.search_all(questions, run, evaluations=5)
    assert num_evaluated(run) == 0


def test_one_child_together(run):
    limits = [hwnas.LatencyLimit("quick", 50), hwnas.LatencyLimit("away", 40)]
    result = hwnas.search(limits, run, evaluations=4, baseline=False)
    assert set(result.best.latency) == {"quick", "away"}
    assert not result.measured
    assert result.devices["quick"].measured
    assert (run / "results" / "quick-50ms+away-40ms.json").is_file()


def test_a_device_with_published_measurements_only(run):
    """No phone, no profile: an answer, and where its latencies come from."""
    told: list[str] = []
    result = hwnas.search(hwnas.LatencyLimit("pixel", 5), run, evaluations=3, baseline=False, notice=told.append)
    assert result.best.latency["pixel"].measured is None
    assert result.best.latency["pixel"].std > 0
    assert result.devices["pixel"].source.startswith("estimated from published measurements of ")
    (text,) = [text for text in told if text.startswith("pixel: latencies are estimated from published measurements")]
    assert re.search(r"typical error \d+%: run `hwnas profile --device pixel`", text)


def test_a_device_by_its_file(run):
    file = str(run / "devices" / "quick.yaml")
    result = hwnas.search(hwnas.LatencyLimit(file, 50), run, evaluations=3, baseline=False)
    assert result.limits[0]["device"] == "quick"
    assert set(result.best.latency) == {"quick"}


@pytest.mark.parametrize(
    ("limits", "front", "name"),
    [
        ([hwnas.LatencyLimit("cpu", 0.14)], None, "cpu-0.14ms"),
        ([hwnas.LatencyLimit("a/cpu.yaml", 20), hwnas.EnergyLimit("pixel", 3)], None, "cpu-20ms+pixel-3mJ"),
        ([hwnas.MacsLimit(6e8), hwnas.ParamsLimit(5.5e6)], None, "macs-600M+params-5.5M"),
        ([hwnas.SizeLimit(10), hwnas.MemoryLimit(2.5)], None, "size-10MB+memory-2.5MB"),
        ([], "cpu", "cpu-front"),
        ([hwnas.LatencyLimit("cpu", 20)], "cpu", "cpu-20ms+cpu-front"),
    ],
)
def test_names_of_results(limits, front, name):
    assert result_name(limits, front) == name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: hwnas.search((), run), "nothing asked for: give a limit"),
        (lambda run: hwnas.search(hwnas.LatencyLimit("cpu", 3), run), "no latency predictor for 'cpu'"),
        (lambda run: hwnas.search((), run, front="cpu"), "no latency predictor for 'cpu'"),
        (
            lambda run: hwnas.search([hwnas.MacsLimit(1e6), hwnas.MacsLimit(2e6)], run),
            "1M MACs and 2M MACs: give one limit of each kind",
        ),
        (lambda run: hwnas.search_all([hwnas.MacsLimit(1e6)], run), r"1 questions \(macs-1M\): ask two or more"),
        (lambda run: hwnas.search_all([hwnas.MacsLimit(1e6)] * 2, run), "ask two or more different ones"),
        (
            lambda run: hwnas.search_all([hwnas.MacsLimit(1e6), hwnas.MacsLimit(2e6)], run, tolerance=-1),
            "tolerance=-1: must be a number from 0",
        ),
        (
            lambda run: hwnas.search_all([hwnas.MacsLimit(1e6), hwnas.MacsLimit(2e6)], run, fronts=["macs"]),
            "1 fronts for 2 questions",
        ),
    ],
)
def test_questions_that_make_no_sense(profiled, call, message):
    before = num_evaluated(profiled)
    with pytest.raises(InputError, match=message):
        call(profiled)
    assert num_evaluated(profiled) == before


# ---------------------------------------------------------------- the command line


def hwnas_search(capsys, *words: object) -> tuple[str, str]:
    assert main(["search", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    return out, err


def test_tables_say_what_is_predicted(capsys, run):
    words = ["--run", run, "--device", "quick", "--latency-ms", 50, "--device", "away", "--latency-ms", 40]
    out, err = hwnas_search(capsys, *words, "--evaluations", 5)
    assert re.search(r"quick-50ms .*\d\.\d{3} ± \d\.\d{3} +\d\.\d{3} +5 +0 ", out)
    assert re.search(r"away-40ms .*predicted only", out)
    assert re.search(r"away: predicted, not measured, typical error \d+\.\d%", out)
    assert "portfolio: the fewest that serve all within 0.2 points" in out
    assert "away: latencies are predicted, not measured" in err
    assert f"next: hwnas export --run {run} --all" in out
    out, _ = hwnas_search(capsys, *words, "--evaluations", 5, "--together", "--json")
    found = json.loads(out)
    assert [limit["device"] for limit in found["limits"]] == ["quick", "away"]
    assert main(["export", "--run", str(run), "--arch", "smallest", "--device", "quick"]) == 0


def test_the_whole_range_and_no_device(capsys, run):
    out, _ = hwnas_search(capsys, "--run", run, "--device", "quick", "--front", "--evaluations", 6)
    assert re.search(r"hypervolume\): guided 0\.\d{4}, random 0\.\d{4}", out)
    found = json.loads((run / "results" / "quick-front.json").read_text())
    assert all(child["latency"]["quick"]["measured"] for child in found["front"])
    out, _ = hwnas_search(capsys, "--run", run, "--max-macs", macs(run, 0.5), "--evaluations", 4, "--json")
    found = json.loads(out)
    assert found["best"]["latency"] == {}
    assert found["devices"] == {}


# ---------------------------------------------------------------- the example


def test_the_example_picks_a_child(run, capsys):
    """In at most 15 lines of code, for a device at hand and for one that is not."""
    script = ROOT / "examples" / "pick_child.py"
    lines = [line for line in script.read_text().splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 15
    done = subprocess.run(
        [sys.executable, script, run, "quick", "50"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^quick: \d+\.\d\d%, \S+ ms \(measured\): \d+px ", done.stdout, flags=re.MULTILINE)
    picked = runpy.run_path(str(script))["pick"](str(run), "away", 50.0)
    assert picked.latency["away"].measured is None
    assert re.search(r"^away: .* ms \(predicted to \d+%\)", capsys.readouterr().out, flags=re.MULTILINE)
