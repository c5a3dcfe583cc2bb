"""The interface of a search strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwnas.space import Architecture, Genes, SearchSpace


@dataclass(frozen=True, slots=True)
class Scored:
    """A child and its validation accuracy, 0 to 1."""

    arch: Architecture
    accuracy: float


class Strategy(ABC):
    """Proposes feasible children, a few at a time.

    `propose` is called with everything that this search has evaluated so far, in order, until the evaluations are
    spent or it returns none. It must return children that keep the limits and are not in the history, and it draws
    chance from `rng` alone: the same history and seed then give the same proposals, so that an interrupted search
    goes on where it was.

    Args:
        space: the search space.
        feasible: which of some children, as genes (num_archs, num_genes), keep the limits: (num_archs,) bool.
        budget: evaluations there will be.
        rng: source of chance.
    """

    def __init__(
        self,
        space: SearchSpace,
        feasible: Callable[[Genes], NDArray[np.bool_]],
        budget: int,
        rng: np.random.Generator,
    ) -> None:
        self.space, self.feasible, self.budget, self.rng = space, feasible, budget, rng

    @abstractmethod
    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """The next children to evaluate, different ones, at most `count`; none when the strategy finds no further."""
