"""Latency predictors: from an architecture to milliseconds on one device."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hwnas.errors import InputError
from hwnas.predictors.base import LatencyPredictor as LatencyPredictor
from hwnas.predictors.base import NotFittedError as NotFittedError
from hwnas.predictors.base import PredictorFile
from hwnas.predictors.metrics import PredictionReport as PredictionReport
from hwnas.predictors.metrics import cross_validate as cross_validate
from hwnas.predictors.metrics import left_out_predictions as left_out_predictions
from hwnas.predictors.metrics import report as report
from hwnas.space import SearchSpace

# Each kind's module and class: a new kind is a line here. Modules load on first use.
_KINDS = {
    "auto": ("auto", "AutoPredictor"),
    "gp": ("gp", "GpPredictor"),
    "lookup": ("lookup", "LookupPredictor"),
    "macs": ("prior", "MacsPredictor"),
    "prior": ("prior", "PriorPredictor"),
    "transfer": ("transfer", "TransferPredictor"),
    "xgboost": ("xgboost", "XgboostPredictor"),
}


def predictor_kinds() -> tuple[str, ...]:
    """The kinds that `make_predictor` knows."""
    return tuple(_KINDS)


def make_predictor(kind: str, space: SearchSpace, sources: Sequence[LatencyPredictor] = ()) -> LatencyPredictor:
    """A predictor of a kind, to be fitted.

    `macs` and `lookup` (a cost for each layer) are baselines, `prior` sums costs over the layers, `gp` and `xgboost`
    add what they learn of its errors, `auto` takes whichever of these predicts best. `transfer` adapts the best of
    `sources`, fitted predictors of other devices for the same space.

    Raises:
        InputError: unknown kind, or sources for a kind that takes none.
    """
    found = _predictor_class(kind)
    if not sources:
        return found(space)
    if kind != "transfer":
        raise InputError(f"predictor {kind!r} takes no sources: kind 'transfer' does")
    return found(space, sources)  # type: ignore[call-arg]


def load_predictor(path: str | Path) -> LatencyPredictor:
    """Read a predictor of whatever kind.

    Raises:
        InputError: the file cannot be read, is damaged, or is of an unknown kind.
    """
    file = PredictorFile.read(Path(path))
    try:
        found = _predictor_class(file.kind)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return found.from_file(file, source=str(path))


def _predictor_class(kind: str) -> type[LatencyPredictor]:
    if kind not in _KINDS:
        raise InputError(f"unknown kind of predictor {kind!r}: not one of {', '.join(_KINDS)}")
    module, name = _KINDS[kind]
    found: type[LatencyPredictor] = getattr(import_module(f"hwnas.predictors.{module}"), name)
    return found
