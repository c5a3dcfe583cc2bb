"""Whether a device can be measured on: step by step, each with its remedy."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hwnas.devices.base import Check, Device, RunTimes
from hwnas.devices.lock import exclusive
from hwnas.errors import DeviceError, ExportError
from hwnas.exporters.base import exporter, write_random
from hwnas.measuring.children import reference_child
from hwnas.space import SearchSpace


def diagnose(device: Device, space: SearchSpace, duration_s: float = 5.0) -> Iterator[Check]:
    """Reach the device, look at its runtime, room and state, write a network's file, and time that for a while.

    Args:
        device: stays open.
        space: its reference child is what is timed.
        duration_s: of the measurement.

    Yields:
        One check a step, up to the first one without which the others make no sense.
    """
    checks = []
    for check in device.check():
        checks.append(check)
        yield check
    if any(not check.passed and check.step in ("reached", device.runtime) for check in checks):
        return
    with tempfile.TemporaryDirectory(prefix="hwnas-") as folder:
        started = time.perf_counter()
        try:
            writer = exporter(device.accepts, device.file_precision)
            arch = reference_child(space)
            path = write_random(writer, space, arch, Path(folder) / arch.id, np.random.default_rng(0))
        except ExportError as error:
            yield Check("file", str(error), "see the message")
            return
        seconds = time.perf_counter() - started
        yield Check("file", f"{device.accepts} {device.file_precision} of {space.name}, written in {seconds:.2g} s")
        yield from _measure(device, path, duration_s)


def _measure(device: Device, path: Path, duration_s: float) -> Iterator[Check]:
    timing = device.timing
    rounds: list[RunTimes] = []
    try:
        with exclusive(device.address):
            end = time.monotonic() + duration_s
            while len(rounds) < 3 or time.monotonic() < end:
                rounds.append(device.run(path, timing))
    except DeviceError as error:
        yield Check("measurement", str(error), "see the message")
        return
    state = {name: value for name, value in rounds[-1].facts.items() if not isinstance(value, dict)}
    if state:
        yield Check("state", ", ".join(f"{name} {value}" for name, value in state.items()))
    low, middle, high = np.quantile([times.latency_ms for times in rounds], (0.25, 0.5, 0.75))
    found = f"{middle:.4g} ms on {timing.threads} thread(s), {len(rounds)} rounds within {(high - low) / middle:.1%}"
    remedy = None
    if (high - low) / middle > 2 * timing.max_drift:
        remedy = "end what else runs there, cool it, or fix its clocks (`prepare` in the device's file)"
    yield Check("measurement", found, remedy)
