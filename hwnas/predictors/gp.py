"""The analytic prior with a Gaussian process on what it leaves unexplained: the default for few measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import by_name, feature_sums, from_names
from hwnas.predictors.metrics import Z_90
from hwnas.predictors.prior import conformal_90, fit_prior
from hwnas.space import Genes

# Hyperparameters: where their search starts, and the box it stays in. The least noise keeps the matrices regular.
_STARTS = ((0.05, 0.02, 1.0), (0.02, 0.05, 3.0))
_LEAST, _GREATEST = (1e-4, 1e-3, 0.2), (1.0, 1.0, 30.0)
# Log-normal beliefs about them, median and log standard deviation: what 10 measurements do not tell.
_MEDIANS, _LOG_STDS = (0.03, 0.03, 2.0), (1.5, 1.5, 1.0)
# The search takes the cube of so many measurements at most; predictions use all.
_MAX_SEARCHED = 400
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Of the process on log(measured / prior).

    Attributes:
        smooth_std: standard deviation of its smooth part.
        noise_std: of the measurements' noise.
        length: distance over which the smooth part changes, in units of the spread of the inputs.
    """

    smooth_std: float
    noise_std: float
    length: float


class GpPredictor(LatencyPredictor):
    """The analytic prior times the exponential of a Gaussian process.

    The process lives on the square roots of the shares that the features have in the prior's latency, and on its
    logarithm: networks that stress the machine alike share what the prior gets wrong. It learns from the prior's
    cross-validated errors, so neither it nor the uncertainty is misled by a prior that fits its own measurements too
    well. Equation numbers are those of Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006.
    """

    kind: ClassVar[str] = "gp"

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        fit = fit_prior(feature_sums(self.space)(genes), latency_ms, weights)
        inputs = _Inputs(self, fit.coefficients, genes)
        _, points = inputs(genes)
        distances, noise = _distances(points, points), 1 / fit.trust
        some = np.random.default_rng(0).permutation(len(genes))[:_MAX_SEARCHED]
        best = _search(distances[np.ix_(some, some)], fit.log_errors[some], noise[some])
        return {
            "coefficients_ms": by_name(fit.coefficients),
            "genes": genes.tolist(),
            "log_errors": fit.log_errors.tolist(),
            "noise": noise.tolist(),
            "hyperparameters": asdict(best),
            "std_factor": _std_factor(best, distances, fit.log_errors, noise),
        }

    def _model(self, learned: dict[str, Any]) -> Model:
        found = Hyperparameters(**learned["hyperparameters"])
        factor = float(learned["std_factor"])
        train = np.array(learned["genes"], dtype=np.int8)
        inputs = _Inputs(self, from_names(learned["coefficients_ms"]), train)
        _, points = inputs(train)
        covariance = _covariance(found, _distances(points, points), np.array(learned["noise"]))
        whiten = solve_triangular(cholesky(covariance, lower=True), np.eye(len(train)), lower=True)
        alpha = whiten.T @ (whiten @ np.array(learned["log_errors"]))

        def predict_chunk(genes: Genes) -> tuple[FloatArray, FloatArray]:  # equations 2.25 and 2.26
            prior_ms, at = inputs(genes)
            cross = _matern(found, _distances(at, points))
            mean_ms = prior_ms * np.exp(cross @ alpha)
            explained = ((cross @ whiten.T) ** 2).sum(axis=1)
            variance = np.maximum(found.smooth_std**2 - explained, 0) + found.noise_std**2
            return mean_ms, factor * np.sqrt(variance) * mean_ms

        def predict(genes: Genes) -> tuple[FloatArray, FloatArray]:
            mean_ms, std_ms = np.empty(len(genes)), np.empty(len(genes))
            for start in range(0, len(genes), _CHUNK):
                part = slice(start, start + _CHUNK)
                mean_ms[part], std_ms[part] = predict_chunk(genes[part])
            return mean_ms, std_ms

        return predict


class _Inputs:
    """The prior's latency in ms and the process's inputs, (num_archs,) and (num_archs, num_inputs), of genes."""

    def __init__(self, predictor: LatencyPredictor, coefficients: FloatArray, train: Genes) -> None:
        costing = np.diag(coefficients)[:, coefficients > 0]
        self._costs = feature_sums(predictor.space).weighted(costing)
        _, raw = self._raw(train)
        spread = raw.std(axis=0)
        varies = spread > 1e-6
        self._centre = raw.mean(axis=0)
        self._scale = np.where(varies, 1 / np.maximum(spread, 1e-6), 0) / np.sqrt(max(varies.sum(), 1))

    def __call__(self, genes: Genes) -> tuple[FloatArray, FloatArray]:
        prior_ms, raw = self._raw(genes)
        return prior_ms, (raw - self._centre) * self._scale

    def _raw(self, genes: Genes) -> tuple[FloatArray, FloatArray]:
        costs = self._costs(genes)
        prior_ms = costs.sum(axis=1)
        return prior_ms, np.column_stack([np.sqrt(costs / prior_ms[:, None]), np.log(prior_ms)])


def _distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """Euclidean, (num_a, num_b)."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _matern(found: Hyperparameters, distances: FloatArray) -> FloatArray:
    """The Matern covariance with nu = 5/2, equation 4.17."""
    scaled = np.sqrt(5) / found.length * distances
    return np.asarray(found.smooth_std**2 * (1 + scaled + scaled**2 / 3) * np.exp(-scaled))


def _covariance(found: Hyperparameters, distances: FloatArray, noise: FloatArray) -> FloatArray:
    """Of the measurements, (num, num); `noise` is each one's noise variance relative to the usual."""
    return _matern(found, distances) + np.diag(found.noise_std**2 * noise)


def _search(distances: FloatArray, log_errors: FloatArray, noise: FloatArray) -> Hyperparameters:
    """The likeliest hyperparameters: equations 5.8 (marginal likelihood) and 5.9 (gradient), with the beliefs."""
    medians, log_stds = np.log(_MEDIANS), np.array(_LOG_STDS)

    def objective(logs: FloatArray) -> tuple[float, FloatArray]:
        at = Hyperparameters(*np.exp(logs))
        smooth, own = _matern(at, distances), at.noise_std**2 * noise
        scaled = np.sqrt(5) / at.length * distances
        by_log_length = smooth * scaled**2 * (1 + scaled) / (3 + 3 * scaled + scaled**2)
        lower = cholesky(smooth + np.diag(own), lower=True)
        inverse = cho_solve((lower, True), np.eye(len(noise)))
        alpha = inverse @ log_errors
        off = (logs - medians) / log_stds
        value = 0.5 * log_errors @ alpha + np.log(np.diag(lower)).sum() + 0.5 * off @ off
        change = inverse - np.outer(alpha, alpha)
        gradient = [(change * smooth).sum(), np.diag(change) @ own, 0.5 * (change * by_log_length).sum()]
        return float(value), np.array(gradient) + off / log_stds

    bounds = list(zip(np.log(_LEAST), np.log(_GREATEST), strict=True))
    found = [minimize(objective, np.log(start), jac=True, method="L-BFGS-B", bounds=bounds) for start in _STARTS]
    return Hyperparameters(*np.exp(min(found, key=lambda result: float(result.fun)).x).tolist())


def _std_factor(found: Hyperparameters, distances: FloatArray, log_errors: FloatArray, noise: FloatArray) -> float:
    """What to multiply standard deviations with so that 90% of errors left out lie within `Z_90` of them.

    Leave-one-out errors and variances come from equation 5.12; a new measurement has the usual noise.
    """
    inverse = np.linalg.inv(_covariance(found, distances, noise))
    left_out = inverse @ log_errors / np.diag(inverse)
    variance = 1 / np.diag(inverse) + found.noise_std**2 * (1 - noise)
    return conformal_90(np.abs(left_out) / np.sqrt(variance)) / Z_90
