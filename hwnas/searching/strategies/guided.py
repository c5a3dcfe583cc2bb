"""Search guided by a model of the accuracy, fitted to the children that were evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from hwnas.searching.fronts import by_rank, gains
from hwnas.searching.strategies.accuracy_model import AccuracyModel, Features, Posterior
from hwnas.searching.strategies.base import Scored, Strategy, unseen
from hwnas.searching.strategies.coarse_to_fine import skeletons
from hwnas.space import Architecture, FloatArray, Genes

FIRST = 16  # evaluated before there is a model
GENERATIONS, POPULATION, PARENTS = 12, 1500, 200
RATES = (0.02, 0.05, 0.15)  # probabilities of a choice to be drawn anew
BOLDNESS = 2.0  # standard deviations that count as good in the boldest choice, while nothing is evaluated
CYCLE = 8  # choices from the surest to the boldest one


class Guided(Strategy):
    """Evolves many thousand children on a model of the accuracy, and evaluates the most promising few.

    First the smallest child, skeletons near the limit and random children. Then, for each batch: a Gaussian process is
    fitted to all that is known (`AccuracyModel`); an evolution on its predictions finds candidates; of these the one
    with the best mean is taken, then ones for which uncertainty counts more and more, in cycles of 8, each time as if
    those before had been evaluated (GP-BUCB: Desautels et al., JMLR 2014), so that a batch is diverse. Uncertainty
    counts less as the evaluations are spent.

    Known children beyond the limits take part in the fit only.

    With `front`, candidates are evolved on accuracy and size, and taken by how much they would add to the hypervolume.

    Args:
        space, feasible, size, budget, rng, front, known: see `Strategy`.
    """

    @cached_property
    def _first(self) -> Genes:
        """Children to begin with, (num_archs, num_genes): half skeletons, half random."""
        drawn = next(self.random(np.random.default_rng(self.seed)), self._skeletons)
        half = max(1, self._wanted // 2)
        return np.concatenate([self._skeletons[:half], drawn[: self._wanted]])

    @cached_property
    def _skeletons(self) -> Genes:
        return skeletons(self.space, self.feasible, self.size, front=self.front)

    @property
    def _wanted(self) -> int:
        return min(FIRST, max(2, self.budget // 4))

    @cached_property
    def _features(self) -> Features:
        drawn = islice(self.random(np.random.default_rng(self.seed)), 4)
        return Features(self.space, self.size, np.concatenate([self._first, *drawn])[:2000])

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        rng = self.rng(history)
        genes, accuracies = self.arrays(history)
        if len(genes) < self._wanted:
            return self.fill(chain([self._first], self.random(rng)), genes, count)
        if not len(self._first):  # nothing keeps the limits
            return []
        model = AccuracyModel(
            self._features,
            np.concatenate([self.beyond[0], genes]),
            np.concatenate([self.beyond[1], accuracies]),
        )
        boldness = BOLDNESS * max(0.0, 1 - len(history) / self.budget)
        candidates = self._evolve(model, genes, accuracies, boldness, rng)
        chosen = self._choose(Posterior(model, candidates), candidates, genes, accuracies, boldness, count)
        return self.fill(chain([candidates[chosen]], self.random(rng)), genes, count)

    def _evolve(
        self, model: AccuracyModel, genes: Genes, accuracies: FloatArray, boldness: float, rng: np.random.Generator
    ) -> Genes:
        """New feasible children that the model thinks best, (at most `POPULATION`, num_genes)."""
        keep = self.feasible(genes)
        best = genes[keep][np.argsort(-accuracies[keep], kind="stable")[:PARENTS]]
        drawn = next(self.random(rng), best)
        seen: set[bytes] = set()
        pool = unseen(np.concatenate([best, self._skeletons, drawn[:POPULATION]]), seen)
        scores = self._scores(model, pool, boldness)
        for _ in range(GENERATIONS):
            parents = pool[self._ranks(scores, pool, PARENTS)]
            a, b = parents[rng.integers(len(parents), size=(2, POPULATION))]
            a[::2] = self.space.crossover_genes(a[::2], b[::2], rng)
            children = self.space.mutate_genes(a, rng, rng.choice(RATES, size=(POPULATION, 1)))
            children = unseen(children[self.feasible(children)], seen)
            pool = np.concatenate([pool, children])
            scores = np.concatenate([scores, self._scores(model, children, boldness)])
        known = {row.tobytes() for row in genes}
        new = np.array([row.tobytes() not in known for row in pool], dtype=bool)
        pool, scores = pool[new], scores[new]
        return np.asarray(pool[self._ranks(scores, pool, POPULATION)])

    def _ranks(self, scores: FloatArray, genes: Genes, count: int) -> NDArray[np.intp]:
        return by_rank(scores, self.size(genes) if self.front else None, count)

    @staticmethod
    def _scores(model: AccuracyModel, genes: Genes, boldness: float) -> FloatArray:
        mean, std = model.predict(genes)
        return mean + boldness / 2 * std

    def _choose(
        self,
        posterior: Posterior,
        candidates: Genes,
        genes: Genes,
        accuracies: FloatArray,
        boldness: float,
        count: int,
    ) -> list[int]:
        """Which candidates to evaluate, the surest first."""
        chosen: list[int] = []
        sizes, known_sizes = self.size(candidates), self.size(genes)
        for number in range(len(genes), len(genes) + min(count, len(candidates))):
            scores = posterior.mean + boldness * (number % CYCLE) / (CYCLE - 1) * posterior.std
            if self.front:
                scores = gains(
                    scores,
                    sizes,
                    np.concatenate([accuracies, posterior.mean[chosen]]),
                    np.concatenate([known_sizes, sizes[chosen]]),
                )
            scores[chosen] = -np.inf
            chosen.append(int(np.argmax(scores)))
            posterior.observe(chosen[-1])
        return chosen
