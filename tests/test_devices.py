"""Devices: the contract, the worker's crashes, the device files."""

import ast
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from hwnas.devices import load_device, worker
from hwnas.devices.base import DeviceGoneError, RunTimes, Timing
from hwnas.devices.runtimes.onnxruntime import Runtime as OnnxRuntime
from hwnas.devices.spec import _modules
from hwnas.devices.transports.host import Host
from hwnas.devices.worker_device import WorkerDevice
from hwnas.errors import DeviceError
from hwnas.measurement import Measurement, steady_rounds, usual_ms
from hwnas.testing import QUICK, DeviceContract, FakeDevice, tiny_space


@pytest.fixture(scope="module")
def cpu():
    with load_device("cpu") as device:
        yield device


@pytest.fixture
def network(cpu, tmp_path):
    return DeviceContract.write(cpu, tmp_path)


class TestCpu(DeviceContract):
    @pytest.fixture
    def device(self, cpu):
        return cpu


class TestFakeDevice(DeviceContract):
    @pytest.fixture
    def device(self):
        with FakeDevice() as device:
            yield device


# -------------------------------------------------------------------- the worker


def worker_pid(device):
    return device._process._process.pid


def test_says_what_it_runs_on(cpu, network):
    assert cpu.accepts == "onnx"
    assert set(cpu.versions()) == {"onnxruntime", "processor"}
    facts = cpu.run(network, QUICK).facts
    assert len(facts["cores"]) == 1
    assert facts["load"] >= 0


def test_goes_on_for_min_duration(cpu, network):
    times = cpu.run(network, replace(QUICK, min_duration_s=0.05))
    assert sum(times.times_ms) > 25


def test_two_threads(cpu, network):
    times = cpu.run(network, replace(QUICK, threads=2))
    assert len(times.facts["cores"]) == min(2, len(os.sched_getaffinity(0)))


def test_keeps_two_networks_loaded(cpu, network, tmp_path):
    other = DeviceContract.write(cpu, tmp_path, largest=True)
    cpu.run(network, QUICK)
    cpu.run(other, QUICK)
    timing = replace(QUICK, warmup_s=1)  # for networks that have to be loaded
    started = time.perf_counter()
    for path in (network, other, network, other):
        cpu.run(path, timing)
    assert time.perf_counter() - started < 0.9
    other.write_bytes(network.read_bytes())  # another network in the same file is loaded anew
    assert cpu.run(other, QUICK).latency_ms < 3 * cpu.run(network, QUICK).latency_ms


def test_killed_worker_is_replaced(cpu, network):
    cpu.run(network, QUICK)
    first = worker_pid(cpu)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"device 'cpu': onnxruntime was ended by SIGKILL \(out of memory"):
        cpu.run(network, QUICK)
    assert cpu.run(network, QUICK).latency_ms > 0
    assert worker_pid(cpu) != first


def test_hanging_network_is_ended(cpu, network):
    cpu.run(network, QUICK)
    pid = worker_pid(cpu)
    with pytest.raises(DeviceError, match=r"did not answer within 0\.3 s, and was ended"):
        cpu.run(network, replace(QUICK, min_duration_s=60, timeout_s=0.3))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert cpu.run(network, QUICK).latency_ms > 0


def test_interrupt_leaves_no_stale_answer(cpu, network, monkeypatch):
    cpu.run(network, QUICK)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cpu.run(network, QUICK)
    assert cpu.versions()["processor"]


def test_network_of_unknown_shape(cpu, network, tmp_path):
    import onnx

    model = onnx.load(network)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, tmp_path / "batch.onnx")
    with pytest.raises(DeviceError, match=r"image is tensor\(float\).*'batch'.*not float32 of a fixed shape"):
        cpu.run(tmp_path / "batch.onnx", QUICK)


def test_without_python():
    class Bare(Host):
        @property
        def python(self):
            return ("/no/such/python",)

    missing = pytest.raises(DeviceGoneError, match="/no/such/python cannot be started: No such file")
    with WorkerDevice("bare", Bare(), "onnxruntime") as device, missing:
        device.versions()


def test_without_the_runtime():
    class WithoutPackages(Host):
        @property
        def python(self):
            return (sys.executable, "-P", "-S", "-E")

    with (
        WorkerDevice("bare", WithoutPackages(), "openvino") as device,
        pytest.raises(DeviceGoneError, match=r"is openvino installed there\? It needs hwnas\[openvino\] or openvino"),
    ):
        device.versions()
    with WorkerDevice("bare", WithoutPackages(), "onnxruntime") as device:
        for _ in range(2):
            with pytest.raises(DeviceGoneError, match=r"No module named 'numpy'.*is onnxruntime installed there\?"):
                device.run(Path("any"), QUICK)


def test_worker_ends_with_its_parent(tmp_path):
    script = "\n".join(
        [
            "import os, sys",
            "from hwnas.devices import load_device",
            "device = load_device('cpu')",
            "device.versions()",
            "print(device._process._process.pid, flush=True)",
            "os.kill(os.getpid(), 9)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


def runs_there(path):
    """Names of the modules that a file imports when it runs on a device."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))  # as old as Python on devices gets
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node))]
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_worker_stands_alone():
    assert runs_there(Path(worker.__file__)) == set()


@pytest.mark.parametrize("runtime", _modules("runtimes"))
def test_runtimes_stand_alone(runtime):
    found = import_module(f"hwnas.devices.runtimes.{runtime}")
    assert "hwnas" not in runs_there(Path(found.__file__))
    assert found.Runtime.accepts
    assert found.Runtime.precisions
    assert found.Runtime.install


def test_worker_answers_every_line():
    requests = [{"op": "versions"}, {"op": "run", "path": "/none", "threads": 1, "cores": None, "warmup_s": 0}]
    answers = io.StringIO()
    served = worker.Worker(OnnxRuntime("fp32"))
    affinity = os.sched_getaffinity(0)
    worker.serve(served, io.StringIO("\n".join(map(json.dumps, requests)) + "\n"), answers)
    os.sched_setaffinity(0, affinity)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert "onnxruntime" in first["ok"]
    assert "No such file" in second["error"]


# -------------------------------------------------------------------- the records


def test_preempted_runs_do_not_count():
    assert RunTimes((1.0, 2.0, 90.0), (False, False, True)).latency_ms == 1.5
    assert RunTimes((1.0, 80.0, 90.0), (False, True, True)).latency_ms == 80.0  # too few are left
    assert RunTimes((1.0, 2.0, 3.0), (False,) * 3).relative_iqr == pytest.approx(0.5)
    with pytest.raises(ValueError, match="1 times and 2 flags"):
        RunTimes((1.0,), (False, False))
    with pytest.raises(ValueError, match="not 0"):
        RunTimes((), ())


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("rounds", 0, "rounds=0: must be at least 1"),
        ("max_rounds", 7, "max_rounds=7: must be at least 8"),
        ("min_duration_s", -1, "min_duration_s=-1: must be at least 0"),
        ("timeout_s", 0, "timeout_s=0: must be over 0"),
    ],
)
def test_timing_checks_itself(field, value, rule):
    with pytest.raises(ValueError, match=rule):
        Timing(**{field: value})


def test_usual_is_the_quiet_cluster():
    rng = np.random.default_rng(0)
    quiet, busy = rng.normal(1, 0.01, 200), rng.normal(1.6, 0.2, 800)
    assert usual_ms([*quiet, *busy], 0.05) == pytest.approx(1, rel=0.02)
    assert usual_ms(quiet, 0.05) == pytest.approx(1, rel=0.005)
    assert usual_ms([3.0], 0.05) == 3.0
    assert usual_ms([3.0, 4.0], 0.0) == 3.0


def measurement(child_ms, reference_ms, usual=None, **changes):
    return Measurement(
        arch=tiny_space().smallest(),
        device="d",
        runtime="r",
        versions={"r": "1"},
        precision="fp32",
        timing=Timing(rounds=2, max_rounds=4),
        rounds=tuple(RunTimes((ms,) * 3, (False,) * 3) for ms in child_ms),
        reference_ms=tuple(reference_ms),
        usual_reference_ms=usual,
        **changes,
    )


def test_latency_of_steady_rounds():
    made = measurement((2.0, 3.3, 2.02), (1.0, 1.01, 1.5, 1.0), 1.0)
    assert made.steady.tolist() == [True, False, False]
    assert made.unstable
    made = measurement((2.0, 3.3, 9.0, 2.04), (1.0, 1.0, 1.5, 1.02, 1.02), 1.0)
    assert made.steady.tolist() == [True, False, False, True]
    assert not made.unstable
    assert made.latency_ms == pytest.approx(2)
    assert made.times_ms.tolist() == [2.0] * 3 + [2.04] * 3


def test_latency_of_disturbed_rounds_is_relative_to_the_reference():
    made = measurement((3.0, 3.2, 3.4), (1.5, 1.5, 1.7, 1.7), 1.0)
    assert made.unstable
    assert made.latency_ms == pytest.approx(2)
    assert made.times_ms.tolist() == [3.0] * 3 + [3.2] * 3 + [3.4] * 3
    assert replace(made, usual_reference_ms=None).latency_ms == pytest.approx(3.2)
    assert replace(made, usual_reference_ms=3.0).latency_ms == pytest.approx(6)


def test_rounds_that_spread_wide_are_not_steady():
    rounds = [RunTimes((1.0, 1.5, 2.0), (False,) * 3), RunTimes((1.0, 1.1, 1.2), (False,) * 3)]
    assert steady_rounds(rounds, (), None, Timing()).tolist() == [False, True]
    assert steady_rounds(rounds, (1, 1, 1), 1.0, Timing()).tolist() == [False, True]


def test_times_or_an_error():
    with pytest.raises(ValueError, match="either times or an error"):
        measurement((), ())
    with pytest.raises(ValueError, match="either times or an error"):
        measurement((1.0,), (1.0, 1.0), error="broken")
    with pytest.raises(ValueError, match="1 rounds have 2 reference times"):
        measurement((1.0,), (1.0,))
    failed = measurement((), (), error="broken")
    assert not failed.unstable
    with pytest.raises(ValueError, match="has no latency on 'd': broken"):
        _ = failed.latency_ms


def test_protocol_tells_conditions_apart():
    made = measurement((1.0,), (1.0, 1.0))
    changes = [
        {"device": "e"},
        {"versions": {"r": "2"}},
        {"timing": Timing(rounds=3)},
        {"precision": "int8"},
        {"reference": "x"},
    ]
    keys = {replace(made, **change).protocol for change in changes}
    assert len(keys | {made.protocol}) == len(changes) + 1
    assert replace(made, role="holdout", arch=tiny_space().largest()).protocol == made.protocol
