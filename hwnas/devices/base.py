"""What a device is, and the records of measuring on one.

A device is a transport (this host, ssh, adb) times a runtime (onnxruntime, tensorrt, litert, ...), described by one
YAML file in the catalogue. A runtime that Python drives is a class in `worker.py`; anything else is a `Device`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config

from hwnas.errors import DeviceError
from hwnas.space import Architecture

Role: TypeAlias = Literal["fit", "holdout", "finalist", "export"]


class DeviceGoneError(DeviceError):
    """The device itself fails, not one network on it: nothing more can be measured."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How latency is measured; recorded with each result.

    A child is timed in rounds, in turns with a reference network: reference, child, reference, child, ..., reference.
    A round is steady if the reference, before and after it, is as fast as it usually is, and its own runs agree.
    Rounds go on until `rounds` steady ones are there; after `max_rounds` the child is marked unstable. By default a
    child of 0.1 ms takes 0.2 s on a quiet machine, and 0.5 s at most.

    Attributes:
        warmup_s: run a network untimed for so long when it has just been loaded.
        warmup_runs: untimed runs at the start of each round.
        repeats: timed runs of a round, at least.
        min_duration_s: a round goes on for at least so long.
        rounds: steady rounds wanted.
        max_rounds: rounds in all, at most.
        threads: of the runtime.
        max_drift: relative distance from its usual latency at which the reference counts as disturbed.
        max_relative_iqr: inter-quartile range over median above which the runs of a round do not agree.
        timeout_s: a round that takes longer counts as hanging.
    """

    warmup_s: float = 0.02
    warmup_runs: int = 2
    repeats: int = 3
    min_duration_s: float = 0.01
    rounds: int = 8
    max_rounds: int = 20
    threads: int = 1
    max_drift: float = 0.05
    max_relative_iqr: float = 0.25
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        least = {"repeats": 1, "rounds": 1, "threads": 1, "max_rounds": self.rounds}
        for name, value in asdict(self).items():
            if value < least.get(name, 0):
                raise ValueError(f"{name}={value}: must be at least {least.get(name, 0)}")
        if self.timeout_s == 0:
            raise ValueError("timeout_s=0: must be over 0")


@dataclass(frozen=True, slots=True)
class RunTimes:
    """One round of timed runs.

    Attributes:
        times_ms: wall time of each run, in order.
        preempted: whether the system took the processor away during that run (`ru_nivcsw` grew).
        facts: the machine's state, as far as it tells: cores, load, mhz, celsius, ...
    """

    times_ms: tuple[float, ...]
    preempted: tuple[bool, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.times_ms or len(self.times_ms) != len(self.preempted):
            raise ValueError(f"{len(self.times_ms)} times and {len(self.preempted)} flags: must be equally many, not 0")

    @property
    def clean_ms(self) -> NDArray[np.float64]:
        """The times without preempted runs; all of them where fewer than half are left."""
        times = np.asarray(self.times_ms)
        clean = times[~np.asarray(self.preempted)]
        return clean if 2 * len(clean) >= len(times) else times

    @property
    def latency_ms(self) -> float:
        """The median of `clean_ms`."""
        return float(np.median(self.clean_ms))

    @property
    def relative_iqr(self) -> float:
        """Inter-quartile range over median of `clean_ms`."""
        low, middle, high = np.quantile(self.clean_ms, (0.25, 0.5, 0.75))
        return float((high - low) / middle)


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
        return float(np.median([times.latency_ms * factor for times, factor in self._counted]))

    @property
    def relative_iqr(self) -> float:
        """Inter-quartile range over median of the single runs that count, preempted ones left out."""
        low, middle, high = np.quantile(
            np.concatenate([times.clean_ms * factor for times, factor in self._counted]), (0.25, 0.5, 0.75)
        )
        return float((high - low) / middle)


def steady_rounds(
    rounds: Sequence[RunTimes], reference_ms: Sequence[float], usual_reference_ms: float | None, timing: Timing
) -> NDArray[np.bool_]:
    """Which rounds no other work disturbed, (num_rounds,).

    The reference was near its usual latency before and after them, and their own times do not spread wide.
    """
    narrow = np.asarray([times.relative_iqr <= timing.max_relative_iqr for times in rounds], dtype=bool)
    if usual_reference_ms is None:
        return narrow
    near = np.abs(np.asarray(reference_ms) / usual_reference_ms - 1) <= timing.max_drift
    return np.asarray(near[:-1] & near[1:] & narrow)


def protocol_key(
    device: str, runtime: str, versions: Mapping[str, str], precision: str, timing: Timing, reference: str
) -> str:
    """See `Measurement.protocol`."""
    parts = [device, runtime, dict(versions), precision, asdict(timing), reference]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Transport(ABC):
    """How files and programs get to a machine: this host, ssh, adb.

    A device calls `send` for its program and each network, and `start` for the program: at first use, and again after a
    crash.
    """

    @abstractmethod
    def send(self, path: Path) -> str:
        """Make a file of this host available on the machine; its path there. Cheap for a file sent before.

        Raises:
            DeviceGoneError: the machine cannot be reached, or has no room.
        """

    @abstractmethod
    def start(self, command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program on the machine, with pipes for its stdin and stdout; killing the process ends it.

        Raises:
            DeviceGoneError: the machine cannot be reached, or lacks the program.
        """

    @property
    @abstractmethod
    def python(self) -> tuple[str, ...]:
        """The command that runs Python there."""


class Device(ABC):
    """Something that times network files.

    `hwnas.measure` asks for `versions` once, then calls `run` for a child's file and a reference's in turns. It is a
    context manager, which calls `close` at the end; what `run` needs is opened at its first call.

    Attributes:
        name: as the user writes it.
        runtime: what runs the networks.
        accepts: the format of the files: an `Exporter.format`.
        precision: of the arithmetic.
        timing: the protocol that suits the device.
    """

    name: str
    runtime: str
    accepts: str
    precision: str = "fp32"
    timing: Timing = Timing()

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """What its times depend on: the runtime's version, the processor, a driver. Other versions, other times.

        Raises:
            DeviceGoneError: the device cannot be reached, or lacks its runtime.
        """

    @abstractmethod
    def run(self, path: Path, timing: Timing) -> RunTimes:
        """One round: untimed runs, then at least `timing.repeats` timed ones for `timing.min_duration_s`.

        Going back and forth between two files is cheap where the runtime allows it.

        Raises:
            DeviceError: this network cannot be run. The next call may succeed: whatever crashed is started again.
            DeviceGoneError: no network can be run.
        """

    def close(self) -> None:  # noqa: B027 - nothing to close is fine
        """Let go of what is open; a later `run` opens it again. Never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
