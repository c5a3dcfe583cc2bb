"""The runtimes on this machine: what a child takes to write and to measure, and how fast it runs.

    python benchmarks/runtimes.py --output benchmarks/results/runtimes.md

The same children of the demo's space and of `bignas` are profiled on every `cpu` device of the catalogue, in fp32 and,
where the runtime has it, int8. One device after the other, so only latencies of one runtime compare exactly.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from environment import heading
from scipy.stats import spearmanr

from hwnas import __version__
from hwnas.devices import load_spec
from hwnas.errors import HwnasError
from hwnas.exporters.base import exporter
from hwnas.measurement import Measurement
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.progress import reporting
from hwnas.space import SearchSpace
from hwnas.store import Store

DEMO = Path(__file__).parent.parent / "examples" / "fashion-mnist.yaml"
DEVICES = ("cpu", "cpu-openvino", "cpu-litert", "cpu-executorch", "cpu-ncnn", "cpu-pytorch")


def profiled(name: str, precision: str, space: SearchSpace, children: int) -> list[Measurement]:
    _, spec = load_spec(name)
    device = replace(spec, precision=precision).open(name)  # type: ignore[arg-type]
    chosen = choose_children(space, children, np.random.default_rng(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(Path(folder) / "hwnas.db") as store,
        device,
        reporting(f"{space.name} {name} {precision}") as (report,),
    ):
        return measure(chosen, space, device, device.timing, store, report=report)


def row(name: str, precision: str, found: list[Measurement], first: list[Measurement]) -> str:
    good = [(a, b) for a, b in zip(first, found, strict=True) if a.trusted and b.trusted]
    write = [m.write_s for m in found]
    cells = [name, precision, f"{statistics.median(write):.3f}", f"{max(write):.3f}"]
    cells.append(f"{statistics.median(m.run_s for m in found):.2f}")
    if len(good) > 2:
        ms = [b.latency_ms for _, b in good]
        rank = spearmanr([a.latency_ms for a, _ in good], ms).statistic
        cells += [f"{found[0].latency_ms:.3f}", f"{found[1].latency_ms:.3f}", f"{rank:.3f}"]
    else:
        cells += ["-"] * 3
    cells.append(f"{len(found) - len(good)}")
    return f"| {' | '.join(cells)} |"


def section(space: SearchSpace, children: int) -> list[str]:
    lines = [
        f"## {space.name}: {children} children",
        "",
        "| device | precision | s to write, median | largest | s to measure | smallest child, ms | biggest, ms "
        "| Spearman with cpu fp32 | failed or rejected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first: list[Measurement] = []
    for name in DEVICES:
        _, spec = load_spec(name)
        for precision in ("fp32", "int8"):
            try:
                exporter(spec.accepts, precision)
                found = profiled(name, precision, space, children)
            except (HwnasError, ValueError) as error:
                if precision == "fp32" or "precision" not in str(error):
                    lines.append(f"| {name} | {precision} | {error} |" + " |" * 6)
                continue
            first = first or found
            lines.append(row(name, precision, found, first))
    return [*lines, ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--children", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    lines = heading("Runtimes on this processor, 1 thread", f"hwnas {__version__}")
    demo = SearchSpace.load(DEMO, in_channels=1, num_classes=10)
    lines += section(replace(demo, name="demo space (fashion-mnist.yaml)"), arguments.children)
    lines += section(SearchSpace.load("bignas"), arguments.children)
    text = "\n".join(lines)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
