"""Search strategies: which child to evaluate next."""

from __future__ import annotations

from importlib import import_module

from hwnas.errors import InputError
from hwnas.searching.strategies.base import Scored as Scored
from hwnas.searching.strategies.base import Strategy as Strategy

# Each strategy's module and class: a new one is a line here. Modules load on first use.
_STRATEGIES = {
    "guided": ("guided", "Guided"),
    "coarse-to-fine": ("coarse_to_fine", "CoarseToFine"),
    "evolution": ("evolution", "Evolution"),
    "nsga2": ("optuna_samplers", "Nsga2"),
    "tpe": ("optuna_samplers", "Tpe"),
    "random": ("random", "RandomSearch"),
}


def strategy_names() -> tuple[str, ...]:
    """The names that `strategy_class` knows, the default first."""
    return tuple(_STRATEGIES)


def strategy_class(name: str) -> type[Strategy]:
    """A strategy by its name.

    `guided` fits a model of the accuracy to the evaluated children, `coarse-to-fine` is BigNAS's, `evolution` that of
    Single Path One-Shot, `nsga2` and `tpe` are Optuna's samplers, `random` is the baseline.

    Raises:
        InputError: unknown name.
    """
    if name not in _STRATEGIES:
        raise InputError(f"unknown strategy {name!r}: not one of {', '.join(_STRATEGIES)}")
    module, kind = _STRATEGIES[name]
    found: type[Strategy] = getattr(import_module(f"hwnas.searching.strategies.{module}"), kind)
    return found
