"""Which children to measure next, by what a predictor of the measured ones does not know yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.measuring.children import spread_candidates
from hwnas.space import Architecture, Genes, SearchSpace

# Of genes (num_archs, num_genes): the covariance of their log latencies, (num_archs, num_archs), and the variance of a
# measurement's noise; `LatencyPredictor.covariance_genes`.
Covariance: TypeAlias = Callable[[Genes], tuple[NDArray[np.float64], float]]


def next_children(
    space: SearchSpace,
    measured: Sequence[Architecture],
    covariance: Covariance,
    count: int,
    rng: np.random.Generator,
    num_candidates: int = 1024,
) -> list[Architecture]:
    """Children to measure after those that `choose_children` gave, each the one that tells most of all others.

        predictor = make_predictor("gp", space).fit(archs, latency_ms)
        archs += next_children(space, archs, predictor.covariance_genes, 10, rng)

    The same arguments give the same children. What a measurement turns out to be does not change what it tells, so a
    batch needs no measurement in between and holds no near-copies: see `most_telling`.

    Args:
        space: the search space.
        measured: children that are not to be chosen again.
        covariance: of the predictor fitted to them.
        count: of children; fewer are returned where the space has fewer.
        rng: of the candidates.
        num_candidates: drawn at random, from the small ones to the big ones.
    """
    genes = np.unique(spread_candidates(space, num_candidates, rng), axis=0)
    taken = {row.tobytes() for row in space.encode(measured)}
    genes = genes[[row.tobytes() not in taken for row in genes]]
    return [space.decode(genes[row]) for row in most_telling(*covariance(genes), count)]


def most_telling(covariance: NDArray[np.float64], noise_var: float, count: int) -> list[int]:
    """Which candidates to measure so that the variance of all is small in the mean, the most telling first.

    Picks one after another what lowers the mean variance most, and conditions on it (Cohn, Neural network exploration
    using optimal experiment design, 1996; for Gaussian processes Seo et al., IJCNN 2000, equation 8). Picking where the
    variance is greatest would go to the corners of the space, which tell little of the rest.

    Args:
        covariance: of the candidates' log latencies, (num_candidates, num_candidates).
        noise_var: variance of a measurement's noise.
        count: of candidates; at most all.
    """
    left = covariance.copy()
    picked: list[int] = []
    for _ in range(min(count, len(left))):
        gain = (left**2).sum(axis=0) / (left.diagonal() + noise_var)
        gain[picked] = -1
        best = int(np.argmax(gain))
        picked.append(best)
        left -= np.outer(left[:, best], left[best]) / (left[best, best] + noise_var)
    return picked
