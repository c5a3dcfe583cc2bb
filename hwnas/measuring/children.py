"""Which children to measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hwnas.layers import LayerSums
from hwnas.space import Architecture, Genes, SearchSpace


def reference_child(space: SearchSpace) -> Architecture:
    """The child that others are timed in turns with: the lower middle of every choice."""
    return space.walk(lambda _name, choices: choices[(len(choices) - 1) // 2])


def choose_children(
    space: SearchSpace,
    count: int,
    rng: np.random.Generator,
    macs: Callable[[Genes], NDArray[np.float64]] | None = None,
    num_candidates: int = 16_384,
) -> list[Architecture]:
    """Children to measure: the smallest, the biggest, and others spread evenly over sizes and choices.

    Uniform sampling clusters at middle sizes, as sums of many choices do. Here the range of log-MACs is cut into equal
    parts, one a child, and each part gives the candidate whose choices occur least among those taken before. Any first
    few of the children are spread over the whole range, too.

    Args:
        space: the search space.
        count: of children; fewer are returned where the space has fewer.
        rng: of the candidates.
        macs: of genes (num_archs, num_genes), (num_archs,) or (num_archs, 1); worked out if not given.
        num_candidates: drawn at random, from the small ones to the big ones.
    """
    ends = [space.smallest(), space.largest()]
    if count <= 2:
        return list(dict.fromkeys(ends))[:count]
    genes = np.unique(np.concatenate([space.encode(ends), spread_candidates(space, num_candidates, rng)]), axis=0)
    if macs is None:
        macs = LayerSums(space, lambda layer: (layer.macs,))
    size = np.log(macs(genes).reshape(len(genes)))
    taken = {int(np.flatnonzero((genes == row).all(axis=1))[0]): None for row in space.encode(ends)}  # in order
    return [space.decode(genes[row]) for row in spread_rows(space, genes, size, list(taken), count)]


def spread_rows(
    space: SearchSpace, genes: Genes, size: NDArray[np.float64], first: Sequence[int], count: int
) -> list[int]:
    """Of candidates, rows that are spread evenly over sizes and choices, `first` first, as `choose_children` says.

    Args:
        space: the search space.
        genes: of the candidates, (num_archs, num_genes).
        size: of the candidates, log-MACs, (num_archs,).
        first: two rows or more.
        count: of rows, more than two; fewer are returned where there are fewer.
    """
    taken = list(first)
    edges = np.linspace(size.min(), size.max(), count - 1)
    parts = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, count - 3)
    free = np.ones(len(genes), dtype=bool)
    free[taken] = False
    for part in _bisecting_order(count - 2):
        if not free.any():
            break
        gaps = np.abs(parts - part)  # where a part has no candidate, those of the nearest part that has one
        near = np.flatnonzero(free & (gaps == gaps[free].min()))
        best = int(near[np.argmax(_rarity(space, genes[near], genes[taken]))])
        free[best] = False
        taken.append(best)
    return taken


def spread_candidates(space: SearchSpace, count: int, rng: np.random.Generator) -> Genes:
    """Random children of all sizes as genes, (count, num_genes).

    Each leans to small or big choices as a whole, and each of its choices a little by itself.
    """
    lean = rng.uniform(-2.5, 2.5, size=(count, 1))
    columns = []
    for gene in space.genes:
        position = rng.random((count, 1)) ** np.exp(lean + rng.normal(0, 0.7, size=(count, 1)))
        columns.append((position * len(gene.choices)).astype(np.int8).clip(max=len(gene.choices) - 1))
    return space.mask_absent(np.concatenate(columns, axis=1))


def _rarity(space: SearchSpace, genes: Genes, taken: Genes) -> NDArray[np.float64]:
    """How seldom the choices of some children occur among those taken, (num_archs,).

    Resolution, widths, depths, kernels and expand ratios weigh the same, however many of them a child has.
    """
    kinds = [gene.name.rpartition(".")[2] for gene in space.genes]
    total = np.zeros(len(genes))
    for index, kind in enumerate(kinds):
        often = np.bincount(taken[:, index] + 1, minlength=128)  # 0: the block is absent
        total += 1 / (1 + often[genes[:, index] + 1]) / kinds.count(kind)
    return total


def _bisecting_order(count: int) -> list[int]:
    """0 to count - 1 in an order of which every beginning is spread: by the reversed bits (van der Corput)."""
    bits = max(count - 1, 1).bit_length()
    reverse = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits))
    return [index for index in reverse if index < count]
