"""Limits: what a user asks a child to keep to, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeAlias

from hwnas.errors import InputError

LimitKind: TypeAlias = Literal["latency", "energy", "macs", "params", "size", "memory"]


@dataclass(frozen=True)
class Limit:
    """An upper bound on one cost of a child; use the subclasses below. The last field is the bound.

    Attributes:
        kind: what is bounded.
        unit: of the bound.
        device: where the cost arises; None for a cost that is the same everywhere.

    Raises:
        InputError: the bound is no finite number over 0, or the device has no name.
    """

    kind: ClassVar[LimitKind]
    unit: ClassVar[str]
    device: ClassVar[str | None] = None
    _of: ClassVar[str] = ""  # what `describe` ends with

    def __post_init__(self) -> None:
        value: object = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise InputError(f"{self.kind} limit {value} {self.unit}: must be a finite number over 0")

    @property
    def value(self) -> float:
        """The bound, in `unit`."""
        value: float = getattr(self, fields(self)[-1].name)
        return value

    def describe(self) -> str:
        """The limit in a few words, `12 ms on cpu` or `600M MACs`."""
        where = "" if self.device is None else f" on {self.device}"
        return f"{show_cost(self.value, self.unit, digits=6)}{where}{self._of}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `kind`, `device`, `value` and `unit`."""
        return {"kind": self.kind, "device": self.device, "value": self.value, "unit": self.unit}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Limit:
        """The inverse of `to_dict`.

        Raises:
            InputError: it is no limit, or one that makes no sense.
        """
        try:
            made, device, bound = _LIMITS[value["kind"]], value["device"], value["value"]
            limit: Limit = made(bound) if device is None else made(device, bound)
        except (KeyError, TypeError):
            raise InputError(
                f"{value!r} is no limit: it has a kind ({', '.join(_LIMITS)}), a device (null for all but latency and "
                "energy) and a value"
            ) from None
        return limit


@dataclass(frozen=True)
class _DeviceLimit(Limit):
    """A limit on one device."""

    device: str = field()  # type: ignore[misc] # an attribute of each in place of the class's

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device:
            raise InputError(f"{self.kind} limit on device {self.device!r}: name a device")
        super().__post_init__()


@dataclass(frozen=True)
class LatencyLimit(_DeviceLimit):
    """At most `ms` milliseconds for one image on a device."""

    ms: float
    kind = "latency"
    unit = "ms"


@dataclass(frozen=True)
class EnergyLimit(_DeviceLimit):
    """At most `mj` millijoules for one image on a device, as its own sensors tell."""

    mj: float
    kind = "energy"
    unit = "mJ"


@dataclass(frozen=True)
class MacsLimit(Limit):
    """At most so many multiply-adds: see `Layer.macs`."""

    macs: float
    kind = "macs"
    unit = "MACs"


@dataclass(frozen=True)
class ParamsLimit(Limit):
    """At most so many parameters: see `Layer.params`."""

    params: float
    kind = "params"
    unit = "parameters"


@dataclass(frozen=True)
class SizeLimit(Limit):
    """The ONNX file in float32 takes at most so many megabytes (10^6 bytes)."""

    megabytes: float
    kind = "size"
    unit = "MB"
    _of = " of file"


@dataclass(frozen=True)
class MemoryLimit(Limit):
    """At any time the activations in float32 take at most so many megabytes (10^6 bytes)."""

    megabytes: float
    kind = "memory"
    unit = "MB"
    _of = " of activations"


_LIMITS: dict[str, Any] = {
    limit.kind: limit for limit in (LatencyLimit, EnergyLimit, MacsLimit, ParamsLimit, SizeLimit, MemoryLimit)
}


def show_cost(value: float, unit: str, digits: int = 4) -> str:
    """A cost as people write it, `12 ms` or `600M MACs`, with so many digits that count."""
    if unit in ("MACs", "parameters"):
        return f"{value / 1e6:.{digits}g}M {unit}"
    return f"{value:.{digits}g} {unit}"
