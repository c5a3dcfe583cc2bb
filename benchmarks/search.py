"""Search strategies on surfaces whose best child is known: what is found, over the evaluations it took.

    python benchmarks/search.py --run demo-run --cache /tmp/search --output benchmarks/results/search.md

The surfaces are those of `surfaces.py`; with `--run`, a finished run of `examples/demo.py`, also those of its trained
supernet. Every strategy proposes 8 children at a time, as `hwnas search` lets it. What is done is kept in the cache, by
the strategy's source and by what the surface answers: an interrupted run continues, a changed strategy starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import heading
from numpy.typing import NDArray
from surfaces import Surface, surfaces

from hwnas.searching.fronts import running_hypervolume
from hwnas.searching.strategies import Scored, Strategy, strategy_class

# Evaluations each strategy gets, and so its budget.
BUDGETS = {"guided": 100, "coarse-to-fine": 100, "evolution": 300, "nsga2": 300, "tpe": 100, "random": 1000}
FRONT_BUDGETS = {"guided": 100, "coarse-to-fine": 100, "evolution": 300, "nsga2": 300, "random": 1000}
FRONT_SURFACES = ("planted-bignas-0", "bottleneck-bignas-0", "bottleneck-ofa-mbv3-0", "supernet-model-loose")
BATCH, OTHER_BATCHES = 8, (2, 16)
AT = 100  # evaluations at which strategies are compared
COLORS = dict(zip(BUDGETS, ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#7f7f7f"), strict=True))


def identity(surface: Surface) -> str:
    """The surface's name and what it answers, in short."""
    told = surface.told(surface.space.sample_genes(50, np.random.default_rng(0))).round(6).tobytes()
    return f"{surface.name} {hashlib.sha256(told + repr(surface.limit).encode()).hexdigest()[:8]}"


def source(name: str) -> str:
    """A strategy's name and source, in short."""
    files = {"guided": ("guided", "accuracy_model", "../fronts", "coarse_to_fine"), "nsga2": ("optuna_samplers",)}
    files |= {"tpe": files["nsga2"]}
    modules = (*files.get(name, (name.replace("-", "_"),)), "sampling")
    folder = Path(inspect.getfile(Strategy)).parent
    content = b"".join((folder / f"{module}.py").read_bytes() for module in modules)
    return f"{name} {hashlib.sha256(content).hexdigest()[:8]}"


def one(surface: Surface, name: str, seed: int, budget: int, batch: int, front: bool) -> dict[str, Any]:
    """A search: what was told, what counts, and the size of each child in order; seconds the last proposal took."""
    strategy = strategy_class(name)(
        surface.space,
        feasible=surface.feasible,
        size=surface.size,
        budget=budget,
        rng=np.random.default_rng([seed, 7]),
        front=front,
    )
    history: list[Scored] = []
    seconds = 0.0
    while len(history) < budget:
        started = time.perf_counter()
        archs = strategy.propose(history, min(batch, budget - len(history)))
        seconds = time.perf_counter() - started
        if not archs:
            break
        told = surface.told(surface.space.encode(archs))
        history += [Scored(arch, float(accuracy)) for arch, accuracy in zip(archs, told, strict=True)]
    genes = surface.space.encode([scored.arch for scored in history])
    return {
        "told": [round(scored.accuracy, 6) for scored in history],
        "value": surface.value(genes).round(6).tolist(),
        "size": surface.size(genes).round(5).tolist(),
        "seconds": seconds,
    }


class Results:
    """Searches that were run, one JSON line each."""

    def __init__(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self._file = cache / "searches.jsonl"
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        self._known = dict(map(json.loads, lines))

    def __call__(
        self, surface: Surface, name: str, seed: int, budget: int, batch: int = BATCH, *, front: bool = False
    ) -> dict[str, Any]:
        key = f"{identity(surface)} {source(name)} budget {budget} batch {batch} front {front} seed {seed}"
        if key not in self._known:
            self._add(key, one(surface, name, seed, budget, batch, front))
        return self._known[key]

    def best(self, surface: Surface) -> float:
        """The optimum if it is known; else the best that was ever found, by any search or by `Surface.best`."""
        if surface.optimum is not None:
            return surface.optimum
        which = identity(surface)
        key = f"best of {which}"
        if key not in self._known:
            self._add(key, {"value": [surface.best]})
        return max(max(run["value"]) for name, run in self._known.items() if which in name)

    def _add(self, key: str, result: dict[str, Any]) -> None:
        self._known[key] = result
        with self._file.open("a") as file:
            file.write(json.dumps([key, result]) + "\n")
        print(key, file=sys.stderr, flush=True)


def regret(surface: Surface, best: float, result: dict[str, Any]) -> NDArray[np.float64]:
    """Accuracy points from the optimum of the child that would be the answer, after each evaluation."""
    told, value = np.array(result["told"]), np.array(result["value"])
    answers = [int(np.argmax(told[:end])) for end in range(1, len(told) + 1)]
    return 100 * (best - value[answers])


def volumes(result: dict[str, Any]) -> NDArray[np.float64]:
    """Hypervolume over accuracy 0 and the limit, after each evaluation."""
    return np.array(running_hypervolume(np.array(result["size"]), np.array(result["value"])))


# -------------------------------------------------------------------- report


def reaches(curves: NDArray[np.float64], goal: float) -> str:
    """After how many evaluations the mean regret is at most the goal."""
    there = np.flatnonzero(curves.mean(axis=0) <= goal + 1e-9)
    return str(there[0] + 1) if len(there) else f"over {curves.shape[1]}"


def stacked(results: list[NDArray[np.float64]], length: int) -> NDArray[np.float64]:
    """Curves of equal length, (num_seeds, length); a search that found all there is stays where it was."""
    return np.stack([np.concatenate([r, np.full(length - len(r), r[-1])]) for r in results])


def curves_of(results: Results, surface: Surface, seeds: dict[str, int]) -> dict[str, NDArray[np.float64]]:
    best = results.best(surface)
    return {
        name: stacked(
            [regret(surface, best, results(surface, name, seed, budget)) for seed in range(seeds[name])], budget
        )
        for name, budget in BUDGETS.items()
    }


def with_error(values: NDArray[np.float64]) -> str:
    """The mean, and its standard error where there are several seeds."""
    error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


def table_of_regrets(found: dict[str, dict[str, NDArray[np.float64]]]) -> list[str]:
    lines = [
        "| surface | " + " | ".join(f"{name} at {min(AT, budget)}" for name, budget in BUDGETS.items())
        + " | random at 1000 | nsga2 at 300 | random needs | nsga2 needs |",
        "|---" * (len(BUDGETS) + 5) + "|",
    ]  # fmt: skip
    for surface, curves in found.items():
        goal = curves["guided"][:, AT - 1].mean()
        cells = [with_error(curve[:, AT - 1]) for curve in curves.values()]
        ends = [f"{curves['random'][:, -1].mean():.3f}", f"{curves['nsga2'][:, -1].mean():.3f}"]
        needs = [reaches(curves["random"], goal), reaches(curves["nsga2"], goal)]
        lines.append("| " + " | ".join([surface, *cells, *ends, *needs]) + " |")
    return lines


def verdict(found: dict[str, dict[str, NDArray[np.float64]]]) -> list[str]:
    """The goals of issue 6, surface by surface."""

    def at(curves: dict[str, NDArray[np.float64]], name: str, evaluations: int) -> float:
        return float(curves[name][:, evaluations - 1].mean())

    lines = []
    pairs = [(AT, "random", 1000), (AT, "nsga2", 300), *((same, "coarse-to-fine", same) for same in (24, 48, AT))]
    for evaluations, other, more in pairs:
        misses = [name for name, curves in found.items() if at(curves, "guided", evaluations) > at(curves, other, more)]
        held = f"{len(found) - len(misses)} of {len(found)} surfaces"
        but = f"; not on {', '.join(misses)}" if misses else ""
        lines.append(f"- guided at {evaluations} is as good as {other} at {more}: on {held}{but}")
    return lines


def table_of_batches(results: Results, surfaces: list[Surface], seeds: int) -> list[str]:
    batches = (*OTHER_BATCHES[:1], BATCH, *OTHER_BATCHES[1:])
    lines = ["| surface | " + " | ".join(f"{batch} at a time" for batch in batches) + " |", "|---" * 4 + "|"]
    for surface in surfaces:
        best, cells = results.best(surface), []
        for batch in batches:
            ends = [regret(surface, best, results(surface, "guided", seed, AT, batch))[-1] for seed in range(seeds)]
            cells.append(f"{np.mean(ends):.3f}")
        lines.append("| " + " | ".join([surface.name, *cells]) + " |")
    return lines


def fronts_of(results: Results, surface: Surface, seeds: int) -> dict[str, NDArray[np.float64]]:
    """Hypervolumes as a share of that of all children that any search on this surface has found."""
    all_found = {
        name: [results(surface, name, seed, budget, front=True) for seed in range(seeds)]
        for name, budget in FRONT_BUDGETS.items()
    }
    union = {key: [x for runs in all_found.values() for run in runs for x in run[key]] for key in ("value", "size")}
    whole = running_hypervolume(np.array(union["size"]), np.array(union["value"]))[-1]
    return {
        name: 100 * stacked([volumes(run) / whole for run in runs], FRONT_BUDGETS[name])
        for name, runs in all_found.items()
    }


def plot(panels: dict[str, dict[str, NDArray[np.float64]]], path: Path, ylabel: str, log: bool) -> None:
    """Means over the seeds with a band from the 10th to the 90th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(13, 3.4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, found in curves.items():
            x = np.arange(1, found.shape[1] + 1)
            shown = np.maximum(found, 0.003) if log else found
            low, high = np.quantile(shown, [0.1, 0.9], axis=0)
            axis.plot(x, shown.mean(axis=0), color=COLORS[name], label=name, linewidth=1.8)
            axis.fill_between(x, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        axis.set(title=title, xscale="log", xlim=(8, 1000))
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(min(found[:, 7].mean() for found in curves.values()), 100.2)
        axis.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("evaluations")
    figure.supylabel(ylabel)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="finished run of examples/demo.py")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is done")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--few", type=int, default=3, help="seeds of what takes long: tpe, fronts, other batches")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results, tried = Results(arguments.cache), surfaces(arguments.run)
    few = arguments.few
    seeds = {name: few if name == "tpe" else arguments.seeds for name in BUDGETS}
    for seed in range(arguments.seeds):  # all surfaces with one seed before the next: what there is, is balanced
        for surface in tried:
            for name, budget in BUDGETS.items():
                if seed < seeds[name]:
                    results(surface, name, seed, budget)
    found = {surface.name: curves_of(results, surface, seeds) for surface in tried}
    fronts = {s.name: fronts_of(results, s, few) for s in tried if s.name in FRONT_SURFACES}
    lines = [
        *heading("Search strategies", f"{arguments.seeds} seeds ({few} of tpe), {BATCH} children at a time"),
        "Accuracy points from the optimum of the child that would be the answer, mean over the seeds and its standard",
        "error; `needs`: evaluations after which the mean is what guided's is at 100. A search is told accuracies with",
        "noise (0.1 points, none on supernet-corner) and answers with the best it was told: more can make that worse.",
        "The optimum is known by construction (planted) or from all children (supernet-corner); elsewhere the best",
        "child that any of these searches, or evolutions of 300,000 children on the surface itself, have found.",
        "",
        *table_of_regrets(found),
        "",
        *verdict(found),
        "",
        f"Guided at {AT} evaluations, by how many children it proposes at a time ({few} seeds):",
        "",
        *table_of_batches(results, tried[:5:4], few),
        "",
        f"Pareto fronts (`front=True`, {few} seeds): hypervolume, percent of that of all children found here:",
        "",
        "| surface | " + " | ".join(f"{name} at {budget}" for name, budget in FRONT_BUDGETS.items()) + " |",
        "|---" * (len(FRONT_BUDGETS) + 1) + "|",
        *(
            "| " + " | ".join([name, *(f"{found[:, -1].mean():.2f}" for found in curves.values())]) + " |"
            for name, curves in fronts.items()
        ),
        "",
        f"![regret over evaluations]({arguments.output.stem}.png)",
        f"![hypervolume over evaluations]({arguments.output.stem}_fronts.png)",
    ]
    arguments.output.write_text("\n".join(lines) + "\n")
    plot(found, arguments.output.with_suffix(".png"), "accuracy points from the optimum", log=True)
    plot(fronts, arguments.output.with_name(f"{arguments.output.stem}_fronts.png"), "hypervolume, %", log=False)


if __name__ == "__main__":
    main()
