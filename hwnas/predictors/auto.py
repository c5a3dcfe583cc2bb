"""The kind of predictor that suits the measurements best, by what it makes of measurements left out."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hwnas.predictors import make_predictor
from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.space import Genes

# In the order of preference among the nearly equal: the process knows best where it is unsure.
_FROM_TO = {
    "gp": (0, 1000), "prior": (0, np.inf), "lookup": (20, np.inf), "xgboost": (100, np.inf), "macs": (0, np.inf),
}  # fmt: skip
_NEARLY_EQUAL = 1.03


class AutoPredictor(LatencyPredictor):
    """Fits each kind, and keeps the one that predicts best what was left out of its fit.

    Compared is `FitStatistics.left_out_pct`, on which single disturbed measurements weigh little. Tables take part
    from 20 measurements, boosted trees from 100, Gaussian processes up to 1000.
    """

    kind: ClassVar[str] = "auto"
    min_samples: ClassVar[int] = 4

    @property
    def choice(self) -> str:
        """What was chosen and why, one line; empty before `fit`."""
        return str(self._learned["choice"]) if self._learned else ""

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        fitted = {
            kind: make_predictor(kind, self.space).fit_genes(genes, latency_ms, weights)
            for kind, (least, most) in _FROM_TO.items()
            if least <= len(genes) <= most
        }
        errors = {}
        for kind, predictor in fitted.items():
            assert predictor.statistics is not None
            assert predictor.statistics.left_out_pct is not None
            errors[kind] = predictor.statistics.left_out_pct
        bar = _NEARLY_EQUAL * min(errors.values())
        chosen = next(kind for kind, error in errors.items() if error <= bar)
        others = ", ".join(f"{kind} {error:.1f}%" for kind, error in errors.items() if kind != chosen)
        return {
            "choice": f"{chosen}: mean error {errors[chosen]:.1f}% on measurements left out ({others}; "
            f"{len(genes)} measurements, left out in turn)",
            "kind": chosen,
            "learned": fitted[chosen].to_dict()["learned"],
        }

    def _model(self, learned: dict[str, Any]) -> Model:
        return make_predictor(learned["kind"], self.space)._model(learned["learned"])

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        return make_predictor(learned["kind"], self.space)._costs_ms(learned["learned"])
