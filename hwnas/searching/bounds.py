"""Bounds: which children keep all limits, and what to say where none or all of them do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import InputError, LimitError
from hwnas.searching.costs import Cost, Floats
from hwnas.searching.limits import Limit, show_cost
from hwnas.space import Architecture, Genes, SearchSpace

DRAWS = 4096  # random children that a search for the least starts from
TRIES = 512  # changes of several choices at once where no single one helps


@dataclass(frozen=True)
class Bounds:
    """The limits of a search with what each bounds.

        bounds = Bounds(space, [(LatencyLimit("cpu", 12), DeviceCost(predictor)), (MacsLimit(6e8), macs)])
        genes = genes[bounds.feasible(genes)]

    Attributes:
        space: of the children.
        terms: each limit with its cost; none means that every child will do.
        confidence: with which a predicted cost has to keep its limit, at least 0.5 and under 1.

    Raises:
        InputError: a confidence that makes no sense, or a limit given twice.
    """

    space: SearchSpace
    terms: Sequence[tuple[Limit, Cost]]
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence {self.confidence}: must be at least 0.5 and under 1")
        seen: dict[tuple[str, str | None], Limit] = {}
        for limit, _ in self.terms:
            before = seen.setdefault((limit.kind, limit.device), limit)
            if before is not limit:
                raise InputError(f"{before.describe()} and {limit.describe()}: give one limit of each kind and device")

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits alone."""
        return tuple(limit for limit, _ in self.terms)

    def describe(self) -> str:
        """All limits in a few words, `12 ms on cpu and 600M MACs`."""
        return " and ".join(limit.describe() for limit in self.limits) or "no limit"

    def over(self, genes: Genes) -> Floats:
        """By how much each child may exceed each limit, in its unit, (num_archs, num_limits); kept where 0 or below."""
        values = np.empty((len(genes), len(self.terms)))
        for column, (limit, cost) in enumerate(self.terms):
            values[:, column] = cost.upper(genes, self.confidence) - limit.value
        return values

    def feasible(self, genes: Genes) -> NDArray[np.bool_]:
        """Which children keep all limits, (num_archs,) for genes (num_archs, num_genes)."""
        return np.asarray((self.over(genes) <= 0).all(axis=1))

    def share(self, genes: Genes) -> Floats:
        """How much of the limits each child is expected to use: the largest share over them, (num_archs,)."""
        return _largest([cost.expected(genes) / limit.value for limit, cost in self.terms], len(genes))

    # ------------------------------------------------------------ none, or all

    def check(self) -> list[str]:
        """Look whether some child keeps all limits.

        Returns:
            What a user should know: the limits that every child keeps.

        Raises:
            LimitError: no child does, as far as a search for one tells. The message has the least possible value of
                each limit that cannot be kept, and the child that has it.
        """
        if not self.possible():
            raise LimitError(self._why_none())
        told = []
        largest = self.space.encode([self.space.largest()])
        for limit, cost in self.terms:
            if cost.upper(largest, self.confidence)[0] > limit.value:
                continue
            _, most = extreme(self.space, lambda genes, cost=cost: -cost.upper(genes, self.confidence))  # type: ignore[misc]
            if -most <= limit.value:
                biggest = show_cost(-most, limit.unit)
                told.append(f"the limit of {limit.describe()} is above the biggest child ({biggest}): all keep it")
        return told

    def least(self, limit: Limit) -> tuple[float, Architecture]:
        """The least possible value of what a limit bounds, with the confidence asked for, and the child that has it."""
        cost = next(cost for known, cost in self.terms if known == limit)
        row, value = extreme(self.space, lambda genes: cost.upper(genes, self.confidence))
        return value, self.space.decode(row)

    def possible(self) -> bool:
        """Whether some child keeps all limits, as far as a search for one tells."""
        if self.feasible(self.space.encode([self.space.smallest()]))[0]:
            return True
        return bool(self._largest_share(self._nearest()[None])[0] <= 1)

    def _largest_share(self, genes: Genes) -> Floats:
        """`share` with the confidence asked for."""
        return _largest([cost.upper(genes, self.confidence) / limit.value for limit, cost in self.terms], len(genes))

    def _nearest(self) -> Genes:
        """The genes of the child that comes closest to keeping all limits, (num_genes,)."""
        return extreme(self.space, self._largest_share)[0]

    def _why_none(self) -> str:
        sure = f" with {self.confidence:.0%} confidence" if any(limit.device for limit in self.limits) else ""
        none = f"no child of space {self.space.name!r} keeps {self.describe()}{sure}"
        alone = [(limit, *self.least(limit)) for limit in self.limits]
        hopeless = [
            f"the least possible is {show_cost(value, limit.unit)}{_where(limit)} ({arch.describe()})"
            for limit, value, arch in alone
            if value > limit.value
        ]
        if hopeless:
            return f"{none}: {'; '.join(hopeless)}"
        row = self._nearest()
        nearest = ", ".join(
            f"{show_cost(float(cost.upper(row[None], self.confidence)[0]), limit.unit)}{_where(limit)}"
            for limit, cost in self.terms
        )
        return f"{none}: each can be kept alone; nearest to all is {nearest} ({self.space.decode(row).describe()})"


def _largest(shares: Sequence[Floats], num_archs: int) -> Floats:
    return np.max(shares, axis=0, initial=0.0) if shares else np.zeros(num_archs)


def _where(limit: Limit) -> str:
    return f" on {limit.device}" if limit.device else ""


def extreme(space: SearchSpace, objective: Callable[[Genes], Floats], seed: int = 0) -> tuple[Genes, float]:
    """The child with the least of something, as far as a local search tells: its genes (num_genes,), and the value.

    From the smallest child, the biggest, and the best of some thousand random ones: the best change of one choice
    again and again, then random changes of a few choices at once, until none helps. Where the objective is a sum over
    blocks this is nearly always the least there is, and it takes some 10,000 values of the objective.

    Args:
        space: of the children.
        objective: (num_archs,) for genes (num_archs, num_genes).
        seed: of the random children and changes.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(gene.choices) for gene in space.genes])
    drawn = space.draw_genes(DRAWS, rng)  # genes of absent blocks too, for greater depths

    def values(complete: Genes) -> Floats:
        return objective(space.mask_absent(complete.copy()))

    starts = [np.zeros(len(sizes), np.int8), (sizes - 1).astype(np.int8), drawn[np.argmin(values(drawn))]]
    best = min((_descend(start, space, values, rng) for start in starts), key=lambda found: found[1])
    return space.mask_absent(best[0][None].copy())[0], best[1]


def _descend(
    row: Genes, space: SearchSpace, values: Callable[[Genes], Floats], rng: np.random.Generator
) -> tuple[Genes, float]:
    sizes = np.array([len(gene.choices) for gene in space.genes])
    where = np.repeat(np.arange(len(sizes)), sizes)
    what = np.concatenate([np.arange(size) for size in sizes]).astype(np.int8)
    best = float(values(row[None])[0])
    while True:
        single = np.repeat(row[None], len(where), axis=0)
        single[np.arange(len(where)), where] = what
        costs = values(single)
        if costs.min() >= best:
            anew = rng.random((TRIES, len(sizes))) < min(1.0, 3 / len(sizes))
            single = np.where(anew, space.draw_genes(TRIES, rng), row)
            costs = values(single)
            if costs.min() >= best:
                return row, best
        row, best = single[np.argmin(costs)], float(costs.min())
