"""The analytic prior with a Gaussian process over rates and layers about it: the default for few measurements."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import by_name, feature_sums, from_names
from hwnas.predictors.prior import DEFAULT_MACHINES
from hwnas.predictors.process import KnownMachine, fit_layers, process_costs_ms, process_covariance, process_model
from hwnas.space import Genes

# Between a mobile core and an accelerator the ratio of arithmetic to memory changes by such factors (exp(1.5) = 4.5).
_KIND_STD = 1.5


class GpPredictor(LatencyPredictor):
    """A sum over the layers whose costs are learned, as `LayerProcess` says.

    With ten measurements it corrects the rates of a known machine; with hundreds it knows what each shape of layer
    costs. Known machines differ in how dear it is to start an operation.
    """

    kind: ClassVar[str] = "gp"

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        known = [by_name(rates) for rates in DEFAULT_MACHINES]
        fit = fit_layers(feature_sums(self.space), self._machines(known), genes, latency_ms, weights)
        return {"machines_ms": known, **fit}

    def _model(self, learned: dict[str, Any]) -> Model:
        return process_model(feature_sums(self.space), self._machines(learned["machines_ms"]), learned)

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        return process_costs_ms(feature_sums(self.space), self._machines(learned["machines_ms"]), learned)

    def _covariance(self, learned: dict[str, Any], genes: Genes) -> tuple[FloatArray, float]:
        return process_covariance(feature_sums(self.space), self._machines(learned["machines_ms"]), learned, genes)

    def _machines(self, rates_ms: list[dict[str, float]]) -> list[KnownMachine]:
        layers = feature_sums(self.space).layer_features
        none = np.empty((len(layers), 0))
        return [KnownMachine(layers * from_names(rates), _KIND_STD, none) for rates in rates_ms]
