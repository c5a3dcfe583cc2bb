"""Pareto fronts of accuracy against size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hwnas.space import FloatArray


def by_rank(accuracies: FloatArray, sizes: FloatArray | None) -> NDArray[np.intp]:
    """Indices of children, best first: by accuracy, or by the Pareto front they are on if sizes are given.

    Within a front the ones with the widest gap to their neighbours come first (NSGA-II's crowding distance, Deb et al.
    2002, III.B).

    Args:
        accuracies: (num_archs,).
        sizes: (num_archs,), or None.
    """
    if sizes is None:
        return np.argsort(-accuracies, kind="stable")
    left = np.lexsort((-accuracies, sizes))
    order: list[NDArray[np.intp]] = []
    while len(left):
        before = np.maximum.accumulate(np.concatenate([[-np.inf], accuracies[left][:-1]]))
        best = accuracies[left] > before
        front = left[best]
        order.append(front[np.argsort(-_gaps(accuracies[front], sizes[front]), kind="stable")])
        left = left[~best]
    return np.concatenate(order) if order else np.empty(0, dtype=np.intp)


def _gaps(accuracies: FloatArray, sizes: FloatArray) -> FloatArray:
    """Crowding distances along a front that is sorted by size, (num_archs,)."""
    gaps = np.full(len(sizes), np.inf)
    if len(sizes) > 2:
        gaps[1:-1] = sum((values[2:] - values[:-2]) / np.ptp(values) for values in (accuracies, sizes))
    return gaps


def hypervolume(accuracies: FloatArray, sizes: FloatArray, greatest_size: float = 1.0) -> float:
    """The area that children dominate, from accuracy 0 and `greatest_size`; children beyond that count nothing."""
    inside = sizes < greatest_size
    order = np.argsort(sizes[inside], kind="stable")
    best = np.maximum.accumulate(accuracies[inside][order])
    widths = np.diff(np.append(sizes[inside][order], greatest_size))
    return float(best @ widths)
