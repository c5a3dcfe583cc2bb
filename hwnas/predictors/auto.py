"""The kind of predictor that suits the measurements best, by what it makes of measurements left out."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hwnas.predictors import make_predictor
from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.space import Genes

# Over few measurements the kinds' errors left out differ by chance: on the published tables what they pick is worse
# than the process at 5 and 10, and no better at 20 (benchmarks/results/predictors.md).
_COMPARED_FROM = 30
# Numbers of measurements from and to, in the order of preference among the nearly equal: the process knows best where
# it is unsure.
_FROM_TO = {
    "gp": (0, 1000), "prior": (_COMPARED_FROM, np.inf), "lookup": (_COMPARED_FROM, np.inf), "xgboost": (100, np.inf),
    "macs": (_COMPARED_FROM, np.inf),
}  # fmt: skip
_NEARLY_EQUAL = 1.03


class AutoPredictor(LatencyPredictor):
    """Takes kind gp for few measurements; of 30 or more, keeps the kind that predicts best what its fit left out.

    Compared is `FitStatistics.left_out_pct`, on which single disturbed measurements weigh little. Boosted trees take
    part from 100 measurements, Gaussian processes up to 1000.
    """

    kind: ClassVar[str] = "auto"

    @property
    def choice(self) -> str:
        """What was chosen and why, one line; empty before `fit`."""
        return str(self._learned["choice"]) if self._learned else ""

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        num = len(genes)
        learned = {
            kind: make_predictor(kind, self.space)._learn(genes, latency_ms, weights)
            for kind, (least, most) in _FROM_TO.items()
            if least <= num <= most
        }
        left_out = {kind: one.pop("left_out") for kind, one in learned.items()}
        errors = {kind: 100 * np.average(np.abs(logs), weights=weights) for kind, logs in left_out.items()}
        bar = _NEARLY_EQUAL * min(errors.values())
        chosen = next(kind for kind, error in errors.items() if error <= bar)
        others = ", ".join(f"{kind} {error:.1f}%" for kind, error in errors.items() if kind != chosen)
        compared = f"{others}; {num} measurements, left out in turn"
        alone = f"{num} measurements; other kinds are compared from {_COMPARED_FROM} on"
        return {
            "choice": f"{chosen}: mean error {errors[chosen]:.1f}% on measurements left out "
            f"({compared if others else alone})",
            "kind": chosen,
            "learned": learned[chosen],
            "left_out": left_out[chosen],
        }

    def _model(self, learned: dict[str, Any]) -> Model:
        return make_predictor(learned["kind"], self.space)._model(learned["learned"])

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        return make_predictor(learned["kind"], self.space)._costs_ms(learned["learned"])

    def _covariance(self, learned: dict[str, Any], genes: Genes) -> tuple[FloatArray, float]:
        return make_predictor(learned["kind"], self.space)._covariance(learned["learned"], genes)
