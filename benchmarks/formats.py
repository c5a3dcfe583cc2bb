"""Exported files: what they compute, how fast they run, how large they are, and how long an export takes.

    python benchmarks/formats.py --run demo-run --cache formats-cache --output benchmarks/results/formats.md

Children of a trained run are written in every format that has a runtime on this machine, in every precision of it, and
run in that runtime on the test images; `hwnas.measuring` times them. Then exports of the biggest child are timed, and
int8 is compared by the batches that its ranges come from. What is known is kept in the cache, so a run that was killed
goes on where it was. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import heading, processor
from numpy.typing import NDArray

import hwnas
from hwnas.api.evaluating import open_evaluator
from hwnas.api.exporting import NUM_RANGED
from hwnas.bundles.parity import correlation
from hwnas.bundles.quantise import value_ranges
from hwnas.data import Split
from hwnas.devices import Device, load_spec
from hwnas.errors import DeviceError
from hwnas.evaluator import Evaluator
from hwnas.exporters.base import Exporter, exporter, random_tensors
from hwnas.files import parts, write_text
from hwnas.layers import lower, total_macs
from hwnas.machine import versions
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.network import Network
from hwnas.run import Run
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store

DEVICES = {  # that time the files of a format
    "onnx": "cpu",
    "openvino": "cpu-openvino",
    "tflite": "cpu-litert",
    "ncnn": "cpu-ncnn",
    "executorch": "cpu-executorch",
}
GOALS_S = {"onnx": 5, "openvino": 5, "ncnn": 5, "tflite": 30, "executorch": 30}  # an export, after start-up
NUM_PARITY = 64
NUM_VALIDATED = 2000  # validation images for the comparison of ranges
RANGE_BATCHES = (64, 512, 16, 4)  # the first one is what exports take
Way = tuple[str, str]  # format and precision


def ways() -> list[Way]:
    return [(format, precision) for format in DEVICES for precision in exporter(format).precisions]


# ------------------------------------------------------------ what is known already


class Cache:
    """Results by what they depend on, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, depends: dict[str, Any], work: Callable[[], Any]) -> Any:
        text = json.dumps(depends, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["found"]
        found = work()
        write_text(path, json.dumps({"depends": depends, "found": found}, indent=2))
        return found


def digest(chunks: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def surroundings() -> dict[str, Any]:
    """What seconds depend on: hwnas's code, the packages, the processor."""
    sources = sorted(Path(hwnas.__file__).parent.rglob("*.py"))
    packages = ["torch", *(package for format in DEVICES for package in exporter(format).packages)]
    return {
        "hwnas": digest(path.read_bytes() for path in sources),
        "versions": versions(packages),
        "processor": processor(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


# ------------------------------------------------------------ children


@dataclass(frozen=True, eq=False)
class Images:
    """What a file is asked: images, their labels, and the network's own logits."""

    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    @property
    def accuracy(self) -> float:
        return float((self.logits.argmax(1) == self.labels).mean())

    @cached_property
    def key(self) -> str:
        return digest([self.values, self.labels, self.logits])


@dataclass(frozen=True, eq=False)
class Child:
    name: str
    arch: Architecture
    network: Network
    calibration: torch.Tensor
    test: Images
    validation: Images

    @property
    def macs(self) -> int:
        return total_macs(self.network.layers)

    def tensors(self, range_batch: int = RANGE_BATCHES[0]) -> dict[str, NDArray[Any]]:
        tensors = {name: tensor.numpy() for name, tensor in self.network.state_dict().items()}
        return {**tensors, **value_ranges(self.network, self.calibration.split(range_batch))}


def children(evaluator: Evaluator, count: int, num_images: int) -> Iterator[Child]:
    """The smallest, the biggest, and others between, by multiply-adds."""
    space, data = evaluator.supernet.space, evaluator.data
    chosen = choose_children(space, count, np.random.default_rng(0))
    chosen.sort(key=lambda arch: total_macs(lower(space, arch)))
    for number, arch in enumerate(chosen, 1):
        name = {1: "smallest", len(chosen): "biggest"}.get(number, f"{number} of {len(chosen)}")
        network = evaluator.child(arch).cpu()

        def asked(split: Split, count: int, network: Network = network, arch: Architecture = arch) -> Images:
            values = evaluator.images(split, arch.resolution, count)
            with torch.inference_mode():
                logits = torch.cat([network(chunk) for chunk in values.split(250)])
            return Images(values.numpy(), split.labels[: len(values)].numpy(), logits.numpy())

        yield Child(
            name,
            arch,
            network,
            evaluator.images(data.calibration, arch.resolution, NUM_RANGED),
            asked(data.test, num_images),
            asked(data.validation, NUM_VALIDATED),
        )


# ------------------------------------------------------------ files


@dataclass(frozen=True)
class Computed:
    """What a file computes, against its network."""

    accuracy: float
    parity_correlation: float
    parity_same: float
    correlation: float
    same: float


@dataclass(frozen=True)
class Row:
    """A child's file."""

    computed: Computed
    ms: float | None
    size_bytes: int


def file_key(writer: Exporter, path: Path) -> dict[str, Any]:
    return {
        "file": digest(part.read_bytes() for part in parts(path)),
        "runtime": writer.runtime,
        "versions": versions(writer.packages),
    }


def computed(writer: Exporter, path: Path, images: Images, cache: Cache) -> Computed:
    def work() -> dict[str, float]:
        found, expected = writer.infer(path, images.values), images.logits
        same = found.argmax(1) == expected.argmax(1)
        return {
            "accuracy": float((found.argmax(1) == images.labels).mean()),
            "parity_correlation": correlation(expected[:NUM_PARITY], found[:NUM_PARITY]),
            "parity_same": float(same[:NUM_PARITY].mean()),
            "correlation": correlation(expected, found),
            "same": float(same.mean()),
        }

    return Computed(**cache.get({**file_key(writer, path), "images": images.key}, work))


@contextmanager
def bench(way: Way) -> Iterator[tuple[Device, Store]]:
    """What times files of a form: all but int8 is computed in float32, as on devices of precision fp32."""
    format, precision = way
    _, spec = load_spec(DEVICES[format])
    device = replace(spec, precision="int8" if precision.startswith("int8") else "fp32").open(DEVICES[format])
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "hwnas.db") as store, device:
        yield device, store


def latency(
    child: Child, space: SearchSpace, writer: Exporter, path: Path, device: Device, store: Store, cache: Cache
) -> dict[str, float]:
    """`ms`, and `run_s` that measuring took; what failed or was disturbed is not kept."""

    def work() -> dict[str, float]:
        (found,) = measure([child.arch], space, device, device.timing, store, role="export", files={child.arch: path})
        if not found.trusted:
            raise DeviceError(f"no latency: {found.error or found.rejection}")
        return {"ms": found.latency_ms, "run_s": found.run_s}

    about = {"device": device.name, "precision": device.precision, "timing": asdict(device.timing)}
    return cache.get({**file_key(writer, path), **about, "processor": processor()}, work)


def write_all(
    chosen: Sequence[Child], space: SearchSpace, cache: Cache
) -> tuple[dict[tuple[str, Way], Row], list[float], list[str]]:
    """Every child's file in every form; the seconds that measuring took; and what did not work."""
    rows, run_s, notes = dict[tuple[str, Way], Row](), list[float](), list[str]()
    tensors = {child.name: child.tensors() for child in chosen}
    for way in ways():
        writer, found = exporter(*way), dict[str, dict[str, float]]()
        with tempfile.TemporaryDirectory() as folder:
            paths = {child.name: Path(folder) / child.arch.id / f"model{writer.suffix}" for child in chosen}
            for child in chosen:
                paths[child.name].parent.mkdir()
                writer.write(child.network.layers, tensors[child.name], paths[child.name])
            try:
                with bench(way) as (device, store):
                    for child in chosen:
                        try:
                            found[child.name] = latency(child, space, writer, paths[child.name], device, store, cache)
                        except DeviceError as error:
                            notes.append(f"{child.name}, {' '.join(way)}: {error}")
            except ValueError as error:  # the device has no such precision
                notes.append(f"{' '.join(way)}: {error}")
            for child in chosen:
                path, ms = paths[child.name], found.get(child.name, {}).get("ms")
                size = sum(part.stat().st_size for part in parts(path))
                rows[child.name, way] = Row(computed(writer, path, child.test, cache), ms, size)
                say(f"{child.name} {line(child, way, rows[child.name, way])}")
        run_s += [measured["run_s"] for measured in found.values()]
    return rows, run_s, notes


def line(child: Child, way: Way, row: Row) -> str:
    found = row.computed
    cells = [*way, f"{found.accuracy:.2%}", f"{100 * (found.accuracy - child.test.accuracy):+.2f}"]
    cells += [f"{found.parity_correlation:.5f}", f"{found.parity_same:.1%}", f"{found.same:.2%}"]
    cells += ["-" if row.ms is None else f"{row.ms:.3f}", f"{row.size_bytes / 1000:.0f}"]
    return f"| {' | '.join(cells)} |"


def in_short(chosen: Sequence[Child], rows: dict[tuple[str, Way], Row]) -> list[str]:
    """All children together: the worst of what they compute, and medians of what they take against fp32."""

    def median(ratios: list[float]) -> str:
        return f"{statistics.median(ratios):.2f}" if ratios else "-"

    lines = [
        "| format | precision | accuracy, points, worst and best | correlation, least | same class, all images, least "
        "| ms / fp32, median | bytes / fp32, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in ways():
        of = {child: rows[child.name, way] for child in chosen}
        points = [100 * (row.computed.accuracy - child.test.accuracy) for child, row in of.items()]
        least = min(row.computed.parity_correlation for row in of.values())
        same = min(row.computed.same for row in of.values())
        pairs = [(row, rows[child.name, (way[0], "fp32")]) for child, row in of.items()]
        ms = median([row.ms / base.ms for row, base in pairs if row.ms and base.ms])
        size = median([row.size_bytes / base.size_bytes for row, base in pairs])
        cells = [*way, f"{min(points):+.2f}, {max(points):+.2f}", f"{least:.5f}", f"{same:.2%}", ms, size]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def files_section(evaluator: Evaluator, chosen: Sequence[Child], cache: Cache) -> list[str]:
    rows, run_s, notes = write_all(chosen, evaluator.supernet.space, cache)
    lines = [
        f"## Files: {len(chosen)} children, {len(chosen[0].test.labels):,} test images",
        "",
        "Accuracy of the file in its own runtime, one image a call, and how many points more than its network has in "
        "torch. Correlation of the logits with the network's, and images of the same top class, on the "
        f"{NUM_PARITY} images of the parity gate; the class on all test images, too. Latency by `hwnas.measuring`, on "
        "one thread of this processor, in turns with a reference network. Bytes of all files of the network / 1000. "
        "fp16 is how weights are stored: these devices compute them in float32. Core ML is left out: its files run on "
        "macOS only.",
        "",
        *in_short(chosen, rows),
    ]
    for child in chosen:
        lines += [
            f"### {child.name}: {child.arch.describe()}, {child.macs / 1e6:.2f} M multiply-adds, "
            f"{child.test.accuracy:.2%} in torch",
            "",
            f"| format | precision | accuracy | points | correlation, {NUM_PARITY} images | same class, {NUM_PARITY} "
            "| same class, all | ms | kB |",
            "|---|---|---|---|---|---|---|---|---|",
            *(line(child, way, rows[child.name, way]) for way in ways()),
            "",
        ]
    if run_s:
        lines.append(f"- measuring a file takes {statistics.median(run_s):.2f} s, median")
    return [*lines, *(f"- {note}" for note in notes), ""]


# ------------------------------------------------------------ seconds


def in_turns(work: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, all of them in each turn; the first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
                say(f"turn {turn} of {turns}, {name}: {seconds[name][-1]:.3f} s")
    return seconds


def writing_s(network: Sequence[Any], tensors: dict[str, NDArray[Any]], turns: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:

        def write(way: Way) -> Callable[[], object]:
            writer = exporter(*way)
            path = Path(folder) / "-".join(way) / f"model{writer.suffix}"
            path.parent.mkdir()
            return lambda: writer.write(network, tensors, path)

        return in_turns({" ".join(way): write(way) for way in ways()}, turns)


def exporting_s(run: Path, turns: int) -> dict[str, list[float]]:
    """Of whole exports of the biggest child, in this process, one format each, and fp32 in all formats at once."""
    with tempfile.TemporaryDirectory() as folder:

        def export(way: Way) -> Callable[[], object]:
            format, precision = way
            target = Path(folder) / "-".join(way)
            return lambda: hwnas.export(run, format=format, precision=precision, arch="biggest", output=target)

        work = {" ".join(way): export(way) for way in ways()}
        work["all"] = lambda: hwnas.export_all(list(DEVICES), run, arch="biggest", output=Path(folder) / "all")
        return in_turns(work, turns)


def commands_s(run: Path, turns: int) -> dict[str, list[float]]:
    """Of commands with their start-up: one for each format, and one for all."""
    with tempfile.TemporaryDirectory() as folder:

        def command(name: str, *chosen: str) -> Callable[[], object]:
            words = [sys.executable, "-m", "hwnas", "export", "--run", str(run), "--arch", "biggest"]
            words += ["--output", str(Path(folder) / name)]
            for format in chosen:
                words += ["--format", format]
            return lambda: subprocess.run(words, check=True, capture_output=True)

        work = {format: command(format, format) for format in DEVICES}
        return in_turns({**work, "all": command("all", *DEVICES)}, turns)


def speed_section(run: Path, evaluator: Evaluator, biggest: Child, cache: Cache, turns: int) -> list[str]:
    about = {**surroundings(), "turns": turns}
    ours = {**about, "weights": evaluator.supernet.identity(), "arch": biggest.arch.id}
    space = SearchSpace.load("bignas")
    large = lower(space, space.largest())
    rng = np.random.default_rng(0)
    writing = cache.get(
        {**ours, "what": "writing"}, lambda: writing_s(biggest.network.layers, biggest.tensors(), turns)
    )
    large_writing = cache.get(
        {**about, "what": "writing bignas"}, lambda: writing_s(large, random_tensors(large, rng), turns)
    )
    exporting = cache.get({**ours, "what": "exporting"}, lambda: exporting_s(run, turns))
    commands = cache.get({**ours, "what": "commands"}, lambda: commands_s(run, turns))
    median = statistics.median
    lines = [
        "## Seconds an export takes",
        "",
        f"Medians of {turns} turns through all rows, after a turn that is not counted, in one process. Writing is "
        "`Exporter.write` alone: of the run's biggest child, and of the biggest of `bignas` "
        f"({total_macs(large) / 1e6:,.0f} M multiply-adds, {sum(layer.params for layer in large) / 1e6:.1f} M "
        "parameters, random weights). The whole is `hwnas.export` of the run's biggest child: opening the run and its "
        f"images, calibration, ranges of int8, the file, parity on {NUM_PARITY} images, accuracy on all test images "
        "(of fp32 in torch, of others in their runtime), and the bundle; nothing is measured on a device.",
        "",
        "| format | precision | writing, s | writing bignas's biggest, s | whole export, s | goal, s |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways():
        name = " ".join(way)
        seconds = (median(found[name]) for found in (writing, large_writing, exporting))
        lines.append(f"| {way[0]} | {way[1]} | {' | '.join(f'{s:.3f}' for s in seconds)} | {GOALS_S[way[0]]} |")
    apart = sum(median(exporting[f"{format} fp32"]) for format in DEVICES)
    together = median(exporting["all"])
    started_apart, started_together = sum(median(commands[format]) for format in DEVICES), median(commands["all"])
    return [
        *lines,
        "",
        f"- {len(DEVICES)} formats in fp32, in this process: {apart:.1f} s one after the other, {together:.1f} s in "
        f"one call of `hwnas.export_all` ({1 - together / apart:.0%} less)",
        f"- as commands, with their start-up: {started_apart:.1f} s one after the other ("
        + ", ".join(f"{format} {median(commands[format]):.1f}" for format in DEVICES)
        + f"), {started_together:.1f} s in one ({1 - started_together / started_apart:.0%} less)",
        "",
    ]


# ------------------------------------------------------------ ranges of int8


def ranges_section(chosen: Sequence[Child], cache: Cache) -> list[str]:
    first, *others = RANGE_BATCHES
    lines = [
        f"## int8: ranges from {NUM_RANGED} calibration images, {NUM_VALIDATED:,} validation images",
        "",
        f"Exports average the extremes of batches of {first} images; the last columns are the correlations with other "
        f"batches. In float32: {', '.join(f'{child.name} {child.validation.accuracy:.2%}' for child in chosen)}.",
        "",
        "| format | precision | child | accuracy | correlation of logits | same top class | "
        + " | ".join(f"correlation, batches of {batch}" for batch in others)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * len(others),
    ]
    tensors = {(child.name, batch): child.tensors(batch) for child in chosen for batch in RANGE_BATCHES}
    for way in ways():
        if not way[1].startswith("int8"):
            continue
        writer = exporter(*way)
        for child in chosen:
            found = {}
            for batch in RANGE_BATCHES:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"model{writer.suffix}"
                    writer.write(child.network.layers, tensors[child.name, batch], path)
                    found[batch] = computed(writer, path, child.validation, cache)
            shipped = found[first]
            cells = [*way, child.name, f"{shipped.accuracy:.2%}", f"{shipped.correlation:.5f}", f"{shipped.same:.1%}"]
            cells += [f"{found[batch].correlation:.5f}" for batch in others]
            lines.append(f"| {' | '.join(cells)} |")
            say(lines[-1])
    return [*lines, ""]


def say(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.0f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder with a trained supernet")
    parser.add_argument("--children", type=int, default=4)
    parser.add_argument("--images", type=int, default=10_000, help="test images, at most")
    parser.add_argument("--turns", type=int, default=3, help="of the timing of exports")
    parser.add_argument("--cache", type=Path, help="folder for what is known already")
    parser.add_argument("--output", type=Path, help="write the results there too")
    options = parser.parse_args()
    STARTED, LOAD = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        cache = Cache(options.cache or Path(scratch))
        evaluator = open_evaluator(Run(options.run))
        chosen = list(children(evaluator, options.children, options.images))
        weights = evaluator.supernet.identity()[:12]
        lines = heading(
            "Exported files: accuracy, latency, size, and seconds to export",
            f"hwnas {hwnas.__version__}, weights {weights} of a run on {evaluator.data.name}",
        )
        lines += files_section(evaluator, chosen, cache)
        lines += ranges_section([chosen[0], chosen[-1]], cache)
        lines += speed_section(options.run, evaluator, chosen[-1], cache, options.turns)
    minutes = (time.perf_counter() - STARTED) / 60
    lines.append(f"- {minutes:.0f} minutes; load when it began {LOAD:.2f}, when it ended {os.getloadavg()[0]:.2f}")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
