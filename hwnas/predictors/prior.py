"""Predictors that know the machine: latency as a sum over the layers with few non-negative rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import stdtrit

from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import FEATURE_NAMES, by_name, feature_sums, from_names
from hwnas.predictors.metrics import Z_90, fold_masks
from hwnas.space import Genes

# What a unit of each feature costs on a middling mobile CPU core, ns: 10 billion dense multiply-adds a second, a
# quarter of that depthwise, 10 GB/s of float32, 3 us to start an operation. Only ratios matter: the fit scales all
# by one measured factor, then lets each go where the measurements pull it.
_DEFAULT_NS = {
    "dense_macs": 0.1, "pointwise_macs": 0.1, "padding_macs": 0.05,
    "depthwise3_macs": 0.4, "depthwise3_stride2_macs": 0.4, "depthwise5_macs": 0.4, "depthwise5_stride2_macs": 0.4,
    "depthwise7_macs": 0.4, "depthwise7_stride2_macs": 0.4, "depthwise_padding_macs": 0.4, "grouped_macs": 0.2,
    "linear_macs": 0.3,
    "dense_moved": 0.4, "pointwise_moved": 0.4, "depthwise_moved": 0.4, "grouped_moved": 0.8, "pool_moved": 0.4,
    "elementwise_moved": 0.4, "weights": 0.4,
    "relu_elements": 0.1, "swish_elements": 1.0, "h_swish_elements": 1.0, "sigmoid_elements": 1.0,
    "h_sigmoid_elements": 1.0,
}  # fmt: skip
_LAUNCH_NS = {
    "convs": 3e3, "depthwise_convs": 3e3, "grouped_convs": 6e3, "pools": 3e3, "elementwise_ops": 3e3,
    "squeeze_excites": 1e3, "networks": 1e4,
}  # fmt: skip

# How much dearer than on that core starting an operation is beside the arithmetic: a mobile CPU, a GPU at a large
# batch, a GPU that waits for the next launch. Cross-validation picks.
_LAUNCH_FACTORS = (1, 100, 1000)
DEFAULT_MACHINES = tuple(
    np.array([(_DEFAULT_NS | {name: ns * factor for name, ns in _LAUNCH_NS.items()})[name] for name in FEATURE_NAMES])
    * 1e-6
    for factor in _LAUNCH_FACTORS
)
# Strength of the pull to the default rates; cross-validation picks.
_RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
NUM_TUNED = 2  # known machine and ridge
# A feature that explains nothing on the default machine may still cost this share of the latency.
_SLACK = 0.05
# Degrees of freedom of the Student-t distribution of errors: measurements far off count little.
_FREEDOM = 3
_MAX_FOLDS, _FEW_FOLDS, _MANY = 10, 5, 20  # the second from so many measurements on


@dataclass(frozen=True, slots=True)
class PriorFit:
    """Rates, and what cross-validation says of them.

    Attributes:
        coefficients: ms a unit of each feature, at least 0, (num_features,).
        log_errors: log(measured / predicted) of each measurement left out of the fit, (num_archs,).
        trust: weight of each measurement, its own times the robust one, (num_archs,).
    """

    coefficients: FloatArray
    log_errors: FloatArray
    trust: FloatArray


def fit_prior(features: FloatArray, latency_ms: FloatArray, weights: FloatArray) -> PriorFit:
    """Non-negative least squares on the relative error, with a pull to the rates of a known machine.

    Minimises, over shares of the latency t >= 0 and with A the features over the latency, columns scaled to mean 1,

        sum_i w_i (sum_j A_ij t_j - 1)^2  +  ridge sum_j ((t_j - d_j) / (d_j + slack))^2

    where d are the shares at the default rates, scaled to the measured speed. Ridge and default machine are those
    with the least cross-validated error. w are the weights times those of Student-t errors (iteratively
    reweighted: Lange, Little and Taylor, JASA 1989, section 3), so that single disturbed measurements do not bend
    the fit.

    Args:
        features: (num_archs, num_features).
        latency_ms: (num_archs,).
        weights: (num_archs,).
    """
    num_folds = _FEW_FOLDS if len(latency_ms) >= _MANY else _MAX_FOLDS
    folds = fold_masks(len(latency_ms), num_folds, np.random.default_rng(0))
    trust = weights
    for _ in range(2):
        trials = []
        for rates in DEFAULT_MACHINES:
            for ridge in _RIDGES:
                errors = np.empty(len(latency_ms))
                for test in folds:
                    train = ~test
                    coefficients = _solve(features[train], latency_ms[train], trust[train], rates, ridge)
                    errors[test] = np.log(latency_ms[test] / (features[test] @ coefficients))
                trials.append((float(trust @ errors**2), ridge, rates, errors))
        _, ridge, rates, errors = min(trials, key=lambda trial: trial[0])
        scale = max(1.4826 * float(np.median(np.abs(errors))), 0.005)  # from median to standard deviation
        trust = weights * (_FREEDOM + 1) / (_FREEDOM + (errors / scale) ** 2)
    return PriorFit(_solve(features, latency_ms, trust, rates, ridge), errors, trust)


def _solve(
    features: FloatArray, latency_ms: FloatArray, weights: FloatArray, rates: FloatArray, ridge: float
) -> FloatArray:
    """The minimum that `fit_prior` describes, as ms a unit of each feature; what never occurs keeps its default."""
    costs = features / latency_ms[:, None]
    coefficients = rates / np.median(costs @ rates)
    means = costs.mean(axis=0)
    occurs = means > 0
    means = means[occurs]
    default = coefficients[occurs] * means
    rows = np.column_stack([costs[:, occurs] / means, np.ones(len(costs))]) * np.sqrt(weights)[:, None]
    if len(rows) > rows.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))  # the same sum of squares in fewer rows
    pull = np.sqrt(ridge) / (default + _SLACK)
    shares, _ = nnls(np.vstack([rows[:, :-1], np.diag(pull)]), np.concatenate([rows[:, -1], pull * default]))
    coefficients[occurs] = shares / means
    return coefficients


def relative_std(log_errors: FloatArray, num_tuned: int) -> float:
    """The relative standard deviation of a predictor with these cross-validated errors; see `honest_factor`."""
    return honest_factor(np.abs(np.expm1(log_errors)), num_tuned)


def honest_factor(scores: FloatArray, num_tuned: int) -> float:
    """What standard deviations of 1 must be multiplied with so that 90% of new errors lie within `Z_90` of them.

    From 9 scores on the quantile is the one of conformal prediction, rank ceil(0.9 (n + 1)) of n (Vovk, Gammerman and
    Shafer 2005). Fewer hold no such rank: the largest of n covers n / (n + 1) only. There it is Student's: a new normal
    error over the root mean square of n others is t-distributed with n degrees of freedom.

    The scores come from the measurements that picked the hyperparameters, so they are a little small: Akaike's final
    prediction error (Fitting autoregressive models for prediction, 1969) has the variance of a new error
    1 + num_tuned / n times as great.

    Args:
        scores: errors left out over their standard deviations, absolute, (num,).
        num_tuned: hyperparameters that the same measurements picked.
    """
    num = len(scores)
    rank = int(np.ceil(0.9 * (num + 1)))
    if rank <= num:
        width = float(np.sort(scores)[rank - 1])
    else:
        width = float(stdtrit(num, 0.95) * np.sqrt(np.mean(scores**2)))
    return width / Z_90 * float(np.sqrt(1 + num_tuned / num))


class PriorPredictor(LatencyPredictor):
    """A sum of non-negative costs over the layers, fitted as `fit_prior` says: good from about 10 measurements."""

    kind: ClassVar[str] = "prior"

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        fit = fit_prior(feature_sums(self.space)(genes), latency_ms, weights)
        return {
            "coefficients_ms": by_name(fit.coefficients),
            "relative_std": relative_std(fit.log_errors, NUM_TUNED),
            "left_out": fit.log_errors,
        }

    def _model(self, learned: dict[str, Any]) -> Model:
        sums = feature_sums(self.space).by_layer(self._layers_ms(learned))
        std = float(learned["relative_std"])

        def predict(genes: Genes) -> tuple[FloatArray, FloatArray]:
            mean_ms = sums(genes)[:, 0]
            return mean_ms, std * mean_ms

        return predict

    def _layers_ms(self, learned: dict[str, Any]) -> FloatArray:
        """What each layer of the space costs, (num_layers, 1)."""
        return np.asarray(feature_sums(self.space).layer_features @ from_names(learned["coefficients_ms"])[:, None])

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        return feature_sums(self.space).layer_features * from_names(learned["coefficients_ms"])


class MacsPredictor(PriorPredictor):
    """a + b times multiply-adds, both at least 0: the baseline that the others must beat."""

    kind: ClassVar[str] = "macs"

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        counted = [name.endswith("_macs") and "padding" not in name for name in FEATURE_NAMES]
        columns = np.array([np.array(FEATURE_NAMES) == "networks", counted], dtype=np.float64).T
        costs = feature_sums(self.space).weighted(columns)(genes) / latency_ms[:, None]
        costs *= np.sqrt(weights)[:, None]

        def solve(keep: NDArray[np.bool_]) -> FloatArray:
            scale = costs[keep].mean(axis=0)
            return np.asarray(nnls(costs[keep] / scale, np.sqrt(weights[keep]))[0] / scale)

        errors = np.empty(len(costs))
        for test in fold_masks(len(costs), _MAX_FOLDS, np.random.default_rng(0)):
            errors[test] = -np.log(costs[test] @ solve(~test) / np.sqrt(weights[test]))
        everything = np.ones(len(costs), dtype=bool)
        return {
            "coefficients_ms": by_name(columns @ solve(everything)),
            "relative_std": relative_std(errors, num_tuned=0),
            "left_out": errors,
        }
