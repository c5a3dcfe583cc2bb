"""Pareto fronts of accuracy against size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hwnas.space import FloatArray


def by_rank(accuracies: FloatArray, sizes: FloatArray | None, count: int) -> NDArray[np.intp]:
    """Indices of the best children, best first: by accuracy, or by the Pareto front they are on if sizes are given.

    Within a front the ones with the widest gap to their neighbours come first (NSGA-II's crowding distance, Deb et al.
    2002, III.B).

    Args:
        accuracies: (num_archs,).
        sizes: (num_archs,), or None.
        count: at most so many.
    """
    if sizes is None:
        return np.argsort(-accuracies, kind="stable")[:count]
    left = np.lexsort((-accuracies, sizes))
    order: list[NDArray[np.intp]] = []
    while len(left) and sum(map(len, order)) < count:
        before = np.maximum.accumulate(np.concatenate([[-np.inf], accuracies[left][:-1]]))
        best = accuracies[left] > before
        front = left[best]
        order.append(front[np.argsort(-_gaps(accuracies[front], sizes[front]), kind="stable")])
        left = left[~best]
    return np.concatenate(order)[:count] if order else np.empty(0, dtype=np.intp)


def _gaps(accuracies: FloatArray, sizes: FloatArray) -> FloatArray:
    """Crowding distances along a front that is sorted by size, (num_archs,)."""
    gaps = np.full(len(sizes), np.inf)
    if len(sizes) > 2:
        gaps[1:-1] = sum((values[2:] - values[:-2]) / np.ptp(values) for values in (accuracies, sizes))
    return gaps


def hypervolume(accuracies: FloatArray, sizes: FloatArray) -> float:
    """The area that children dominate, (num_archs,) each, up to size 1 and down to accuracy 0."""
    edges, best = _steps(accuracies, sizes)
    return float(best @ np.diff(edges))


def gains(accuracies: FloatArray, sizes: FloatArray, others: FloatArray, other_sizes: FloatArray) -> FloatArray:
    """What each child would add to the hypervolume of the others, (num_archs,)."""
    edges, best = _steps(others, other_sizes)
    widths = np.maximum(edges[1:] - np.maximum(edges[:-1], sizes[:, None]), 0)
    return np.asarray((np.maximum(accuracies[:, None] - best, 0) * widths).sum(axis=1))


def _steps(accuracies: FloatArray, sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Edges of sizes from 0 to 1, (num_steps + 1,), and the best accuracy a child within them has, (num_steps,)."""
    order = np.argsort(sizes, kind="stable")
    order = order[sizes[order] < 1]
    best = np.maximum.accumulate(np.concatenate([[0.0], accuracies[order]]))
    return np.concatenate([[0.0], sizes[order], [1.0]]), best
