"""What a search found: candidates, the front, and how the search went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from hwnas.errors import InputError
from hwnas.space import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A cost on a device.

    Attributes:
        predicted, std: what the device's predictor says.
        measured: the median measured there; None if it was not measured.
    """

    predicted: float
    std: float
    measured: float | None = None

    @property
    def value(self) -> float:
        """Measured where it was, else predicted."""
        return self.predicted if self.measured is None else self.measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A child with all that is known of it.

    Attributes:
        architecture: the child.
        accuracy: on the validation images, 0 to 1.
        macs, params: multiply-adds and parameters.
        latency: milliseconds, by device.
    """

    architecture: Architecture
    accuracy: float
    macs: int
    params: int
    latency: Mapping[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "architecture": self.architecture.to_dict(),
            "architecture_text": self.architecture.describe(),
            "accuracy": self.accuracy,
            "macs": self.macs,
            "params": self.params,
            "latency": {
                device: {name: getattr(estimate, name) for name in Estimate.__slots__}
                for device, estimate in self.latency.items()
            },
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            architecture=Architecture.from_dict(value["architecture"]),
            accuracy=value["accuracy"],
            macs=value["macs"],
            params=value["params"],
            latency={device: Estimate(**estimate) for device, estimate in value["latency"].items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search found.

    Attributes:
        limits: what was asked for: of each limit its `kind`, `device` (None where it has none), `value` and `unit`.
        confidence: with which an unmeasured child had to keep them.
        strategy: by which children were chosen.
        seed: of the search.
        best: the most accurate child that keeps the limits, as measured where a device could be reached.
        front: children that no other evaluated one beats in both accuracy and latency on the first device, fastest
            first.
        random: the best child of random search with as many evaluations under the same rules, where it was run.
        history: accuracies in the order of evaluation, by strategy; `random` is the baseline.
    """

    limits: tuple[Mapping[str, Any], ...]
    confidence: float
    strategy: str
    seed: int
    best: Candidate
    front: tuple[Candidate, ...]
    random: Candidate | None
    history: Mapping[str, Sequence[float]]

    @property
    def num_evaluations(self) -> int:
        """Children that the strategy evaluated, without the baseline's."""
        return len(self.history[self.strategy])

    @property
    def device(self) -> str | None:
        """Of the first limit on a device; None if no limit is on one."""
        return next((limit["device"] for limit in self.limits if limit["device"] is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        value: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        value["limits"] = [dict(limit) for limit in self.limits]
        value["best"] = self.best.to_dict()
        value["front"] = [candidate.to_dict() for candidate in self.front]
        value["random"] = self.random and self.random.to_dict()
        value["history"] = {strategy: list(accuracies) for strategy, accuracies in self.history.items()}
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: something is missing.
        """
        try:
            known = {name: value[name] for name in cls.__slots__}
            known["limits"] = tuple(value["limits"])
            known["best"] = Candidate.from_dict(value["best"])
            known["front"] = tuple(Candidate.from_dict(item) for item in value["front"])
            known["random"] = value["random"] and Candidate.from_dict(value["random"])
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a search result of this hwnas ({error!r}): search again") from None
