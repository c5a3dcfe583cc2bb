"""The whole main job on Fashion-MNIST: train, profile, search under two limits, export, check, measure.

Runs the commands a user would type (each is printed before it runs), and ends with a table. Started again with the
same run folder after an interruption, it goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwnas import api
from hwnas.cli import finish, main, table
from hwnas.config import read_json
from hwnas.run import Run
from hwnas.space import Architecture

SPACE = Path(__file__).parent / "fashion-mnist.yaml"
MARGIN = 0.005  # accuracy that both winners must have over the smallest child; 10,000 images tell 0.4 points apart


@dataclass(frozen=True)
class Size:
    """How much work the demo does."""

    options: tuple[str, ...]
    children: int
    holdout: int
    evaluations: int


FULL = Size((), children=60, holdout=40, evaluations=60)
SHORT = Size(
    ("train.epochs=0.1", "data.validation=1000", "data.calibration=512"),
    children=20,
    holdout=5,
    evaluations=8,
)


def hwnas(*words: str) -> None:
    """Run one command line as a user would; stop where it fails."""
    print(f"\n$ hwnas {shlex.join(words)}", flush=True)
    started = time.monotonic()
    code = main(words)
    if code:
        sys.exit(code)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def run_all(folder: str, size: Size) -> None:
    run = ("--run", folder)
    options = [word for option in size.options for word in ("-o", option)]
    hwnas("train", *run, "--space", str(SPACE), "--data", "fashion-mnist", *options)
    hwnas("profile", *run, "--device", "cpu", "--children", str(size.children), "--holdout", str(size.holdout))
    limits = two_limits(folder)
    for limit in limits:
        hwnas("search", *run, "--device", "cpu", "--latency-ms", limit, "--evaluations", str(size.evaluations))
    for limit in limits:
        hwnas("export", *run, "--format", "onnx", "--result", f"cpu-{limit}ms")
    ends(folder, limits, size)


def two_limits(folder: str) -> tuple[str, str]:
    """A tight and a loose limit for this machine.

    60% and 85% of the way from the smallest child's measured latency to the biggest one's: so short a training teaches
    these two ends most, and below half the way little is better than the smallest child.
    """
    small, big = (measured_ms(folder, name) for name in ("smallest", "biggest"))
    return tuple(f"{small + share * (big - small):.2g}" for share in (0.6, 0.85))  # type: ignore[return-value]


def measured_ms(folder: str, which: str) -> float:
    run = Run(folder)
    arch = run.space.smallest() if which == "smallest" else run.space.largest()
    with run.store() as store:
        return next(m.latency_ms for m in store.measurements(device="cpu") if m.arch == arch and m.error is None)


def ends(folder: str, limits: tuple[str, str], size: Size) -> None:
    """The table: both winners with their random baselines, and the ends of the space."""
    rows: list[list[str]] = []
    winners: list[tuple[float, float, float]] = []

    def add(limit: str, name: str, arch: Architecture, predicted: float | None, measured: float | None) -> float:
        accuracy = api.accuracy(arch, folder, split="test")
        macs = api.cost(arch, run=folder)["macs"]
        rows.append(
            [limit, name, arch.describe(), f"{accuracy:.2%}", "-" if predicted is None else f"{predicted:.3f}",
             "-" if measured is None else f"{measured:.3f}", f"{macs / 1e6:.2f}"]
        )  # fmt: skip
        return accuracy

    paths = []
    for limit in limits:
        result: dict[str, Any] = read_json(Run(folder).result_path(f"cpu-{limit}ms"))
        bundle = Path(folder) / "exports" / f"cpu-{limit}ms-onnx"
        manifest = read_json(bundle / "manifest.json")
        paths.append(bundle / manifest["file"]["name"])
        best = Architecture.from_dict(result["best"]["architecture"])
        latency = manifest["latency"]
        accuracy = add(f"{limit} ms", "winner", best, latency["predicted_ms"], latency["measured_ms"])
        winners.append((float(limit), accuracy, latency["measured_ms"]))
        random = result["random"]
        ms = random["latency"]["cpu"]
        drawn = Architecture.from_dict(random["architecture"])
        add(f"{limit} ms", "random search", drawn, ms["predicted"], ms["measured"])
    space = Run(folder).space
    smallest = add("-", "smallest child", space.smallest(), None, measured_ms(folder, "smallest"))
    add("-", "biggest child", space.largest(), None, measured_ms(folder, "biggest"))
    columns = ["limit", "", "architecture", "test accuracy", "predicted ms", "measured ms", "MMACs"]
    finish(False, {}, table(f"{size.evaluations} evaluations a search; accuracy on the test images", columns, rows))
    for path in paths:
        print(path)
    for limit_ms, accuracy, ms in winners:
        kept, better = ms <= limit_ms, accuracy >= smallest + MARGIN
        print(
            f"{limit_ms:g} ms: measured {ms:.3f} ms: {'kept' if kept else 'NOT KEPT'}; "
            f"{100 * (accuracy - smallest):+.2f} points over the smallest child"
            f"{'' if better else f' (NOT the {100 * MARGIN:g} it should be)'}"
        )
        if size is FULL and not (kept and better):
            sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="demo-run", help="run folder")
    parser.add_argument("--short", action="store_true", help="two minutes: proves that it runs, not how good it is")
    arguments = parser.parse_args()
    begun = time.monotonic()
    run_all(arguments.run, SHORT if arguments.short else FULL)
    print(f"{time.monotonic() - begun:.0f} s in all")
