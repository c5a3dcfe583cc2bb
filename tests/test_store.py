"""The run's database: round trips, other processes, kills, damage."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import optuna
import pytest

from hwnas.devices.base import RunTimes, Timing
from hwnas.errors import InputError
from hwnas.measurement import Measurement, usual_ms
from hwnas.store import Evaluation, Store
from hwnas.testing import tiny_space
from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
SPACE = tiny_space()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hwnas.db"


@pytest.fixture(scope="module")
def server():
    with Postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, path):
    if request.param == "sqlite":
        return f"sqlite:///{path}"
    return request.getfixturevalue("server").url(path.parent.name)


@pytest.fixture
def store(url):
    with Store(url) as store:
        yield store


def child(seed):
    return SPACE.sample(np.random.default_rng(seed))


def measurement(seed=0, **changes):
    rng = np.random.default_rng(seed)
    rounds = tuple(
        RunTimes(
            tuple(rng.uniform(1, 1.05, n).tolist()), tuple((rng.random(n) < 0.3).tolist()), {"load": 1.5, "cores": [0]}
        )
        for n in (1, 9, 30)
    )
    made = Measurement(
        arch=child(seed),
        device="cpu",
        runtime="onnxruntime",
        versions={"onnxruntime": "1.31.1", "processor": "Some Processor"},
        precision="fp32",
        timing=Timing(rounds=2),
        reference="0123456789ab",
        role="fit",
        rounds=rounds,
        reference_ms=tuple(rng.uniform(1, 1.01, 4).tolist()),
        write_s=0.01,
        run_s=0.5,
    )
    return replace(made, **changes)


def evaluation(seed=0, **changes):
    made = Evaluation(
        arch=child(seed),
        weights="abc",
        split="validation",
        protocol="1024 images",
        accuracy=0.875,
        num_images=5000,
        loss=0.4,
        seconds=1.5,
    )
    return replace(made, **changes)


FAILED = {"rounds": (), "reference_ms": (), "error": "out of memory"}


@pytest.mark.parametrize("changes", [{}, {"role": "finalist"}, {"reference_ms": ()}, FAILED])
def test_measurement_round_trip(store, url, changes):
    made = measurement(**changes)
    store.add_measurement(made)
    with Store(url) as other:
        (found,) = other.measurements()
    usual = usual_ms(made.reference_ms, 0.05) if made.reference_ms else None
    assert found == replace(made, usual_reference_ms=usual)
    assert found.created.tzinfo is not None


def test_measurements_that_match(store):
    made = [measurement(seed) for seed in range(4)]
    made[1] = replace(made[1], device="pixel")
    made[2] = replace(made[2], timing=Timing(rounds=3), role="holdout")
    for item in made:
        store.add_measurement(item)

    def archs(**conditions):
        return [item.arch for item in store.measurements(**conditions)]

    assert archs() == [child(seed) for seed in range(4)]
    assert archs(device="cpu") == [child(0), child(2), child(3)]
    assert archs(device="cpu", role="fit") == [child(0), child(3)]
    assert archs(timing=Timing(rounds=3)) == [child(2)]
    assert archs(protocol=made[0].protocol) == [child(0), child(3)]
    assert archs(arch=child(1)) == [child(1)]
    assert archs(device="none") == []


def test_reference_becomes_known_from_all_measurements(store):
    busy = replace(measurement(0), reference_ms=(1.6, 1.6, 1.6, 1.6))
    store.add_measurement(busy)
    (alone,) = store.measurements()
    assert alone.usual_reference_ms == 1.6
    assert not alone.unstable
    store.add_measurement(replace(measurement(1), reference_ms=(1.0, 1.0, 1.0, 1.0)))
    store.add_measurement(replace(measurement(2), reference_ms=(9.0,) * 4, device="slower"))
    found, _ = store.measurements(device="cpu")
    assert found.usual_reference_ms == 1.0
    assert found.unstable
    assert found.latency_ms == pytest.approx(alone.latency_ms / 1.6)
    assert store.measurements(arch=child(0)) == [found]  # whatever is asked for


def test_evaluation_round_trip(store):
    made = evaluation(created=datetime(2026, 1, 2, tzinfo=UTC))
    assert store.evaluation(made.arch, "abc", "validation", "1024 images") is None
    store.add_evaluation(made)
    assert store.evaluation(made.arch, "abc", "validation", "1024 images") == made
    for other in ({"weights": "abd"}, {"split": "test"}, {"protocol": "64 images"}, {"arch": child(1)}):
        key = {"arch": made.arch, "weights": "abc", "split": "validation", "protocol": "1024 images"} | other
        assert store.evaluation(**key) is None
        store.add_evaluation(replace(made, **other))
        assert store.evaluation(**key) == replace(made, **other)
    assert [e.arch for e in store.evaluations("abc", "validation", "1024 images")] == [child(0), child(1)]


def test_first_evaluation_is_kept(store):
    store.add_evaluation(evaluation(accuracy=0.5))
    store.add_evaluation(evaluation(accuracy=0.6))
    assert [e.accuracy for e in store.evaluations("abc", "validation", "1024 images")] == [0.5]


def test_optuna_shares_the_database(store, url):
    store.add_measurement(measurement())
    storage = optuna.storages.RDBStorage(url.replace("postgresql:", "postgresql+psycopg:"))
    study = optuna.create_study(storage=storage, study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    store.add_evaluation(evaluation())
    assert len(study.get_trials()) == len(store.measurements()) == 1
    storage.remove_session()
    storage.engine.dispose()
    with Store(url) as again:
        assert len(again.measurements()) == 1


def test_adopts_what_another_database_has(store, tmp_path):
    with Store(tmp_path / "other.db") as other:
        for seed in range(3):
            other.add_measurement(measurement(seed))
            other.add_evaluation(evaluation(seed))
        store.add_evaluation(evaluation(1, accuracy=0.5))
        store.adopt(other)
        store.adopt(other)
        assert store.measurements() == other.measurements()
        found = {e.arch: e.accuracy for e in store.evaluations("abc", "validation", "1024 images")}
    assert found == {child(0): 0.875, child(1): 0.5, child(2): 0.875}


# -------------------------------------------------------------------- studies that workers share


def test_the_first_to_open_a_study_decides(store):
    known = [(child(5), 0.25)]
    assert store.open_study("s", {"ms": 0.1}, known) == ({"ms": 0.1}, known)
    assert store.open_study("s", {"ms": 7}, []) == ({"ms": 0.1}, known)
    assert store.open_study("other", 3, []) == (3, [])


def test_the_first_to_propose_decides(store):
    store.propose("s", 0, [child(0), child(1)])
    store.propose("s", 0, [child(2), child(3)])
    store.propose("s", 2, [child(4)])
    assert [(c.number, c.arch, c.accuracy) for c in store.children("s")] == [
        (0, child(0), None),
        (1, child(1), None),
        (2, child(4), None),
    ]
    assert [store.begin_child("s", 1), store.begin_child("s", 1)] == [True, False]
    store.finish_child("s", 1, 0.1)
    assert [(c.number, c.accuracy) for c in store.children("s", first=1)] == [(1, 0.1), (2, None)]
    assert store.children("other") == []


def test_a_claim_excludes_others(store, url):
    with Store(url) as other:
        with store.claim("a") as mine, other.claim("a") as theirs, store.claim("a") as again, other.claim("b") as b:
            assert (mine, theirs, again, b) == (True, False, False, True)
        with other.claim("a") as theirs:
            assert theirs


def test_a_claim_ends_with_its_holder(store, url):
    program = """
import sys, time
from hwnas.store import Store
with Store(sys.argv[1]) as store, store.claim("a") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, url], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        with store.claim("a") as mine:
            assert not mine
        waited = []
        holder.kill()
        holder.wait()
        with store.claimed("a", lambda: waited.append(1)):
            assert len(waited) <= 1  # the server may take a moment to notice


def test_claims_leave_no_files(path):
    with Store(path) as store, store.claim("a"), store.claim("b"):
        pass
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["hwnas.db"]


# -------------------------------------------------------------------- other processes

WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from test_store import measurement, evaluation
from hwnas.store import Store
url, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Store(url) as store:
    for seed in range(first, first + count):
        store.add_measurement(measurement(seed))
        store.add_evaluation(evaluation(seed % 20))
        print(seed, flush=True)
"""


def start_writer(url, first, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, str(first), str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_at_once(url):
    writers = [start_writer(url, first, 60) for first in (0, 1000)]  # they make the tables at once, too
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with Store(url) as store:
        measured = store.measurements()
        assert {item.arch for item in measured} == {child(seed) for seed in (*range(60), *range(1000, 1060))}
        assert len(measured) == 120
        found = store.evaluations("abc", "validation", "1024 images")
        assert len(found) == len({item.arch for item in found}) == 20


def test_what_was_added_survives_a_kill(url):
    with start_writer(url, 0, 100_000) as writer:
        said = [int(writer.stdout.readline()) for _ in range(15)]
        os.kill(writer.pid, signal.SIGKILL)
    with Store(url) as store:
        measured = [item.arch for item in store.measurements()]
        assert measured[:15] == [child(seed) for seed in said]
        store.add_measurement(measurement(7))


def test_opens_fast(path):
    with Store(path) as store:
        for seed in range(100):
            store.add_measurement(measurement(seed))

    def seconds():
        started = time.perf_counter()
        Store(path).close()
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.05


# -------------------------------------------------------------------- damage


def test_not_a_database(path):
    path.write_text("this is no database, however long it is\n" * 100)
    with pytest.raises(
        InputError, match=r"hwnas\.db: the database is damaged \(file is not a database\): move it away"
    ):
        Store(path)


def test_damaged_pages(path):
    with Store(path) as store:
        for seed in range(50):
            store.add_measurement(measurement(seed))
    data = bytearray(path.read_bytes())
    for start in range(4096 * 8, len(data) - 4096, 4096):
        data[start : start + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"hwnas\.db: the database is damaged .*: move it away"):
        Store(path)


def test_cut_off_file(path):
    with Store(path) as store:
        for seed in range(50):
            store.add_measurement(measurement(seed))
    path.write_bytes(path.read_bytes()[:-10_000])
    with pytest.raises(InputError, match="the database is damaged"):
        Store(path)


@pytest.mark.parametrize(
    ("column", "value"),
    [("times", b"123"), ("arch", '{"stem": 3}'), ("timing", '{"rounds": 0}'), ("rounds", "[[99, {}]]")],
)
def test_damaged_record(path, column, value):
    with Store(path) as store:
        store.add_measurement(measurement())
        with sqlite3.connect(path) as connection:
            connection.execute(f"UPDATE hwnas_measurements SET {column} = ?", (value,))
        connection.close()
        with pytest.raises(InputError, match=r"hwnas\.db: .*measurement 1"):
            store.measurements()


def test_newer_schema(path):
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE hwnas_schema SET version = 99")
    connection.close()
    with pytest.raises(InputError, match=r"made by a newer hwnas \(its schema is 99.*: upgrade hwnas"):
        Store(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////no/such/folder/hwnas.db", "/no/such/folder/hwnas.db: the database cannot be used: unable to open"),
        ("nonsense", "'nonsense' is no database URL"),
        (
            "postgresql://me:secret@127.0.0.1:1/db",
            r"//me:\*\*\*@127.0.0.1:1/db: the database cannot be used: .*refused",
        ),
        ("nonsense://host/db", "nonsense://host/db: .*nonsense"),
    ],
)
def test_unusable_url(url, message):
    with pytest.raises(InputError, match=message):
        Store(url)


def test_password_is_not_shown():
    with pytest.raises(InputError) as caught:
        Store("postgresql+nodriver://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)
