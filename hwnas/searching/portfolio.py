"""Portfolios: the fewest children that serve many devices, none of which loses much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwnas.searching.costs import Floats
from hwnas.searching.result import Candidate, Result
from hwnas.searching.searcher import Searcher
from hwnas.searching.strategies import Scored

TOLERANCE = 0.002  # accuracy that an answer may lose, by default
SOLVER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A child of a portfolio.

    Attributes:
        candidate: the child, with what is known of it on every device of the portfolio.
        serves: the questions that it answers, by name, each with the accuracy that is lost there against the best
            child that was found for it.
    """

    candidate: Candidate
    serves: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.candidate.to_dict(), "serves": dict(self.serves)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Portfolio:
    """The answers to several questions, and the fewest children that answer all of them.

    Attributes:
        results: the best child for each question by itself, by the question's name (`pixel-20ms`), in order.
        members: the fewest children of which one answers each question, the most accurate first.
        tolerance: accuracy that an answer may lose against the question's best child.
        exact: whether it is certain that fewer will not do, among the children that were evaluated.
    """

    results: Mapping[str, Result]
    members: tuple[Member, ...]
    tolerance: float
    exact: bool

    def child_for(self, name: str) -> Candidate:
        """The member that answers a question.

        Raises:
            KeyError: there is no such question.
        """
        return {name: member.candidate for member in self.members for name in member.serves}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the single answers the names and what was asked: each has its own document."""
        return {
            "answers": {
                name: {
                    "limits": [dict(limit) for limit in result.limits],
                    "best": result.best.to_dict(),
                    "devices": result.to_dict()["devices"],
                }
                for name, result in self.results.items()
            },
            "members": [member.to_dict() for member in self.members],
            "tolerance": self.tolerance,
            "exact": self.exact,
        }


def choose_members(
    searchers: Mapping[str, Searcher], results: Mapping[str, Result], tolerance: float
) -> tuple[list[Member], bool]:
    """The fewest children that serve all of some finished searches, measured wherever that is possible.

    Any child that one of the searches evaluated may serve another. What is chosen is measured on the devices that it
    is to serve, and the choice is repeated until nothing is left to measure.

    Args:
        searchers: after their `run`, by the question's name.
        results: what they found.
        tolerance: accuracy that each may lose.

    Returns:
        The members, and whether the choice is certainly of the fewest.
    """
    scored = list({one.arch: one for searcher in searchers.values() for one in searcher.pool}.values())
    accuracies = np.array([one.accuracy for one in scored])
    best = np.array([results[name].best.accuracy for name in searchers])
    close = accuracies[:, None] >= best - tolerance
    while True:
        keeps = [searcher.keeps([one.arch for one in scored]) for searcher in searchers.values()]
        serves = close & np.stack(keeps, axis=1)
        chosen, exact = fewest(serves, accuracies)
        served = _assign(serves[chosen])
        measured = [
            searcher.settle([scored[chosen[row]].arch])
            for row, searcher in zip(served, searchers.values(), strict=True)
        ]
        if not any(measured):
            break
    members = []
    for row, index in enumerate(chosen):
        losses = {
            name: float(best[question] - accuracies[index])
            for question, name in enumerate(searchers)
            if served[question] == row
        }
        members.append(Member(candidate=_everywhere(scored[index], searchers), serves=losses))
    return members, exact


def fewest(serves: NDArray[np.bool_], accuracies: Floats) -> tuple[list[int], bool]:
    """The fewest children of which at least one serves each question: a minimum set cover.

    Solved exactly as an integer program by HiGHS; if that takes over ten seconds, which far more than a hundred
    questions would, its best cover so far.

    Args:
        serves: whether a child serves a question, (num_archs, num_questions), with a true value in every column.
        accuracies: (num_archs,); among covers of equally many children the one with the highest sum is taken.

    Returns:
        Indices of children, the most accurate first, and whether fewer are certainly not enough.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    order = np.argsort(-accuracies, kind="stable")
    _, first = np.unique(serves[order], axis=0, return_index=True)  # of those that serve the same, the best
    rows = order[np.sort(first)]
    rows = rows[serves[rows].any(axis=1)]
    # What is lost is below 1 in all, so that it decides between covers of equally many only.
    cost = 1 + (1 - accuracies[rows]) / (serves.shape[1] + 1)
    found = milp(
        cost,
        constraints=LinearConstraint(serves[rows].T.astype(float), lb=1),
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"time_limit": SOLVER_S},
    )
    return [int(row) for row, taken in zip(rows, found.x, strict=True) if taken > 0.5], found.status == 0


def _assign(serves: NDArray[np.bool_]) -> list[int]:
    """For each question the member that serves it: the first, which is the most accurate; (num_members, questions)."""
    return [int(row) for row in serves.argmax(axis=0)]


def _everywhere(scored: Scored, searchers: Mapping[str, Searcher]) -> Candidate:
    """The child with its costs on all devices."""
    candidates = [searcher.candidate(scored) for searcher in searchers.values()]
    return replace(
        candidates[0],
        latency={name: cost for candidate in reversed(candidates) for name, cost in candidate.latency.items()},
        energy={name: cost for candidate in reversed(candidates) for name, cost in candidate.energy.items()},
    )
