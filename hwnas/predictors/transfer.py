"""Another device's predictor, adapted by about ten measurements."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from hwnas.errors import InputError
from hwnas.predictors import make_predictor
from hwnas.predictors.base import FloatArray, LatencyPredictor, Model
from hwnas.predictors.features import feature_sums
from hwnas.predictors.process import KnownMachine, fit_layers, process_costs_ms, process_covariance, process_model
from hwnas.space import Genes, SearchSpace

# Devices of one family differ in the ratio of arithmetic to memory less than any two machines do.
_KIND_STD = 0.5


class TransferPredictor(LatencyPredictor):
    """Takes the known machine of `LayerProcess` from predictors of other devices.

    The sources under which the measurements are likeliest are adapted: their rates by kind, what their layers cost,
    and towards the other sources where these explain the measurements better. Each then counts as much as it is
    probable.

        predictor = TransferPredictor(space, [load_predictor("pixel4.json"), load_predictor("note10.json")])
        predictor.fit(archs, latency_ms)

    Args:
        space: the search space.
        sources: fitted predictors of other devices for the same space; a loaded predictor needs none.
    """

    kind: ClassVar[str] = "transfer"

    def __init__(self, space: SearchSpace, sources: Sequence[LatencyPredictor] = ()) -> None:
        super().__init__(space)
        wrong = [source for source in sources if source.space != space]
        if wrong:
            raise InputError(f"a source's space is {wrong[0].space.name!r}, not {space.name!r}: fit it for this space")
        self._sources = [{key: source.to_dict()[key] for key in ("kind", "learned")} for source in sources]

    @cached_property
    def _known(self) -> list[KnownMachine]:
        return self._machines(self._sources)

    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        if self._learned is not None:  # loaded, and fitted to more
            self._sources = self._learned["sources"]
        if not self._sources:
            raise InputError("a transfer needs fitted predictors of other devices: give it sources")
        fit = fit_layers(feature_sums(self.space), self._known, genes, latency_ms, weights)
        return {"sources": self._sources, **fit}

    def _machines(self, sources: Sequence[dict[str, Any]]) -> list[KnownMachine]:
        costs = [make_predictor(s["kind"], self.space)._costs_ms(s["learned"]) for s in sources]
        layers = np.stack([cost.sum(axis=1) for cost in costs], axis=1)
        return [KnownMachine(cost, _KIND_STD, np.delete(layers, i, axis=1)) for i, cost in enumerate(costs)]

    def _model(self, learned: dict[str, Any]) -> Model:
        machines = self._known if learned["sources"] == self._sources else self._machines(learned["sources"])
        return process_model(feature_sums(self.space), machines, learned)

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        return process_costs_ms(feature_sums(self.space), self._machines(learned["sources"]), learned)

    def _covariance(self, learned: dict[str, Any], genes: Genes) -> tuple[FloatArray, float]:
        return process_covariance(feature_sums(self.space), self._machines(learned["sources"]), learned, genes)
