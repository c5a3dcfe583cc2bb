"""Costs: what a child takes, exactly from its layers or as predicted and measured on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.exporters.base import file_bytes
from hwnas.layers import Layer, LayerPeaks, LayerSums
from hwnas.predictors import LatencyPredictor
from hwnas.space import Genes, SearchSpace

Floats: TypeAlias = NDArray[np.float64]

# By how much a second measurement of the same child may come out slower (benchmarks/results/profiling.md).
REPEATABILITY = 0.02


class Cost(ABC):
    """What something costs a child, for many children at once.

    Attributes:
        unit: of the values.
    """

    unit: str

    @abstractmethod
    def expected(self, genes: Genes) -> Floats:
        """The expected cost of each child, (num_archs,) for genes (num_archs, num_genes)."""

    @abstractmethod
    def upper(self, genes: Genes, confidence: float) -> Floats:
        """What the cost stays under with a probability of `confidence`, (num_archs,)."""


class LayerCost(Cost):
    """A cost that the layers decide, the same on every device.

    Args:
        space: of the children.
        kind: `macs`, `params`, `size` (of the ONNX file in float32, MB; see `file_bytes`) or `memory` (of the
            activations in float32 at their peak, MB; see `peak_activation_bytes`). A MB is 10^6 bytes.
    """

    def __init__(self, space: SearchSpace, kind: str) -> None:
        self.unit, make = _LAYER_COSTS[kind]
        self._values = make(space)

    def expected(self, genes: Genes) -> Floats:
        """See `Cost`."""
        return self._values(genes)

    def upper(self, genes: Genes, confidence: float) -> Floats:
        """See `Cost`."""
        return self._values(genes)


_Values: TypeAlias = Callable[[Genes], Floats]


def _sums(measure: Callable[[Layer], float]) -> Callable[[SearchSpace], _Values]:
    def make(space: SearchSpace) -> _Values:
        sums = LayerSums(space, lambda layer: (measure(layer),))
        return lambda genes: sums(genes)[:, 0]

    return make


def _peaks(space: SearchSpace) -> _Values:
    peaks = LayerPeaks(space)
    return lambda genes: peaks(genes) / 1e6


_LAYER_COSTS: dict[str, tuple[str, Callable[[SearchSpace], _Values]]] = {
    "macs": ("MACs", _sums(lambda layer: layer.macs)),
    "params": ("parameters", _sums(lambda layer: layer.params)),
    "size": ("MB", _sums(lambda layer: file_bytes([layer]) / 1e6)),
    "memory": ("MB", _peaks),
}
LAYER_COSTS = tuple(_LAYER_COSTS)  # the kinds of `LayerCost`


class LayerCosts:
    """Every kind of `LayerCost` of a space.

    Attributes:
        by_kind: the costs.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.by_kind = {kind: LayerCost(space, kind) for kind in LAYER_COSTS}

    def told(self, genes: Genes) -> list[dict[str, int]]:
        """Of each child `macs`, `params`, `file_bytes` and `peak_bytes`, for genes (num_archs, num_genes)."""
        names = {"macs": "macs", "params": "params", "size": "file_bytes", "memory": "peak_bytes"}
        columns = {}
        for kind, name in names.items():
            values = self.by_kind[kind].expected(genes) * (1e6 if self.by_kind[kind].unit == "MB" else 1)
            columns[name] = [round(value) for value in values.tolist()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class DeviceCost(Cost):
    """Latency or energy on a device.

    A child that was measured counts with its measured value and the share by which a second measurement may differ;
    any other with the predicted mean plus the margin that its predicted standard deviation asks for.

    Args:
        predictor: of that device, whatever it predicts.
        measured: values in `unit` by the bytes of a child's genes (`Genes.tobytes`).
        unit: of what is predicted.
    """

    def __init__(
        self, predictor: LatencyPredictor, measured: Mapping[bytes, float] | None = None, unit: str = "ms"
    ) -> None:
        self.predictor, self.measured, self.unit = predictor, measured or {}, unit

    def expected(self, genes: Genes) -> Floats:
        """See `Cost`."""
        return self._with_measured(genes, self.predictor.predict_genes(genes)[0], 1.0)

    def upper(self, genes: Genes, confidence: float) -> Floats:
        """See `Cost`."""
        mean, std = self.predictor.predict_genes(genes)
        return self._with_measured(genes, mean + NormalDist().inv_cdf(confidence) * std, 1 + REPEATABILITY)

    def _with_measured(self, genes: Genes, predicted: Floats, factor: float) -> Floats:
        if not self.measured:
            return predicted
        measured = np.array([self.measured.get(row.tobytes(), np.nan) for row in genes])
        return np.where(np.isnan(measured), predicted, factor * measured)
