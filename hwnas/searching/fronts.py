"""Fronts: the children that no other beats in accuracy and in cost, and what can be read off them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from hwnas.searching.result import Slope
from hwnas.space import FloatArray

WINDOW = 0.25  # share of the limit, to both sides, over which the slope is taken
RESAMPLES = 200
LEAST_POINTS = 4  # of the front inside the window


def pareto(costs: FloatArray, accuracies: FloatArray) -> NDArray[np.intp]:
    """Indices of the points that no other beats in both, cheapest first; (num_points,) both."""
    order = np.lexsort((-accuracies, costs))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(accuracies[order])[:-1]])[: len(order)]
    return order[accuracies[order] > best_before]


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
    left = np.arange(len(sizes))
    order: list[NDArray[np.intp]] = []
    while len(left) and sum(map(len, order)) < count:
        front = left[pareto(sizes[left], accuracies[left])]
        order.append(front[np.argsort(-_gaps(accuracies[front], sizes[front]), kind="stable")])
        left = np.setdiff1d(left, front)
    return np.concatenate(order)[:count] if order else np.empty(0, dtype=np.intp)


def _gaps(accuracies: FloatArray, sizes: FloatArray) -> FloatArray:
    """Crowding distances along a front that is sorted by size, (num_archs,)."""
    gaps = np.full(len(sizes), np.inf)
    if len(sizes) > 2:
        gaps[1:-1] = sum((values[2:] - values[:-2]) / np.ptp(values) for values in (accuracies, sizes))
    return gaps


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


def running_hypervolume(costs: FloatArray, accuracies: FloatArray) -> list[float]:
    """The hypervolume after each point, of it and all before it.

    The area that the points dominate up to the reference point (cost 1, accuracy 0); those costlier than 1 count
    nothing. With accuracies from 0 to 1 it is the mean, over all limits from 0 to 1, of the best accuracy that keeps
    them.

    Args:
        costs: relative to the greatest that counts, (num_points,).
        accuracies: 0 to 1, (num_points,).
    """
    x: list[float] = []  # the front, ascending in both
    y: list[float] = []
    area, areas = 0.0, []
    for cost, accuracy in zip(costs.tolist(), accuracies.tolist(), strict=True):
        below = bisect_right(x, cost)
        if cost < 1 and accuracy > (y[below - 1] if below else 0.0):
            start = bisect_left(x, cost)
            end = bisect_right(y, accuracy)
            steps = [*x[start:end], x[end] if end < len(x) else 1.0]
            beaten = [y[start - 1] if start else 0.0, *y[start:end]]
            at = cost
            for step, height in zip(steps, beaten, strict=True):
                area += (step - at) * (accuracy - height)
                at = step
            x[start:end], y[start:end] = [cost], [accuracy]
        areas.append(area)
    return areas


def front_slope(costs: FloatArray, accuracies: FloatArray, limit: float, rng: np.random.Generator) -> Slope | None:
    """How steep the front is at a limit: a straight line through the part of it within a quarter of the limit.

    The front is a staircase over costs; the line is fitted to it by least squares on an even grid, from the cheapest
    to the costliest child within the window. The standard deviation is that over bootstrap resamples of the children
    (Efron, 1979): it tells how much depends on which children happened to be evaluated, not on which images they were.

    Args:
        costs: of the evaluated children, perhaps some over the limit, (num_points,).
        accuracies: 0 to 1, (num_points,).
        limit: in the unit of the costs.
        rng: of the resamples.

    Returns:
        Percentage points for one more unit of cost; None where fewer than four children of the front are within the
        window.
    """
    low, high = (1 - WINDOW) * limit, (1 + WINDOW) * limit
    front = pareto(costs, accuracies)
    inside = front[(costs[front] >= low) & (costs[front] <= high)]
    if len(inside) < LEAST_POINTS:
        return None
    grid = np.linspace(costs[inside[0]], costs[inside[-1]], 50)

    def slope(chosen: NDArray[np.intp]) -> float:
        order = chosen[np.argsort(costs[chosen], kind="stable")]
        best = np.maximum.accumulate(accuracies[order])
        reached = np.searchsorted(costs[order], grid, side="right")
        known = reached > 0  # a resample may lack the cheapest children
        return float(np.polyfit(grid[known], best[reached[known] - 1], 1)[0]) if known.sum() > 1 else 0.0

    resamples = [slope(rng.integers(len(costs), size=len(costs))) for _ in range(RESAMPLES)]
    return Slope(
        points_per_ms=100 * slope(np.arange(len(costs))), std=100 * float(np.std(resamples)), num_points=len(inside)
    )
