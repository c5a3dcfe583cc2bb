"""trtexec's command line and output, with a stand-in for the program; and TensorRT's parser on our files."""

import stat
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hwnas.devices.base import DeviceGoneError, Timing
from hwnas.devices.runtimes import tensorrt as tensorrt_file
from hwnas.devices.tool_device import ToolDevice
from hwnas.devices.tools import trtexec
from hwnas.devices.tools.base import spread_of_percentile
from hwnas.devices.tools.trtexec import Program
from hwnas.devices.transports.host import Host
from hwnas.devices.worker_device import WorkerDevice
from hwnas.errors import DeviceError
from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import lower
from hwnas.space import SearchSpace
from hwnas.testing import QUICK, DeviceContract, tiny_space
from tests.samples import sample

SUMMARY = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v101302] [b5] # trtexec --loadEngine=/tmp/built0
[01/02/2026-10:00:40] [I] Latency: min = 1.1 ms, max = 3 ms, mean = 2.2 ms, median = 2.1 ms, percentile(75%) = 2.15 ms
[01/02/2026-10:00:40] [I] GPU Compute Time: min = 1 ms, mean = 2.1 ms, median = 2 ms, percentile(75%) = 2.05 ms
[01/02/2026-10:00:40] [I] Total GPU Compute Time: 3.00524 s
&&&& PASSED TensorRT.trtexec [TensorRT v101302] [b5] # trtexec --loadEngine=/tmp/built0
"""


# -------------------------------------------------------------------- what it prints


def test_median_of_gpu_compute_time():
    times = Program("fp32").parse(SUMMARY)
    assert (times.times_ms, times.preempted) == ((2.0,), (False,))
    assert times.relative_iqr == pytest.approx(0.05)  # twice from the median to the third quartile
    assert times.facts == {"tensorrt": "10.13.2"}


@pytest.mark.parametrize(
    ("name", "median", "version", "p99"),
    [
        ("trtexec_v8.4_xavier.txt", 0.388443, "8.4.0", 0.393188),
        ("trtexec_v8.4.3_unstable.txt", 5.46616, "8.4.3", 5.64722),
        ("trtexec_v10.3.txt", 0.348389, "10.3.0", 0.385986),
    ],
)
def test_recorded_output(name, median, version, p99):
    times = Program("fp32").parse(sample(name))
    assert times.times_ms == (median,)
    assert times.facts["tensorrt"] == version
    # 0.5799 = 2 * 0.6745 / 2.3263, the quantiles of a normal distribution
    assert times.relative_iqr == pytest.approx(0.5799 * (p99 - median) / median, rel=1e-3)
    assert times.facts.get("coefficient_of_variance") == (0.145636 if "unstable" in name else None)


def test_recorded_output_that_is_cut():
    with pytest.raises(DeviceError, match=r"did not end with PASSED: .*Latency: min = 4\.27838"):
        Program("fp32").parse(sample("trtexec_v8.6_percentiles.txt"))


def test_without_percentiles():
    text = SUMMARY.replace(", percentile(75%) = 2.05 ms", "").replace("median = 2 ms", "half = 2 ms")
    assert Program("fp32").parse(text).times_ms == (2.1,)
    assert Program("fp32").parse(text).spread is None
    unstable = "[W] * GPU compute time is unstable, with coefficient of variance = 10%.\n"
    assert Program("fp32").parse(unstable + text).relative_iqr == pytest.approx(0.1349)


def test_pasted_logs():
    assert Program("fp32").parse("".join(f"# {line}\n" for line in SUMMARY.splitlines())).times_ms == (2.0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "did not end with PASSED: it printed nothing"),
        ("trtexec: libnvinfer.so.10: cannot open shared object file", "PASSED: .*libnvinfer.so.10: cannot open"),
        (SUMMARY.replace("PASSED", "FAILED"), "did not end with PASSED"),
        ("[07/01/2026-10:00:00] [E] [TRT] 3: first\n[E] second\n" + SUMMARY, r"^\[TRT\] 3: first$"),
        (SUMMARY.replace("GPU Compute Time: min", "GPU Time: min"), "no GPU Compute Time"),
        (SUMMARY.replace("median = 2 ms", "median = nan ms"), "GPU Compute Time of nan ms"),
        (SUMMARY.replace("median = 2 ms", "median = - ms"), "cannot be read: min = 1 ms"),
        (f"[W] {trtexec._IGNORED}. The inference\n" + SUMMARY, "cannot run as a CUDA graph"),
    ],
)
def test_failures(text, message):
    with pytest.raises(DeviceError, match=message):
        Program("fp32").parse(text)


def test_spread_of_normal_times():
    times = np.random.default_rng(0).normal(10, 0.5, 200_000)
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    for share in (0.75, 0.9, 0.99):
        estimate = spread_of_percentile(median, share, np.quantile(times, share))
        assert estimate == pytest.approx((high - low) / median, rel=0.02)


def test_versions():
    banner = "&&&& RUNNING TensorRT.trtexec [TensorRT v{}] # trtexec --help\n=== Model Options ==="
    for digits, version in [("8503", "8.5.3"), ("8601", "8.6.1"), ("100300", "10.3.0"), ("11.1.0.106", "11.1.0.106")]:
        program = Program("fp32", version=int(version.partition(".")[0]))
        assert program.parse_version(banner.format(digits)) == {"tensorrt": version}
    with pytest.raises(DeviceError, match=r"it is of TensorRT 8\.5\.3: set `options: \{version: 8\}`"):
        Program("fp32").parse_version(banner.format(8503))
    with pytest.raises(DeviceError, match="does not say its version"):
        Program("fp32").parse_version("hello")


# -------------------------------------------------------------------- its command line


def test_command_line():
    timing = Timing(warmup_s=0.5, min_duration_s=2, repeats=7)
    assert Program("fp16").build_command("t", "/f/1.onnx", "/f/built0", "/f") == [
        *("t", "--onnx=/f/1.onnx", "--saveEngine=/f/built0", "--timingCacheFile=/f/timing.cache"),
        *("--noTF32", "--fp16", "--warmUp=0", "--duration=0", "--iterations=1"),
    ]
    assert Program("fp32").command("t", "/f/built0", timing, "/f") == [
        *("t", "--loadEngine=/f/built0", "--warmUp=500", "--duration=2", "--iterations=7", "--percentile=75"),
        *("--useCudaGraph", "--useSpinWait", "--noDataTransfers"),
    ]
    assert {"--int8", "--fp16"} <= set(Program("int8", version=8).build_command("t", "n", "b", "f"))
    newest = Program("int8", version=11)
    asked = {*newest.build_command("t", "n", "b", "f"), *newest.command("t", "b", timing, "f")}
    assert asked.isdisjoint({"--int8", "--fp16", "--useCudaGraph", "--useSpinWait", "--noDataTransfers"})


def test_options():
    with pytest.raises(ValueError, match="version=7: must be one of 8, 9, 10, 11"):
        Program("fp32", version=7)
    with pytest.raises(ValueError, match="precision fp16: TensorRT 11 runs networks in the types of the file"):
        Program("fp16", version=11)
    with pytest.raises(ValueError, match="streams: Program has no such options"):
        Program("fp32", streams=2)


# -------------------------------------------------------------------- a stand-in for it

STAND_IN = f"""\
#!{sys.executable} -S
import sys
from pathlib import Path
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
with open(Path(__file__).parent / "calls", "a") as calls:
    calls.write(" ".join(options) + "\\n")
name = "TensorRT.trtexec [TensorRT v100300] # trtexec"
print(f"&&&& RUNNING {{name}}")
if "help" in options:
    sys.exit()
try:
    data = Path(options["onnx"] if "onnx" in options else options["loadEngine"]).read_bytes()
    if data == b"no network":
        raise ValueError("failed to parse onnx file")
except (OSError, ValueError) as error:
    print(f"[07/01/2026-10:00:00] [E] {{error}}")
    print(f"&&&& FAILED {{name}}")
    sys.exit(1)
if "onnx" in options:
    Path(options["saveEngine"]).write_bytes(b"engine" * len(data))
ms = len(data) / 1e6
print(f"[07/01/2026-10:00:00] [I] GPU Compute Time: mean = {{ms}} ms, median = {{ms}} ms, percentile(75%) = {{ms}} ms")
print(f"&&&& PASSED {{name}}")
"""


@pytest.fixture
def stand_in(tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    program = folder / "trtexec"
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def calls(program):
    file = program.parent / "calls"
    return [set(line.split()) for line in file.read_text().splitlines()] if file.exists() else []


class TestStandIn(DeviceContract):
    @pytest.fixture
    def device(self, stand_in):
        with ToolDevice("jetson", Host(), Program("fp16"), program=str(stand_in)) as device:
            yield device

    def test_runs_as_often_as_asked(self, device, network):
        assert len(device.run(network, QUICK).times_ms) == 1  # the program tells no single times


def test_builds_once_a_network(stand_in, tmp_path):
    with ToolDevice("jetson", Host(), Program("fp32"), program=str(stand_in)) as device:
        one = DeviceContract.write(device, tmp_path)
        two = DeviceContract.write(device, tmp_path, largest=True)
        for path in (one, two, one, two):
            device.run(path, QUICK)
        built = ["onnx" in call for call in calls(stand_in)]
        assert built == [True, False, True, False, False, False]
        one.write_bytes(two.read_bytes())  # another network in the same file
        assert device.run(one, QUICK).latency_ms == device.run(two, QUICK).latency_ms
        assert sum("onnx" in call for call in calls(stand_in)) == 3
        folder = Path(device._transport.folder)
        assert {file.name for file in folder.iterdir()} == {"built0", "built1", "built2"}
        device.close()
        assert not folder.exists()
        device.run(two, QUICK)
        assert sum("onnx" in call for call in calls(stand_in)) == 4


def test_keeps_few_engines(stand_in, tmp_path):
    with ToolDevice("jetson", Host(), Program("fp32"), program=str(stand_in)) as device:
        for number in range(9):
            path = tmp_path / f"{number}.onnx"
            path.write_bytes(b"x" * (number + 1))
            device.run(path, QUICK)
        files = sorted(file.name for file in Path(device._transport.folder).iterdir())
        assert files == [f"built{number}" for number in range(3, 9)]


def test_failure_of_a_build(stand_in, tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no network")
    with ToolDevice("jetson", Host(), Program("fp32"), program=str(stand_in)) as device:
        for _ in range(2):
            with pytest.raises(DeviceError, match="device 'jetson': tensorrt: failed to parse onnx file"):
                device.run(bad, QUICK)
    assert ["onnx" in call for call in calls(stand_in)] == [True, True]


def test_version_of_the_stand_in(stand_in):
    refused = pytest.raises(DeviceGoneError, match=r"it is of TensorRT 10\.3\.0: set `options: \{version: 10\}`")
    program = Program("fp32", version=8)
    with ToolDevice("jetson", Host(), program, program=str(stand_in)) as device, refused:
        device.versions()


# -------------------------------------------------------------------- TensorRT itself


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13", exc_type=ImportError)


def child(space, which):
    return space.sample(np.random.default_rng(0)) if which == "random" else getattr(space, which)()


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *[("tiny", "smallest"), ("tiny", "largest"), ("tiny", "random"), ("bignas", "smallest"), ("bignas", "random")],
        pytest.param("bignas", "largest", marks=pytest.mark.slow),
        *[("ofa-mbv3", "smallest"), ("ofa-mbv3", "largest"), ("ofa-mbv3", "random"), ("attentivenas", "smallest")],
    ],
)
def test_tensorrt_takes_our_files(rtx, name, which, tmp_path):
    space = SearchSpace.load(name)
    layers = lower(space, child(space, which))
    tensors = random_tensors(layers, np.random.default_rng(0))
    times = b""
    for precision, of_file in (("fp32", "fp32"), ("int8", Program.int8)):
        path = exporter(Program.accepts, of_file).write(layers, tensors, tmp_path / "m.onnx").path
        engine, times = tensorrt_file.build(rtx, path.read_bytes(), precision, times)
        assert len(bytes(engine)) > 1000


def test_tensorrt_refuses_what_onnxruntime_likes(rtx, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    path = (
        exporter("onnx", "int8")
        .write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.onnx")
        .path
    )
    with pytest.raises(RuntimeError, match=r"TensorRT [\d.]+ cannot read the network: .*zero point"):
        tensorrt_file.build(rtx, path.read_bytes(), "int8")


def test_tensorrt_refuses_garbage(rtx):
    with pytest.raises(RuntimeError, match=r"TensorRT [\d.]+ cannot read the network"):
        tensorrt_file.build(rtx, b"no network", "fp32")


def test_tensorrt_without_fp16(rtx, tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    path = exporter("onnx").write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.onnx").path
    with pytest.raises(RuntimeError, match="runs networks in the types of the file"):
        tensorrt_file.build(rtx, path.read_bytes(), "fp16")


def test_tensorrt_without_a_gpu(rtx):
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    missing = pytest.raises(DeviceGoneError, match=r"no CUDA driver|cuInit: CUDA_ERROR")
    with WorkerDevice("rtx", Host(), "tensorrt", options={"rtx": True}) as device, missing:
        device.versions()


@pytest.mark.gpu
class TestOnGpu(DeviceContract):
    @pytest.fixture(params=["fp32", "int8"])
    def device(self, request):
        rtx = find_spec("tensorrt") is None
        if rtx and find_spec("tensorrt_rtx") is None:
            pytest.skip("neither tensorrt nor tensorrt_rtx is installed")
        with WorkerDevice("rtx", Host(), "tensorrt", precision=request.param, options={"rtx": rtx}) as device:
            yield device
