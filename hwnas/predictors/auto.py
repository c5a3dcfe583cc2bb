"""The kind of predictor that suits the measurements best, by cross-validation."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hwnas.predictors import make_predictor
from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.metrics import fold_masks
from hwnas.space import Genes

# In the order of preference among the nearly equal: the process knows best where it is unsure.
_FROM_TO = {"gp": (0, 1000), "prior": (0, np.inf), "xgboost": (100, np.inf), "macs": (0, np.inf)}
_NEARLY_EQUAL = 1.03
_FOLDS = 5


class AutoPredictor(LatencyPredictor):
    """Fits each kind to parts of the measurements, and then the one that predicts the rest best to all of them.

    Compared is the mean of |log(measured / predicted)|, on which single disturbed measurements weigh little. Boosted
    trees take part from 100 measurements, Gaussian processes up to 1000.
    """

    kind: ClassVar[str] = "auto"
    min_samples: ClassVar[int] = 4

    @property
    def choice(self) -> str:
        """What was chosen and why, one line; empty before `fit`."""
        return str(self._learned["choice"]) if self._learned else ""

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        folds = fold_masks(len(genes), _FOLDS, np.random.default_rng(0))
        errors = {
            kind: self._error(kind, genes, latency_ms, weights, folds)
            for kind, (least, most) in _FROM_TO.items()
            if least <= len(genes) <= most
        }
        bar = _NEARLY_EQUAL * min(errors.values())
        chosen = next(kind for kind, error in errors.items() if error <= bar)
        others = ", ".join(f"{kind} {error:.1%}" for kind, error in errors.items() if kind != chosen)
        fitted = make_predictor(chosen, self.space).fit_genes(genes, latency_ms, weights).to_dict()
        return {
            "choice": f"{chosen}: mean error {errors[chosen]:.1%} on measurements left out ({others}; "
            f"{len(genes)} measurements in {len(folds)} folds)",
            "kind": fitted["kind"],
            "learned": fitted["learned"],
        }

    def _error(self, kind: str, genes: Genes, latency_ms: FloatArray, weights: FloatArray, folds: list[Any]) -> float:
        errors = np.empty(len(genes))
        for test in folds:
            predictor = make_predictor(kind, self.space).fit_genes(genes[~test], latency_ms[~test], weights[~test])
            errors[test] = np.abs(np.log(latency_ms[test] / predictor.predict_genes(genes[test])[0]))
        return float(np.average(errors, weights=weights))

    def _model(self, learned: dict[str, Any]) -> Model:
        return make_predictor(learned["kind"], self.space)._model(learned["learned"])
