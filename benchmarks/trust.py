"""Whether two profiles of the same children agree: on a quiet machine, and beside disturbing processes.

    python benchmarks/trust.py --output benchmarks/results/trust.md

Profiles the same children several times, each time into a database of its own: twice as the machine is, then with one
process that keeps a core busy, with one that also fills the caches, with as many as there are cores, and with bursts.
Every later profile is compared with the first. Beside it stands what the median of the raw times would have given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from environment import heading
from scipy.stats import spearmanr

from hwnas import __version__
from hwnas.devices import load_device
from hwnas.measurement import Measurement
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.progress import reporting
from hwnas.space import SearchSpace
from hwnas.store import Store

SPACE = Path(__file__).parent.parent / "examples" / "fashion-mnist.yaml"
SPIN = "while True: pass"
CACHE = "import numpy as np\na = np.ones(1 << 24)\nwhile True: a += 1"
BURSTS = """
import random, time
while True:
    end = time.monotonic() + random.uniform(0.05, 0.5)
    while time.monotonic() < end: pass
    time.sleep(random.uniform(0.05, 0.5))
"""


@dataclass(frozen=True)
class Condition:
    """What else runs."""

    name: str
    programs: tuple[str, ...]

    @contextmanager
    def running(self) -> Iterator[None]:
        processes = [subprocess.Popen([sys.executable, "-c", program]) for program in self.programs]
        try:
            time.sleep(1)
            yield
        finally:
            for process in processes:
                process.kill()
                process.wait()


CORES = os.cpu_count() or 1
CONDITIONS = (
    Condition("nothing", ()),
    Condition("nothing, again", ()),
    Condition("1 busy process", (SPIN,)),
    Condition("1 that also fills the caches", (CACHE,)),
    Condition("bursts on every core", (BURSTS,) * CORES),
    Condition(f"{CORES} busy processes", (SPIN,) * CORES),
    Condition(f"{CORES} that also fill the caches", (CACHE,) * CORES),
)


def profiled(device_name: str, space: SearchSpace, children: int, condition: Condition) -> list[Measurement]:
    chosen = choose_children(space, children, np.random.default_rng(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(Path(folder) / "hwnas.db") as store,
        load_device(device_name) as device,
        condition.running(),
        reporting(condition.name) as (report,),
    ):
        return measure(chosen, space, device, device.timing, store, report=report)


def row(condition: Condition, first: list[Measurement], found: list[Measurement]) -> str:
    pairs = [(a, b) for a, b in zip(first, found, strict=True) if a.trusted and b.trusted]
    rejected = sum(b.rejection is not None for b in found)
    repeats = statistics.mean(len(b.rounds) for b in found)
    seconds = statistics.median(b.run_s for b in found)
    busy = statistics.median(b.others_busy or 0 for b in found)
    cells = [condition.name, f"{busy:.1f}", f"{len(pairs)}", f"{rejected}", f"{repeats:.1f}", f"{seconds:.2f}"]
    if len(pairs) >= 3:
        before, now = (np.array([pair[side].latency_ms for pair in pairs]) for side in (0, 1))
        raw = np.array([np.median(np.concatenate([r.times_ms for r in b.rounds])) for _, b in pairs])
        difference = np.abs(now / before - 1)
        cells += [
            f"{np.median(difference):.1%}",
            f"{np.quantile(difference, 0.9):.1%}",
            f"{difference.max():.1%}",
            f"{spearmanr(before, now).statistic:.4f}",
            f"{np.median(np.abs(raw / before - 1)):.1%}",
        ]
    else:
        cells += ["-"] * 5
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--children", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    space = SearchSpace.load(SPACE, in_channels=1, num_classes=10)
    results = [(c, profiled(arguments.device, space, arguments.children, c)) for c in CONDITIONS]
    first = results[0][1]
    low, high = min(m.latency_ms for m in first), max(m.latency_ms for m in first)
    lines = heading(
        "Do two profiles agree? Also beside other work?",
        f"hwnas {__version__}, device {arguments.device}, {arguments.children} children of the demo's space "
        f"({low:.3f} to {high:.3f} ms); every profile against the first one",
    )
    lines += [
        "| beside | seen busy | trusted | rejected | rounds a child | s a child | median difference | 90% within "
        "| largest | Spearman | raw medians off by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(condition, first, found) for condition, found in results[1:]),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
