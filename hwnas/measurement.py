"""A child measured on a device: the rounds, and the latency that they amount to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.devices.base import RunTimes, Timing
from hwnas.space import Architecture

Role: TypeAlias = Literal["fit", "holdout", "finalist", "export"]


def usual_ms(reference_ms: Iterable[float], max_drift: float) -> float:
    """The reference's latency when nothing disturbs it, from its medians of many rounds.

    Other work on the machine only ever slows it down, often most of the time: with two busy processes on two cores the
    median is 60% off. So this is the median of the low end: of the values up to three times `max_drift` above the 10th
    percentile, which keeps apart the few percent by which the clock of an undisturbed processor wanders.
    """
    values = np.asarray(list(reference_ms))
    low = np.quantile(values, 0.1, method="lower")
    return float(np.median(values[values <= low * (1 + 3 * max_drift)]))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A child measured on a device, or the reason why it could not be.

    Attributes:
        arch: the child.
        device, runtime, versions, precision, timing: what measured it, and how.
        reference: id of the reference network's architecture.
        role: what it is for: to `fit` a predictor, as its `holdout`, a search's `finalist`, or an `export`.
        rounds: the raw times, disturbed rounds included; empty after an error.
        reference_ms: medians of the reference around the rounds, one more than there are rounds.
        usual_reference_ms: the reference's undisturbed latency, worked out over all measurements of the same protocol
            (see `usual_ms`), so it becomes better known as more are made; None leaves the times uncorrected.
        error: why there are no times.
        write_s, run_s: time spent on writing the file, and on the device.
        created: when, UTC.
    """

    arch: Architecture
    device: str
    runtime: str
    versions: Mapping[str, str]
    precision: str
    timing: Timing
    reference: str = ""
    role: Role = "fit"
    rounds: tuple[RunTimes, ...] = ()
    reference_ms: tuple[float, ...] = ()
    usual_reference_ms: float | None = None
    error: str | None = None
    write_s: float = 0.0
    run_s: float = 0.0
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        if bool(self.rounds) == (self.error is not None):
            raise ValueError("a measurement has either times or an error")
        if self.usual_reference_ms is not None and not self.reference_ms:
            raise ValueError("usual_reference_ms: there are no times of a reference")
        if self.reference_ms and len(self.reference_ms) != len(self.rounds) + 1:
            raise ValueError(f"{len(self.rounds)} rounds have {len(self.rounds) + 1} reference times around them")

    @property
    def protocol(self) -> str:
        """Twelve hexadecimal digits: measurements with the same protocol can be compared."""
        return protocol_key(self.device, self.runtime, self.versions, self.precision, self.timing, self.reference)

    @cached_property
    def steady(self) -> NDArray[np.bool_]:
        """Which rounds no other work disturbed, (num_rounds,): see `steady_rounds`."""
        return steady_rounds(self.rounds, self.reference_ms, self.usual_reference_ms, self.timing)

    @property
    def unstable(self) -> bool:
        """Whether too few rounds were steady: a latency to be trusted less."""
        return self.error is None and int(self.steady.sum()) < self.timing.rounds

    @property
    def relative_error(self) -> float:
        """Standard error of `latency_ms` over itself, from how far the rounds that count lie apart.

        That of the median of normal values, sqrt(pi / 2) times that of their mean, with the standard deviation taken
        from their inter-quartile range (over 1.349): one stray round does not count.

        Raises:
            ValueError: the measurement failed.
        """
        low, middle, high = np.quantile(self._estimates_ms, (0.25, 0.5, 0.75))
        return float(math.sqrt(math.pi / 2 / len(self._estimates_ms)) * (high - low) / 1.349 / middle)

    @property
    def others_busy(self) -> float | None:
        """How many processors other programs kept busy meanwhile, on average; None if the device does not tell.

        Where they do so all the time, the reference is never seen undisturbed: what they cost a child beside what they
        cost the reference, through caches and memory, stays in its latency.
        """
        used = [times.facts["used_s"] for times in self.rounds if "used_s" in times.facts]
        if len(used) < 2 or used[-1]["own"] < used[0]["own"]:  # a worker that was replaced
            return None
        clock, machine, own = (used[-1][name] - used[0][name] for name in ("clock", "machine", "own"))
        return max(0.0, float((machine - own) / clock)) if clock > 0 else None

    @property
    def rejection(self) -> str | None:
        """Why the latency is not to be trusted; None if it is, and after an error.

        The device was disturbed or throttled for most of the time, and the rounds do not agree even relative to the
        reference.
        """
        if not self.unstable or self.relative_error <= self.timing.max_error:
            return None
        causes = []
        if self.usual_reference_ms is not None:
            slowest = max(self.reference_ms) / self.usual_reference_ms
            causes.append(f"the reference took up to {slowest:.1f} times as long as usual")
        if throttled(self.rounds).any():
            causes.append("the device throttled itself")
        celsius = [times.facts["celsius"] for times in self.rounds if "celsius" in times.facts]
        if celsius:
            causes.append(f"up to {max(celsius):.0f} degrees Celsius")
        return (
            f"disturbed: {int(self.steady.sum())} of {len(self.rounds)} rounds were steady, and all of them agree to "
            f"{self.relative_error:.1%}, not {self.timing.max_error:.1%}" + "".join(f"; {cause}" for cause in causes)
        )

    @property
    def trusted(self) -> bool:
        """Whether there is a latency, and it was not rejected."""
        return self.error is None and self.rejection is None

    @cached_property
    def _counted(self) -> list[tuple[RunTimes, float]]:
        """The rounds that count, each with the factor that brings it to the reference's undisturbed speed."""
        if self.error is not None:
            raise ValueError(f"{self.arch.id} has no latency on {self.device!r}: {self.error}")
        scale = np.ones(len(self.rounds))
        if self.usual_reference_ms is not None:
            around = np.asarray(self.reference_ms)
            scale = self.usual_reference_ms / ((around[:-1] + around[1:]) / 2)
        counts = np.ones_like(self.steady) if self.unstable else self.steady
        return [
            (times, float(factor)) for times, factor, count in zip(self.rounds, scale, counts, strict=True) if count
        ]

    @cached_property
    def _estimates_ms(self) -> list[float]:
        """The latency on the undisturbed device, as each round that counts has it."""
        return [times.latency_ms * factor for times, factor in self._counted]

    @property
    def times_ms(self) -> NDArray[np.float64]:
        """Raw times, uncorrected, of the rounds that count: the steady ones, or all if too few are."""
        return np.concatenate([times.times_ms for times, _ in self._counted])

    @property
    def latency_ms(self) -> float:
        """The child's latency on the undisturbed device: the median over the rounds that count.

        A round's own figure is its `RunTimes.latency_ms`, times the reference's usual latency over its latency around
        that round. In steady rounds this changes little (`Timing.max_drift`); where other work disturbed all rounds it
        takes most of the disturbance out. On two cores with two other busy processes, two measurements of tiny's
        children differ by 2-3.5% (median) so corrected, and by 34% as they are.

        Raises:
            ValueError: the measurement failed.
        """
        return float(np.median(self._estimates_ms))

    @property
    def energy_mj(self) -> float | None:
        """Energy of one inference, mJ, the median over the rounds that count; None if the device does not tell.

        Of everything that the device's sensor sees, at rest and for other programs too: the processor's package by its
        counters (RAPL), a Jetson's whole module by its power times the latency. A Raspberry Pi or a phone tells none.

        Raises:
            ValueError: the measurement failed.
        """
        energies = []
        for times, factor in self._counted:
            if "energy_mj" in times.facts:
                energies.append(times.facts["energy_mj"])
            elif "run_power_mw" in times.facts:
                energies.append(times.facts["run_power_mw"] * times.latency_ms * factor / 1000)
        return float(np.median(energies)) if energies else None

    @property
    def relative_iqr(self) -> float:
        """Inter-quartile range over median of the single runs that count, preempted ones left out."""
        low, middle, high = np.quantile(
            np.concatenate([times.clean_ms * factor for times, factor in self._counted]), (0.25, 0.5, 0.75)
        )
        return float((high - low) / middle)


def last_by_child(found: Sequence[Measurement]) -> list[Measurement]:
    """The last measurement of each child, all by the same protocol: the last one used.

    One that can be trusted goes before a later one that cannot.

    Args:
        found: of one device, in the order they were made.
    """
    # As the records say, not the database's column: an older hwnas, whose `Timing` had fewer keys, hashed less.
    protocols = [measurement.protocol for measurement in found]
    last: dict[Architecture, Measurement] = {}
    for measurement, protocol in zip(found, protocols, strict=True):
        before = last.get(measurement.arch)
        if protocol == protocols[-1] and (measurement.trusted or before is None or not before.trusted):
            last[measurement.arch] = measurement
    return list(last.values())


def steady_rounds(
    rounds: Sequence[RunTimes], reference_ms: Sequence[float], usual_reference_ms: float | None, timing: Timing
) -> NDArray[np.bool_]:
    """Which rounds no other work disturbed, (num_rounds,).

    The reference was near its usual latency before and after them, their own times do not spread wide, and the device
    did not throttle itself.
    """
    narrow = np.asarray([times.relative_iqr <= timing.max_relative_iqr for times in rounds], dtype=bool)
    narrow &= ~throttled(rounds)
    if usual_reference_ms is None:
        return narrow
    near = np.abs(np.asarray(reference_ms) / usual_reference_ms - 1) <= timing.max_drift
    return np.asarray(near[:-1] & near[1:] & narrow)


def throttled(rounds: Sequence[RunTimes]) -> NDArray[np.bool_]:
    """In which rounds the device slowed itself down, as far as it tells, (num_rounds,).

    The clock that the system allows was more than a tenth below the highest in these rounds, or Android spoke of
    moderate throttling or more (https://developer.android.com/reference/android/os/PowerManager). The clock itself says
    less: it falls as soon as a program ends.
    """
    mhz = np.asarray([times.facts.get("mhz_limit", np.nan) for times in rounds], dtype=float)
    status = np.asarray([times.facts.get("thermal_status", 0) for times in rounds])
    highest = np.nanmax(mhz) if np.isfinite(mhz).any() else np.inf
    return np.asarray((mhz < 0.9 * highest) & np.isfinite(mhz) | (status >= 2))


def protocol_key(
    device: str, runtime: str, versions: Mapping[str, str], precision: str, timing: Timing, reference: str
) -> str:
    """See `Measurement.protocol`."""
    parts = [device, runtime, dict(versions), precision, asdict(timing), reference]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
