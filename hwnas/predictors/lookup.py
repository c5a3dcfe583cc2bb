"""A table of what each layer costs, as ProxylessNAS and Once-for-All use: a baseline."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hwnas.predictors.base import FloatArray
from hwnas.predictors.features import by_name, feature_sums, from_names
from hwnas.predictors.prior import NUM_TUNED, PriorPredictor, fit_prior, relative_std
from hwnas.space import Genes

# How firmly a layer's cost is held to the prior's; leave-one-out errors pick.
_RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


class LookupPredictor(PriorPredictor):
    """A sum of costs over the layers, one for each different layer and at least 0.

    A layer's cost is the analytic prior's times a correction, found by ridge regression on the relative errors: what
    was never measured costs what the prior says.
    """

    kind: ClassVar[str] = "lookup"

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        fit = fit_prior(feature_sums(self.space)(genes), latency_ms, weights)
        shares = self._shares(genes, fit.coefficients, latency_ms)
        likeness = (shares @ shares.T).toarray()
        # The prior's own errors on these measurements are too small, so those left out of its fit decide.
        honest, missing = -np.expm1(-fit.log_errors), 1 - np.asarray(shares.sum(axis=1))
        trials = []
        for ridge in _RIDGES:  # the dual of ridge regression; leave-one-out errors: Rasmussen and Williams 2006, 5.12
            inverse = np.linalg.inv(likeness + ridge * np.diag(1 / fit.trust))
            trials.append((inverse @ honest / np.diag(inverse), inverse @ missing))
        left_out, duals = min(trials, key=lambda trial: float(fit.trust @ trial[0] ** 2))
        errors = -np.log(np.maximum(1 - left_out, 0.01))
        return {
            "coefficients_ms": by_name(fit.coefficients),
            "genes": genes.tolist(),
            "latency_ms": latency_ms.tolist(),
            "duals": duals.tolist(),
            "relative_std": relative_std(errors, NUM_TUNED + 1),
            "left_out": errors,
        }

    def _layers_ms(self, learned: dict[str, Any]) -> FloatArray:
        return np.asarray(self._costs_ms(learned).sum(axis=1, keepdims=True))

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        coefficients = from_names(learned["coefficients_ms"])
        genes = np.array(learned["genes"], dtype=np.int8)
        shares = self._shares(genes, coefficients, np.array(learned["latency_ms"]))
        correction = 1 + shares.T @ np.array(learned["duals"])
        costs = feature_sums(self.space).layer_features * coefficients
        return np.asarray(costs * np.maximum(correction, 0)[:, None])

    def _shares(self, genes: Genes, coefficients: FloatArray, latency_ms: FloatArray) -> Any:
        """Of each layer in the measured latency by the prior: sparse, (num_archs, num_layers)."""
        sums = feature_sums(self.space)
        layer_ms = sums.layer_features @ coefficients
        return sums.counts(genes).multiply(layer_ms).multiply(1 / latency_ms[:, None]).tocsr()
