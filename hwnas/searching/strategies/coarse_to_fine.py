"""BigNAS's coarse-to-fine architecture selection (Yu et al., ECCV 2020, arXiv 2003.11142, 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from hwnas.searching.strategies.base import Scored, Strategy
from hwnas.space import Architecture, Genes, SearchSpace

MUTATIONS = 128  # drawn at once
ROUNDS = 20


class CoarseToFine(Strategy):
    """First network-wise skeletons, then stage-wise mutations of the best child.

    Coarse: the smallest child, so that the answer is never worse than it; then the grid of `SearchSpace.skeletons`,
    those within the limits, largest share of the limit first and the resolutions in turn, until `coarse_share` of the
    evaluations is spent. Fine: every choice of the best child so far is replaced with `probability`; where no new
    feasible child turns up, the probability grows. The child that is mutated uses at least half of what the costliest
    one so far uses: the sandwich rule trains the smallest child most, and near it little is better.

    Args:
        space, feasible, budget, rng: see `Strategy`.
        size: the cost by which skeletons are ordered, (num_archs,) for genes (num_archs, num_genes).
        coarse_share: of the evaluations.
        probability: of a choice to be drawn anew; 0.1 as in published reproductions.
    """

    def __init__(
        self,
        space: SearchSpace,
        feasible: Callable[[Genes], NDArray[np.bool_]],
        budget: int,
        rng: np.random.Generator,
        *,
        size: Callable[[Genes], NDArray[np.float64]],
        coarse_share: float = 0.4,
        probability: float = 0.1,
    ) -> None:
        super().__init__(space, feasible, budget, rng)
        self.probability, self._size = probability, size
        skeletons = dict.fromkeys([space.smallest(), *self._feasible_skeletons(size)])
        fits = feasible(space.encode(skeletons))
        self._skeletons = [arch for arch, fit in zip(skeletons, fits, strict=True) if fit]
        self._skeletons = self._skeletons[: max(1, round(coarse_share * budget))]

    def _feasible_skeletons(self, size: Callable[[Genes], NDArray[np.float64]]) -> Iterator[Architecture]:
        archs = list(self.space.skeletons())
        genes = self.space.encode(archs)
        feasible, sizes = self.feasible(genes), size(genes)
        by_resolution: dict[int, list[Architecture]] = {}
        for index in np.argsort(-sizes, kind="stable"):
            if feasible[index]:
                by_resolution.setdefault(archs[index].resolution, []).append(archs[index])
        for turn in zip_longest(*by_resolution.values()):
            yield from (arch for arch in turn if arch is not None)

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        known = {scored.arch for scored in history}
        coarse = [arch for arch in self._skeletons if arch not in known]
        if coarse:
            return coarse[:count]
        if not history:
            return self._first(count)
        sizes = self._size(self.space.encode([scored.arch for scored in history]))
        costly = [scored for scored, size in zip(history, sizes, strict=True) if size >= sizes.max() / 2]
        parent = max(costly, key=lambda scored: scored.accuracy).arch
        return self._mutants(parent, known, count)

    def _mutants(self, parent: Architecture, known: set[Architecture], count: int) -> list[Architecture]:
        found: dict[Architecture, None] = {}  # in order
        for number in range(ROUNDS):
            probability = min(1.0, self.probability * 1.15**number)
            archs = [self.space.mutate(parent, self.rng, probability) for _ in range(MUTATIONS)]
            feasible = self.feasible(self.space.encode(archs))
            for arch, fits in zip(archs, feasible, strict=True):
                if fits and arch not in known:
                    found[arch] = None
                if len(found) == count:
                    return list(found)
        return list(found)

    def _first(self, count: int) -> list[Architecture]:
        """Where no skeleton is feasible: mutations of the smallest child, or itself."""
        smallest = self.space.smallest()
        if self.feasible(self.space.encode([smallest]))[0]:
            return [smallest]
        return self._mutants(smallest, set(), count)
