"""What a run folder holds that a report shows, read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hwnas.config import read_json
from hwnas.errors import InputError
from hwnas.measurement import Measurement, last_by_child
from hwnas.predictors import LatencyPredictor
from hwnas.report.fit import FitPoint, fit_points, load_fit
from hwnas.run import PORTFOLIO, Run
from hwnas.searching.costs import LayerCosts
from hwnas.searching.result import Candidate, Estimate, Result
from hwnas.space import Architecture
from hwnas.store import Evaluation, Store


class Findings:
    """A run, as far as a report shows it.

    Attributes:
        run: the run folder.
        results: of the searches, by name, the latest last.
        portfolios: documents by name, likewise.
        weights: of the last search; None before one.
        evaluations: of children with these weights, by the protocol used last.
        measurements: those that can be trusted, by device and child, of the protocol used last on each device.
        devices: those with a predictor in the run or a result, in order of their names.
        predictors: by device, where there is one.
        fits: predicted against measured, by device; empty before `hwnas fit`.
        evaluated: the children with a known accuracy, by id, with their costs on all devices.

    Raises:
        InputError: a file of the run, or its database, is damaged.
    """

    def __init__(self, run: Run) -> None:
        self.run, self._layers = run, LayerCosts(run.space)
        documents = {path.stem: read_json(path) for path in run.results()}
        self.portfolios: dict[str, Any] = {
            name: document for name, document in documents.items() if name.startswith(PORTFOLIO)
        }
        self.results = {
            name: Result.from_dict(document) for name, document in documents.items() if name not in self.portfolios
        }
        self.weights = next((one.weights for one in reversed(self.results.values()) if one.weights), None)
        with run.store() as store:
            self.evaluations = self._evaluations(store)
            self.measurements = _measurements(store)
        told = [*(candidate for one in self.results.values() for candidate in _candidates(one)), *self._members()]
        self.devices = sorted({*run.profiled(), *(device for candidate in told for device in candidate.latency)})
        self.predictors = {device: found for device in self.devices if (found := self._predictor(device)) is not None}
        self.fits = {device: self._fit(device) for device in self.devices}
        known = {one.arch: one.accuracy for one in self.evaluations}
        self.evaluated = {one.architecture.id: one for one in self.candidates(list(known), list(known.values()))}
        for candidate in told:  # what a search says of a child goes before what is predicted now
            latency = dict(self.evaluated.get(candidate.architecture.id, candidate).latency)
            for device, estimate in candidate.latency.items():
                if estimate.measured is not None or device not in latency or latency[device].measured is None:
                    latency[device] = estimate
            self.evaluated[candidate.architecture.id] = replace(candidate, latency=latency)

    def candidates(self, archs: Sequence[Architecture], accuracies: Sequence[float]) -> list[Candidate]:
        """Children with their costs on all devices, measured where they were; (num_archs,) each."""
        if not archs:
            return []
        genes = self.run.space.encode(archs)
        latency: list[dict[str, Estimate]] = [{} for _ in archs]
        for device, predictor in self.predictors.items():
            measured = self.measurements.get(device, {})
            for costs, arch, mean, std in zip(latency, archs, *predictor.predict_genes(genes), strict=True):
                known = measured[arch].latency_ms if arch in measured else None
                costs[device] = Estimate(predicted=float(mean), std=float(std), measured=known)
        return [
            Candidate(
                architecture=arch,
                accuracy=accuracy,
                latency=costs,
                energy={},
                **layers,
            )
            for arch, accuracy, costs, layers in zip(archs, accuracies, latency, self._layers.told(genes), strict=True)
        ]

    def _members(self) -> list[Candidate]:
        return [
            Candidate.from_dict(member) for portfolio in self.portfolios.values() for member in portfolio["members"]
        ]

    def _evaluations(self, store: Store) -> list[Evaluation]:
        if self.weights is None:
            return []
        space, found = self.run.space, store.evaluations(self.weights, "validation")
        return [one for one in found if one.protocol == found[-1].protocol and space.has_resolution_of(one.arch)]

    def _predictor(self, device: str) -> LatencyPredictor | None:
        try:
            return self.run.predictor(device)
        except InputError:
            if self.run.predictor_path(device).is_file():
                raise
            return None  # it was removed since the search

    def _fit(self, device: str) -> list[FitPoint]:
        """What `hwnas fit` left, and the finalists measured since, which the predictor has not seen."""
        points = load_fit(self.run.path / "plots" / f"{device}.json")
        if not points or device not in self.predictors:
            return points
        seen = {point.arch for point in points}
        later = [
            m
            for m in self.measurements.get(device, {}).values()
            if m.role == "finalist" and m.arch not in seen and self.run.space.has_resolution_of(m.arch)
        ]
        if later:
            archs = [m.arch for m in later]
            mean, std = self.predictors[device].predict(archs)
            points += fit_points("finalist", archs, [m.latency_ms for m in later], mean, std)
        return points


def _candidates(result: Result) -> Iterable[Candidate]:
    """Of a search, those that count most last."""
    yield from result.front
    if result.random is not None:
        yield result.random
    yield result.best


def _measurements(store: Store) -> Mapping[str, Mapping[Architecture, Measurement]]:
    by_device: dict[str, list[Measurement]] = {}
    for m in store.measurements():
        if m.role != "export":
            by_device.setdefault(m.device, []).append(m)
    kept = {device: {m.arch: m for m in last_by_child(some) if m.trusted} for device, some in by_device.items()}
    return {device: children for device, children in kept.items() if children}
