"""`hwnas profile`, `fit` and `predict`: from a device to its latency predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from hwnas import __version__
from hwnas.api.catalogue import open_device
from hwnas.api.costs import fit_energy, layer_values, read_architecture
from hwnas.devices import Device
from hwnas.devices.base import Timing
from hwnas.errors import DeviceError, InputError
from hwnas.measurement import Measurement, Role, last_by_child
from hwnas.measuring.active import next_children
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.predictors import (
    LatencyPredictor,
    PredictionReport,
    left_out_predictions,
    load_predictor,
    make_predictor,
)
from hwnas.predictors import report as prediction_report
from hwnas.progress import Report, silent
from hwnas.report.fit import FitPoint, fit_points, save_fit
from hwnas.run import Run, RunConfig, published_model
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store

# Up to so many measurements of a device, what is known of others may tell more than they do.
_FEW = 30
# Children that are measured before what they tell decides on the next ones: so many more, or half as many again.
_BATCH = 10


@dataclass(frozen=True, slots=True)
class Profile:
    """What `profile` and `fit` leave: a predictor and how good it is.

    Attributes:
        device: its name.
        predictor: fitted to the children measured for it.
        num_children: how many those are.
        num_failed, num_rejected: children whose measurement failed, and that were measured but cannot be trusted.
        num_unstable: children among those used that were disturbed, but whose latency can be trusted.
        choice: which kind was taken and why, and what a transfer started from; empty where there was no choice.
        others_busy: processors that other programs kept busy meanwhile, median; None if the device does not tell.
        write_s, run_s: seconds that a child took to write and to measure, median.
        cross_validation: errors on children left out of the fit in turn.
        holdout: errors on fresh random children measured for this only; None if there are none.
        points: predicted against measured, of the children of both.
        plots: the files that show them, the one to look at first.
        energy: predictor of the energy of an inference, mJ; None where the device does not tell it.
    """

    device: str
    predictor: LatencyPredictor
    num_children: int
    num_failed: int
    num_rejected: int
    num_unstable: int
    choice: str
    others_busy: float | None
    write_s: float
    run_s: float
    cross_validation: PredictionReport
    holdout: PredictionReport | None
    points: tuple[FitPoint, ...] = ()
    plots: tuple[Path, ...] = ()
    energy: LatencyPredictor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "device": self.device,
            "kind": self.predictor.kind,
            "choice": self.choice,
            "num_children": self.num_children,
            "num_failed": self.num_failed,
            "num_rejected": self.num_rejected,
            "num_unstable": self.num_unstable,
            "others_busy": self.others_busy,
            "write_s": self.write_s,
            "run_s": self.run_s,
            "cross_validation": asdict(self.cross_validation),
            "holdout": self.holdout and asdict(self.holdout),
            "points": [point.to_dict() for point in self.points],
            "plots": [str(path) for path in self.plots],
        }


def profile(
    device: str | Path,
    run: str | Path | None = None,
    *,
    children: int = 60,
    holdout: int = 0,
    space: str | Path | None = None,
    kind: str = "auto",
    seed: int = 0,
    report: Report = silent,
) -> Profile:
    """Measure children on a device, and fit its latency predictor. What is measured already is not measured again.

    Args:
        device: a device's name or file.
        run: the run folder.
        children: how many to fit to: first ten spread over the space, the smallest and biggest among them, then those
            that tell most of all others, by what was measured up to then.
        holdout: how many fresh random ones to test the predictor on.
        space: for a run folder that holds no run yet: profile before training.
        kind: of predictor. `auto` tries `transfer` too where measurements are few: `transfer` starts from the
            predictors of the run's other devices and from what is published of this one.
        seed: of the choice of children.
        report: told the progress.

    Raises:
        InputError: unknown device, kind or space, no run, or numbers that make no sense.
        DeviceError: the device cannot be used.
    """
    (made,) = profile_all(
        [device], run, children=children, holdout=holdout, space=space, kind=kind, seed=seed, reports=[report]
    )
    if isinstance(made, DeviceError):
        raise made
    return made


def profile_all(
    devices: Sequence[str | Path],
    run: str | Path | None = None,
    *,
    children: int = 60,
    holdout: int = 0,
    space: str | Path | None = None,
    kind: str = "auto",
    seed: int = 0,
    reports: Sequence[Report] | None = None,
) -> list[Profile | DeviceError]:
    """Profile several devices at the same time, one measurement at a time on each machine: see `profile`.

    A device that cannot be used does not keep the others.

    Args:
        devices: their names or files.
        run: see `profile`, as for all others.
        children: to fit to; the first ten are the same on every device.
        holdout: to test on.
        space: a name or file.
        kind: of predictor.
        seed: of the choice of children.
        reports: one for each device, called from a thread of its own.

    Returns:
        For each device its profile, or why it could not be used.

    Raises:
        InputError: unknown device, kind or space, no run, or numbers that make no sense.
    """
    if children < 5:
        raise InputError(f"children={children}: at least 5 are needed to fit a predictor")
    if holdout < 0:
        raise InputError(f"holdout={holdout}: must be at least 0")
    make_predictor(kind, SearchSpace.load("tiny"))  # refuses an unknown kind before an hour of measuring
    opened = Run(run) if space is None else Run.create(run, _profile_only(run, space))
    targets = [open_device(device, opened) for device in devices]
    for target in targets if kind == "transfer" else []:
        _sources(opened, target)
    if len({target.name for target in targets}) < len(targets):
        raise InputError(f"{', '.join(target.name for target in targets)}: a device is named twice")
    stop = Event()

    def bench(target: Device, report: Report) -> DeviceError | None:
        before = 0

        def run_all(archs: Sequence[Architecture], store: Store, role: Role) -> list[Measurement]:
            def tell(done: float, total: float, note: str = "") -> None:
                report(before + done, children + holdout, note)
                if stop.is_set():
                    raise KeyboardInterrupt

            nonlocal before
            made = measure(archs, opened.space, target, target.timing, store, role=role, report=tell)
            before += len(archs)
            return made

        try:
            with target, opened.store() as store:
                chosen = _first_children(opened.space, target, store, children, seed)
                fresh = _fresh_children(opened.space, chosen, min(holdout, opened.space.size() - children), seed)
                made = run_all(chosen[:children], store, "fit")
                while len(chosen) < children:
                    count = min(children - len(chosen), max(_BATCH, len(chosen) // 2))
                    rng = np.random.default_rng([seed, 2, len(chosen)])
                    more = _next_children(opened.space, made, [*chosen, *fresh], count, rng)
                    if not more:  # the space holds no others
                        break
                    chosen += more
                    made += run_all(more, store, "fit")
                run_all(fresh, store, "holdout")
        except DeviceError as error:
            return error
        return None

    with ThreadPoolExecutor(len(targets)) as threads:
        done = [threads.submit(bench, *pair) for pair in zip(targets, reports or [silent] * len(targets), strict=True)]
        try:
            errors = [future.result() for future in done]
        except BaseException:  # Ctrl-C: every thread ends after the child that it measures
            stop.set()
            raise
    with opened.store() as store:
        return [
            _fit(opened, target, store, kind) if error is None else error
            for target, error in zip(targets, errors, strict=True)
        ]


def _first_children(space: SearchSpace, device: Device, store: Store, count: int, seed: int) -> list[Architecture]:
    """Spread over the space; and all that were chosen before on the device, so that none was measured in vain."""
    first = choose_children(space, min(count, _BATCH), np.random.default_rng([seed, 0]))
    before = [m.arch for m in last_measurements(device.name, device.timing, store, "fit")]
    return list(dict.fromkeys([*first, *before]))


def _fresh_children(space: SearchSpace, taken: Sequence[Architecture], count: int, seed: int) -> list[Architecture]:
    """Random ones that are not taken."""
    rng = np.random.default_rng([seed, 1])
    fresh: dict[Architecture, None] = {}
    while len(fresh) < min(count, space.size() - len(taken)):
        arch = space.sample(rng)
        if arch not in taken:
            fresh[arch] = None
    return list(fresh)


def _next_children(
    space: SearchSpace,
    made: Sequence[Measurement],
    taken: Sequence[Architecture],
    count: int,
    rng: np.random.Generator,
) -> list[Architecture]:
    """The children that tell most of all others, by what was measured."""
    trusted = [m for m in made if m.trusted]
    if len(trusted) < 5:
        return [arch for arch in choose_children(space, len(taken) + count, rng) if arch not in taken][:count]
    known = make_predictor("gp", space).fit([m.arch for m in trusted], [m.latency_ms for m in trusted])
    return next_children(space, taken, known.covariance_genes, count, rng)


def _profile_only(run: str | Path | None, space: str | Path) -> RunConfig:
    known = Run.find(run)
    if known is not None and known.config.data is not None:
        raise InputError(f"{known.path}: has its space already: leave out --space")
    return RunConfig(hwnas=__version__, space=SearchSpace.load(space))


def fit(device: str | Path, run: str | Path | None = None, *, kind: str = "auto") -> Profile:
    """Fit a device's latency predictor to what the run's database holds, and save it.

    Raises:
        InputError: unknown kind or device, or nothing measured on the device.
        DeviceError: too little that was measured can be trusted.
    """
    opened = Run(run)
    target = open_device(device, opened)
    with opened.store() as store:
        return _fit(opened, target, store, kind)


def known_machines(run: Run, target: Device) -> dict[str, LatencyPredictor]:
    """What a transfer to a device can start from, by a name for people.

    These are the predictors of the run's other devices, and the published model of this one.
    """
    known = {}
    for device in run.profiled():
        try:
            predictor = load_predictor(run.predictor_path(device))
        except InputError:  # of another version, or damaged: only its own device needs it
            continue
        if device != target.name and predictor.space == run.space and predictor.knows_layers:
            known[device] = predictor
    model = published_model(target)
    if model is not None:
        known[f"published measurements of {model.machine}"] = model.predictor(run.space, target.name)
    return known


def _sources(run: Run, target: Device) -> dict[str, LatencyPredictor]:
    known = known_machines(run, target)
    if not known:
        raise InputError(
            f"nothing known to transfer to {target.name!r}: profile another device in {run.path} first, or take "
            "another --kind"
        )
    return known


def _fit(run: Run, target: Device, store: Store, kind: str) -> Profile:
    """Finalists of searches count among the children that the predictor is fitted to; held-out ones never do."""
    device = target.name
    last = last_measurements(device, target.timing, store)
    if not last:
        raise InputError(f"nothing measured on {device!r} in {run.path}: run `hwnas profile --device {device}`")
    used = [m for m in last if m.trusted]
    train = [m for m in used if m.role != "holdout" and run.space.has_resolution_of(m.arch)]
    test = [m for m in used if m.role == "holdout"]
    rejected = [m for m in last if m.rejection is not None]
    if len(train) < 5 and rejected:
        raise DeviceError(
            f"device {device!r}: {len(rejected)} of {len(last)} children cannot be trusted, the last: "
            f"{rejected[-1].rejection}: end what else runs there, or cool it, and profile again"
        )
    archs, latency_ms = [m.arch for m in train], [m.latency_ms for m in train]
    sources = _sources(run, target) if kind == "transfer" else {}
    makes = {kind: partial(make_predictor, kind, run.space, list(sources.values()))}
    if kind == "auto" and len(archs) <= _FEW and (sources := known_machines(run, target)):
        makes["transfer"] = partial(make_predictor, "transfer", run.space, list(sources.values()))
    left_out = {
        name: left_out_predictions(make, archs, latency_ms, folds=5, rng=np.random.default_rng(0))
        for name, make in makes.items()
    }
    validated = {name: prediction_report(latency_ms, *predicted) for name, predicted in left_out.items()}
    chosen = min(validated, key=lambda name: validated[name].mape_pct)
    predictor = makes[chosen]().fit(archs, latency_ms)
    points = fit_points("cross-validation", archs, latency_ms, *left_out[chosen])
    tested = None
    if test:
        mean, std = predictor.predict([m.arch for m in test])
        tested = prediction_report([m.latency_ms for m in test], mean, std)
        points += fit_points("held out", [m.arch for m in test], [m.latency_ms for m in test], mean, std)
    predictor.save(run.predictor_path(device))
    energy = fit_energy(run, device, train)
    plots = save_fit(device, points, run.path / "plots")
    others = [busy for m in used if (busy := m.others_busy) is not None]
    return Profile(
        device=device,
        predictor=predictor,
        num_children=len(train),
        num_failed=sum(m.error is not None for m in last),
        num_rejected=len(rejected),
        num_unstable=sum(m.unstable for m in [*train, *test]),
        choice=_told(chosen, getattr(predictor, "choice", ""), validated, list(sources)),
        others_busy=float(np.median(others)) if others else None,
        write_s=float(np.median([m.write_s for m in used])),
        run_s=float(np.median([m.run_s for m in used])),
        cross_validation=validated[chosen],
        holdout=tested,
        points=tuple(points),
        plots=tuple(plots),
        energy=energy,
    )


def _told(chosen: str, choice: str, validated: Mapping[str, PredictionReport], sources: Sequence[str]) -> str:
    """What was taken and why; `choice` is what kind `auto` tells of its own."""
    if not sources:
        return choice
    errors = ", ".join(f"{name} {report.mape_pct:.1f}%" for name, report in validated.items() if name != chosen)
    told = (
        f"{chosen}{f' ({choice})' if choice else ''}: mean error {validated[chosen].mape_pct:.1f}% in cross-validation"
    )
    return f"{told}{f', against {errors}' if errors else ''}; transfer is from {', '.join(sources)}"


def last_measurements(device: str, timing: Timing, store: Store, role: Role | None = None) -> list[Measurement]:
    """What a device's measurements say of each child: see `last_by_child`."""
    return last_by_child(store.measurements(device=device, timing=timing, role=role))


def predict(
    device: str, archs: Sequence[str | Path | Architecture], run: str | Path | None = None, *, layers: bool = False
) -> list[dict[str, Any]]:
    """Predicted latencies of children on a device.

    Args:
        device: a device with a predictor in the run, or a published model.
        archs: architectures, `smallest`, `biggest`, or files (see `read_architecture`).
        run: the run folder.
        layers: also where the milliseconds go.

    Returns:
        For each child `architecture`, `architecture_text`, `predicted_ms`, `std_ms`, and `source`: where the figures
        come from if not from measurements of the device in this run. Perhaps `layers`: what
        `cost` tells of each, in order of execution, with its `ms`; they add up to `predicted_ms`.

    Raises:
        InputError: no predictor for the device yet, one that does not know single layers, or an architecture outside
            the space.
    """
    opened = Run(run)
    predictor = opened.predictor(device)
    children = [opened.space.check(read_architecture(arch, opened.space)) for arch in archs]
    mean, std = predictor.predict(children)
    found: list[dict[str, Any]] = [
        {
            "architecture": arch.to_dict(),
            "architecture_text": arch.describe(),
            "predicted_ms": float(m),
            "std_ms": float(s),
            "source": predictor.source,
        }
        for arch, m, s in zip(children, mean, std, strict=True)
    ]
    if layers:
        for arch, prediction in zip(children, found, strict=True):
            prediction["layers"] = [{**layer_values(layer), "ms": ms} for layer, ms in predictor.breakdown_ms(arch)]
    return found
