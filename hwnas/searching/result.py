"""What a search found: candidates, the front, how the search went, and how far its figures can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
        file_bytes: of its fp32 ONNX file; None where it was not worked out.
        peak_bytes: of activations alive at once, fp32, one image; None where it was not worked out.
        latency: milliseconds, by device.
        energy: millijoules an inference, by device; empty where no device tells its power.
    """

    architecture: Architecture
    accuracy: float
    macs: int
    params: int
    file_bytes: int | None = None
    peak_bytes: int | None = None
    latency: Mapping[str, Estimate]
    energy: Mapping[str, Estimate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "architecture": self.architecture.to_dict(),
            "architecture_text": self.architecture.describe(),
            "accuracy": self.accuracy,
            "macs": self.macs,
            "params": self.params,
            "file_bytes": self.file_bytes,
            "peak_bytes": self.peak_bytes,
            "latency": {device: asdict(estimate) for device, estimate in self.latency.items()},
            "energy": {device: asdict(estimate) for device, estimate in self.energy.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        known = {name: value[name] for name in ("accuracy", "macs", "params")}
        known |= {name: value.get(name) for name in ("file_bytes", "peak_bytes")}
        for name in ("latency", "energy"):
            known[name] = {device: Estimate(**estimate) for device, estimate in value.get(name, {}).items()}
        return cls(architecture=Architecture.from_dict(value["architecture"]), **known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the latencies of a device come from.

    Attributes:
        measured: whether the answer was measured on the device; else it is predicted.
        error_pct: typical error of the predictions, percent: the mean of |log(measured / predicted)| of measurements
            left out of the fit, or else what the predictor itself expects.
        source: of the predictions: empty for a predictor fitted in this run, else the sentence that says what
            published measurements they are estimated from.
        reason: why nothing was measured there; empty where it was.
        runtime: what runs the networks, with its precision: `onnxruntime, fp32`.
        versions: what the latencies depend on besides (see `Device.versions`); empty where the device was not reached.
    """

    measured: bool
    error_pct: float
    source: str = ""
    reason: str = ""
    runtime: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """What one more millisecond on a device buys: the slope of the front at the limit.

    Attributes:
        points_per_ms: percentage points of accuracy for one more millisecond.
        std: its standard deviation over resamples of the evaluated children.
        num_points: children of the front that it was fitted to.
    """

    points_per_ms: float
    std: float
    num_points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search found.

    Attributes:
        limits: what was asked for: of each limit its `kind`, `device` (None where it has none), `value` and `unit`.
        confidence: with which an unmeasured child had to keep them.
        strategy: by which children were chosen.
        seed: of the search.
        best: the most accurate child that keeps the limits, as measured where a device could be reached.
        front: children that no other evaluated one beats in both accuracy and the cost that `axis` names, cheapest
            first.
        random: the best child of random search with as many evaluations under the same rules, where it was run.
        history: accuracies in the order of evaluation, by strategy; `random` is the baseline. Children that were known
            before and cost no evaluation are not among them.
        axis: the cost of the front, as a limit's `kind`, `device` and `unit`.
        num_known: children known from earlier searches that keep the limits: candidates for the answer, too.
        devices: where each device's latencies come from.
        hypervolume: how good the front was after each evaluation, by strategy: the mean, over all limits from 0 to the
            search's own, of the best accuracy that keeps them (0 where no child does), by predicted costs. That is the
            area between the front and the reference point (the limit, accuracy 0), over the limit.
        slope: what one more millisecond buys, by device, where the evaluated children are enough to tell.
        weights: what identifies the supernet's weights.
        question: all that the answer depends on, as plain values: the same question gets the same answer.
        versions: of the packages that made it, hwnas among them.
    """

    limits: tuple[Mapping[str, Any], ...]
    confidence: float
    strategy: str
    seed: int
    best: Candidate
    front: tuple[Candidate, ...]
    random: Candidate | None
    history: Mapping[str, Sequence[float]]
    axis: Mapping[str, Any] = field(default_factory=dict)
    num_known: int = 0
    devices: Mapping[str, Source] = field(default_factory=dict)
    hypervolume: Mapping[str, Sequence[float]] = field(default_factory=dict)
    slope: Mapping[str, Slope] = field(default_factory=dict)
    weights: str = ""
    question: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_evaluations(self) -> int:
        """Children that the strategy evaluated, without the baseline's."""
        return len(self.history[self.strategy])

    @property
    def device(self) -> str | None:
        """Of the first limit on a device, else of the front; None if there is none."""
        asked = (limit["device"] for limit in self.limits if limit["device"] is not None)
        return next(asked, self.axis.get("device"))

    @property
    def measured(self) -> bool:
        """Whether the answer was measured on every device that it was asked for."""
        return all(source.measured for source in self.devices.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        value: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        value["limits"] = [dict(limit) for limit in self.limits]
        value["best"] = self.best.to_dict()
        value["front"] = [candidate.to_dict() for candidate in self.front]
        value["random"] = self.random and self.random.to_dict()
        for name in ("history", "hypervolume"):
            value[name] = {strategy: list(numbers) for strategy, numbers in value[name].items()}
        for name in ("devices", "slope"):
            value[name] = {key: asdict(part) for key, part in value[name].items()}
        for name in ("axis", "question", "versions"):
            value[name] = dict(value[name])
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; what an older hwnas did not write is left at its default.

        Raises:
            InputError: something is missing.
        """
        try:
            known = {one.name: value[one.name] for one in fields(cls) if one.name in value}
            known["limits"] = tuple(value["limits"])
            known["best"] = Candidate.from_dict(value["best"])
            known["front"] = tuple(Candidate.from_dict(item) for item in value["front"])
            known["random"] = value["random"] and Candidate.from_dict(value["random"])
            known["devices"] = {name: Source(**item) for name, item in value.get("devices", {}).items()}
            known["slope"] = {name: Slope(**item) for name, item in value.get("slope", {}).items()}
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a search result of this hwnas ({error!r}): search again") from None
