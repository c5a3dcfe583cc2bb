"""BigNAS's coarse-to-fine architecture selection (Yu et al., ECCV 2020, arXiv 2003.11142, 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from hwnas.searching.fronts import by_rank
from hwnas.searching.strategies.base import Feasible, Scored, Size, Strategy
from hwnas.space import Architecture, Genes, SearchSpace

MUTATIONS = 128  # drawn at once
ROUNDS = 20
PROBABILITY = 0.1  # of a choice to be drawn anew, as in published reproductions
GOLDEN = (5**0.5 - 1) / 2
COARSE_SHARE = 0.4  # of the evaluations


def skeletons(space: SearchSpace, feasible: Feasible, size: Size, *, front: bool) -> Genes:
    """Feasible skeletons in the order in which they are worth trying, (num_skeletons, num_genes).

    The smallest child first; then the largest share of the limit first, and the resolutions in turn. With `front`, all
    sizes in turn, ever closer to each other (steps of the golden ratio).
    """
    genes = space.encode(space.skeletons())
    genes = genes[np.argsort(-size(genes), kind="stable")]
    genes = genes[feasible(genes)]
    if front:
        order = np.argsort(np.arange(len(genes)) * GOLDEN % 1, kind="stable")
    else:
        place = np.zeros(len(genes), dtype=int)  # among those of the same resolution
        for index in range(len(space.resolution)):
            same = genes[:, 0] == index
            place[same] = np.arange(same.sum())
        order = np.argsort(place, kind="stable")
    smallest = space.encode([space.smallest()])
    return np.concatenate([smallest[feasible(smallest)], genes[order]])


class CoarseToFine(Strategy):
    """First network-wise skeletons, then stage-wise mutations of the best child.

    Coarse: the smallest child, so that the answer is never worse than it; then the grid of `SearchSpace.skeletons`,
    those within the limits, largest share of the limit first and the resolutions in turn, until 40% of the evaluations
    are spent. Fine: every choice of the best child so far is replaced with probability 0.1; where no new feasible child
    turns up, the probability grows. The child that is mutated uses at least half of what the costliest one so far uses:
    the sandwich rule trains the smallest child most, and near it little is better.

    With `front`, skeletons of all sizes in turn, and a child of the Pareto front is mutated, drawn anew for each batch.

    Args:
        space, feasible, size, budget, rng, front, known: see `Strategy`.
    """

    @cached_property
    def _skeletons(self) -> Genes:
        return skeletons(self.space, self.feasible, self.size, front=self.front)

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        rng = self.rng(history)
        genes, accuracies = self.arrays(history)
        wanted = max(1, round(COARSE_SHARE * self.budget))
        coarse = self.fill([self._skeletons[:wanted]], genes, count)
        if coarse:
            return coarse
        if not len(genes):  # no skeleton is feasible
            return self.fill([self.space.encode([self.space.smallest()]), *self.random(rng)], genes, count)
        sizes = self.size(genes)
        if self.front:
            ranks = by_rank(accuracies, sizes, max(1, len(genes) // 10))
            parent = genes[rng.choice(ranks)]
        else:
            costly = np.flatnonzero(sizes >= sizes.max() / 2)
            parent = genes[costly[np.argmax(accuracies[costly])]]
        return self.fill(self._mutants(parent, rng), genes, count)

    def _mutants(self, parent: Genes, rng: np.random.Generator) -> Iterator[Genes]:
        parents = np.repeat(parent[None], MUTATIONS, axis=0)
        for number in range(ROUNDS):
            yield self.space.mutate_genes(parents, rng, min(1.0, PROBABILITY * 1.15**number))
