"""LiteRT's benchmark_model: its flags, and what it printed on phones and boards."""

import math
import stat

import numpy as np
import pytest

from hwnas.devices import load_device
from hwnas.devices.base import Timing
from hwnas.devices.tools.benchmark_model import Program
from hwnas.errors import DeviceError
from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import lower
from hwnas.testing import QUICK, tiny_space
from tests.samples import sample

PLAIN = """\
INFO: STARTING!
INFO: Graph: [/data/local/tmp/1.tflite]
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the delegate.
INFO: Running benchmark for at least 2 iterations and at least 0.02 seconds but terminate if exceeding 120 seconds.
INFO: count=9 first=9000 curr=2000 min=2000 max=9000 avg=3000 std=700 p5=2000 median=2100 p95=9000

INFO: Running benchmark for at least 3 iterations and at least 0.01 seconds but terminate if exceeding 120 seconds.
INFO: count=30 first=1010 curr=990 min=980 max=1400 avg=1005 std=20 p5=985 median=1000 p95=1040

INFO: Inference timings in us: Init: 812, First inference: 9000, Warmup (avg): 3000, Inference (avg): 1005
INFO: Overall peak memory footprint (MB) via periodic monitoring: 12.5
"""
ON_GPU = PLAIN.replace("XNNPACK", "GPU")
V2 = """\
INFO: count=2 first=9000 curr=2000 min=2000 max=9000 avg=5500 std=3500 p5=2000 median=9000 p95=9000
INFO: count=30 first=121 curr=123 min=120 max=140 avg=124.5 std=4 p5=120 median=123 p95=131
INFO: [benchmark_litert_model.h:88]
========== BENCHMARK RESULTS ==========
INFO: [benchmark_litert_model.h:100] Inference (avg):      0.12 ms (30 runs)
INFO: [benchmark_litert_model.h:108] Inference (std):      0.00
"""


def parse(text, precision="fp32", **options):
    return Program(precision, **options).parse(text)


@pytest.mark.parametrize(
    ("name", "latency_ms", "runs", "deviation"),
    [
        ("litert_benchmark_model_logcat_percentiles", 141.253, 25, 13.583),
        ("litert_benchmark_model_tf2.4_mi11", 249.684, 50, 1.442),
        ("litert_benchmark_model_tflite2.1_pixel4", 137.144, 50, 0.264),
        ("litert_benchmark_model_tflite2.8", 2950.34, 50, 109.798),
        ("litert_v2_benchmark_model", 7430.20, 10, 9.92),
    ],
)
def test_recorded_output(name, latency_ms, runs, deviation):
    times = parse(sample(f"{name}.txt"))
    assert times.times_ms == (latency_ms,)
    assert times.latency_ms == latency_ms
    assert times.facts == {"runs": runs}
    assert times.relative_iqr == pytest.approx(1.349 * deviation / latency_ms)


def test_recorded_failure():
    recorded = sample("litert_benchmark_model_failure_nnapi.txt")
    with pytest.raises(DeviceError, match="ANEURALNETWORKS_OP_FAILED at line 3779"):
        parse(recorded)


# -------------------------------------------------------------------- numbers


def test_the_run_is_read_and_not_the_warm_up():
    times = parse(PLAIN)
    assert times.times_ms == (1.0,)  # the median, not the mean
    assert times.spread == pytest.approx(1.349 * 20 / 1000)


def test_without_deviation_the_percentiles_tell_the_spread():
    times = parse(PLAIN.replace(" std=20", ""))
    assert times.spread == pytest.approx(1.349 * (1040 - 985) / 3.29 / 1000)


def test_spread_is_that_of_the_runs():
    """It stands for the inter-quartile range where times scatter normally."""
    runs = np.random.default_rng(0).normal(1000, 20, size=100_000)
    low, middle, high = np.quantile(runs, (0.25, 0.5, 0.75))
    text = PLAIN.replace("std=20", f"std={runs.std()}").replace("median=1000", f"median={middle}")
    assert parse(text).spread == pytest.approx((high - low) / middle, rel=0.02)
    low, high = np.quantile(runs, (0.05, 0.95))
    percentiles = PLAIN.replace(" std=20", "").replace("p5=985", f"p5={low}").replace("p95=1040", f"p95={high}")
    assert parse(percentiles).spread == pytest.approx(parse(text).spread, rel=0.02)


@pytest.mark.parametrize("prefix", ["", "I tflite  : ", "11-22 07:50:00.123  4711  4712 I tflite  : "])
def test_prefixes_and_other_lines_between(prefix):
    noise = ["VERBOSE: Replacing 87 out of 87 node(s) with delegate (TfLiteXNNPackDelegate) node", "WARN: hot", ""]
    lines = [noise[i % 3] + "\n" + prefix + line for i, line in enumerate(PLAIN.splitlines())]
    assert parse("\r\n".join(lines)) == parse(PLAIN)


def test_profile_is_not_the_run():
    profile = (
        "Timings (microseconds): count=30 first=7 curr=7 min=7 max=7 avg=7 std=0\nMemory (bytes): count=0\n4 nodes\n"
    )
    assert parse(PLAIN + profile) == parse(PLAIN)
    assert parse(profile + PLAIN) == parse(PLAIN)
    without_end = "\n".join(line for line in PLAIN.splitlines() if "timings in us" not in line)
    assert parse(without_end + "\n" + profile) == parse(PLAIN)


def test_one_run_of_seconds():
    text = "count=1 curr=3512391\ncount=1 curr=2.95034e+06\nInference timings in us: Init: 17187"
    times = parse(text)
    assert times.times_ms == (2950.34,)
    assert times.spread is None


def test_v2_prints_microseconds_before_its_milliseconds():
    assert parse(V2, v2=True).times_ms == (0.123,)
    rounded = "\n".join(line for line in V2.splitlines() if "count=" not in line)
    times = parse(rounded.replace("0.00", "0.01"), v2=True)
    assert times.times_ms == (0.12,)
    assert times.spread == pytest.approx(1.349 * 0.01 / 0.12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "STARTING!\nLoaded model m.tflite\n",
        "count=9 first=9 curr=2 min=2 max=9 avg=3 std=1\n",  # the warm-up, and then it was ended
        "Inference timings in us: Init: 812, First inference: 9000, Warmup (avg): 3000, Inference (avg): 1005\n",
        "count=0\ncount=0\nInference timings in us: Init: 812",
        "count=2 avg=1 std=0\ncount=2 avg=nan std=nan\nInference timings in us: Init: 812",
        "count=2 avg=1 std=0\ncount=2 avg=1..5 std=0\nInference timings in us: Init: 812",
        "INFO: [benchmark_litert_model.h:100] Inference (avg):      0.00 ms (0 runs)\n",
    ],
)
def test_no_times(text):
    with pytest.raises(DeviceError, match="it printed"):
        parse(text)


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "line",
    [
        "ERROR: Benchmarking failed.",
        "ERROR: Failed to apply GPU delegate.",
        "ERROR: Node number 248 (TfLiteNnapiDelegate) failed to prepare.",
        "ERROR: Node number 68 (TfLiteGpuDelegate) failed to invoke.",
        "ERROR: Restored original execution plan after delegate application failure.",
        "ERROR: Disallowed CPU fallback detected.",
        "E tflite  : Failed to apply XNNPACK delegate.",
        "INFO: Though XNNPACK delegate is explicitly applied, the model graph will not be executed by the delegate.",
        "WARN: GPU acceleration is unsupported on this platform.",
        "WARN: Unconsumed cmdline flags: --xnnpack_force_fp16=true",
        "ERROR: [litert/tools/benchmark_litert_model.h:254] Run failed: out of memory",
    ],
)
def test_failures_are_never_numbers(line):
    first, _, rest = PLAIN.partition("\n")
    with pytest.raises(DeviceError) as caught:
        parse(f"{first}\n{line}\n{rest}")
    assert str(caught.value) == line
    with pytest.raises(DeviceError):
        parse(PLAIN + line)  # stderr comes last


@pytest.mark.parametrize(
    "line",
    [
        "First 0 operations will run on the GPU, and the remaining 81 on the CPU.",
        "123 operations will run on the GPU, and the remaining 156 operations will run on the CPU.",
        "No operations will run on the GPU, and all 12 operations will run on the CPU.",
        "INFO: Explicitly applied GPU delegate, and the model graph will be partially executed by the delegate w/ 2",
    ],
)
def test_part_of_a_network_on_the_gpu(line):
    for options in ({}, {"v2": True}):
        with pytest.raises(DeviceError) as caught:
            parse(f"{ON_GPU}{line}\n", gpu=True, **options)
        assert str(caught.value) == line


def test_the_reason_is_told_before_its_consequences():
    text = f"{PLAIN}ERROR: Following operations are not supported by GPU delegate:\nMEAN: no\nBenchmarking failed.\n"
    with pytest.raises(DeviceError, match=r"^ERROR: Following operations are not supported"):
        parse(text, gpu=True)


def test_fp16_and_the_gpu_take_all_of_the_network():
    partly = PLAIN.replace("completely executed by the delegate.", "partially executed by the delegate w/ 3 kernels.")
    assert parse(partly, "int8").times_ms == (1.0,)  # the rest runs on the processor, too
    with pytest.raises(DeviceError, match="partially executed"):
        parse(partly, "fp16")
    silent = "\n".join(line for line in PLAIN.splitlines() if "applied" not in line)
    assert parse(silent).times_ms == (1.0,)
    for options in ({"precision": "fp16"}, {"gpu": True}):
        with pytest.raises(DeviceError, match="get a newer benchmark_model"):
            parse(silent, **options)
    assert parse(PLAIN, "fp16").times_ms == parse(ON_GPU, gpu=True).times_ms == (1.0,)


def test_opengl_is_the_gpu_too():
    said = "ERROR: Can not open OpenCL library on this device - dlopen failed\nERROR: Falling back to OpenGL\n"
    assert parse(said + ON_GPU, "fp16", gpu=True).times_ms == (1.0,)


# -------------------------------------------------------------------- flags

TIMING = Timing(warmup_s=0.5, warmup_runs=4, repeats=7, min_duration_s=0.25, threads=2, timeout_s=60)


@pytest.mark.parametrize(
    ("precision", "options", "flags"),
    [
        ("fp32", {}, ["--use_xnnpack=true"]),
        ("int8", {}, ["--use_xnnpack=true"]),
        ("fp16", {}, ["--use_xnnpack=true", "--xnnpack_force_fp16=true", "--require_full_delegation=true"]),
        ("fp32", {"gpu": True}, ["--use_gpu=true", "--gpu_precision_loss_allowed=false"]),
        ("fp16", {"gpu": True}, ["--use_gpu=true", "--gpu_precision_loss_allowed=true"]),
        ("fp32", {"v2": True}, []),
        ("fp32", {"v2": True, "gpu": True}, ["--use_gpu=true", "--use_cpu=false", "--gpu-precision=fp32"]),
        ("fp16", {"v2": True, "gpu": True}, ["--use_gpu=true", "--use_cpu=false", "--gpu-precision=fp16"]),
    ],
)
def test_flags(precision, options, flags):
    command = Program(precision, **options).command("/p/benchmark_model", "/n/1.tflite", TIMING, "/f")
    assert command[:8] == [
        "/p/benchmark_model",
        "--graph=/n/1.tflite",
        "--num_threads=2",
        "--warmup_runs=4",
        "--warmup_min_secs=0.5",
        "--num_runs=7",
        "--min_secs=0.25",
        "--max_secs=60",
    ]
    if options.get("gpu"):
        flags = [*flags, "--require_full_delegation=true"]
    assert command[8:] == flags


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int8", {"gpu": True}, "int8 with gpu: GPUs compute int8 files in floating point"),
        ("fp16", {"v2": True}, "fp16 with v2: that program has it only on the GPU"),
        ("fp32", {"gpu": "yes"}, "gpu='yes': must be true or false"),
        ("fp32", {"nnapi": True}, "nnapi: Program has no such options"),
    ],
)
def test_options_that_make_no_sense(precision, options, message):
    with pytest.raises(ValueError, match=message):
        Program(precision, **options)


# -------------------------------------------------------------------- on this host


@pytest.fixture
def network(tmp_path):
    layers = lower(tiny_space(), tiny_space().smallest())
    tensors = random_tensors(layers, np.random.default_rng(0))
    return exporter("tflite").write(layers, tensors, tmp_path / "a network.tflite").path


def device(folder, text, status=0):
    """A program that prints `text`, and what it was called with."""
    program = folder / "benchmark_model"
    (folder / "text").write_text(text)
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{folder}/called\ncat {folder}/text\nexit {status}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "phone.yaml").write_text(f"transport: host\ntool: benchmark_model\nprogram: {program}\n")
    return load_device("phone", folder)


def test_a_round(tmp_path, network):
    with device(tmp_path, PLAIN) as phone:
        assert (phone.runtime, phone.accepts, phone.file_precision) == ("litert", "tflite", "fp32")
        versions = phone.versions()
        assert len(versions["litert"]) == 12
        times = phone.run(network, QUICK)
        assert math.isclose(times.latency_ms, 1.0)
        assert times.facts["runs"] == 30
        assert f"--graph={network}" in (tmp_path / "called").read_text().splitlines()
        assert all(check.passed for check in phone.check())


def test_a_round_that_fails(tmp_path, network):
    with (
        device(tmp_path, PLAIN + "ERROR: Benchmarking failed.\n", 1) as phone,
        pytest.raises(DeviceError, match="device 'phone': litert: ERROR: Benchmarking failed"),
    ):
        phone.run(network, QUICK)
    with device(tmp_path, PLAIN, 139) as phone, pytest.raises(DeviceError, match="ended with status 139"):
        phone.run(network, QUICK)
