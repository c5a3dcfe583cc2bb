"""What sharing a study costs, and what it gains: overhead, opening, speed-up by workers; SQLite and PostgreSQL.

    PYTHONPATH=. python benchmarks/scale.py --output benchmarks/results/scale.md     # about 10 minutes

Children are of space bignas (50 genes, 45 of them present in the mean). PostgreSQL is a server of its own on this
machine, with commits that wait for the disk; it needs Debian's postgresql, and is left out where that is missing.

- overhead: evaluations that take no time; what `Study.explore` takes by evaluation, without proposing. Beside it, the
  same children through Optuna alone, median: `add_trial` of a finished trial, and its queue: a trial added in state
  WAITING, asked and told.
- opening: some 10,000 evaluations in the study, in the accuracy cache and as Optuna's trials; seconds until the
  strategy is asked for the next child; beside it `Study.get_trials` of Optuna.
- speed-up: sleeping evaluations, by as many worker processes as said; from the moment that each has its first child.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from environment import heading

from hwnas.database import database_url
from hwnas.searching.strategies import Scored, Strategy
from hwnas.searching.study import GENERATION, Study
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store
from tests.postgres import Postgres

SPACE = SearchSpace.load("bignas")
RECORDED, SAMPLE = 10_240, 80
SLEEP_S, SLEEPS = 0.5, 64
EVALUATIONS = 104


class Fixed(Strategy):
    """Proposes random children: the same whenever it is asked; remembers when it was."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.moments: list[tuple[float, float]] = []  # wall and processor time as it is asked, and has answered

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        self.moments.append((time.perf_counter(), time.process_time()))
        genes = SPACE.sample_genes(count, np.random.default_rng(len(history)))
        found = [SPACE.decode(row) for row in genes]
        self.moments.append((time.perf_counter(), time.process_time()))
        return found


def study(url: str, evaluate: object = None, at_once: int = 2) -> Study:
    return Study(
        SPACE,
        url,
        "benchmark",
        "question",
        evaluate=evaluate or (lambda archs: [0.5] * len(archs)),  # type: ignore[arg-type]
        about=lambda arch: ({"macs": 1, "params": 1, "predicted_ms": 1.0, "std_ms": 0.1}, {"12 ms on cpu": -0.1}),
        at_once=at_once,
    )


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """URLs of fresh databases."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {"SQLite": f"sqlite:///{folder / 'hwnas.db'}"}
        try:
            server = stack.enter_context(Postgres(durable=True))
            urls["PostgreSQL"] = server.url("benchmark")
        except pytest.skip.Exception as missing:
            print(missing, file=sys.stderr)
        yield urls


# ------------------------------------------------------------ overhead


def overhead(url: str, count: int) -> tuple[float, float, float]:
    """Milliseconds by evaluation, of the generations: median and least wall time, median processor time."""
    strategy = Fixed(count)
    study(url).explore(strategy)
    moments = np.array(strategy.moments[1:-1])  # from an answer to the next question
    wall, cpu = ((moments[1::2] - moments[::2]) / GENERATION * 1e3).T
    return float(np.median(wall)), float(wall.min()), float(np.median(cpu))


@contextmanager
def optuna_study(url: str, name: str) -> Iterator[optuna.Study]:
    text = database_url(url).render_as_string(hide_password=False)
    storage = optuna.storages.RDBStorage(text)
    yield optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    storage.remove_session()
    storage.engine.dispose()


def optuna_alone(url: str, count: int) -> tuple[float, float]:
    """Median wall milliseconds of Optuna's `add_trial`, and of its queue."""
    ours = study(url)
    added, queued = [], []
    with optuna_study(url, "alone") as alone:
        for arch in Fixed(count).propose([], count):
            trial = ours._trial(Scored(arch, 0.5))
            started = time.perf_counter()
            alone.add_trial(trial)
            added.append(time.perf_counter() - started)
            trial.state, trial.values = optuna.trial.TrialState.WAITING, None
            trial.datetime_complete = None
            started = time.perf_counter()
            alone.add_trial(trial)
            alone.tell(alone.ask(), 0.5)
            queued.append(time.perf_counter() - started)
    return statistics.median(added) * 1e3, statistics.median(queued) * 1e3


# ------------------------------------------------------------ opening


def record(url: str) -> None:
    """A study of so many evaluations. Optuna's trials are copies of some real ones: it would write for minutes."""
    key = study(url)._key
    study(url).explore(Fixed(SAMPLE))
    genes = SPACE.sample_genes(RECORDED, np.random.default_rng(0))
    archs = [SPACE.decode(row) for row in genes]
    with Store(url) as store:
        for start in range(SAMPLE, RECORDED, 500):
            store.propose(key, start, archs[start : start + 500])
    engine = sa.create_engine(database_url(url))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE hwnas_children SET begun = true, accuracy = 0.5"))
        tables = sa.MetaData()
        tables.reflect(connection)
        common = {"weights": "w", "split": "validation", "protocol": "p", "accuracy": 0.5, "num_images": 1}
        common |= {"loss": 0.1, "seconds": 1.0, "created": "2026-01-01T00:00:00+00:00"}
        rows = [{"arch_id": arch.id, "arch": arch.to_dict(), **common} for arch in archs]
        connection.execute(tables.tables["hwnas_evaluations"].insert(), rows)
        trials = tables.tables["trials"].c
        have = SAMPLE
        while have < RECORDED:
            shift = connection.execute(sa.select(sa.func.max(trials.trial_id))).scalar_one()
            for name in ("trials", "trial_params", "trial_values", "trial_user_attributes", "trial_system_attributes"):
                table = tables.tables[name]
                own = set() if name == "trials" else {column.name for column in table.primary_key}
                added = {"trial_id": shift, "number": have}
                columns = [column for column in table.c if column.name not in own]
                moved = [column + added[column.name] if column.name in added else column for column in columns]
                query = table.insert().from_select([column.name for column in columns], sa.select(*moved))
                connection.execute(query)
            have *= 2
    engine.dispose()


class Asked(Exception):
    """The strategy was asked."""


class Impatient(Fixed):
    """Asked for a child, it says so."""

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        assert len(history) == RECORDED
        raise Asked


def opening(url: str) -> tuple[float, float, float]:
    """Seconds until a strategy can go on, wall and processor time, least of 5; of Optuna to read its trials, once."""
    seconds = []
    for _ in range(5):
        started, cpu = time.perf_counter(), time.process_time()
        try:
            study(url).explore(Impatient(RECORDED + 1))
        except Asked:
            seconds.append((time.perf_counter() - started, time.process_time() - cpu))
    with optuna_study(url, study(url)._key) as alone:
        started = time.perf_counter()
        assert len(alone.get_trials(deepcopy=False)) == RECORDED
        read_s = time.perf_counter() - started
    wall_s, cpu_s = min(seconds)
    return wall_s, cpu_s, read_s


# ------------------------------------------------------------ speed-up


def worker(url: str, folder: Path, count: int) -> None:
    """One of some; the first child of each waits until all have one, so that starting does not count."""

    def evaluate(archs: Sequence[Architecture]) -> list[float]:
        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < count:
            time.sleep(0.005)
        time.sleep(SLEEP_S * len(archs))
        return [0.5] * len(archs)

    study(url, evaluate, at_once=1).explore(Fixed(SLEEPS))
    print("done", flush=True)


def seconds_by(url: str, workers: int) -> float:
    study(url).explore(Fixed(0))  # makes the tables
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--worker", url, folder, str(workers)]
        processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
        while len(list(Path(folder).iterdir())) < workers:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.005)
        started = time.perf_counter()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
        taken = time.perf_counter() - started
        for process in processes:
            process.communicate()
    return taken


# ------------------------------------------------------------ the tables


def speed_up() -> Iterator[str]:
    yield f"{SLEEPS} evaluations that sleep {SLEEP_S} s, {GENERATION} proposed at a time:"
    yield ""
    yield "| database | workers | s | speed-up against one |"
    yield "|---|---|---|---|"
    with databases() as urls:
        names = list(urls)
    for name in names:
        alone = 0.0
        for workers in (1, 2, 4, 8):
            with databases() as fresh:
                taken = seconds_by(fresh[name], workers)
            alone = alone or taken
            yield f"| {name} | {workers} | {taken:.1f} | {alone / taken:.2f} |"


def openings() -> Iterator[str]:
    yield f"Opening a study with {RECORDED:,} evaluations, s, least of 5:"
    yield ""
    yield "| database | wall | processor time of the worker | Optuna's `get_trials`, wall |"
    yield "|---|---|---|---|"
    with databases() as urls:
        for name, url in urls.items():
            record(url)
            wall, cpu, theirs = opening(url)
            yield f"| {name} | {wall:.2f} | {cpu:.2f} | {theirs:.1f} |"


def overheads() -> Iterator[str]:
    yield f"Overhead of an evaluation, ms, over {EVALUATIONS} evaluations by one worker, two at a time; the last two"
    yield "columns are Optuna alone, which does less:"
    yield ""
    yield "| database | wall, median | wall, least | worker's processor time | `add_trial` | queue: add, ask, tell |"
    yield "|---|---|---|---|---|---|"
    with databases() as urls:
        for name, url in urls.items():
            wall, least, cpu = overhead(url, EVALUATIONS)
            added, queued = optuna_alone(url, 20)
            yield f"| {name} | {wall:.1f} | {least:.1f} | {cpu:.1f} | {added:.0f} | {queued:.0f} |"


PARTS = {"speed-up": speed_up, "overhead": overheads, "opening": openings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        url, folder, count = options.worker
        worker(url, Path(folder), int(count))
        return
    load = os.getloadavg()[0]
    lines = heading("A study shared by workers", f"the machine was shared: load average {load:.1f} at the start")
    for part in options.parts:
        for line in PARTS[part]():
            print(line, flush=True)
            lines.append(line)
        lines.append("")
        if options.output:
            options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
