"""What a further device costs: a fifth of the evaluations, from what is known, against a whole search of its own.

Accuracies are those of a synthetic surface (`surfaces.bottleneck`), as hundreds of searches on a trained supernet would
take days; the devices are those of published measurements, which order the children of a space differently.

    python -m benchmarks.many_devices --seeds 3
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import heading
from benchmarks.surfaces import Surface, bottleneck
from hwnas.api.searching import FURTHER
from hwnas.predictors.published import published_models
from hwnas.searching.limits import LatencyLimit
from hwnas.searching.portfolio import choose_members
from hwnas.searching.result import Result
from hwnas.searching.searcher import Searcher
from hwnas.searching.strategies import Scored
from hwnas.searching.targets import Target
from hwnas.space import Architecture

RESULTS = Path(__file__).parent / "results" / "many_devices.md"
SPACE = "bignas"
DEVICES = ("galaxy-note10", "pixel-4-4-threads", "jetson-orin-nano-ncnn")
EVALUATIONS = 100
# Where the limits are between the least and the greatest latency, in logarithms.
SHARES = {"loosest limit first": (0.65, 0.5, 0.35), "tightest limit first": (0.35, 0.5, 0.65)}


class World:
    """A surface, and the accuracies that were looked up on it so far."""

    def __init__(self, surface: Surface, folder: Path) -> None:
        self.surface, self.url = surface, f"sqlite:///{folder / 'run.db'}"
        self.known: dict[Architecture, float] = {}

    def evaluate(self, archs: Sequence[Architecture]) -> list[float]:
        new = [arch for arch in archs if arch not in self.known]
        if new:
            self.known.update(zip(new, self.surface.told(self.surface.space.encode(new)).tolist(), strict=True))
        return [self.known[arch] for arch in archs]

    def value(self, result: Result) -> float:
        """The answer's accuracy without noise."""
        return float(self.surface.value(self.surface.space.encode([result.best.architecture]))[0])

    def searcher(self, device: str, share: float, seed: int) -> Searcher:
        space = self.surface.space
        predictor = published_models()[device].predictor(space, device)
        (small, big), _ = predictor.predict([space.smallest(), space.largest()])
        return Searcher(
            space,
            [LatencyLimit(device, float(small * (big / small) ** share))],
            {device: Target(device, predictor, reason="no device is at hand")},
            evaluate=self.evaluate,
            known=lambda: [Scored(arch, accuracy) for arch, accuracy in self.known.items()],
            storage_url=self.url,
            seed=seed,
        )


def run(surface: Surface, shares: Sequence[float], seed: int) -> tuple[list[list[float]], int]:
    """Per further device the values of: a search of its own, a fifth of one from what is known, a fifth from nothing;
    and the number of children in the portfolio of all."""
    further = math.ceil(FURTHER * EVALUATIONS)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:

        def alone(device: str, share: float, budget: int) -> float:
            world = World(surface, Path(tempfile.mkdtemp(dir=folder)))
            return world.value(world.searcher(device, share, seed).run(budget, baseline=False))

        rows = []
        shared = World(surface, Path(tempfile.mkdtemp(dir=folder)))
        searchers = {
            device: shared.searcher(device, share, seed) for device, share in zip(DEVICES, shares, strict=True)
        }
        results: dict[str, Result] = {}
        for device, share in zip(DEVICES, shares, strict=True):
            results[device] = searchers[device].run(further if results else EVALUATIONS, baseline=False)
            if len(results) > 1:
                value = shared.value(results[device])
                rows.append([alone(device, share, EVALUATIONS), value, alone(device, share, further)])
        members, exact = choose_members(searchers, results, 0.002)
        assert exact
    return rows, len(members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    count = parser.parse_args().seeds
    further = math.ceil(FURTHER * EVALUATIONS)
    how = (
        f"{count} surfaces on {SPACE} for each order; strategy guided; the first device, {DEVICES[0]}, has "
        f"{EVALUATIONS} evaluations. Points of accuracy of the answer against those of a whole search for that device "
        "alone, without the surface's noise: mean ± standard error."
    )
    lines = heading("What a further device costs", how)
    for name, shares in SHARES.items():
        values, sizes = [], []
        for seed in range(count):
            rows, size = run(bottleneck(SPACE, seed, 0.5), shares, seed)
            values.append(rows)
            sizes.append(size)
            print(name, seed, np.round(100 * np.array(rows), 2).tolist(), size, flush=True)
        points = 100 * np.array(values)  # (seeds, further devices, [whole, from what is known, fifth])
        points = points[..., 1:] - points[..., :1]
        lines += [
            f"## {name.capitalize()}: {', '.join(f'{share:g}' for share in shares)} of the way to the biggest child",
            "",
            f"| device | {further} evaluations, from what is known | {further} evaluations, from nothing |",
            "|---|---|---|",
            *(
                f"| {device} | {mean(points[:, n, 0])} | {mean(points[:, n, 1])} |"
                for n, device in enumerate(DEVICES[1:])
            ),
            f"| both | {mean(points[..., 0].mean(axis=1))} | {mean(points[..., 1].mean(axis=1))} |",
            "",
            f"Children in the portfolio of the {len(DEVICES)} devices, each within 0.2 points of its best: "
            f"{', '.join(map(str, sizes))}.",
            "",
        ]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def mean(values: NDArray[np.float64]) -> str:
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()
