"""The measuring loop against a fake device, and the choice of children."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwnas.devices import load_device, worker
from hwnas.devices.base import DeviceGoneError, Timing
from hwnas.errors import DeviceError
from hwnas.layers import lower, total_macs
from hwnas.measuring.children import choose_children, reference_child
from hwnas.measuring.measure import measure
from hwnas.space import SearchSpace
from hwnas.store import Store
from hwnas.testing import QUICK, FakeDevice, fake_latency_ms, tiny_space

ROOT = Path(__file__).parent.parent
SPACE = tiny_space()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "hwnas.db") as store:
        yield store


def children(count):
    return choose_children(SPACE, count, np.random.default_rng(0), num_candidates=500)


def true_ms(arch):
    return fake_latency_ms(lower(SPACE, arch))


def is_reference(layers):
    return layers[0].in_size == reference_child(SPACE).resolution and total_macs(layers) == total_macs(
        lower(SPACE, reference_child(SPACE))
    )


def test_measures_in_order_and_records(store):
    archs = children(8)
    reports = []
    device = FakeDevice()
    found = measure(
        [*archs, archs[0]], SPACE, device, QUICK, store, role="holdout", report=lambda *args: reports.append(args)
    )
    assert [m.arch for m in found] == [*archs, archs[0]]
    assert found[:-1] == store.measurements(device="fake", timing=QUICK, role="holdout")
    for m in found:
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.03)
        assert not m.unstable
        assert len(m.rounds) == QUICK.rounds
        assert (m.runtime, m.versions, m.precision) == ("fake", {"fake": "1"}, "fp32")
        assert m.write_s > 0
    assert [report[:2] for report in reports] == [(n, 8) for n in range(1, 9)]
    assert float(reports[0][2].removesuffix(" ms")) == pytest.approx(found[0].latency_ms, rel=0.03)
    assert len({path.parent for path in device.ran}) == 1
    assert not device.ran[0].parent.exists()


def test_child_and_reference_take_turns(store):
    device = FakeDevice()
    (arch,) = children(1)
    measure([arch], SPACE, device, QUICK, store)
    assert [path.stem for path in device.ran] == [reference_child(SPACE).id, arch.id] * 2 + [reference_child(SPACE).id]


def test_resume_measures_nothing_twice(store):
    archs = children(6)
    first = measure(archs[:4], SPACE, FakeDevice(seed=1), QUICK, store)
    device = FakeDevice(seed=2)
    found = measure(archs, SPACE, device, QUICK, store, role="finalist")
    assert {path.stem for path in device.ran} == {archs[4].id, archs[5].id, reference_child(SPACE).id}
    assert [m.rounds for m in found[:4]] == [m.rounds for m in first]
    assert [m.role for m in found] == ["fit"] * 4 + ["finalist"] * 2
    measure(archs, SPACE, device := FakeDevice(), QUICK, store)
    assert not device.ran


def test_other_protocol_is_measured_anew(store):
    archs = children(2)
    measure(archs, SPACE, FakeDevice(), QUICK, store)
    for device, timing in ((FakeDevice(), replace(QUICK, threads=2)), (FakeDevice(name="other"), QUICK)):
        measure(archs, SPACE, device, timing, store)
        assert len(device.ran) == 10
    assert len(store.measurements()) == 6


def test_disturbed_rounds_are_repeated(store):
    # Every third call to the device finds it slow: rounds with such a reference beside them, or in them, do not count.
    device = FakeDevice(slowdown=lambda number: 1.8 if number % 7 in (2, 3) else 1.0)
    timing = replace(QUICK, rounds=3, max_rounds=20)
    for m in measure(children(6), SPACE, device, timing, store):
        assert not m.unstable
        assert len(m.rounds) > timing.rounds
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.03)


def test_what_stays_noisy_is_marked(store):
    rng = np.random.default_rng(0)
    device = FakeDevice(slowdown=lambda number: rng.uniform(1, 3))
    timing = replace(QUICK, max_rounds=12, max_drift=0.02)
    found = measure(children(4), SPACE, device, timing, store)
    assert all(m.unstable for m in found)
    assert all(len(m.rounds) == 12 for m in found)


def test_drift_is_taken_out(store):
    # Quiet at first, then everything takes 1.5 times as long: as after another program started.
    device = FakeDevice(slowdown=lambda number: 1.0 if number < 20 else 1.5)
    found = measure(children(8), SPACE, device, QUICK, store)
    assert not found[0].unstable
    assert found[-1].unstable
    for m in found:
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.04)


def test_earlier_measurements_tell_what_is_usual(store):
    archs = children(6)
    measure(archs[:3], SPACE, FakeDevice(), QUICK, store)
    found = measure(archs[3:], SPACE, FakeDevice(slowdown=lambda number: 1.5), QUICK, store)
    for m in found:
        assert m.unstable
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.04)


def test_spread_of_single_runs(store):
    # Wide but even noise: all rounds are used, and the child is marked.
    timing = replace(QUICK, repeats=50, max_drift=0.2)
    (m,) = measure(children(1), SPACE, FakeDevice(spread=0.5), timing, store)
    assert m.unstable
    assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.2)
    assert m.relative_iqr > 0.25


def test_preempted_runs_do_not_count(store):
    timing = replace(QUICK, repeats=20)
    for m in measure(children(3), SPACE, FakeDevice(preempt=0.25), timing, store):
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.03)
        assert m.times_ms.max() > 5 * m.latency_ms  # they are kept


def test_what_cannot_be_trusted_is_measured_again_then_rejected(store):
    rng = np.random.default_rng(0)
    archs = children(4)
    disturbed = [True]
    device = FakeDevice(slowdown=lambda number: rng.uniform(1, 3) if disturbed[0] else 1.0)
    timing = replace(QUICK, max_rounds=6, max_error=0.01)
    reports = []
    found = measure(archs, SPACE, device, timing, store, report=lambda *args: reports.append(args))
    assert not any(m.trusted for m in found)
    assert len(store.measurements()) == 8
    assert reports[0][2].startswith("disturbed: ")
    assert reports[-1][2].startswith("once more: disturbed: ")
    for m in found:
        assert m.relative_error > 0.01
        assert "rounds were steady, and all of them agree to" in m.rejection
        assert "the reference took up to" in m.rejection
    disturbed[0] = False
    found = measure(archs, SPACE, device, timing, store)
    assert len(store.measurements()) == 12
    for m in found:
        assert m.trusted
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.03)


def test_second_try_can_succeed(store):
    rng = np.random.default_rng(0)
    device = FakeDevice(slowdown=lambda number: rng.uniform(1, 3) if 10 <= number < 23 else 1.0)
    found = measure(children(6), SPACE, device, replace(QUICK, max_rounds=6, max_error=0.005), store)
    assert len(store.measurements()) > 6
    for m in found:
        assert m.trusted
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.03)


def test_throttled_rounds_are_repeated(store):
    # Its clock falls for some rounds, and what it reports shows it; the reference is hit as much as the child.
    def hot(number):
        return 7 <= number < 12

    device = FakeDevice(
        slowdown=lambda number: 1.5 if hot(number) else 1.0,
        facts=lambda number: {"mhz_limit": 1200 if hot(number) else 1800, "celsius": 81.5 if hot(number) else 60.0},
    )
    for m in measure(children(4), SPACE, device, replace(QUICK, max_rounds=12), store):
        assert not m.unstable
        counted = [times for times, steady in zip(m.rounds, m.steady, strict=True) if steady]
        assert {times.facts["mhz_limit"] for times in counted} == {1800}
        assert m.latency_ms == pytest.approx(true_ms(m.arch), rel=0.03)


def test_android_tells_of_throttling(store):
    rng = np.random.default_rng(0)
    device = FakeDevice(
        slowdown=lambda number: rng.uniform(1, 2), facts=lambda number: {"thermal_status": 3, "celsius": 48.0}
    )
    (m,) = measure(children(1), SPACE, device, replace(QUICK, max_error=0.001), store)
    assert not m.steady.any()
    assert m.rejection.endswith("the device throttled itself; up to 48 degrees Celsius")


def test_tells_what_else_ran(store):
    def facts(number):
        return {"used_s": {"clock": 5 + number, "machine": 100 + 2.5 * number, "own": 1 + number}}

    (m,) = measure(children(1), SPACE, FakeDevice(facts=facts), QUICK, store)
    assert m.others_busy == pytest.approx(1.5)
    (m,) = measure(children(1), SPACE, FakeDevice(name="other"), QUICK, store)
    assert m.others_busy is None


def test_sees_a_busy_process(store):
    with load_device("cpu") as device:
        timing = replace(device.timing, rounds=30, max_rounds=30)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            (m,) = measure(children(1), SPACE, device, timing, store)
        finally:
            busy.kill()
            busy.wait()
    assert m.others_busy > 0.3


@pytest.mark.parametrize(
    ("facts", "energy"),
    [
        (lambda ms: {"energy_mj": 3.0}, lambda ms: 3.0),
        (lambda ms: {"run_power_mw": 4000.0}, lambda ms: 4 * ms),
        (lambda ms: {"run_power_mw": 4000.0, "energy_mj": 3.0}, lambda ms: 3.0),
        (lambda ms: {"power_mw": 4000.0}, lambda ms: None),  # after the program ended: the device at rest
    ],
)
def test_energy_where_the_device_tells(store, facts, energy):
    (arch,) = children(1)
    ms = true_ms(arch)
    device = FakeDevice(facts=lambda number: facts(ms), spread=0.001)
    measure([arch], SPACE, device, QUICK, store)
    (found,) = store.measurements(device="fake")
    assert found.energy_mj == (energy(ms) and pytest.approx(energy(ms), rel=0.01))


def test_disturbed_rounds_do_not_count_for_energy(store):
    (arch,) = children(1)
    slow = {3, 4}
    device = FakeDevice(
        slowdown=lambda number: 3.0 if number in slow else 1.0,
        facts=lambda number: {"energy_mj": 30.0 if number in slow else 3.0},
    )
    (found,) = measure([arch], SPACE, device, QUICK, store)
    assert not found.steady.all()
    assert found.energy_mj == 3


def zone(folder, name, kind, used, most=1_000_000):
    (folder / name).mkdir(parents=True)
    for file, text in (("name", kind), ("energy_uj", str(used)), ("max_energy_range_uj", str(most))):
        (folder / name / file).write_text(text + "\n")


def test_processors_tell_their_energy(tmp_path):
    """A folder as Linux shows RAPL's counters; subzones are part of their package, psys is more than processors."""
    for name, kind, used in (
        ("intel-rapl:0", "package-0", 500),
        ("intel-rapl:0:0", "core", 300),
        ("intel-rapl:1", "package-1", 999_000),
        ("intel-rapl:2", "psys", 10_000),
        ("intel-rapl-mmio:0", "package-0", 500),
    ):
        zone(tmp_path, name, kind, used)
    before = worker.energy_uj(tmp_path)
    assert before == {"intel-rapl:0": (500, 1_000_000), "intel-rapl:1": (999_000, 1_000_000)}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("2500\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("3000\n")  # started again
    assert worker.used_uj(before, worker.energy_uj(tmp_path)) == 2000 + 4000
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert worker.used_uj(before, worker.energy_uj(tmp_path)) == 2000


def test_counters_that_nobody_may_read(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", "garbage")
    assert worker.energy_uj(tmp_path) == {}
    assert worker.energy_uj(tmp_path / "none") == {}
    assert worker.used_uj({}, {}) == 0


def rails(folder, number, name, **values):
    (folder / f"hwmon{number}").mkdir(parents=True)
    (folder / f"hwmon{number}" / "name").write_text(name + "\n")
    for index, (label, (mv, ma)) in enumerate(values.items(), 1):
        for file, text in ((f"in{index}_label", label), (f"in{index}_input", mv), (f"curr{index}_input", ma)):
            (folder / f"hwmon{number}" / file).write_text(f"{text}\n")


def test_a_jetson_tells_its_power_while_it_runs(tmp_path):
    assert worker.power_mw(tmp_path) is None
    rails(tmp_path / "nano", 3, "ina3221", VDD_IN=(5000, 952), VDD_CPU_GPU_CV=(5000, 200), VDD_SOC=(5000, 300))
    assert worker.power_mw(tmp_path / "nano") == 4760
    rails(tmp_path / "agx", 1, "ina3221", VDD_GPU_SOC=(19000, 100), VDD_CPU_CV=(19000, 50))
    assert worker.power_mw(tmp_path / "agx") is None
    rails(tmp_path / "agx", 2, "ina3221", VIN_SYS_5V0=(5000, 600))
    assert worker.power_mw(tmp_path / "agx") == 1900 + 950 + 3000
    rails(tmp_path / "pc", 1, "nct6775", VDD_IN=(5000, 952))
    assert worker.power_mw(tmp_path / "pc") is None


def test_a_round_tells_the_energy_of_one_run(tmp_path, monkeypatch):
    counter = iter(range(0, 10**9, 70_000))
    monkeypatch.setattr(worker, "energy_uj", lambda: {"intel-rapl:0": (next(counter), 10**9)})
    monkeypatch.setattr(worker, "power_mw", lambda: 4000.0)
    monkeypatch.setattr(worker.os, "sched_setaffinity", lambda *_: None)

    class Runtime:
        def load(self, path, threads):
            return lambda: None

    file = tmp_path / "x"
    file.touch()
    answer = worker.Worker(Runtime()).run(
        str(file), threads=1, cores=[0], warmup_s=0, warmup_runs=2, repeats=5, min_duration_s=0
    )
    assert answer["facts"]["energy_mj"] == pytest.approx(70 / 7)
    assert answer["facts"]["run_power_mw"] == 4000


def test_pauses_after_a_disturbed_round(store, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    device = FakeDevice(slowdown=lambda number: 1.8 if number == 4 else 1.0)
    measure(children(2), SPACE, device, replace(QUICK, rounds=3, max_rounds=20, pause_s=7.0), store)
    assert slept == [7.0]


def test_one_measurement_at_a_time_on_a_machine(tmp_path):
    """Two devices on one address in two threads never run at once; on two addresses they do."""

    class Shared(FakeDevice):
        busy = 0
        most = 0

        def run(self, path, timing):
            Shared.busy += 1
            Shared.most = max(Shared.most, Shared.busy)
            time.sleep(0.01)
            Shared.busy -= 1
            return super().run(path, timing)

    def most(*addresses):
        Shared.most = 0
        devices = [Shared(name=f"fake{number}") for number in range(len(addresses))]
        with Store(tmp_path / "hwnas.db") as store, ThreadPoolExecutor() as threads:
            for device, address in zip(devices, addresses, strict=True):
                device.address = f"{tmp_path} {address}"
            list(threads.map(lambda device: measure(children(3), SPACE, device, QUICK, store), devices))
        for device in devices:
            assert len(device.ran) == 15
        (tmp_path / "hwnas.db").unlink()
        return Shared.most

    assert most("a", "a", "a") == 1
    assert most("a", "b") == 2


def failing(archs):
    macs = {total_macs(lower(SPACE, arch)) for arch in archs}

    def latency_ms(layers):
        if total_macs(layers) in macs:
            raise DeviceError("out of memory")
        return fake_latency_ms(layers)

    return latency_ms


def test_failures_are_recorded_and_tried_again(store):
    archs = children(8)
    reports = []
    found = measure(
        archs, SPACE, FakeDevice(failing(archs[1:3])), QUICK, store, report=lambda *args: reports.append(args)
    )
    assert [m.error for m in found] == [None, "out of memory", "out of memory"] + [None] * 5
    both = ["out of memory"] * 2  # at the end they are tried once more
    assert [m.error for m in store.measurements()] == [m.error for m in found] + both
    assert reports[1][2] == "out of memory"
    assert reports[-1] == (8, 8, "once more: out of memory")
    device = FakeDevice()
    found = measure(archs, SPACE, device, QUICK, store)
    assert {path.stem for path in device.ran} == {archs[1].id, archs[2].id, reference_child(SPACE).id}
    assert all(m.error is None for m in found)
    assert len(store.measurements()) == 12


def test_three_failures_in_a_row_end_it(store):
    archs = children(8)
    with pytest.raises(DeviceError, match="3 children in a row failed, the last with: out of memory"):
        measure(archs, SPACE, FakeDevice(failing(archs[2:])), QUICK, store)
    assert [m.error is None for m in store.measurements()] == [True, True, False, False, False]


def test_device_that_goes_away(store):
    archs = children(4)

    def latency_ms(layers):
        if total_macs(layers) == total_macs(lower(SPACE, archs[2])):
            raise DeviceGoneError("unplugged")
        return fake_latency_ms(layers)

    with pytest.raises(DeviceGoneError, match="unplugged"):
        measure(archs, SPACE, FakeDevice(latency_ms), QUICK, store)
    assert [m.arch for m in store.measurements()] == archs[:2]


def test_folder_is_left_empty(store, tmp_path):
    (tmp_path / "work").mkdir()
    device = FakeDevice()
    measure(children(2), SPACE, device, QUICK, store, folder=tmp_path / "work")
    assert device.ran[0].is_relative_to(tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_measure import *
archs = children(6)
def report(done, total, note=""):
    if done == 4:
        os.kill(os.getpid(), 9)
with Store(Path(sys.argv[1])) as store:
    measure(archs, SPACE, FakeDevice(), QUICK, store, report=report)
"""


def test_kill_loses_nothing_that_was_reported(tmp_path):
    path = tmp_path / "hwnas.db"
    done = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    with Store(path) as store:
        assert [m.arch for m in store.measurements()] == children(6)[:4]


def test_on_this_machine(store):
    archs = children(6)
    with load_device("cpu") as device:
        timing = Timing(rounds=4, max_rounds=12, min_duration_s=0.005, max_error=10.0)
        found = measure(archs, SPACE, device, timing, store)
        os.kill(device._process._process.pid, signal.SIGKILL)
        again = measure([archs[0], SPACE.sample(np.random.default_rng(3))], SPACE, device, timing, store)
    assert found[1].latency_ms > 3 * found[0].latency_ms
    assert found[0].rounds == again[0].rounds
    assert again[1].error is None  # the second time
    assert "SIGKILL" in store.measurements(arch=again[1].arch)[0].error


# -------------------------------------------------------------------- which children


@pytest.mark.parametrize("name", SearchSpace.names())
def test_children_are_spread_over_sizes(name):
    space = SearchSpace.load(name)
    count = 30
    chosen = choose_children(space, count, np.random.default_rng(0), num_candidates=4096)
    assert len(set(chosen)) == count
    assert chosen[:2] == [space.smallest(), space.largest()]
    for arch in chosen:
        space.check(arch)
    size = np.log([total_macs(lower(space, arch)) for arch in chosen])
    share, _ = np.histogram(size, bins=6)
    assert share.min() >= 3
    assert share.max() <= 8
    early, _ = np.histogram(size[:10], bins=np.linspace(size.min(), size.max(), 4))
    assert early.min() >= 2


def test_children_are_spread_over_choices():
    chosen = SPACE.encode(choose_children(SPACE, 40, np.random.default_rng(0)))
    for index, gene in enumerate(SPACE.genes):
        if len(gene.choices) > 1:
            present = chosen[chosen[:, index] >= 0, index]
            counts = np.bincount(present, minlength=len(gene.choices))
            assert counts.min() >= 0.4 * len(present) / len(gene.choices), gene.name


def test_choice_is_repeatable():
    def chosen(seed):
        return choose_children(SPACE, 12, np.random.default_rng(seed), num_candidates=500)

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_few_children():
    rng = np.random.default_rng(0)
    assert choose_children(SPACE, 0, rng) == []
    assert choose_children(SPACE, 1, rng) == [SPACE.smallest()]
    assert choose_children(SPACE, 2, rng) == [SPACE.smallest(), SPACE.largest()]
    assert len(set(choose_children(SPACE, 3, rng))) == 3


def test_space_with_fewer_children_than_asked(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "resolution: [16, 24]\nstem: {width: 8}\nhead: {width: 16}\n"
        "stages: [{width: [8, 16], depth: [1, 2], kernel: 3, expand: 2}]\n"
    )
    space = SearchSpace.load(path, in_channels=1, num_classes=10)
    assert len(set(choose_children(space, 50, np.random.default_rng(0)))) == space.size() == 8
    assert len(choose_children(space, 5, np.random.default_rng(0))) == 5
