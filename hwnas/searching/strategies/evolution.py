"""The evolutionary search of Single Path One-Shot (Guo et al., ECCV 2020, arXiv 1904.00420, 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hwnas.searching.fronts import by_rank
from hwnas.searching.strategies.base import Scored, Strategy
from hwnas.space import Architecture, Genes

ROUNDS = 20
DRAWN = 64  # for each child that is wanted


class Evolution(Strategy):
    """Mutations and crossovers of the best children, generation by generation.

    As published: population 50, of the best 10 half mutated with probability 0.1 for each choice, half crossed, for
    20 generations. With a budget under 1,000 the population is smaller, down to 10 children of the best 5, so that
    there are generations. With `front`, the best are those of the first Pareto fronts.

    Args:
        space, feasible, size, budget, rng, front, known: see `Strategy`.
    """

    probability = 0.1

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        rng = self.rng(history)
        genes, accuracies = self.arrays(history)
        population = min(50, max(10, self.budget // 20))
        whole = len(genes) // population * population
        if not whole:
            return self.fill(self.random(rng), genes, count)
        sizes = self.size(genes[:whole]) if self.front else None
        parents = genes[by_rank(accuracies[:whole], sizes, max(5, population // 5))]
        mutants = self.fill(self._mutants(parents, rng), genes, (count + 1) // 2)
        known = np.concatenate([genes, self.space.encode(mutants)])
        children = self.fill(self._children(parents, rng), known, count - len(mutants))
        known = np.concatenate([known, self.space.encode(children)])
        return [*mutants, *children, *self.fill(self.random(rng), known, count - len(mutants) - len(children))]

    def _mutants(self, parents: Genes, rng: np.random.Generator) -> Iterator[Genes]:
        for _ in range(ROUNDS):
            yield self.space.mutate_genes(parents[rng.integers(len(parents), size=DRAWN)], rng, self.probability)

    def _children(self, parents: Genes, rng: np.random.Generator) -> Iterator[Genes]:
        for _ in range(ROUNDS):
            a, b = parents[rng.integers(len(parents), size=(2, DRAWN))]
            yield self.space.crossover_genes(a, b, rng)
