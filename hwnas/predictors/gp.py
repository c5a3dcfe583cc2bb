"""The analytic prior with a Gaussian process over rates and layers about it: the default for few measurements."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import FeatureSums, by_name, feature_sums, from_names
from hwnas.predictors.prior import DEFAULT_MACHINES
from hwnas.predictors.process import KnownMachine, fit_layers, fitted_process, process_costs_ms, process_model
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
        sums = feature_sums(self.space)
        features = sums(genes)
        rates = [machine * np.median(latency_ms / (features @ machine)) for machine in DEFAULT_MACHINES]
        fit = fit_layers(sums, [default_machine(sums, rate) for rate in rates], genes, latency_ms, weights)
        return {"machine_ms": by_name(rates[fit.machine]), **fitted_process(fit, genes, latency_ms)}

    def _model(self, learned: dict[str, Any]) -> Model:
        sums = feature_sums(self.space)
        return process_model(sums, default_machine(sums, from_names(learned["machine_ms"])), learned)

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        sums = feature_sums(self.space)
        return process_costs_ms(sums, default_machine(sums, from_names(learned["machine_ms"])), learned)


def default_machine(sums: FeatureSums, rates: FloatArray) -> KnownMachine:
    """A machine by what a unit of each feature costs in ms, (num_features,)."""
    return KnownMachine(sums.layer_features * rates, _KIND_STD, np.empty((len(sums.layers), 0)))
