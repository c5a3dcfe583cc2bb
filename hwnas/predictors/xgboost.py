"""The analytic prior with boosted trees on what it leaves unexplained: for hundreds of measurements."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import xgboost as xgb

from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import by_name, feature_sums, from_names
from hwnas.predictors.metrics import fold_masks
from hwnas.predictors.prior import fit_prior, relative_std
from hwnas.space import Genes

_PARAMETERS = {
    "objective": "reg:squarederror", "base_score": 0.0, "learning_rate": 0.1, "max_depth": 3,
    "min_child_weight": 3, "subsample": 0.8, "nthread": 1, "seed": 0, "verbosity": 0,
}  # fmt: skip
# Numbers of trees that cross-validation picks from; none leaves the prior alone.
_NUM_TREES = (0, 5, 10, 20, 40, 80, 160)
_FOLDS = 5


class XgboostPredictor(LatencyPredictor):
    """The analytic prior times the exponential of boosted trees over features and genes.

    The trees learn the prior's cross-validated errors, as the process of `GpPredictor` does. How many there are, and
    the standard deviation, come from cross-validation.
    """

    kind: ClassVar[str] = "xgboost"
    min_samples: ClassVar[int] = 20

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        fit = fit_prior(feature_sums(self.space)(genes), latency_ms, weights)
        data = self._inputs(genes)
        data.set_info(label=fit.log_errors, weight=fit.trust)
        errors = np.empty((len(_NUM_TREES), len(genes)))
        for test in fold_masks(len(genes), _FOLDS, np.random.default_rng(0)):
            booster = xgb.train(_PARAMETERS, data.slice(np.flatnonzero(~test)), _NUM_TREES[-1])
            left_out = data.slice(np.flatnonzero(test))
            for row, num_trees in enumerate(_NUM_TREES):
                errors[row, test] = fit.log_errors[test] - _boost(booster, left_out, num_trees)
        best = int(np.argmin((fit.trust * errors**2).sum(axis=1)))
        booster = xgb.train(_PARAMETERS, data, max(_NUM_TREES[best], 1))
        return {
            "coefficients_ms": by_name(fit.coefficients),
            "num_trees": _NUM_TREES[best],
            "booster": json.loads(booster.save_raw("json")),
            "relative_std": relative_std(errors[best]),
        }

    def _model(self, learned: dict[str, Any]) -> Model:
        prior = feature_sums(self.space).weighted(from_names(learned["coefficients_ms"]))
        std, num_trees = float(learned["relative_std"]), int(learned["num_trees"])
        booster = xgb.Booster({"nthread": 1})
        booster.load_model(bytearray(json.dumps(learned["booster"]), "utf-8"))

        def predict(genes: Genes) -> tuple[FloatArray, FloatArray]:
            mean_ms = prior(genes)[:, 0]
            if len(genes):
                mean_ms *= np.exp(_boost(booster, self._inputs(genes), num_trees))
            return mean_ms, std * mean_ms

        return predict

    def _inputs(self, genes: Genes) -> xgb.DMatrix:
        return xgb.DMatrix(np.hstack([feature_sums(self.space)(genes), genes]), nthread=1)


def _boost(booster: xgb.Booster, data: xgb.DMatrix, num_trees: int) -> FloatArray:
    """What the first `num_trees` trees predict, (num_archs,)."""
    if num_trees == 0:  # which xgboost takes to mean all
        return np.zeros(data.num_row())
    return np.asarray(booster.predict(data, iteration_range=(0, num_trees)), dtype=np.float64)
