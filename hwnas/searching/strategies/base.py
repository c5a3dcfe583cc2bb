"""The interface of a search strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.searching.strategies.sampling import FeasibleSampler
from hwnas.space import Architecture, FloatArray, Genes, SearchSpace

Feasible: TypeAlias = Callable[[Genes], NDArray[np.bool_]]
Size: TypeAlias = Callable[[Genes], FloatArray]


@dataclass(frozen=True, slots=True)
class Scored:
    """A child and its validation accuracy, 0 to 1."""

    arch: Architecture
    accuracy: float


class Strategy(ABC):
    """Proposes feasible children, a few at a time.

    `propose` is called with the history, all that this strategy proposed, in order, until the evaluations are spent or
    it returns none. What it returns keeps the limits, is neither known nor in the history, and is a function of the
    history and of what the strategy was made with: so an interrupted search goes on where it was, and a second worker
    finds the same.

    Args:
        space: the search space.
        feasible: which of some children, as genes (num_archs, num_genes), keep the limits: (num_archs,) bool.
        size: their share of the limits used, (num_archs,): up to 1 where a child keeps them, more or less.
        budget: evaluations there will be, beside those known before.
        rng: source of chance; one number is drawn from it.
        front: look for the best children of every size instead of the best one.
        known: children that were evaluated for other searches: those that keep the limits are what it starts from, the
            others it may learn from.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        feasible: Feasible,
        size: Size,
        budget: int,
        rng: np.random.Generator,
        front: bool = False,
        known: Sequence[Scored] = (),
    ) -> None:
        self.space, self.feasible, self.size, self.budget, self.front = space, feasible, size, budget, front
        self.seed = int(rng.integers(2**31))
        self.sampler = FeasibleSampler(space, feasible, size)
        self._rows: dict[Architecture, Genes] = {}
        genes, accuracies = self._arrays(known)
        keeps = feasible(genes) if len(genes) else np.empty(0, dtype=bool)
        self.known, self.beyond = (genes[keeps], accuracies[keeps]), (genes[~keeps], accuracies[~keeps])

    @abstractmethod
    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """The next children to evaluate, different ones, at most `count`; none when the strategy finds no further."""

    # ------------------------------------------------------------ for those who propose

    def rng(self, history: Sequence[Scored]) -> np.random.Generator:
        """Chance for the next proposal, the same whenever it is asked for."""
        return np.random.default_rng([self.seed, len(history)])

    def arrays(self, history: Sequence[Scored]) -> tuple[Genes, FloatArray]:
        """All evaluated children that keep the limits: those known before, then the history.

        Returns:
            Genes (num_scored, num_genes) and accuracies (num_scored,).
        """
        genes, accuracies = self._arrays(history)
        return np.concatenate([self.known[0], genes]), np.concatenate([self.known[1], accuracies])

    def _arrays(self, history: Sequence[Scored]) -> tuple[Genes, FloatArray]:
        for scored in history:
            if scored.arch not in self._rows:
                self._rows[scored.arch] = self.space.encode([scored.arch])[0]
        rows = [self._rows[scored.arch] for scored in history]
        genes = np.stack(rows) if rows else np.empty((0, len(self.space.genes)), dtype=np.int8)
        return genes, np.array([scored.accuracy for scored in history])

    def fill(self, batches: Iterable[Genes], known: Genes, count: int) -> list[Architecture]:
        """The first different children of the batches that are feasible and not known.

        Args:
            batches: genes (any number, num_genes), best first; only as many are asked for as it takes.
            known: genes (num_known, num_genes).
            count: at most so many.
        """
        seen = {row.tobytes() for row in known}
        found: list[Architecture] = []
        for batch in batches if count > 0 else ():
            new = unseen(batch[self.feasible(batch)], seen)[: count - len(found)]
            found += [self.space.decode(row) for row in new]
            if len(found) == count:
                break
        return found

    def random(self, rng: np.random.Generator, rounds: int = 20) -> Iterator[Genes]:
        """Feasible children drawn at random, for `fill`; ends, as a small space holds no more new ones."""
        return islice(self.sampler.draws(rng), rounds)


def unseen(genes: Genes, seen: set[bytes]) -> Genes:
    """Those of some children, (any number, num_genes), that were not seen before, each once; they are seen then."""
    new = []
    for row in genes:
        key = row.tobytes()
        new.append(key not in seen)
        seen.add(key)
    return np.asarray(genes[np.array(new, dtype=bool)])
