"""What children cost beside time: memory, file size, energy; and the report of a space."""

import json
import os
import re
from pathlib import Path

import click
import numpy as np
import pytest

import hwnas
import hwnas.api
from hwnas.api.costs import energy_predictor, fit_energy
from hwnas.cli import cli, limit_options, main
from hwnas.devices.base import RunTimes, Timing
from hwnas.devices.tool_device import ToolDevice
from hwnas.devices.tools import trtexec
from hwnas.devices.transports import linux
from hwnas.devices.transports.host import Host
from hwnas.errors import DeviceError, InputError
from hwnas.exporters.base import exporter, file_bytes, write_random
from hwnas.files import parts
from hwnas.layers import lower, peak_activation_bytes, total_macs
from hwnas.measurement import Measurement
from hwnas.predictors import make_predictor
from hwnas.run import Run, RunConfig
from hwnas.searching.costs import DeviceCost, LayerCost
from hwnas.searching.limits import EnergyLimit, LatencyLimit, MacsLimit, ParamsLimit
from hwnas.space import SearchSpace
from hwnas.testing import QUICK

PACKAGES = {"executorch": "executorch"}  # that a format needs for writing
SIZES = [
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("onnx", "int8-symmetric"), ("tflite", "fp32"),
    ("tflite", "int8"), ("ncnn", "fp32"), ("ncnn", "fp16"), ("ncnn", "int8"), ("executorch", "fp32"),
    ("executorch", "int8"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "precision"), SIZES)
def test_file_size_is_known_before_the_file_is_written(format, precision, tmp_path):
    if format in PACKAGES:
        pytest.importorskip(PACKAGES[format])
    rng = np.random.default_rng(5)
    for name, children, off in (("bignas", 1, 0.005), ("ofa-mbv3", 1, 0.005), ("tiny", 3, 0.02)):
        space = SearchSpace.load(name)
        for arch in (space.smallest(), *(space.sample(rng) for _ in range(children))):
            path = write_random(exporter(format, precision), space, arch, tmp_path / arch.id, rng)
            size = sum(part.stat().st_size for part in parts(path))
            assert file_bytes(lower(space, arch), format, precision) == pytest.approx(size, rel=off)


def test_size_of_files_that_nobody_measured():
    with pytest.raises(
        InputError, match="size of onnx files in fp13 is not known beforehand, only that of executorch fp32"
    ):
        file_bytes([], "onnx", "fp13")


# -------------------------------------------------------------------- one child


def test_a_child_tells_memory_and_file_size():
    told = hwnas.cost("biggest", space="bignas")
    layers = lower(SearchSpace.load("bignas"), SearchSpace.load("bignas").largest())
    assert told["peak_activation_bytes"] == peak_activation_bytes(layers) == 4 * (24 + 2 * 144) * 160**2
    assert told["onnx_file_bytes"] == file_bytes(layers)


# -------------------------------------------------------------------- energy, and a run with predictors

SPACE = SearchSpace.load("tiny", resolution=[16, 20, 24])


def measured(arch, **facts) -> Measurement:
    ms = total_macs(lower(SPACE, arch)) * 1e-7 + 0.05
    return Measurement(
        arch=arch, device="board", runtime="fake", versions={}, precision="fp32", timing=Timing(),
        rounds=(RunTimes((ms,) * 5, (False,) * 5, {key: value * ms for key, value in facts.items()}),),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Run:
    """A run with a latency predictor of `board`."""
    made = Run.create(tmp_path / "run", RunConfig(hwnas="0", space=SPACE))
    predictor = make_predictor("prior", SPACE).fit(ARCHS, [measured(arch).latency_ms for arch in ARCHS])
    made.folder("predictors")
    predictor.save(made.predictor_path("board"))
    return made


ARCHS = [SPACE.smallest(), SPACE.largest(), *(SPACE.sample(np.random.default_rng(i)) for i in range(20))]


TEGRASTATS = """#!/bin/sh
while true; do
    if [ -e {folder}/running ]; then power=9000; else power=4000; fi
    echo "RAM 1/2MB (lfb 1x4MB) CPU [1%@729,off] GR3D_FREQ 0% cpu@48.468C VDD_IN ${{power}}mW/4778mW"
    sleep 0.05
done
"""
TRTEXEC = """#!/bin/sh
case "$*" in *saveEngine*) for word; do case $word in --saveEngine=*) echo engine >"${{word#*=}}";; esac; done;; esac
sleep 0.2; touch {folder}/running; sleep 0.6; rm {folder}/running
echo '[07/01/2026-10:00:00] [I] GPU Compute Time: mean = 2 ms, median = 2 ms, percentile(75%) = 2 ms'
echo '&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec'
"""


@pytest.fixture
def jetson(tmp_path, monkeypatch) -> ToolDevice:
    """A stand-in for trtexec on a board whose tegrastats tells 4 W at rest and 9 W while a network runs."""
    for name, text in (("tegrastats", TEGRASTATS), ("trtexec", TRTEXEC)):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "child.onnx").touch()
    with ToolDevice("jetson", Host(), trtexec.Program("fp16"), program=str(tmp_path / "trtexec")) as device:
        yield device


def test_a_program_on_a_jetson_is_metered_while_it_runs(jetson, tmp_path):
    times = jetson.run(tmp_path / "child.onnx", QUICK)
    assert times.facts["power_mw"] == times.facts["before"]["power_mw"] == 4000
    assert times.facts["run_power_mw"] == 9000
    made = Measurement(
        arch=ARCHS[0], device="jetson", runtime="tensorrt", versions={}, precision="fp16", timing=QUICK, rounds=(times,)
    )
    assert made.energy_mj == 9 * 2


def test_a_failure_under_the_meter_keeps_its_status(jetson, tmp_path):
    (tmp_path / "trtexec").write_text(
        "#!/bin/sh\ncase \"$*\" in *saveEngine*) exit 0;; esac\necho '[E] no memory left'\nexit 7\n"
    )
    with pytest.raises(DeviceError, match="no memory left"):
        jetson.run(tmp_path / "child.onnx", QUICK)


def test_a_log_of_power_that_tells_none():
    assert linux.run_power_mw("") is None
    assert linux.run_power_mw("tegrastats: not found\nRAM 1/2MB VDD_IN mW\n") is None


def test_energy_is_predicted_where_it_is_told(run):
    with pytest.raises(InputError, match=r"no energy predictor for 'board' in .*: `hwnas profile --device board`"):
        energy_predictor(run, "board")
    assert fit_energy(run, "board", [measured(arch) for arch in ARCHS]) is None
    few = [measured(arch, energy_mj=4) for arch in ARCHS[:4]] + [measured(arch) for arch in ARCHS[4:]]
    assert fit_energy(run, "board", few) is None
    assert not run.energy_path("board").exists()
    fitted = fit_energy(run, "board", [measured(arch, energy_mj=4) for arch in ARCHS])
    mean, _ = energy_predictor(run, "board").predict(ARCHS)
    assert np.array_equal(mean, fitted.predict(ARCHS)[0])
    assert mean == pytest.approx([4 * measured(arch).latency_ms for arch in ARCHS], rel=0.05)


def test_energy_predictor_of_another_space(run):
    other = SearchSpace.load("tiny")
    predictor = make_predictor("macs", other).fit([other.smallest(), other.largest(), other.smallest()], [1, 2, 1])
    predictor.save(run.energy_path("board"))
    with pytest.raises(InputError, match="is for another space"):
        energy_predictor(run, "board")


# -------------------------------------------------------------------- a space


def test_a_space_tells_what_its_children_cost(run):
    fit_energy(run, "board", [measured(arch, energy_mj=4) for arch in ARCHS])
    told = hwnas.api.space_report(run=run.path, samples=2000)
    kinds = [(cost["kind"], cost["device"]) for cost in told["costs"]]
    assert kinds == [
        ("macs", None), ("params", None), ("size", None), ("memory", None), ("latency", "board"), ("energy", "board")
    ]  # fmt: skip
    assert told["size"] == SPACE.size()
    assert told["all"] is None
    by_kind = {cost["kind"]: cost for cost in told["costs"]}
    assert by_kind["macs"]["least"]["value"] == total_macs(lower(SPACE, SPACE.smallest()))
    assert by_kind["macs"]["greatest"]["architecture"] == SPACE.largest().to_dict()
    genes = SPACE.sample_genes(2000, np.random.default_rng(0))
    peaks = [peak_activation_bytes(lower(SPACE, SPACE.decode(row))) / 1e6 for row in genes]
    assert by_kind["memory"]["quantiles"]["0.9"] == pytest.approx(np.quantile(peaks, 0.9))
    mean, _ = run.predictor("board").predict_genes(genes)
    assert by_kind["latency"]["quantiles"]["0.5"] == pytest.approx(np.median(mean))
    assert by_kind["energy"]["quantiles"]["0.5"] == pytest.approx(4 * np.median(mean), rel=0.05)
    assert by_kind["energy"]["unit"] == "mJ"


def test_the_share_that_keeps_limits(run):
    genes = SPACE.sample_genes(200_000, np.random.default_rng(1))
    macs = LayerCost(SPACE, "macs").expected(genes)
    ms = DeviceCost(run.predictor("board")).upper(genes, 0.9)
    limits = [LatencyLimit("board", float(np.quantile(ms, 0.3))), MacsLimit(float(np.quantile(macs, 0.2)))]
    told = hwnas.api.space_report(run=run.path, limits=limits, confidence=0.9, samples=5000)
    both = ((ms <= limits[0].value) & (macs <= limits[1].value)).mean()
    for share, true in zip([*told["limits"], told["all"]], [0.3, 0.2, both], strict=True):
        std = np.sqrt(true * (1 - true) / 5000)
        assert share["share"] == pytest.approx(true, abs=4.5 * std)
        assert share["low"] < share["share"] < share["high"]
        assert share["high"] - share["low"] == pytest.approx(2 * 1.96 * std, rel=0.1)
        assert share["possible"]


def test_limits_that_no_child_or_no_sample_keeps():
    least = total_macs(lower(SearchSpace.load("tiny"), SearchSpace.load("tiny").smallest()))
    (rare,) = hwnas.api.space_report("tiny", limits=[MacsLimit(least)], samples=100)["limits"]
    assert (rare["share"], rare["possible"], rare["least"]) == (0, True, least)
    assert rare["high"] > 0.03
    told = hwnas.api.space_report("tiny", limits=[MacsLimit(least - 1), ParamsLimit(1e9)], samples=100)
    assert [share["possible"] for share in told["limits"]] == [False, True]
    assert not told["all"]["possible"]


def command(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_the_command(capsys, run):
    code, out, err = command(
        capsys, "space", "--run", run.path, "--max-macs", "0.9M", "--max-params", "500k", "--device", "board",
        "--latency-ms", 0.01, "--samples", 500,
    )  # fmt: skip
    assert (code, err) == (0, "")
    for text in ("of which 500 random ones", "ms on board", "0.9M MACs", "all of them", "none", "the least is 0.0"):
        assert text in out
    assert re.search(r"0\.5M parameters +100\.00%", out)
    code, out, _ = command(capsys, "space", "--space", "tiny", "--max-size-mb", 1, "--samples", 500, "--json")
    (limit,) = json.loads(out)["limits"]
    assert (code, limit["kind"], limit["value"]) == (0, "size", 1)
    assert 0.5 < limit["share"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-macs", "600X"], "'600X' is not a number such as 600M, 0.6G or 6e8"),
        (["--max-macs", "nan"], "macs limit nan MACs: must be a finite number over 0"),
        (["--max-memory-mb", "-1"], "memory limit -1.0 MB: must be a finite number over 0"),
        (["--latency-ms", 3], "--latency-ms 3: on which device? Name it with --device"),
        (["--device", "a", "--device", "a"], "name each device once"),
        (
            ["--device", "a", "--device", "b", "--device", "c", "--energy-mj", 1, "--energy-mj", 2],
            "--energy-mj is given 2 times, --device 3 times: give one for each device, in the same order, or one",
        ),
        (["--device", "cpu"], "what space 'tiny' costs on a device is not known"),
        (["--samples", 5], "samples=5: at least 100 tell something"),
        (["--confidence", 2], "confidence 2.0: must be at least 0.5 and under 1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, words, message):
    code, out, err = command(capsys, "space", "--space", "tiny", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_limits_pair_with_devices_in_order():
    found = []

    @click.command
    @limit_options
    def probe(devices, limits):
        found.append((devices, limits))

    words = "--device a --device b --latency-ms 3 --energy-mj 1 --energy-mj 2 --max-macs 1G"
    probe.main(words.split(), standalone_mode=False)
    limits = (
        LatencyLimit("a", 3), EnergyLimit("a", 1), LatencyLimit("b", 3), EnergyLimit("b", 2), MacsLimit(1e9)
    )  # fmt: skip
    assert found == [(("a", "b"), limits)]


def test_the_commands_of_the_guide(capsys):
    guide = (Path(__file__).parent.parent / "docs" / "costs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(.*?)```", guide, flags=re.DOTALL)
    for line in block.splitlines():
        code, out, err = command(capsys, *line.split()[1:])
        assert (code, err) == (0, "")
        assert "MB" in out
    told = set(re.findall(r"`(?:--device D )?(--[\w-]+) [\d.]+[MG]?` \|", guide))
    names = {option.opts[0] for option in cli.commands["space"].params}
    assert told == {name for name in names if name.startswith(("--max-", "--latency", "--energy"))}
