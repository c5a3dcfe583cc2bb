"""Costs: what a child takes, exactly from its layers or as predicted and measured on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.layers import LayerSums
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
    """A cost that the layers decide, the same on every device and exactly known.

    Args:
        space: of the children.
        kind: `macs`, `params`, ...: a `Limit.kind` without a device.
    """

    def __init__(self, space: SearchSpace, kind: str) -> None:
        self.unit, make = _KINDS[kind]
        self._values = make(space)

    def expected(self, genes: Genes) -> Floats:
        """See `Cost`."""
        return self._values(genes)

    def upper(self, genes: Genes, confidence: float) -> Floats:
        """See `Cost`."""
        return self._values(genes)


def _macs(space: SearchSpace) -> Callable[[Genes], Floats]:
    sums = LayerSums(space, lambda layer: (layer.macs,))
    return lambda genes: sums(genes)[:, 0]


def _params(space: SearchSpace) -> Callable[[Genes], Floats]:
    sums = LayerSums(space, lambda layer: (layer.params,))
    return lambda genes: sums(genes)[:, 0]


_KINDS: dict[str, tuple[str, Callable[[SearchSpace], Callable[[Genes], Floats]]]] = {
    "macs": ("MACs", _macs),
    "params": ("parameters", _params),
}


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
