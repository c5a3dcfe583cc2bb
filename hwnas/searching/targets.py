"""Targets: the devices that a search finds a child for, each with what predicts and what measures its costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hwnas.devices.base import DeviceGoneError
from hwnas.errors import InputError
from hwnas.measurement import Measurement
from hwnas.predictors import LatencyPredictor
from hwnas.progress import Notice, unheard
from hwnas.searching.costs import DeviceCost
from hwnas.searching.result import Estimate, Source
from hwnas.space import Architecture

Measure = Callable[[Sequence[Architecture]], Sequence[Measurement]]


class Target:
    """A device of a search.

    Args:
        name: the device's.
        predictor: of its latencies; fitted anew, in place, to what is measured.
        measure: puts children on the device; None where it cannot be reached, and `source.reason` says why.
        measurements: what was measured there so far.
        energy: predictor of the energy of an inference, mJ; None where the device does not tell its power.
        source: what is known of where the latencies come from.
        notice: told what a user should know.
    """

    def __init__(
        self,
        name: str,
        predictor: LatencyPredictor,
        *,
        measure: Measure | None = None,
        measurements: Sequence[Measurement] = (),
        energy: LatencyPredictor | None = None,
        source: Source | None = None,
        notice: Notice = unheard,
    ) -> None:
        self.name, self.predictor, self.energy = name, predictor, energy
        self.measured = {m.arch: m for m in measurements if m.trusted}
        self.failed: set[Architecture] = set()  # could not be measured, so they are not delivered
        self._measure, self._notice = measure, notice
        self._source = source or Source(measured=False)

    def cost(self, kind: str, *, measured: bool = True) -> DeviceCost:
        """What children cost here: `latency` or `energy`, by predictions alone or with what was measured.

        Raises:
            InputError: the device has no predictor of its energy.
        """
        values = self._values(kind) if measured else {}
        if kind == "latency":
            return DeviceCost(self.predictor, values, "ms")
        if self.energy is None:
            raise InputError(
                f"no energy predictor for {self.name!r}: profile it where it tells its power, "
                f"`hwnas profile --device {self.name}`; or leave out the energy limit"
            )
        return DeviceCost(self.energy, values, "mJ")

    def estimate(self, kind: str, arch: Architecture) -> Estimate:
        """A child's predicted cost here, with the measured one if it was measured."""
        cost = self.cost(kind)
        mean, std = cost.predictor.predict([arch])
        measured = cost.measured.get(cost.predictor.space.encode([arch]).tobytes())
        return Estimate(predicted=float(mean[0]), std=float(std[0]), measured=measured)

    def source(self, best: Architecture) -> Source:
        """Where the latencies come from; `best` is the answer."""
        measured = best in self.measured
        return replace(self._source, measured=measured, reason="" if measured else self._source.reason)

    def settled(self, arch: Architecture) -> bool:
        """Whether all is known of a child that can be known here."""
        return self._measure is None or arch in self.measured

    def measure(self, archs: Sequence[Architecture]) -> None:
        """Measure the children that were not yet, and fit the predictor anew.

        Where the device turns out not to be reachable, the predictor is all there is from then on, and the user is
        told.

        Raises:
            DeviceError: the device is there, but the children fail on it.
        """
        wanted = [arch for arch in archs if not self.settled(arch) and arch not in self.failed]
        if self._measure is None or not wanted:
            return
        try:
            made = self._measure(wanted)
        except DeviceGoneError as error:
            self._measure = None
            self._source = replace(self._source, reason=str(error))
            self._notice(f"{self.name}: not reachable, so its latencies are predicted from here on: {error}")
            return
        for measurement in made:
            if measurement.trusted:
                self.measured[measurement.arch] = measurement
            else:
                self.failed.add(measurement.arch)
                why = measurement.error or measurement.rejection
                self._notice(f"{self.name}: {measurement.arch.describe()}: not measured: {why}")
        self._refit()

    def _refit(self) -> None:
        archs = list(self.measured)
        if len(archs) >= self.predictor.min_samples:
            self.predictor.fit(archs, [self.measured[arch].latency_ms for arch in archs])

    def _values(self, kind: str) -> Mapping[bytes, float]:
        name = {"latency": "latency_ms", "energy": "energy_mj"}[kind]
        values = {arch: getattr(measurement, name) for arch, measurement in self.measured.items()}
        archs = [arch for arch, value in values.items() if value is not None]
        genes = self.predictor.space.encode(archs)
        return {row.tobytes(): values[arch] for arch, row in zip(archs, genes, strict=True)}
