"""How good predictions are: one report for every kind, on held-out measurements or by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import InputError
from hwnas.predictors.base import FloatArray, LatencyPredictor
from hwnas.space import Architecture

# A normal variable lies within so many standard deviations of its mean with probability 0.9.
Z_90 = 1.6448536269514722


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionReport:
    """Predicted against measured latency.

    Attributes:
        num: measurements compared.
        spearman: rank correlation, -1 to 1; 0 where either side is constant.
        mape_pct: mean of |prediction / measurement - 1|, percent.
        within_5_pct, within_10_pct: percentage of predictions that close to their measurement.
        coverage_90: percentage of measurements within `Z_90` standard deviations of their prediction: 90 when
            the standard deviations are honest.
    """

    num: int
    spearman: float
    mape_pct: float
    within_5_pct: float
    within_10_pct: float
    coverage_90: float


def report(latency_ms: Sequence[float] | FloatArray, mean_ms: FloatArray, std_ms: FloatArray) -> PredictionReport:
    """Compare measured latencies with predictions; all of shape (num_archs,).

    Raises:
        InputError: the shapes differ, or there is nothing to compare.
    """
    latency = np.asarray(latency_ms, dtype=np.float64)
    if not latency.shape == mean_ms.shape == std_ms.shape or latency.ndim != 1:
        raise InputError(f"shapes differ: latencies {latency.shape}, means {mean_ms.shape}, stds {std_ms.shape}")
    if not len(latency):
        raise InputError("a report needs at least one measurement, there are none")
    error = np.abs(mean_ms / latency - 1)
    # 1e-12: predictions at exactly 5% count, whatever the rounding.
    return PredictionReport(
        num=len(latency),
        spearman=_spearman(latency, mean_ms),
        mape_pct=100 * float(error.mean()),
        within_5_pct=100 * float((error <= 0.05 + 1e-12).mean()),
        within_10_pct=100 * float((error <= 0.10 + 1e-12).mean()),
        coverage_90=100 * float((np.abs(mean_ms - latency) <= Z_90 * std_ms).mean()),
    )


def cross_validate(
    make: Callable[[], LatencyPredictor],
    archs: Sequence[Architecture],
    latency_ms: Sequence[float],
    folds: int,
    rng: np.random.Generator,
) -> PredictionReport:
    """The report on `left_out_predictions`, whose arguments these are."""
    return report(latency_ms, *left_out_predictions(make, archs, latency_ms, folds, rng))


def left_out_predictions(
    make: Callable[[], LatencyPredictor],
    archs: Sequence[Architecture],
    latency_ms: Sequence[float],
    folds: int,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    """Predictions for measurements that were left out of the fit, each once.

    Args:
        make: makes an unfitted predictor, such as `lambda: make_predictor("gp", space)`.
        archs: the measured children, (num_archs,).
        latency_ms: their latencies, (num_archs,).
        folds: in how many parts the measurements are split.
        rng: splits them.

    Returns:
        Mean and standard deviation, ms, (num_archs,) each.

    Raises:
        InputError: fewer measurements than folds, or too few for the predictor once a fold is left out.
    """
    genes = make().space.encode(archs)
    latency = np.asarray(latency_ms, dtype=np.float64)
    if not 2 <= folds <= len(latency):
        raise InputError(f"folds={folds}: must be from 2 to the number of measurements, {len(latency)}")
    mean_ms, std_ms = np.empty(len(latency)), np.empty(len(latency))
    for test in fold_masks(len(latency), folds, rng):
        predictor = make().fit_genes(genes[~test], latency[~test])
        mean_ms[test], std_ms[test] = predictor.predict_genes(genes[test])
    return mean_ms, std_ms


def fold_masks(num: int, folds: int, rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Random folds of nearly equal size: for each a mask, (num,), true for what it leaves out."""
    fold = rng.permutation(num) % min(folds, num)
    return [fold == index for index in range(min(folds, num))]


def _spearman(a: FloatArray, b: FloatArray) -> float:
    ranks = np.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=1))
    return float(ranks[0] @ ranks[1] / (norms[0] * norms[1])) if norms.all() else 0.0


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], dtype=np.float64)
