"""Many workers on one study: each child evaluated once, the same answer as one worker gets, also after a kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import pytest

from hwnas.errors import InputError
from hwnas.layers import lower, total_macs
from hwnas.run import Run
from hwnas.searching.strategies import Scored, Strategy
from hwnas.searching.study import GENERATION, Study
from hwnas.store import Store
from hwnas.testing import tiny_space
from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
SPACE = tiny_space()
QUESTION = {"seed": 0, "limit": {"ms": 12.0}}


class Climb(Strategy):
    """Mutates the best child: what is proposed depends on every accuracy before it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def propose(self, history, count):
        rng = np.random.default_rng(len(history))
        best = max(history, key=lambda scored: scored.accuracy).arch if history else SPACE.smallest()
        known, found = {scored.arch for scored in history}, {}
        while len(found) < count:
            arch = SPACE.mutate(best, rng, 0.2)
            if arch not in known:
                found[arch] = None
        return list(found)


def accuracy(arch):
    return 1 - 1 / total_macs(lower(SPACE, arch))


def study(url, evaluate=lambda archs: [accuracy(arch) for arch in archs], question=QUESTION, **options):
    return Study(SPACE, str(url), "climb", question, evaluate=evaluate, about=lambda arch: ({}, {}), **options)


@pytest.fixture(scope="module")
def server():
    with Postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hwnas.db'}"
    return request.getfixturevalue("server").url(tmp_path.name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one worker finds, by number of evaluations."""
    path = tmp_path_factory.mktemp("alone") / "hwnas.db"
    return {budget: study(f"sqlite:///{path}", question=budget).explore(Climb(budget)) for budget in (12, 40)}


def trials(url):
    """The trials of the only study, as Optuna sees them."""
    storage = optuna.storages.RDBStorage(str(url).replace("postgresql:", "postgresql+psycopg:"))
    (name,) = optuna.get_all_study_names(storage)
    found = optuna.load_study(study_name=name, storage=storage).get_trials()
    storage.remove_session()
    storage.engine.dispose()
    return found


# ---------------------------------------------------------------- one process


def test_a_generation_is_proposed_before_any_of_it_is_evaluated(url, alone):
    """Else the answer would depend on who evaluates what first."""
    evaluated = []

    def evaluate(archs):
        evaluated.extend(archs)
        return [accuracy(arch) for arch in archs]

    found = study(url, evaluate, at_once=3).explore(Climb(40))
    assert found == alone[40]
    assert evaluated == [scored.arch for scored in found]
    assert 40 % GENERATION == 0
    proposed = [Climb(40).propose(found[:start], GENERATION) for start in range(0, 40, GENERATION)]
    assert evaluated == [arch for generation in proposed for arch in generation]


def test_a_finished_study_evaluates_and_records_nothing(url, alone):
    study(url).explore(Climb(12))
    before = len(trials(url))

    def evaluate(archs):
        raise AssertionError(archs)

    assert study(url, evaluate).explore(Climb(12)) == alone[12]
    assert len(trials(url)) == before == 12


@pytest.mark.parametrize("moment", ["evaluating", "recording"])
def test_what_an_interruption_left_behind_is_done_once(url, alone, moment, monkeypatch):
    evaluated = Counter()

    def evaluate(archs):
        if moment == "evaluating" and len(evaluated) == 4:
            raise KeyboardInterrupt
        evaluated.update(archs)
        return [accuracy(arch) for arch in archs]

    def dies(self, study, number, accuracy):  # its trial is there, its accuracy is not
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "recording":
            patch.setattr(Store, "finish_child", dies)
        with pytest.raises(KeyboardInterrupt):
            study(url, evaluate).explore(Climb(12))
    evaluated.clear()
    moment = "going on"
    assert study(url, evaluate).explore(Climb(12)) == alone[12]
    assert max(evaluated.values()) == 1
    assert sorted(trial.value for trial in trials(url)) == sorted(scored.accuracy for scored in alone[12])


def test_children_known_before_are_those_of_the_first_worker(url):
    known = [Scored(SPACE.largest(), 0.9)]
    assert study(url).begin(known) == known
    study(url).explore(Climb(8))
    assert study(url).begin([]) == known
    assert study(url).begin([Scored(SPACE.smallest(), 0.1)]) == known


def test_another_question_under_a_name_is_refused(url):
    study(url, named=True).explore(Climb(3))
    other = {"seed": 1, "limit": {"ms": 15.0}}
    with pytest.raises(InputError, match=r"study 'climb' asks something else \(limit.ms=12.0 there, 15.0 now; seed=0"):
        study(url, question=other, named=True).explore(Climb(3))
    assert len(study(url, question=other).explore(Climb(3))) == 3  # by its question it is another study


@pytest.mark.parametrize("name", ["", " ", "a\x1b[2J", "x" * 513])
def test_names_that_cannot_be_shown_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"study name '.*': must have 1 to 512 printable characters"):
        Study(SPACE, f"sqlite:///{tmp_path}/hwnas.db", name, 0, evaluate=list, about=list, named=True)


def test_all_that_is_evaluated_is_told(url):
    told = []
    found = study(url).explore(Climb(20), told.append)
    assert [len(scored) for scored in told] == sorted(len(scored) for scored in told)
    assert told[-1] == found
    assert len(told) > 3


def test_a_trial_has_what_optuna_itself_would_write(url, tmp_path):
    """Our way of writing in one go leaves the rows that Optuna's leaves."""

    def about(arch):
        return {"predicted_ms": 1.5, "macs": 7}, {"12 ms on cpu": -0.25}

    written = Study(SPACE, url, "ours", 0, evaluate=lambda a: [0.5] * len(a), about=about)
    written.explore(Climb(3))
    plain = f"sqlite:///{tmp_path / 'plain.db'}"
    copy = optuna.create_study(storage=plain)
    for trial in trials(url):
        copy.add_trial(trial)
    for ours, theirs in zip(trials(url), trials(plain), strict=True):
        for what in ("value", "params", "distributions", "user_attrs", "constraints", "state", "number"):
            assert getattr(ours, what) == getattr(theirs, what)


# ---------------------------------------------------------------- many processes

WORKER = """
import sys, time
from tests.test_scale import Climb, accuracy, study
url, log, budget, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
with open(log, "a", buffering=1) as lines:
    def evaluate(archs):
        for arch in archs:
            print("begin", arch.id, file=lines)
            time.sleep(seconds)
            print("end", arch.id, file=lines)
        return [accuracy(arch) for arch in archs]
    found = study(url, evaluate, at_once=1).explore(Climb(budget))
print(" ".join(scored.arch.id for scored in found))
"""


class Workers:
    """Processes that share a study; each writes a log of what it evaluates."""

    def __init__(self, url, folder, budget, seconds):
        self.words, self.folder = [str(url), str(budget), str(seconds)], folder
        self.started = []

    def start(self):
        url, budget, seconds = self.words
        log = self.folder / f"worker{len(self.started)}"
        words = [sys.executable, "-c", WORKER, url, log, budget, seconds]
        log.touch()
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started.append((process, log))
        return process, log

    def logged(self, what):
        """The children that were begun, or ended, by all workers."""
        lines = [line.split() for _, log in self.started for line in log.read_text().splitlines()]
        return Counter(child for word, child in lines if word == what)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process, _ in self.started:
            process.kill()
            process.communicate()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_four_workers_of_which_one_is_killed(url, tmp_path, alone):
    """The others take over what it had, evaluate all else once, and find what one worker finds."""
    with Workers(url, tmp_path, 40, 0.4) as workers:
        for _ in range(3):
            workers.start()
        victim, log = workers.start()
        wait_for(lambda: "end" in log.read_text())
        wait_for(lambda: log.read_text().count("begin") > log.read_text().count("end"))
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        answers = set()
        for process, _ in workers.started[:3]:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            answers.add(out.strip())
        begun, ended = workers.logged("begin"), workers.logged("end")
    expected = [scored.arch.id for scored in alone[40]]
    assert answers == {" ".join(expected)}
    assert ended == Counter(expected)
    (lost,) = begun - ended  # begun twice: by the killed one, and by who took it over
    assert begun[lost] == 2
    recorded = Counter(trial.user_attrs["id"] for trial in trials(url))
    assert recorded == Counter(expected)


# ---------------------------------------------------------------- the command line


def test_where_a_run_keeps_its_records(tmp_path, monkeypatch):
    config = {"hwnas": "0", "space": json.loads(json.dumps(asdict(SPACE))), "storage": "postgresql://in/file"}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert Run(tmp_path).storage_url == "postgresql://in/file"
    monkeypatch.setenv("HWNAS_STORAGE", "postgresql://in/environment")
    assert Run(tmp_path).storage_url == "postgresql://in/environment"
    assert Run(tmp_path, storage="postgresql://in/command").storage_url == "postgresql://in/command"


@pytest.mark.slow
def test_two_machines_share_a_search(tmp_path, server, capsys):
    """Each with a run folder of its own that was trained and profiled before there was a server; one is killed."""
    import psycopg

    from hwnas.cli import main
    from tests.test_cli import SPACE as TINY  # here: the workers of the tests above import this file
    from tests.test_cli import TRAIN, add_device

    original = tmp_path / "run"
    add_device(original)
    (tmp_path / "space.yaml").write_text(json.dumps(TINY))
    for words in (
        ["train", "--space", tmp_path / "space.yaml", *TRAIN],
        ["profile", "--device", "quick", "--children", 8],
    ):
        assert main([*map(str, words), "--run", str(original)]) == 0, capsys.readouterr().err
    url = server.url("machines")
    options = ["--storage", url, "--study", "both", "--device", "quick", "--latency-ms", "50"]

    def start(folder, *more):
        words = [sys.executable, "-m", "hwnas", "search", "--run", folder, "--evaluations", "16", *options, *more]
        return subprocess.Popen(
            [str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    folders = [Path(shutil.copytree(original, tmp_path / name)) for name in ("a", "b")]
    first, second = [start(folder) for folder in folders]
    with Store(url) as store:
        wait_for(lambda: any(child.accuracy is not None for child in store.children("both")))
        first.kill()
        first.communicate()
        first = start(folders[0])
        for worker in (first, second):
            _, errors = worker.communicate(timeout=200)
            assert worker.returncode == 0, errors
        found = store.children("both") + store.children("both, random")
        measured = [m.arch for m in store.measurements(role="finalist")]
        assert len(store.measurements(role="fit")) == 8
    answers = [json.loads((folder / "results" / "quick-50ms.json").read_text()) for folder in folders]
    for what in ("history", "question"):
        assert answers[0][what] == answers[1][what]
    # Of equally accurate children the cheapest is best, by what had been measured when a machine was done.
    assert answers[0]["best"]["accuracy"] == answers[1]["best"]["accuracy"]
    assert len(found) == 32
    assert len(measured) == len(set(measured)) > 0
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT arch_id, count(*) FROM hwnas_evaluations GROUP BY arch_id").fetchall()
        assert {child.arch.id: 1 for child in found} == dict(rows)
        assert connection.execute("SELECT count(*) FROM trials").fetchone() == (32,)
    other = start(folders[0], "--seed", "1")
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "study 'both' asks something else (seed=0 there, 1 now)" in errors.splitlines()[-1]
