"""What a latency predictor is. A new kind needs this file only; `MacsPredictor` in prior.py is the shortest example."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config

from hwnas.config import check
from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.layers import Layer, lower
from hwnas.space import Architecture, Genes, SearchSpace

FloatArray: TypeAlias = NDArray[np.float64]
Model: TypeAlias = Callable[[Genes], tuple[FloatArray, FloatArray]]


class NotFittedError(RuntimeError):
    """A predictor was asked to predict or save before `fit` or `load`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitStatistics:
    """What a predictor was fitted on, and how closely: for people to read.

    Attributes:
        num_samples: measurements.
        least_ms, greatest_ms: their range.
        mape_pct: mean absolute error on these same measurements, percent; on others it is greater.
        left_out_pct: mean of |log(measured / predicted)| of measurements left out of the fit in turn, percent; None
            where the kind does not tell.
    """

    num_samples: int
    least_ms: float
    greatest_ms: float
    mape_pct: float
    left_out_pct: float | None = None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorFile:
    """A predictor as JSON holds it.

    `learned` is the kind's own, `created` an ISO 8601 time, `source` as the predictor has it.
    """

    schema: Literal[1]
    kind: str
    space: dict[str, Any]
    learned: dict[str, Any]
    statistics: FitStatistics
    created: str
    source: str = ""

    @classmethod
    def read(cls, path: Path) -> PredictorFile:
        """Read a file that `LatencyPredictor.save` wrote.

        Raises:
            InputError: it cannot be read, is damaged, or is something else.
        """

        def refuse(constant: str) -> float:
            raise ValueError(f"{constant} is not JSON")

        try:
            content = json.loads(path.read_bytes(), parse_constant=refuse)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a predictor, or damaged: {error}") from None
        return check(PredictorFile, content, source=str(path))


class LatencyPredictor(ABC):
    """Predicts a child's latency on one device from few measurements.

    First `fit` (or `load`), then any number of `predict`. A kind implements two methods: `_learn` turns
    measurements into a JSON object, and `_model` turns that object into a function of genes. `fit` passes what was
    learned through JSON, so a loaded predictor predicts exactly what the fitted one did.

        predictor = make_predictor("gp", space).fit(archs, latency_ms)
        mean_ms, std_ms = predictor.predict(candidates)

    Attributes:
        kind: name of the kind, as files and commands write it.
        min_samples: measurements that `fit` needs at least.
        space: the search space the predictor knows.
        statistics: of the last fit; None before.
        source: where the predictions come from if not from measurements of the user's own device: one sentence to
            print beside them. Empty for a predictor that was fitted.
    """

    kind: ClassVar[str]
    min_samples: ClassVar[int] = 3

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.statistics: FitStatistics | None = None
        self.source = ""
        self._learned: dict[str, Any] | None = None
        self._predict: Model | None = None

    # ------------------------------------------------------ what a kind implements

    @abstractmethod
    def _learn(self, genes: Genes, latency_ms: FloatArray, weights: FloatArray) -> dict[str, Any]:
        """Learn from checked measurements; called by `fit`.

        Measurements come in an order of their own, so the one they were taken in does not matter.

        Args:
            genes: (num_archs, num_genes), see `SearchSpace.encode`.
            latency_ms: (num_archs,), over 0.
            weights: (num_archs,), over 0, mean 1.

        Returns:
            What `_model` needs: dicts, lists, strings and finite numbers. Under `left_out`, which is not kept, it may
            give log(measured / predicted) of each measurement left out of the fit, (num_archs,).
        """

    @abstractmethod
    def _model(self, learned: dict[str, Any]) -> Model:
        """The function from genes (num_archs, num_genes) to mean and standard deviation in ms, (num_archs,) each.

        Called by `fit` and `load`. The standard deviation is that of a new measurement, noise included. May raise
        LookupError, TypeError or ValueError where `learned` is not what `_learn` returns.
        """

    def _costs_ms(self, learned: dict[str, Any]) -> FloatArray:
        """What each feature costs in each layer of the space, ms, (num_layers, num_features).

        `FeatureSums.layers` are these layers. For `transfer` and `breakdown_ms`.

        Raises:
            InputError: the kind does not know.
        """
        raise InputError(f"a predictor of kind {self.kind!r} does not know what single layers cost: fit one of kind gp")

    def _covariance(self, learned: dict[str, Any], genes: Genes) -> tuple[FloatArray, float]:
        """What `covariance_genes` returns.

        Raises:
            InputError: the kind does not know.
        """
        raise InputError(
            f"a predictor of kind {self.kind!r} does not know how networks vary together: fit one of kind gp"
        )

    # ------------------------------------------------------ what callers use

    def fit(
        self, archs: Sequence[Architecture], latency_ms: Sequence[float], weights: Sequence[float] | None = None
    ) -> Self:
        """Learn from measurements, and forget earlier ones.

        Args:
            archs: measured children of `space`; may repeat.
            latency_ms: (num_archs,).
            weights: how much each measurement counts beside the others, (num_archs,); equally by default.

        Raises:
            InputError: too few measurements, different lengths, a latency or weight that is not a finite number
                over 0, or an architecture outside the space.
        """
        return self.fit_genes(self.space.encode(archs), latency_ms, weights)

    def fit_genes(
        self,
        genes: Genes,
        latency_ms: Sequence[float] | FloatArray,
        weights: Sequence[float] | FloatArray | None = None,
    ) -> Self:
        """`fit` for architectures as genes, (num_archs, num_genes)."""
        latency = _positive("latency_ms", latency_ms, len(genes))
        importance = _positive("weights", np.ones(len(genes)) if weights is None else weights, len(genes))
        if len(genes) < self.min_samples:
            raise InputError(
                f"{len(genes)} measurements are too few for predictor {self.kind!r}: "
                f"measure at least {self.min_samples} children"
            )
        order = np.lexsort((importance, latency, *genes.T))
        genes, latency, importance = genes[order], latency[order], importance[order]
        learned = self._learn(genes, latency, importance / importance.mean())
        left_out = learned.pop("left_out", None)
        self.source = ""
        self._learned = json.loads(json.dumps(learned, allow_nan=False))
        self._predict = self._model(self._learned)
        mean_ms, _ = self._predict(genes)
        self.statistics = FitStatistics(
            num_samples=len(latency),
            least_ms=float(latency.min()),
            greatest_ms=float(latency.max()),
            mape_pct=100 * float(np.abs(mean_ms / latency - 1).mean()),
            left_out_pct=None if left_out is None else 100 * float(np.average(np.abs(left_out), weights=importance)),
        )
        return self

    def predict(self, archs: Sequence[Architecture]) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the latency in ms, (num_archs,) each.

        Raises:
            NotFittedError: before `fit`.
            InputError: an architecture is not of the predictor's space.
        """
        return self.predict_genes(self.space.encode(archs))

    def predict_genes(self, genes: Genes) -> tuple[FloatArray, FloatArray]:
        """`predict` for architectures as genes, (num_archs, num_genes): the fast road for whole populations."""
        if self._predict is None:
            raise self._not_fitted()
        return self._predict(genes)

    def covariance_genes(self, genes: Genes) -> tuple[FloatArray, float]:
        """What measuring one network tells of others: for choosing which to measure.

        Args:
            genes: (num_archs, num_genes), some thousands at most.

        Returns:
            The covariance of the logarithms of the networks' latencies, (num_archs, num_archs), and the variance of a
            measurement's noise.

        Raises:
            NotFittedError: before `fit`.
            InputError: the kind does not know.
        """
        if self._learned is None:
            raise self._not_fitted()
        return self._covariance(self._learned, genes)

    def breakdown_ms(self, arch: Architecture) -> list[tuple[Layer, float]]:
        """Where the milliseconds go: the layers of a child in order of execution, each with its cost.

        They add up to the predicted latency: what a network costs as a whole is spread over its layers.

        Raises:
            NotFittedError: before `fit`.
            InputError: the architecture is not of the predictor's space, or the kind does not know single layers.
        """
        from hwnas.predictors.features import feature_sums  # imports scipy

        if self._learned is None:
            raise self._not_fitted()
        (mean_ms,), _ = self.predict([arch])
        layers = lower(self.space, arch)
        costs = self._costs_ms(self._learned).sum(axis=1)[feature_sums(self.space).rows(layers)]
        return list(zip(layers, (costs * mean_ms / costs.sum()).tolist(), strict=True))

    @property
    def knows_layers(self) -> bool:
        """Whether it was fitted, and knows of every layer of the space what it costs, over 0: what a transfer needs."""
        try:
            return self._learned is not None and bool((self._costs_ms(self._learned).sum(axis=1) > 0).all())
        except InputError:
            return False

    def to_dict(self) -> dict[str, Any]:
        """All that the predictor is, for JSON: equal for predictors that predict the same.

        Raises:
            NotFittedError: before `fit`.
        """
        if self._learned is None or self.statistics is None:
            raise self._not_fitted()
        content = {
            "schema": 1,
            "kind": self.kind,
            "space": self.space.to_dict(),
            "learned": self._learned,
            "statistics": asdict(self.statistics),
        }
        return content | ({"source": self.source} if self.source else {})

    def save(self, path: str | Path, *, created: datetime | None = None) -> None:
        """Write the predictor as JSON, whole or not at all; `created` is now unless given.

        Raises:
            NotFittedError: before `fit`.
            OSError: the file cannot be written.
        """
        when = created or datetime.now(UTC)
        content = self.to_dict() | {"created": when.isoformat(timespec="seconds")}
        write_text(Path(path), json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a predictor of this kind; `hwnas.predictors.load_predictor` reads any kind.

        Raises:
            InputError: the file cannot be read, is damaged, or holds another kind.
        """
        return cls.from_file(PredictorFile.read(Path(path)), source=str(path))

    @classmethod
    def from_file(cls, file: PredictorFile, source: str) -> Self:
        """`load` from a file that has been read; `source` is its name, for messages.

        Raises:
            InputError: as `load`.
        """
        if file.kind != cls.kind:
            raise InputError(f"{source}: holds a predictor of kind {file.kind!r}, not {cls.kind!r}")
        predictor = cls(SearchSpace.from_dict(file.space, source=f"{source}: space"))
        predictor._learned, predictor.statistics, predictor.source = file.learned, file.statistics, file.source
        try:
            with np.errstate(all="ignore"):
                predictor._predict = predictor._model(file.learned)
                answers = np.concatenate(predictor.predict([predictor.space.smallest(), predictor.space.largest()]))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise InputError(f"{source}: damaged, fit the predictor anew ({type(error).__name__}: {error})") from None
        if answers.shape != (4,) or not np.isfinite(answers).all() or (answers < 0).any():
            raise InputError(f"{source}: damaged, fit the predictor anew (it predicts {answers.tolist()})")
        return predictor

    def _not_fitted(self) -> NotFittedError:
        return NotFittedError(f"predictor {self.kind!r} has learned nothing yet: call fit or load first")


def _positive(name: str, values: Sequence[float] | FloatArray, num: int) -> FloatArray:
    """`values` as an array (num,) of finite numbers over 0."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: must be numbers, not {values!r}") from None
    if array.shape != (num,):
        raise InputError(f"{name} has shape {array.shape}, but there are {num} architectures: give one value each")
    wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(wrong):
        raise InputError(
            f"{name}[{wrong[0]}]={array[wrong[0]]}: must be a finite number over 0; leave failed measurements out"
        )
    return array
