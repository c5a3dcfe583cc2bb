"""Limits: what a child may cost, and which children keep within it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import InputError
from hwnas.layers import LayerSums
from hwnas.predictors import LatencyPredictor
from hwnas.space import Genes, SearchSpace

Floats: TypeAlias = NDArray[np.float64]

# By how much a second measurement of the same child may come out slower (benchmarks/results/profiling.md).
REPEATABILITY = 0.02


class Limit(ABC):
    """An upper bound on one cost of a child."""

    unit: str

    @property
    @abstractmethod
    def value(self) -> float:
        """The bound, in `unit`."""

    @abstractmethod
    def cost(self, genes: Genes) -> Floats:
        """The expected cost of each child: (num_archs,) for genes (num_archs, num_genes), in `unit`."""

    @abstractmethod
    def upper(self, genes: Genes) -> Floats:
        """What the cost stays under with the stated confidence; a child is feasible if this keeps the limit."""

    @abstractmethod
    def describe(self) -> str:
        """The limit in a few words, `12 ms on cpu`."""

    def feasible(self, genes: Genes) -> NDArray[np.bool_]:
        """Which children keep the limit, (num_archs,)."""
        return self.upper(genes) <= self.value


@dataclass(frozen=True)
class LatencyLimit(Limit):
    """At most `ms` milliseconds on a device, with a probability of `confidence`.

    A child that was measured counts with its measured latency and the share by which a second measurement may
    differ; any other with the predicted mean plus the margin that its predicted standard deviation asks for.

    Attributes:
        device: its name.
        ms: the limit, milliseconds.
        predictor: of that device.
        measured: latencies in ms by the bytes of a child's genes (`Genes.tobytes`).
        confidence: between 0.5 and 1.
    """

    device: str
    ms: float
    predictor: LatencyPredictor
    measured: Mapping[bytes, float] = field(default_factory=dict)
    confidence: float = 0.95
    unit = "ms"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.ms) and self.ms > 0):
            raise InputError(f"latency limit {self.ms} ms: must be a number over 0")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence {self.confidence}: must be at least 0.5 and under 1")

    @property
    def value(self) -> float:
        """See `Limit`."""
        return self.ms

    def cost(self, genes: Genes) -> Floats:
        """See `Limit`."""
        return self._with_measured(genes, self.predictor.predict_genes(genes)[0], 1.0)

    def upper(self, genes: Genes) -> Floats:
        """See `Limit`."""
        mean, std = self.predictor.predict_genes(genes)
        return self._with_measured(genes, mean + NormalDist().inv_cdf(self.confidence) * std, 1 + REPEATABILITY)

    def _with_measured(self, genes: Genes, predicted: Floats, factor: float) -> Floats:
        if not self.measured:
            return predicted
        measured = np.array([self.measured.get(row.tobytes(), np.nan) for row in genes])
        return np.where(np.isnan(measured), predicted, factor * measured)

    def describe(self) -> str:
        """See `Limit`."""
        return f"{self.ms:g} ms on {self.device}"


@dataclass(frozen=True)
class MacsLimit(Limit):
    """At most so many multiply-adds.

    Attributes:
        space: of the children.
        macs: the limit.
    """

    space: SearchSpace
    macs: float
    unit = "MACs"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.macs) and self.macs > 0):
            raise InputError(f"MACs limit {self.macs}: must be a number over 0")
        object.__setattr__(self, "_sums", LayerSums(self.space, lambda layer: (layer.macs,)))

    @property
    def value(self) -> float:
        """See `Limit`."""
        return self.macs

    def cost(self, genes: Genes) -> Floats:
        """See `Limit`."""
        sums: LayerSums = self._sums  # type: ignore[attr-defined]
        return sums(genes)[:, 0]

    upper = cost

    def describe(self) -> str:
        """See `Limit`."""
        return f"{self.macs / 1e6:g}M MACs"
