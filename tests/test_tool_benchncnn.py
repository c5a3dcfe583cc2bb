"""benchncnn's command line, and its tables, read exactly or refused."""

import os
import shutil
from dataclasses import replace

import pytest

from hwnas.devices import load_device
from hwnas.devices.base import DeviceGoneError, Timing
from hwnas.devices.tool_device import ToolDevice
from hwnas.devices.tools.benchncnn import Program, Row, rows
from hwnas.devices.transports.host import Host
from hwnas.errors import DeviceError, InputError
from hwnas.testing import QUICK, DeviceContract
from tests.samples import sample

HEAD = "loop_count = 10\nnum_threads = 1\npowersave = 0\ngpu_device = -1\ncooling_down = 0\n"
ROW = "        /tmp/x/3.param  min =    4.90  max =    5.31  avg =    5.00\n"
GPU = (
    "[0 Adreno (TM) 740]  queueC=0[3]  queueT=0[3]\n[0 Adreno (TM) 740]  fp16-p/s/u/a=1/1/1/{}  int8-p/s/u/a=1/1/1/1\n"
)


# -------------------------------------------------------------------- what it prints


def test_table_of_a_raspberry_pi():
    table = rows(sample("benchncnn_rpi4.txt"))
    assert len(table) == 35
    assert table[0] == Row("squeezenet", 46.28, 46.91, 46.65)
    assert table[5] == Row("mobilenet_v3", 47.08, 48.40, 47.53)
    assert table[-2] == Row("vision_transformer", 1872.31, 1964.95, 1909.21)
    assert table[-1] == Row("FastestDet", 38.39, 39.17, 38.69)
    assert sum(row.avg_ms for row in table) == pytest.approx(5776.82)


def test_table_of_a_jetson():
    table = rows(sample("benchncnn_orin_nano.txt"))
    assert len(table) == 36
    assert table[0] == Row("squeezenet", 5.31, 5.95, 5.44)
    assert table[31] == Row("yolo-fastest-1.1", 8.72, 9.18, 8.96)
    assert table[-1] == Row("squeezenet", 5.05, 5.23, 5.09)  # of a second run, with one thread


@pytest.mark.parametrize(("name", "gpu", "count"), [("rpi4", -1, 35), ("orin_nano", 0, 36)])
def test_a_table_of_many_models_is_not_ours(name, gpu, count):
    with pytest.raises(DeviceError, match=f"timed {count} models of its own: ncnn 20230816 or later"):
        Program("fp32" if gpu < 0 else "fp16", gpu=gpu).parse(sample(f"benchncnn_{name}.txt"))


def test_one_model():
    times = Program("fp32").parse(HEAD + ROW)
    assert times.latency_ms == 5.0
    assert times.relative_iqr == pytest.approx((5.31 - 4.90 + 0.01) / 5.0)
    assert times.facts == {"runs": 10}
    assert Program("fp16", gpu=0).parse(GPU.format(1) + HEAD + ROW).latency_ms == 5.0
    assert Program("fp32", gpu=0).parse(GPU.format(0) + HEAD + ROW).latency_ms == 5.0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "it printed no times"),
        (HEAD, "it printed no times"),
        ("input tensor shape empty!\n", "input tensor shape empty"),
        ("fopen /x.param failed\n" + HEAD + ROW.replace("5.00", "0.00"), r"fopen /x\.param failed"),
        (HEAD + "layer Swish not exists or registered\n" + ROW, "layer Swish not exists or registered"),
        (HEAD + ROW.replace("5.00", "0.00"), r"0\.00 ms: the network did not run"),
        (HEAD + ROW + ROW, "timed 2 models of its own"),
        ("sh: /data/local/tmp/benchncnn: not found\n", "benchncnn: not found"),
        ("sh: 3: exec: /tmp/benchncnn: Permission denied\n", "Permission denied"),
    ],
)
def test_failures(output, message):
    with pytest.raises(DeviceError, match=message):
        Program("fp32").parse(output)


@pytest.mark.parametrize(
    ("precision", "output", "message"),
    [
        ("fp16", HEAD + ROW, r"no GPU 0, or benchncnn was built without -DNCNN_VULKAN=ON"),
        ("fp16", "no vulkan device\n", "no GPU 0"),
        ("fp16", GPU.replace("[0", "[1").format(1) + HEAD + ROW, "no GPU 0"),
        ("fp16", GPU.format(0) + HEAD + ROW, "GPU 0 has no fp16 with benchncnn: set precision: fp32"),
        ("fp32", GPU.format(1) + HEAD + ROW, "GPU 0 computes in fp16 with benchncnn: set precision: fp16"),
        ("fp16", GPU.replace("Adreno (TM) 740", "llvmpipe (LLVM 15)").format(1) + ROW, "llvmpipe .*, a processor"),
    ],
)
def test_a_gpu_that_is_not_used(precision, output, message):
    with pytest.raises(DeviceError, match=message):
        Program(precision, gpu=0).parse(output)


def test_precision_of_the_processor():
    with_fp16, without = "0123456789abcdef  /x/benchncnn\nasimdhp\n", "0123456789abcdef  /x/asimdhp/benchncnn\n"
    assert Program("fp16").parse_version(with_fp16) == {"ncnn": "0123456789ab"}
    assert Program("fp32").parse_version(without) == {"ncnn": "0123456789ab"}
    assert Program("int8").parse_version(with_fp16) == Program("int8").parse_version(without)
    with pytest.raises(DeviceError, match="processor computes in fp16 with benchncnn: set precision: fp16"):
        Program("fp32").parse_version(with_fp16)
    with pytest.raises(DeviceError, match="processor has no fp16 with benchncnn: set precision: fp32"):
        Program("fp16").parse_version(without)


# -------------------------------------------------------------------- how it is asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "0"}, "gpu='0': must be the number of a GPU, or -1"),
        ({"gpu": True}, "gpu=True: must be the number of a GPU"),
        ({"powersave": 3}, "powersave=3: must be 0, 1 or 2"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        Program("fp32", **options)
    with pytest.raises(ValueError, match="precision int8: is for the processor"):
        Program("int8", gpu=0)


# What it does with its arguments is that of benchmark/benchncnn.cpp: it needs a shape, and tells failures nowhere else.
FAKE = """#!/bin/sh
[ $# = 7 ] && [ "$7" != shape= ] || { echo "input tensor shape empty!" >&2; exit 255; }
printf 'loop_count = %s\\nnum_threads = %s\\npowersave = %s\\ngpu_device = %s\\n' "$1" "$2" "$3" "$4" >&2
printf '%s\\n' "$@" >"$0.asked"
printf '%20s  min = %7.2f  max = %7.2f  avg = %7.2f\\n' "${6#param=}" 1 1.2 1.1 >&2
"""


@pytest.fixture
def fake(tmp_path):
    program = tmp_path / "a folder" / "bench'ncnn"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(0o755)
    with ToolDevice("board", Host(), Program("fp32", powersave=2), program=str(program)) as device:
        yield device, program


def test_asks_for_the_network_in_the_file(fake, tmp_path):
    device, program = fake
    path = DeviceContract.write(device, program.parent)
    times = device.run(path, Timing(threads=4, min_duration_s=0.05))
    assert times.latency_ms == 1.1
    asked = program.with_name("bench'ncnn.asked").read_text().splitlines()
    assert asked == ["50", "4", "2", "-1", "0", f"param={path}", "shape=[28,28,1]"]
    device.run(path, replace(QUICK, repeats=7))
    assert program.with_name("bench'ncnn.asked").read_text().startswith("7\n")


def test_a_network_without_a_shape(fake, tmp_path):
    device, _ = fake
    (tmp_path / "m.param").write_text("7767517\n1 1\nInput image 0 1 image\n")
    with pytest.raises(DeviceError, match="device 'board': ncnn: input tensor shape empty"):
        device.run(tmp_path / "m.param", QUICK)


def test_version_is_the_programs_hash(fake):
    device, program = fake
    before = device.versions()
    assert len(before["ncnn"]) == 12
    program.write_text(FAKE + "# newer")
    assert device.versions() != before
    program.unlink()
    with pytest.raises(DeviceGoneError, match=r"No such file.*build it from github.com/Tencent/ncnn"):
        device.versions()


def test_device_file(tmp_path):
    (tmp_path / "phone.yaml").write_text("transport: host\ntool: benchncnn\nprecision: fp16\noptions: {gpu: 0}\n")
    phone = load_device("phone", tmp_path)
    assert (phone.runtime, phone.accepts, phone.precision, phone.file_precision) == ("ncnn", "ncnn", "fp16", "fp32")
    (tmp_path / "phone.yaml").write_text("transport: host\ntool: benchncnn\nprecision: bf16\n")
    with pytest.raises(InputError, match="precision 'bf16': benchncnn knows fp32, fp16, int8"):
        load_device("phone", tmp_path)


# -------------------------------------------------------------------- the real one


@pytest.mark.skipif(
    not (os.environ.get("HWNAS_TEST_BENCHNCNN") or shutil.which("benchncnn")),
    reason="no benchncnn: set $HWNAS_TEST_BENCHNCNN to the program",
)
class TestBenchncnn(DeviceContract):
    @pytest.fixture(params=["fp32", "int8"])
    def device(self, request):
        program = os.environ.get("HWNAS_TEST_BENCHNCNN") or shutil.which("benchncnn")
        with ToolDevice("bench", Host(), Program(request.param), program=program) as device:
            yield device
