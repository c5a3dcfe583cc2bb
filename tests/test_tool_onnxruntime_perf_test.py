"""onnxruntime_perf_test's command line and output."""

import stat
import sys

import pytest

from hwnas.devices.base import Timing
from hwnas.devices.tool_device import ToolDevice
from hwnas.devices.tools.onnxruntime_perf_test import Program
from hwnas.devices.transports.host import Host
from hwnas.errors import DeviceError
from hwnas.testing import QUICK, DeviceContract
from tests.samples import sample

OUTPUT = """\
Session creation time cost: 0.01 s
First inference time cost: 2 ms
Total inference requests: 100
Average inference time cost: 2.5 ms
Min Latency: 0.0019 s
Max Latency: 0.009 s
P50 Latency: 0.002 s
P90 Latency: 0.0022 s
P95 Latency: 0.0025 s
P999 Latency: 0.009 s
"""


def test_median_in_milliseconds():
    times = Program("fp32").parse(OUTPUT)
    assert times.times_ms == (pytest.approx(2.0),)
    # 1.0526 = 2 * 0.6745 / 1.2816, the quantiles of a normal distribution
    assert times.relative_iqr == pytest.approx(1.0526 * 0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "median", "p90"),
    [
        ("onnxruntime_perf_test_arm.txt", 99.5086, 101.519),
        ("onnxruntime_perf_test_cobalt100.txt", 1.85674, 1.87215),
    ],
)
def test_recorded_output(name, median, p90):
    times = Program("fp32").parse(sample(name))
    assert times.times_ms == (pytest.approx(median, rel=1e-9),)
    assert times.relative_iqr == pytest.approx(1.0526 * (p90 - median) / median, rel=1e-3)


@pytest.mark.parametrize("wording", ["Average inference time cost", "Average inference time cost total"])
def test_without_percentiles(wording):
    times = Program("fp32").parse(f"{wording}: 98.961997 ms\n")
    assert (times.times_ms, times.spread) == ((98.961997,), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "printed no times"),
        (
            "Setting\nLoad model from m.onnx failed:Protobuf parsing failed.\nbye",
            "^Load model from m.onnx failed:Proto",
        ),
        ("P50 Latency: 0.002 s", "printed no times"),  # it ended early
        ("Average inference time cost: -nan(ind) ms", "times that are not numbers"),
        ("Average inference time cost: nan ms", "printed no times"),
    ],
)
def test_failures(text, message):
    with pytest.raises(DeviceError, match=message):
        Program("fp32").parse(text)


def test_command_line():
    timing = Timing(min_duration_s=1.2, threads=4)
    assert list(Program("int8").command("p", "/f/1.onnx", timing, "/f")) == [
        *("p", "-I", "-S", "0", "-e", "cpu", "-o", "99", "-m", "duration", "-t", "2"),
        *("-x", "4", "-y", "1", "-Z", "-s", "/f/1.onnx"),
    ]
    with pytest.raises(ValueError, match="provider: Program has no such options"):
        Program("fp32", provider="cuda")


STAND_IN = f"""\
#!{sys.executable} -S
import sys
from pathlib import Path
data = Path(sys.argv[-1]).read_bytes()
if data == b"no network":
    print("Load model failed:Protobuf parsing failed.", file=sys.stderr)
    sys.exit(255)
print(f"Average inference time cost total: {{len(data) / 1e6}} ms")
"""


class TestStandIn(DeviceContract):
    @pytest.fixture
    def device(self, tmp_path_factory):
        program = tmp_path_factory.mktemp("program") / "onnxruntime_perf_test"
        program.write_text(STAND_IN)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        with ToolDevice("board", Host(), Program("fp32"), program=str(program)) as device:
            yield device

    def test_runs_as_often_as_asked(self, device, network):
        assert len(device.run(network, QUICK).times_ms) == 1  # the program tells no single times


def test_reason_of_a_failure(tmp_path):
    program, bad = tmp_path / "program", tmp_path / "bad.onnx"
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    bad.write_bytes(b"no network")
    failed = pytest.raises(DeviceError, match="device 'board': onnxruntime: Load model failed:Protobuf parsing failed")
    with ToolDevice("board", Host(), Program("fp32"), program=str(program)) as device, failed:
        device.run(bad, QUICK)
