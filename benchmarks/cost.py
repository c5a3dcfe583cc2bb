"""How many architectures a second get their MACs and parameters: one by one, and in a batch of genes.

    python benchmarks/cost.py

Alternates the ways in one process and prints medians. "one by one" lowers each architecture and sums its layers;
"batch" is `LayerSums` on encoded genes, which search uses. Reference: AttentiveNAS's analytic counter on the live
model costs 5,300 a second, a plain formula over the record 51,600 (measured on a machine of this kind).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from environment import heading

from hwnas.layers import Layer, LayerSums, lower, total_macs, total_params
from hwnas.space import SearchSpace

BATCH, SINGLE, ROUNDS = 200_000, 500, 7


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str) -> list[str]:
    space = SearchSpace.load(name)
    rng = np.random.default_rng(0)
    built = seconds(lambda: LayerSums(space, lambda layer: (layer.macs, layer.params)))
    both = LayerSums(space, lambda layer: (layer.macs, layer.params))
    macs = LayerSums(space, lambda layer: (layer.macs,))
    genes = space.sample_genes(BATCH, rng)
    archs = [space.decode(row) for row in genes[:SINGLE]]

    def one(arch: object) -> tuple[int, int]:
        layers: tuple[Layer, ...] = lower(space, arch)  # type: ignore[arg-type]
        return total_macs(layers), total_params(layers)

    assert np.array_equal(both(genes[:SINGLE]), [one(arch) for arch in archs])
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "one by one": (SINGLE, lambda: [one(arch) for arch in archs]),
        "sample genes + MACs": (BATCH, lambda: macs(space.sample_genes(BATCH, rng))),
        "batch, MACs": (BATCH, lambda: macs(genes)),
        "batch, MACs and parameters": (BATCH, lambda: both(genes)),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, (count, work) in ways.items():
            rates[way].append(count / seconds(work))
    cells = " | ".join(f"{statistics.median(rates[way]):,.0f}" for way in ways)
    return [f"| {name} | {len(space.genes)} | {built:.2f} | {cells} |"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results there too")
    lines = heading("Architectures costed a second", f"median of {ROUNDS} alternating rounds, 1 process")
    lines += [
        "| space | genes | build s | one by one | sample genes + MACs | batch, MACs | batch, MACs and parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SearchSpace.names():
        lines += measure(name)
    text = "\n".join(lines) + "\n"
    print(text)
    output = parser.parse_args().output
    if output is not None:
        output.write_text(text, encoding="utf-8")
