"""Which networks to measure: error of the predictor over the number of measurements, by how they were chosen.

    python benchmarks/sampling.py --cache /tmp/sampling --output benchmarks/results/sampling.md

The published tables (`latency_tables.py`) stand for devices: of their 5,000 networks 500 are held out, and the others
can be measured. `random` takes them as they come; `spread` as `choose_children` does, evenly over sizes and choices;
`active` begins as `spread` does with 10, then takes what tells most of all the others (`most_telling`, from a random
1,024 of the table), in batches that end at the sizes shown. The predictor is kind gp throughout.

What is done is kept in the cache: an interrupted run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from environment import heading
from latency_tables import SUMS, Table, fbnet, ofa
from numpy.typing import NDArray

from hwnas import measuring, predictors
from hwnas.layers import LayerSums
from hwnas.measuring.active import most_telling
from hwnas.measuring.children import spread_rows
from hwnas.predictors import make_predictor, report

HELD_OUT = 500
SIZES = (5, 10, 20, 30, 50, 100)
BEGINNING = 10
POOL = 1024
STRATEGIES = ("random", "spread", "active")
MEASURES = {
    "mape_pct": "Mean absolute error, %",
    "within_10_pct": "% within 10%",
    "spearman": "Spearman",
    "coverage_90": "Coverage of 90% intervals, %",
}
Key = tuple[str, str, str, int]  # table, device, strategy, seed
Rows = NDArray[np.int64]


@cache
def tables() -> dict[str, Table]:
    return {table.name: table for table in (fbnet(), ofa())}


def chosen(table: Table, device: str, strategy: str, seed: int) -> Iterator[tuple[int, Rows, Rows]]:
    """For each size the rows to fit to and to test on."""
    order = np.random.default_rng(seed).permutation(len(table.genes))
    pool, test = order[:-HELD_OUT], order[-HELD_OUT:]
    if strategy == "random":
        yield from ((size, pool[:size], test) for size in SIZES)
        return
    macs = LayerSums(table.space, lambda layer: (layer.macs,))(table.genes[pool])[:, 0]
    ends = [int(np.argmin(macs)), int(np.argmax(macs))]

    def spread(size: int) -> Rows:
        return pool[spread_rows(table.space, table.genes[pool], np.log(macs), ends, size)]

    measured = spread(BEGINNING)
    for size in SIZES:
        if strategy == "spread" or size <= BEGINNING:
            yield size, spread(size), test
            continue
        predictor = make_predictor("gp", table.space)
        predictor.fit_genes(table.genes[measured], table.latency_ms[device][measured])
        rng = np.random.default_rng([seed, len(measured)])
        candidates = rng.permutation(np.setdiff1d(pool, measured))[:POOL]
        told = most_telling(*predictor.covariance_genes(table.genes[candidates]), size - len(measured))
        measured = np.concatenate([measured, candidates[told]])
        yield size, measured, test


def measure(key: Key) -> dict[str, dict[str, float]]:
    """The report for each size."""
    name, device, strategy, seed = key
    table = tables()[name]
    latency = table.latency_ms[device]
    found = {}
    for size, train, test in chosen(table, device, strategy, seed):
        predictor = make_predictor("gp", table.space).fit_genes(table.genes[train], latency[train])
        found[str(size)] = asdict(report(latency[test], *predictor.predict_genes(table.genes[test])))
    return found


def run(arguments: argparse.Namespace) -> dict[Key, dict[str, dict[str, float]]]:
    """All reports, from the cache where it has them."""
    folders = [Path(next(iter(package.__path__))) for package in (predictors, measuring)]
    text = b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    text += Path(__file__).read_bytes()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    file = arguments.cache / f"{hashlib.sha256(text).hexdigest()[:12]}.jsonl"
    done: dict[Key, Any] = {}
    if file.exists():
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # the last line may be cut off
                entry = json.loads(line)
                done[tuple(entry["key"])] = entry["reports"]
    wanted: list[Key] = [
        (name, device, strategy, seed)
        for seed in range(arguments.seeds)
        for name in arguments.tables
        for device in tables()[name].latency_ms
        if device not in SUMS
        for strategy in STRATEGIES
    ]
    with file.open("a") as out:
        for key in wanted:
            if key not in done:
                done[key] = measure(key)
                out.write(json.dumps({"key": key, "reports": done[key]}) + "\n")
                out.flush()
    return {key: done[key] for key in wanted}


def write(results: dict[Key, dict[str, dict[str, float]]], arguments: argparse.Namespace, seconds: float) -> str:
    counted = "1 seed" if arguments.seeds == 1 else f"{arguments.seeds} seeds"
    lines = heading(
        "Which networks to measure: error over the number of measurements",
        f"{counted}, {HELD_OUT} networks held out each, predictor kind gp; 1 process, {seconds:.0f} s in "
        "this run (the rest from its cache)",
    )
    lines += [*(__doc__ or "").split("\n\n")[2].splitlines(), ""]
    for name in arguments.tables:
        devices = sorted({device for table, device, _, _ in results if table == name})

        def mean(strategy: str, size: int, measure: str, of: list[str], name: str = name) -> float:
            seeds = range(arguments.seeds)
            return float(np.mean([results[name, d, strategy, seed][str(size)][measure] for d in of for seed in seeds]))

        lines += [f"## {name}: means over {len(devices)} end-to-end devices", ""]
        for measure, title in MEASURES.items():
            digits = 3 if measure == "spearman" else 1
            lines += [f"{title}:", "", f"| chosen | {' | '.join(map(str, SIZES))} |", "|---" * (len(SIZES) + 1) + "|"]
            for strategy in STRATEGIES:
                row = (f"{mean(strategy, size, measure, devices):.{digits}f}" for size in SIZES)
                lines.append(f"| {strategy} | {' | '.join(row)} |")
            lines.append("")
        for strategy in STRATEGIES[1:]:
            better = {
                size: sum(
                    mean(strategy, size, "mape_pct", [d]) < mean("random", size, "mape_pct", [d]) for d in devices
                )
                for size in SIZES
            }
            told = ", ".join(f"{number} at {size}" for size, number in better.items())
            lines += [f"Devices on which `{strategy}` errs less than `random`, of {len(devices)}: {told}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=["FBNet", "OFA"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cache", type=Path, required=True, help="folder of what is done")
    parser.add_argument("--output", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = run(arguments)
    text = write(found, arguments, time.perf_counter() - start)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
