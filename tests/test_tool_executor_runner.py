"""What `executor_runner` prints, as times or errors."""

import sys

import pytest

from hwnas.devices import load_device
from hwnas.devices.base import Timing
from hwnas.devices.tools.executor_runner import Program
from hwnas.errors import DeviceError
from hwnas.testing import QUICK

BEGIN = """\
I 00:00:00.000312 executorch:executor_runner.cpp:381] Resetting threadpool with num threads = 2
I 00:00:00.000801 executorch:executor_runner.cpp:507] Model file /data/local/tmp/1.pte is loaded.
I 00:00:00.000822 executorch:executor_runner.cpp:516] Using method forward
I 00:00:00.000840 executorch:executor_runner.cpp:566] Setting up CPU planned buffer 0, size 3176.
E 00:00:00.000900 executorch:cpuinfo_utils.cpp:125] CPU info and manual query on # of cpus dont match.
I 00:00:00.004100 executorch:executor_runner.cpp:640] Model loaded in 3.204000 ms.
"""
RUNS = """\
I 00:00:00.009000 executorch:executor_runner.cpp:818] Iteration 1 of 4: 1.900000 ms
I 00:00:00.010000 executorch:executor_runner.cpp:818] Iteration 2 of 4: 0.620000 ms
I 00:00:00.011000 executorch:executor_runner.cpp:818] Iteration 3 of 4: 0.500000 ms
I 00:00:00.012000 executorch:executor_runner.cpp:818] Iteration 4 of 4: 0.540000 ms
"""
END = """\
I 00:00:00.012100 executorch:executor_runner.cpp:830] Model executed successfully 4 time(s) in 3.560000 ms.
I 00:00:00.012200 executorch:executor_runner.cpp:839] 1 outputs:
OutputX 0: tensor(sizes=[1, 3], [0.1, -0.2, 3.])
"""


@pytest.fixture
def tool():
    return Program("fp32")


def test_command(tool):
    timing = Timing(repeats=3, warmup_runs=2, min_duration_s=0.01, threads=2)
    assert tool.command("/x/runner", "/y/1.pte", timing, "/y") == [
        "/x/runner",
        "--model_path=/y/1.pte",
        "--num_executions=20",
        "--cpu_threads=2",
    ]


@pytest.mark.parametrize("timing", [Timing(repeats=50, min_duration_s=0), Timing(warmup_runs=50, min_duration_s=0)])
def test_as_many_runs_before_as_count(tool, timing):
    assert "--num_executions=100" in tool.command("runner", "1.pte", timing, "/")


def test_last_half_of_the_runs_counts(tool):
    times = tool.parse(BEGIN + RUNS + END)
    assert times.times_ms == (0.5, 0.54)
    assert times.facts == {"threads": 2}
    assert times.relative_iqr == pytest.approx(0.02 / 0.52)


def test_sums_of_versions_before_1_3(tool):
    times = tool.parse(BEGIN + END)
    assert times.times_ms == (pytest.approx(0.89),)
    assert times.facts == {"threads": 2, "runs": 4}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            BEGIN
            + "E 00:00:00.001000 executorch:method.cpp:87] Backend XnnpackBackend is not registered.\n"
            + "F 00:00:00.001100 executorch:executor_runner.cpp:631] In function main(), assert failed (method.ok()): "
            + "Loading of method forward failed with status 0x20\n",
            "Loading of method forward failed with status 0x20",
        ),
        (
            "E 00:00:00.000500 executorch:executor_runner.cpp:504] Failed to parse model file /data/local/tmp/1.pte\n",
            "Failed to parse model file",
        ),
        ("ERROR: unknown command line flag 'cpu_threads'\n", "^unknown command line flag 'cpu_threads'$"),
        ("", "it logged no times; build it .* -DEXECUTORCH_ENABLE_LOGGING=ON"),
        (BEGIN.replace("E 00", "I 00") + RUNS, "it logged no times"),  # killed before the end
        (
            BEGIN
            + RUNS
            + END
            + "I 00:00:01 executorch:executor_runner.cpp:260] ETDump written to file 'model.etdump'.",
            "it traces each operator.*-DEXECUTORCH_ENABLE_EVENT_TRACER=OFF",
        ),
    ],
)
def test_no_times(tool, output, message):
    with pytest.raises(DeviceError, match=message):
        tool.parse(output)


def test_device_with_a_program(tmp_path):
    runner = tmp_path / "runner"
    runner.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.stderr.write({BEGIN!r})\n"
        "count = [a for a in sys.argv if a.startswith('--num_executions=')][0].partition('=')[2]\n"
        "if 'good' not in sys.argv[1]:\n"
        "    sys.exit('E 00:00:00.000500 executorch:executor_runner.cpp:504] Failed to parse model file')\n"
        "at = 'I 00:00:00.000001 executorch:executor_runner.cpp:1] '\n"
        "for i in range(int(count)):\n"
        "    print(f'{at}Iteration {i + 1} of {count}: 2.5 ms')\n"
        "print(f'{at}Model executed successfully {count} time(s) in {int(count) * 2.5:f} ms.')\n"
    )
    runner.chmod(0o755)
    (tmp_path / "board.yaml").write_text(f"transport: host\ntool: executor_runner\nprogram: {runner}\n")
    for name in ("good", "bad"):
        (tmp_path / f"{name}.pte").write_bytes(b"ET12")
    with load_device(tmp_path / "board.yaml") as device:
        assert device.accepts == "executorch"
        assert len(device.versions()["executorch"]) == 12
        times = device.run(tmp_path / "good.pte", QUICK)
        assert times.latency_ms == 2.5
        assert len(times.times_ms) >= QUICK.repeats
        with pytest.raises(DeviceError, match=r"device 'board': executorch: Failed to parse model file"):
            device.run(tmp_path / "bad.pte", QUICK)
