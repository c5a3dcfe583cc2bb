"""What a device is: something that times network files.

A device is a transport (this host, ssh, adb) times what runs the networks there, described by one YAML file in the
catalogue. That is either a runtime that Python drives (a file in `runtimes/`, run by `worker.py` on the device; see
`WorkerDevice`), or a program of the runtime's makers (a file in `tools/`; see `ToolDevice`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config

from hwnas.devices.lock import HOST
from hwnas.errors import DeviceError


class DeviceGoneError(DeviceError):
    """The device itself fails, not one network on it: nothing more can be measured."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How latency is measured; recorded with each result.

    A child is timed in rounds, in turns with a reference network: reference, child, reference, child, ..., reference.
    A round is steady if the reference, before and after it, is as fast as it usually is, and its own runs agree.
    Rounds go on until `rounds` steady ones are there. After `max_rounds` the disturbed ones count too, each brought to
    the reference's usual speed; if they do not agree to `max_error` then, the child is measured again later, and
    rejected if that does not help. By default a child of 0.1 ms takes 0.2 s on a quiet machine, and 0.5 s at most.

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
        max_error: relative standard error above which disturbed rounds do not make a latency.
        pause_s: wait so long after a disturbed round: a phone cools, another program ends.
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
    max_error: float = 0.03
    pause_s: float = 0.0
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
        facts: the machine's state after it, as far as it tells: `cores`, `load`, `mhz` of the fastest core, `mhz_limit`
            that the system allows it at the moment, `celsius` of the hottest part, `thermal_status` (Android's: 0 none,
            1 light, 2 moderate, ... throttling), `used_s` (seconds up to now: `clock` of the wall, `machine` of all
            processors by all programs, `own` of them by the runtime), `energy_mj` that one run took on average (of the
            whole processor), `run_power_mw` (of a Jetson's whole module, as the last run ended), ...
        spread: inter-quartile range over median of the runs, where only their sum is known and `times_ms` is one
            value, their median or mean.
    """

    times_ms: tuple[float, ...]
    preempted: tuple[bool, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    spread: float | None = None

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
        if self.spread is not None:
            return self.spread
        low, middle, high = np.quantile(self.clean_ms, (0.25, 0.5, 0.75))
        return float((high - low) / middle)


@dataclass(frozen=True, slots=True)
class Check:
    """One step of checking a device.

    Attributes:
        step: what was looked at: `reached`, `room`, `onnxruntime`, ...
        found: what was found, or what went wrong.
        remedy: what to do about it, ready to paste where it is a command; None where nothing is wrong.
    """

    step: str
    found: str
    remedy: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.remedy is None


class Device(ABC):
    """Something that times network files.

    `hwnas.measuring.measure` asks for `versions` once, then calls `run` for a child's file and a reference's in turns.
    It is a context manager, which calls `close` at the end; what `run` needs is opened at its first call.

    Attributes:
        name: as the user writes it.
        runtime: what runs the networks.
        accepts: the format of the files: an `Exporter.format`.
        precision: of the arithmetic.
        int8: the precision of the files for int8, where the format knows several.
        timing: the protocol that suits the device.
        install: what to do where the runtime is missing.
        address: of the machine: on one address one round runs at a time, whichever device or process asks for it. It
            holds from the first call of `versions` on.
    """

    name: str
    runtime: str
    accepts: str
    precision: str = "fp32"
    int8: str = "int8"
    timing: Timing = Timing()
    install: str = "see the message"
    address: str = HOST

    @property
    def file_precision(self) -> str:
        """Of the files it takes: int8 networks are written so, anything else is cast by the runtime from fp32."""
        return self.int8 if self.precision == "int8" else "fp32"

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """What its times depend on: the runtime's version, the processor, a driver. Other versions, other times.

        Raises:
            DeviceGoneError: the device cannot be reached, or lacks its runtime.
        """

    @abstractmethod
    def run(self, path: Path, timing: Timing) -> RunTimes:
        """One round: untimed runs, then at least `timing.repeats` timed ones for `timing.min_duration_s`.

        Going back and forth between two files is cheap where the runtime allows it. A network of several files is
        given by one of them: the others lie beside it and share its stem (`hwnas.files.parts`).

        Raises:
            DeviceError: this network cannot be run. The next call may succeed: whatever crashed is started again.
            DeviceGoneError: no network can be run.
        """

    def check(self) -> Iterator[Check]:
        """Look whether the device can be used, step by step, up to the first one that fails for good. Never raises."""
        try:
            versions = self.versions()
        except DeviceError as error:
            yield Check(self.runtime, str(error), self.install)
        else:
            yield Check(self.runtime, ", ".join(f"{name} {version}" for name, version in versions.items()))

    def close(self) -> None:  # noqa: B027 - nothing to close is fine
        """Let go of what is open; a later `run` opens it again. Never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
