"""Random children that keep the limits, however few of all do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hwnas.space import FloatArray, Genes, SearchSpace

DRAWS = 1024
ENOUGH = 1 / 64  # share of uniform draws that has to be feasible, or else walks find them
WALKS = 256
SWEEPS = 2  # over all genes, between draws of a walk
FIRST_SWEEPS = 20


class FeasibleSampler:
    """Draws each choice uniformly, given that the child keeps the limits.

    Where enough uniform draws are feasible, the others are thrown away. Where hardly any is, walks have the same
    distribution in the long run: from the smallest child, one gene at a time is drawn anew, and the child stays as it
    was if it would not keep the limits (Gibbs sampling). It is of genes with a choice for blocks that are absent, as
    `SearchSpace.draw_genes` makes them, so a shallow child is as likely as in a uniform draw.

    Args:
        space: the search space.
        feasible: which children, as genes (num_archs, num_genes), keep the limits: (num_archs,) bool.
        size: their share of the limits used, (num_archs,).
    """

    def __init__(
        self,
        space: SearchSpace,
        feasible: Callable[[Genes], NDArray[np.bool_]],
        size: Callable[[Genes], FloatArray],
    ) -> None:
        self.space, self._feasible, self._size = space, feasible, size

    @cached_property
    def share(self) -> float:
        """Of uniform draws that are feasible, estimated from some."""
        return float(self._feasible(self.space.sample_genes(4 * DRAWS, np.random.default_rng(0))).mean())

    def draws(self, rng: np.random.Generator) -> Iterator[Genes]:
        """Batches of feasible children, (any number, num_genes), without end; of the walks, none if they find none."""
        if self.share >= ENOUGH:
            while True:
                genes = self.space.sample_genes(DRAWS, rng)
                yield genes[self._feasible(genes)]
        yield from self._walks(rng)

    @cached_property
    def _walkers(self) -> Genes:
        """Where walks have come to that started from the smallest child, a choice for every gene."""
        rng = np.random.default_rng(0)
        start = self.space.encode([self.space.smallest()])
        genes = np.where(start >= 0, start, self.space.draw_genes(WALKS, rng))
        self._sweep(genes, FIRST_SWEEPS, rng)
        return genes

    def _walks(self, rng: np.random.Generator) -> Iterator[Genes]:
        genes = self._walkers.copy()
        while True:
            self._sweep(genes, SWEEPS, rng)
            masked = self.space.mask_absent(genes.copy())
            masked = masked[self._feasible(masked)]
            if not len(masked):
                return
            yield masked

    def _sweep(self, genes: Genes, sweeps: int, rng: np.random.Generator) -> None:
        """Let walks go on, in place; one that has not found a feasible child yet goes where the limits are nearer."""
        masked = self.space.mask_absent(genes.copy())
        feasible, sizes = self._feasible(masked), self._size(masked)
        choices = np.array([len(gene.choices) for gene in self.space.genes])
        free = np.flatnonzero(choices > 1)
        rows = np.arange(len(genes))
        for _ in range(sweeps * len(free)):
            columns = rng.choice(free, size=len(genes))
            tried = genes.copy()
            tried[rows, columns] = rng.integers(choices[columns])
            masked = self.space.mask_absent(tried.copy())
            fits, size = self._feasible(masked), self._size(masked)
            moves = fits | (~feasible & (size <= sizes))
            genes[moves], feasible[moves], sizes[moves] = tried[moves], fits[moves], size[moves]
