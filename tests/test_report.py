"""The report: its numbers against the run's, and the page in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hwnas import api
from hwnas.cli import main
from hwnas.config import read_json
from hwnas.errors import InputError
from hwnas.predictors.metrics import report as prediction_report
from hwnas.report.charts import Axis, Bars, Chart, Series, file_name
from hwnas.report.contents import Answer, Contents, Section, Table
from hwnas.report.fit import load_fit, save_fit
from hwnas.report.gather import gather, stage_bars
from hwnas.report.page import page
from hwnas.run import Run
from hwnas.searching.result import Result
from tests.browser import CHROMIUM, Browser

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><b>&amp;'\"`${1}"

DEVICE = {
    "transport": "host",
    "runtime": "onnxruntime",
    "timing": {"rounds": 2, "max_rounds": 2, "min_duration_s": 0.001, "warmup_s": 0.0, "max_drift": 10.0,
               "max_error": 10.0},
}  # fmt: skip

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two devices, an answer for each, a portfolio, and an answer without a device."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "devices").mkdir(parents=True)
    for name in ("quick", "other"):
        (folder / "devices" / f"{name}.yaml").write_text(yaml.safe_dump(DEVICE))
    space = folder.parent / "mine.yaml"
    space.write_text(yaml.safe_dump({"base": "tiny", "resolution": [8, 12]}))
    train = ["--data", "digits", "-o", "data.size=12", "-o", "train.epochs=0.5", "-o", "train.threads=1"]
    for words in (
        ["train", "--space", str(space), *train],
        ["profile", "--device", "quick", "--device", "other", "--children", "12", "--holdout", "3"],
        ["search", "--device", "quick", "--device", "other", "--latency-ms", "50", "--evaluations", "10"],
        ["search", "--max-macs", "2M", "--evaluations", "4"],
        ["export", "--arch", "smallest", "--device", "quick"],
    ):
        assert main([*words, "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def contents(finished) -> Contents:
    return gather(Run(finished), "hwnas report")


@pytest.fixture(scope="module")
def page_file(finished, tmp_path_factory) -> Path:
    path, _ = api.report(finished, tmp_path_factory.mktemp("page") / "page.html")
    return path


def section(contents: Contents, id: str) -> Section:
    return next(section for section in contents.sections if section.id == id)


def plot(contents: Contents, name: str) -> Chart:
    return next(plot for plot in contents.plots if plot.name == name)


def series(chart: Chart, name: str) -> Series:
    return next(series for series in chart.series if series.name == name)


def evaluated(run: Path) -> dict[str, float]:
    """Accuracies by id, from the database."""
    weights = Result.from_dict(read_json(run / "results" / "quick-50ms.json")).weights
    with Run(run).store() as store:
        return {one.arch.id: one.accuracy for one in store.evaluations(weights, "validation")}


# ---------------------------------------------------------------- what it says


def test_sections_of_a_whole_run(contents):
    assert [section.id for section in contents.sections] == [
        "fronts", "history", "layers", "predictors", "portfolio", "training", "exports", "provenance",
    ]  # fmt: skip
    assert len({plot.name for plot in contents.plots}) == len(contents.plots)


def test_answers_say_what_the_results_say(finished, contents):
    for name, title in (
        ("macs-2M", "≤ 2M MACs"),
        ("quick-50ms", "≤ 50 ms on quick"),
        ("other-50ms", "≤ 50 ms on other"),
    ):
        best = Result.from_dict(read_json(finished / "results" / f"{name}.json")).best
        (answer,) = (one for one in contents.answers if one.title == title)
        figures = {name: (value, remark) for name, value, remark in answer.figures}
        assert answer.best == best.architecture.id
        assert figures["Accuracy"][0] == f"{best.accuracy:.2%}"
        assert {key for key in figures if key.startswith("Latency")} == {
            f"Latency on {device}" for device in best.latency
        }
        for device, estimate in best.latency.items():
            value, remark = figures[f"Latency on {device}"]
            assert float(value.removesuffix(" ms")) == pytest.approx(estimate.measured, rel=0.005)
            assert remark.startswith("measured; predicted ")


def test_front_is_what_no_child_beats(contents):
    chart = plot(contents, "front-quick")
    front = series(chart, "front")
    points = [(x, y) for one in chart.series for x, y in zip(one.x, one.y, strict=True)]
    on_front = set(zip(front.x, front.y, strict=True))
    for x, y in points:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert beaten != ((x, y) in on_front)
    assert chart.rules == ((50.0, "50 ms"),)


def test_every_evaluated_child_is_in_the_fronts(finished, contents):
    accuracies = {id: pytest.approx(100 * accuracy) for id, accuracy in evaluated(finished).items()}
    for name in ("front-quick", "front-other", "front-macs"):
        drawn = {
            id: accuracy
            for one in plot(contents, name).series
            for id, accuracy in zip(one.children, one.y, strict=True)
        }
        assert drawn == accuracies
        assert drawn.keys() <= contents.children.keys()


def test_marks_tell_measured_from_predicted(finished, contents):
    with Run(finished).store() as store:
        measured = {m.arch.id for m in store.measurements(device="quick") if m.role != "export"}
    chart = plot(contents, "front-quick")
    assert set(series(chart, "measured").children) == measured & set(contents.children) & evaluated(finished).keys()
    assert not set(series(chart, "predicted").children) & measured


def test_history_never_falls_and_ends_at_the_best(finished, contents):
    history = read_json(finished / "results" / "quick-50ms.json")["history"]
    for line in plot(contents, "history-quick-50ms").series:
        assert list(line.y) == sorted(line.y)
        assert line.y[-1] == 100 * max(history[line.name])
        assert line.x == tuple(range(1, len(history[line.name]) + 1))


def test_bars_add_up_to_the_prediction(finished):
    run = Run(finished)
    predictor = run.predictor("quick")
    arch = run.space.largest()
    bars = stage_bars("layers", "", predictor.breakdown_ms(arch))
    (mean,), _ = predictor.predict([arch])
    assert sum(sum(values) for _, values in bars.bars) == pytest.approx(mean)
    assert [label for label, _ in bars.bars] == [
        "stem",
        *(f"stage {n}" for n in range(1, len(arch.stages) + 1)),
        "head",
    ]


def test_portfolio_names_a_child_for_each_answer(finished, contents):
    (table,) = section(contents, "portfolio").tables
    assert {row[2] for row in table.rows} == {"quick-50ms", "other-50ms"}
    assert set(table.children) <= contents.children.keys()


def test_same_run_same_contents(finished, contents):
    assert replace(gather(Run(finished), "hwnas report"), created="") == replace(contents, created="")


def test_latest_answer_comes_first(run):
    path = run / "results" / "quick-50ms.json"
    path.write_text(path.read_text())
    assert gather(Run(run), "").answers[0].title == "≤ 50 ms on quick"


def test_a_run_that_was_only_profiled(run):
    shutil.rmtree(run / "results")
    shutil.rmtree(run / "plots")
    contents = gather(Run(run), "hwnas report")
    assert contents.answers == ()
    assert [section.id for section in contents.sections] == ["predictors", "training", "exports", "provenance"]
    assert "run `hwnas fit --device quick` first" in section(contents, "predictors").text


def test_a_bundle_that_was_not_measured(run):
    """Its device could not be reached when it was exported."""
    (path,) = (run / "exports").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["latency"]["measured_ms"] = None
    path.write_text(json.dumps(manifest))
    (table,) = section(gather(Run(run), "report"), "exports").tables
    (row,) = table.rows
    assert row[table.columns.index("measured")] == ""


def test_bundles_in_zip_files(run):
    (folder,) = (run / "exports").iterdir()
    shutil.make_archive(str(folder), "zip", folder)
    (table,) = section(gather(Run(run), "report"), "exports").tables
    unpacked, packed = table.rows
    assert (unpacked[0], packed[0]) == (folder.name, f"{folder.name}.zip")
    assert unpacked[1:] == packed[1:]


def test_damaged_bundles_are_named_and_the_others_shown(run):
    (folder,) = (run / "exports").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    (run / "exports" / "note.txt").write_text("no bundle, so not listed")
    (run / "exports" / "torn.zip").write_bytes(b"PK")
    for name, content in (
        ("child", json.dumps({**manifest, "architecture": {}}).encode()),
        ("long", b" " * (16 * 2**20 + 1)),
        ("old", json.dumps({**manifest, "schema": 1}).encode()),
    ):
        with zipfile.ZipFile(run / "exports" / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("manifest.json", content)
    with zipfile.ZipFile(run / "exports" / "other.zip", "w") as packed:
        packed.writestr("photo.jpg", b"")
    with zipfile.ZipFile(run / "exports" / "bomb.zip", "w", zipfile.ZIP_BZIP2) as packed:
        packed.writestr("manifest.json", json.dumps(manifest))
    found = section(gather(Run(run), "report"), "exports")
    assert [row[0] for table in found.tables for row in table.rows] == [folder.name]
    ((title, facts),) = found.facts
    assert title == "Cannot be read"
    assert [name for name, _ in facts] == [
        "bomb.zip", "child.zip", "long.zip", "old.zip", "other.zip", "torn.zip",
    ]  # fmt: skip
    for (name, reason), expected in zip(
        facts,
        (
            "packed by method 12",
            "resolution",
            "more than 16,777,216 bytes",
            "has schema 1",
            "has no manifest.json",
            "not a zip",
        ),
        strict=True,
    ):
        assert expected in reason, (name, reason)
        assert not reason.startswith(name)


def test_energy_predictors_are_no_devices(run):
    shutil.copy(run / "predictors" / "quick.json", run / "predictors" / "quick.energy.json")
    (table,) = section(gather(Run(run), "report"), "predictors").tables
    assert [row[0] for row in table.rows] == ["other", "quick"]


def test_damaged_files_are_named(run):
    (run / "plots" / "quick.json").write_text('{"points": [{}]}')
    with pytest.raises(InputError, match=r"quick\.json: damaged .* run `hwnas fit --device quick`"):
        gather(Run(run), "")
    (run / "plots" / "quick.json").unlink()
    (run / "results" / "quick-50ms.json").write_text("{}")
    with pytest.raises(InputError, match="not a search result of this hwnas"):
        gather(Run(run), "")


# ---------------------------------------------------------------- the fit


def test_fit_leaves_its_points(run, capsys):
    assert main(["fit", "--run", str(run), "--device", "quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [Path(name).name for name in document["plots"]] == ["quick.png", "quick.csv", "quick.json"]
    points = load_fit(run / "plots" / "quick.json")
    assert [point.to_dict() for point in points] == document["points"]
    for tested, name in (("cross-validation", "cross_validation"), ("held out", "holdout")):
        columns = [
            np.array([getattr(p, what) for p in points if p.tested == tested])
            for what in ("measured_ms", "predicted_ms", "std_ms")
        ]
        assert prediction_report(*columns).mape_pct == pytest.approx(document[name]["mape_pct"])
    with (run / "plots" / "quick.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["predicted_ms"]) for row in rows] == [point.predicted_ms for point in points]
    assert main(["fit", "--run", str(run), "--device", "quick"]) == 0
    assert f"predicted against measured: {run / 'plots' / 'quick.png'}" in capsys.readouterr().out


def test_fit_without_matplotlib_leaves_the_numbers(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("hwnas.report.fit.can_draw", lambda: False)
    files = save_fit("quick", load_fit(finished / "plots" / "quick.json"), tmp_path)
    assert [file.name for file in files] == ["quick.csv", "quick.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quick.csv", "quick.json"]


def test_finalists_that_the_predictor_never_saw_are_tests_of_it(finished, contents):
    chart = plot(contents, "predicted-quick")
    fitted = {point.arch.id for point in load_fit(finished / "plots" / "quick.json")}
    later = series(chart, "finalists of searches since")
    assert later.children
    assert not fitted & set(later.children)


# ---------------------------------------------------------------- files


def test_every_plot_as_png_and_csv(run, contents, capsys):
    assert main(["report", "--run", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(run / "report.html")
    names = {Path(name).name for name in document["plots"]}
    assert names == {f"{plot.name}.{ending}" for plot in contents.plots for ending in ("csv", "png")}
    for name in document["plots"]:
        if name.endswith(".png"):
            with Image.open(name) as image:
                colours = image.convert("RGB").getcolors(1 << 20)
            assert len(colours) > 20
    chart = plot(contents, "front-quick")
    with (run / "report" / "front-quick.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = [x for one in chart.series for x in one.x]
    assert [float(row["latency (ms)"]) for row in rows] == drawn
    assert {row["architecture"] for row in rows} <= {child["text"] for child in contents.children.values()}


def test_without_matplotlib_there_is_a_notice(run, monkeypatch, capsys):
    monkeypatch.setattr("hwnas.report.png.find_spec", lambda name: None)
    assert main(["report", "--run", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "no PNG files of the plots, only CSV: pip install 'hwnas[plot]' to have them" in err
    assert f"report: {run / 'report.html'}" in out
    assert not list((run / "report").glob("*.png"))


def test_page_to_a_place_of_ones_own(run, tmp_path, capsys):
    assert main(["report", "--run", str(run), "--output", str(tmp_path / "there" / "mine.html")]) == 0
    assert (tmp_path / "there" / "mine.html").is_file()
    assert (tmp_path / "there" / "mine" / "front-quick.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "--output", "page.pdf"], "page.pdf: a report is an HTML page: name a file that ends in .html"),
        (["report", "--output", "/proc/page.html"], "cannot be written .*: name another file with --output"),
        (["dashboard", "--port", "0"], "--port"),
    ],
)
def test_wrong_input(run, capsys, words, message):
    assert main([*words, "--run", str(run)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_run(tmp_path, capsys):
    for verb in ("report", "dashboard"):
        assert main([verb, "--run", str(tmp_path)]) == 2
        assert "no run at" in capsys.readouterr().err


def test_dashboard_needs_its_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert main(["dashboard", "--run", str(run)]) == 2
    assert "optuna-dashboard is not installed: pip install 'hwnas[dashboard]'" in capsys.readouterr().err


def test_names_of_plots_are_names_of_files():
    assert file_name("front", "../../x y") == "front-.._.._x_y"
    assert file_name("front", HOSTILE).isascii()


def test_series_of_different_lengths():
    with pytest.raises(ValueError, match="series 'a': x, y, std and children differ in length"):
        Series(name="a", mark="dot", x=(1.0,), y=(1.0, 2.0))


# ---------------------------------------------------------------- the page


@in_browser
@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_and_is_quiet(page_file, tmp_path, width, dark):
    with Browser(width, 800, dark=dark) as browser:
        browser.open(page_file)
        assert browser.messages == []
        assert browser.requests == [page_file.as_uri()]
        assert browser.run("document.documentElement.scrollWidth") <= width
        paper = browser.run("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == dark
        # Every chart is drawn, and within its figure.
        assert browser.run("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg *'))")
        outside = "[...document.querySelectorAll('.plot')].filter(p => [...p.querySelectorAll('circle,path.join,rect')]"
        outside += ".some(m => m.getBoundingClientRect().right > p.getBoundingClientRect().right + 9)).length"
        assert browser.run(outside) == 0


@in_browser
def test_page_says_what_the_contents_say(page_file, contents):
    with Browser() as browser:
        browser.open(page_file)
        said = browser.run("document.body.innerText")
        assert browser.run("document.querySelectorAll('figure[id]').length") == len(contents.plots)
    for answer in contents.answers:
        assert answer.title in said
        assert all(value in said for _, value, _ in answer.figures)
    for one in contents.sections:
        assert one.title in said


@in_browser
def test_click_opens_the_architecture(page_file, contents):
    best = plot(contents, "front-quick").series[-1]
    with Browser() as browser:
        browser.open(page_file)
        browser.run("document.getElementById('front-quick').scrollIntoView()")
        browser.settle()
        x, y = browser.run(
            "(r => [r.x + r.width / 2, r.y + r.height / 2])"
            "(document.querySelector('#front-quick .plot .strong.diamond').getBoundingClientRect())"
        )
        browser.point(x, y)
        tip = browser.run("document.querySelector('#front-quick .tip').innerText")
        child = contents.children[best.children[0]]
        assert child["text"] in tip
        assert f"{100 * child['accuracy']:.2f} %" in tip
        browser.point(x, y, click=True)
        assert browser.run("document.querySelector('dialog').open")
        assert browser.run("location.hash") == f"#child={best.children[0]}"
        blocks = sum(len(stage["blocks"]) for stage in child["architecture"]["stages"])
        assert browser.run("document.querySelectorAll('dialog .block').length") == blocks
        browser.press("Escape")
        assert not browser.run("document.querySelector('dialog').open")
        assert browser.run("location.hash") == ""
        assert browser.messages == []


@in_browser
def test_keyboard_alone_reaches_every_point(page_file, contents):
    chart = plot(contents, "front-quick")
    points = sorted((x, y, id) for one in chart.series for x, y, id in zip(one.x, one.y, one.children, strict=True))
    with Browser() as browser:
        browser.open(page_file)
        for _ in range(200):
            browser.press("Tab")
            if browser.run("document.activeElement.closest('figure')?.id") == "front-quick":
                break
        assert browser.run("document.activeElement.className") == "plot clickable"
        browser.press("ArrowRight")
        spoken = browser.run("document.getElementById('spoken').textContent")
        assert contents.children[points[0][2]]["text"] in spoken
        browser.press("ArrowRight")
        browser.press("Enter")
        assert browser.run("location.hash") == f"#child={points[1][2]}"
        assert browser.run("document.querySelector('dialog').contains(document.activeElement)")
        browser.press("Escape")
        assert browser.run("document.activeElement.closest('figure').id") == "front-quick"


@in_browser
def test_link_to_a_child(page_file, contents):
    id = contents.answers[0].best
    with Browser() as browser:
        browser.open(page_file, f"#child={id}")
        assert contents.children[id]["text"] in browser.run("document.querySelector('dialog').innerText")
    with Browser() as browser:
        browser.open(page_file, "#child=constructor")
        assert not browser.run("document.querySelector('dialog').open")
        assert browser.messages == []


@in_browser
def test_data_behind_a_chart(page_file, contents):
    chart = plot(contents, "front-quick")
    with Browser() as browser:
        browser.open(page_file)
        browser.run("document.querySelector('#front-quick summary').click()")
        browser.settle()
        rows = browser.run("document.querySelectorAll('#front-quick tbody tr').length")
    assert rows == sum(len(one.x) for one in chart.series)


def hostile(contents: Contents) -> Contents:
    """Every text and every name of a device replaced by markup that would do harm."""
    children = {
        id: {**child, "text": HOSTILE, "latency": {HOSTILE: next(iter(child["latency"].values()))}}
        for id, child in contents.children.items()
    }
    axis, facts = Axis(label=HOSTILE, unit=HOSTILE), ((HOSTILE, HOSTILE),)
    table = Table(title=HOSTILE, columns=(HOSTILE,), rows=((HOSTILE,),), children=(next(iter(children)),))
    charts = [
        replace(one, title=HOSTILE, x=axis, y=axis, series=tuple(replace(s, name=HOSTILE) for s in one.series),
                rules=tuple((value, HOSTILE) for value, _ in one.rules))
        if isinstance(one, Chart)
        else Bars(name=one.name, title=HOSTILE, value=axis, parts=(HOSTILE,), bars=((HOSTILE, (1.0,)),))
        for one in contents.plots
    ]  # fmt: skip
    answer = Answer(title=HOSTILE, best=next(iter(children)), figures=((HOSTILE,) * 3,), facts=facts)
    return replace(
        contents, title=HOSTILE, summary=HOSTILE, created=HOSTILE, children=children, overview=table,
        answers=(answer, answer),
        sections=(Section(id="all", title=HOSTILE, text=HOSTILE, plots=tuple(charts), tables=(table,),
                          facts=((HOSTILE, facts),)),),
    )  # fmt: skip


@in_browser
def test_texts_are_never_markup(contents, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(hostile(contents)), encoding="utf-8")
    with Browser() as browser:
        browser.open(file, f"#child={next(iter(contents.children))}")
        browser.run("document.querySelectorAll('summary').forEach(summary => summary.click())")
        browser.settle()
        assert browser.run("document.title") == f"{HOSTILE} – hwnas report"
        assert browser.run("document.querySelector('h1').textContent") == HOSTILE
        assert browser.run("document.querySelectorAll('img, main script, dialog script').length") == 0
        assert browser.run("[...document.querySelectorAll('b')].length") == 0
        assert browser.messages == []
        assert browser.requests == [file.as_uri()]


@in_browser
def test_policy_blocks_what_is_not_the_pages_own(page_file):
    with Browser() as browser:
        browser.open(page_file)
        browser.run(
            "document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/x'}))"
        )
        browser.run(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
        )
        browser.settle()
        assert browser.run("window.hacked === undefined")
        assert len([text for text in browser.messages if "Content Security Policy" in text]) == 2


@pytest.mark.parametrize("name", ["page.js", "page.css", "page.html"])
def test_template_is_in_the_package(name):
    """What the wheel holds is what setuptools is told to take."""
    import tomllib

    root = Path(__file__).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hwnas"]
    taken = {path for pattern in patterns for path in (root / "hwnas").glob(pattern)}
    assert root / "hwnas" / "report" / "template" / name in taken


def test_dashboard_serves_the_runs_studies(run):
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    import socket
    import time
    import urllib.request

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "hwnas", "dashboard", "--run", str(run), "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                try:
                    with urllib.request.urlopen(f"http://localhost:{port}/api/studies", timeout=5) as answer:
                        studies = json.load(answer)["study_summaries"]
                    break
                except OSError:
                    time.sleep(0.2)
            assert any("50 ms on quick" in study["study_name"] for study in studies)
        finally:
            server.kill()
