"""The measuring loop: each child in turns with a reference, recorded as soon as it is measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hwnas.devices.base import Device, DeviceGoneError, RunTimes, Timing
from hwnas.devices.lock import HOST, exclusive
from hwnas.errors import DeviceError, ExportError
from hwnas.exporters.base import exporter, write_random
from hwnas.files import parts
from hwnas.measurement import Measurement, Role, protocol_key, steady_rounds, throttled, usual_ms
from hwnas.measuring.children import reference_child
from hwnas.progress import Report, silent
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store

MAX_FAILURES = 3  # in a row: then it is the device


def measure(
    archs: Sequence[Architecture],
    space: SearchSpace,
    device: Device,
    timing: Timing,
    store: Store,
    *,
    role: Role = "fit",
    files: Mapping[Architecture, Path] | None = None,
    rng: np.random.Generator | None = None,
    folder: Path | None = None,
    report: Report = silent,
) -> list[Measurement]:
    """Measure children on a device, and record each as soon as it is measured.

    A child's network is written with random weights and timed in turns with a reference network of the space, as
    `Timing` says. What cannot be measured is recorded with the reason. Children that failed or were rejected are
    measured once more at the end. A child that has a measurement by the same protocol in the store, in whatever role,
    is not measured again; one that failed, was rejected, or has a file of its own, is.

    On one machine (`Device.address`) one child is measured at a time, also by several threads and processes.

    Args:
        archs: the children.
        space: theirs.
        device: stays open.
        timing: the protocol.
        store: for the results.
        role: of the measurements in the store.
        files: of children whose deployable file is to be measured, in place of one with random weights.
        rng: of the weights.
        folder: where to make a temporary one for the networks' files; by default the system's.
        report: told the number of children done, and the last one's latency.

    Returns:
        The last measurement of each child, in the order of `archs`: see `Measurement.trusted`.

    Raises:
        DeviceError: the device cannot be used, or three children in a row failed. What was measured is in the store.
        OSError: a file cannot be written.
    """
    wanted = list(dict.fromkeys(archs))
    with tempfile.TemporaryDirectory(prefix="hwnas-", dir=folder) as work:
        bench = _Bench(space, device, timing, store, Path(work), rng or np.random.default_rng(0))
        files = files or {}
        known = {arch for arch in bench.known() if arch not in files}
        failures = 0
        once_more = []
        for done, arch in enumerate(wanted, 1):
            if arch not in known:
                measurement = bench.measure(arch, role, files.get(arch))
                store.add_measurement(measurement)
                failures = failures + 1 if measurement.error else 0
                if failures == MAX_FAILURES:
                    raise DeviceError(f"{failures} children in a row failed, the last with: {measurement.error}")
                if not measurement.trusted:
                    once_more.append(arch)
                report(done, len(wanted), _note(measurement))
        for arch in once_more:
            measurement = bench.measure(arch, role, files.get(arch))
            store.add_measurement(measurement)
            report(len(wanted), len(wanted), f"once more: {_note(measurement)}")
        measured = bench.known(distrusted=True)
    return [measured[arch] for arch in archs]


def _note(measurement: Measurement) -> str:
    return measurement.error or measurement.rejection or f"{measurement.latency_ms:.3g} ms"


class _Bench:
    """What all children of one `measure` are measured with."""

    def __init__(
        self,
        space: SearchSpace,
        device: Device,
        timing: Timing,
        store: Store,
        folder: Path,
        rng: np.random.Generator,
    ) -> None:
        self._space, self._device, self._timing, self._store = space, device, timing, store
        self._folder, self._rng = folder, rng
        self._exporter = exporter(device.accepts, device.file_precision)
        self._versions = device.versions()
        reference = reference_child(space)
        self._reference = reference.id
        self._reference_path, _ = self._write(reference)
        self._reference_ms: list[float] = []  # of all rounds by this protocol

    def known(self, distrusted: bool = False) -> dict[Architecture, Measurement]:
        """The last measurement by this protocol of each child that has one."""
        device = self._device
        protocol = protocol_key(
            device.name, device.runtime, self._versions, device.precision, self._timing, self._reference
        )
        found = self._store.measurements(protocol=protocol)
        self._reference_ms = [ms for measurement in found for ms in measurement.reference_ms]
        return {measurement.arch: measurement for measurement in found if distrusted or measurement.trusted}

    def measure(self, arch: Architecture, role: Role, file: Path | None = None) -> Measurement:
        """One child, measured or failed; its own `file`, or one with random weights.

        Raises:
            DeviceGoneError: the device cannot be used any more.
        """
        rounds: list[RunTimes] = []
        reference_ms: list[float] = []
        error = None
        write_s = run_s = 0.0
        try:
            path = file
            if path is None:
                path, write_s = self._write(arch)
            with exclusive(self._device.address):
                started = time.perf_counter()
                rounds, reference_ms = self._rounds(path)
                run_s = time.perf_counter() - started
            if file is None:
                for part in parts(path):
                    part.unlink()
        except DeviceGoneError:
            raise
        except (DeviceError, ExportError) as failure:
            error = str(failure)
        self._reference_ms += reference_ms
        return Measurement(
            arch=arch,
            device=self._device.name,
            runtime=self._device.runtime,
            versions=self._versions,
            precision=self._device.precision,
            timing=self._timing,
            reference=self._reference,
            role=role,
            rounds=tuple(rounds),
            reference_ms=tuple(reference_ms),
            usual_reference_ms=self._usual([]) if rounds else None,
            error=error,
            write_s=write_s,
            run_s=run_s,
        )

    def _write(self, arch: Architecture) -> tuple[Path, float]:
        """A child's file with random weights, and the seconds that took; not while this host measures."""
        with exclusive(HOST):
            started = time.perf_counter()
            path = write_random(self._exporter, self._space, arch, self._folder / arch.id, self._rng)
            return path, time.perf_counter() - started

    def _rounds(self, path: Path) -> tuple[list[RunTimes], list[float]]:
        """Rounds of the child, and the reference's medians around them."""
        timing = self._timing
        rounds: list[RunTimes] = []
        reference_ms = [self._device.run(self._reference_path, timing).latency_ms]
        while len(rounds) < timing.max_rounds:
            rounds.append(self._device.run(path, timing))
            reference_ms.append(self._device.run(self._reference_path, timing).latency_ms)
            if len(rounds) < timing.rounds and not timing.pause_s:
                continue
            usual = self._usual(reference_ms)
            if steady_rounds(rounds, reference_ms, usual, timing).sum() >= timing.rounds:
                break
            if abs(reference_ms[-1] / usual - 1) > timing.max_drift or throttled(rounds)[-1]:
                time.sleep(timing.pause_s)
        return rounds, reference_ms

    def _usual(self, further: list[float]) -> float:
        return usual_ms([*self._reference_ms, *further], self._timing.max_drift)
