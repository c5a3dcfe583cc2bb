"""`hwnas search`: one child under all of some limits, or an answer for each device and the fewest children for all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hwnas.api.catalogue import open_device
from hwnas.api.costs import energy_predictor
from hwnas.api.evaluating import open_evaluator
from hwnas.api.profiling import last_measurements
from hwnas.devices import Device, device_name
from hwnas.devices.base import DeviceGoneError
from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.machine import versions
from hwnas.measurement import Measurement
from hwnas.measuring.measure import measure
from hwnas.progress import Notice, Report, silent, unheard
from hwnas.run import PORTFOLIO, Run
from hwnas.space import Architecture

if TYPE_CHECKING:
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.evaluator import Evaluator
    from hwnas.searching.limits import Limit
    from hwnas.searching.portfolio import Portfolio
    from hwnas.searching.result import Result, Source
    from hwnas.searching.searcher import Searcher
    from hwnas.searching.targets import Target

# Of the evaluations of the first question, for each further one: it starts from what is known by then
# (benchmarks/results/many_devices.md).
FURTHER = 0.2
PACKAGES = ("numpy", "scipy", "optuna", "torch")  # whose versions a result tells
DRAWS = 4096  # random children, to tell which limits are loose


def search(
    limits: Limit | Sequence[Limit] = (),
    run: str | Path | None = None,
    *,
    strategy: str = "guided",
    evaluations: int = 100,
    confidence: float = 0.95,
    baseline: bool = True,
    front: str | None = None,
    storage: str | None = None,
    study: str | None = None,
    data: TorchDatasets | None = None,
    seed: int = 0,
    report: Report = silent,
    notice: Notice = unheard,
) -> Result:
    """Find the most accurate child that keeps all of some limits, perhaps on several devices.

        result = hwnas.search(hwnas.LatencyLimit("cpu", ms=20), "run")
        result = hwnas.search([hwnas.LatencyLimit("pixel", ms=20), hwnas.MacsLimit(600e6)], "run")

    Accuracies are on the validation images. What an earlier search evaluated or measured is not worked out again, and
    the search starts from it. Where a device can be reached, the answer is measured on it; where it cannot, the answer
    is predicted, `notice` says how well, and so does `result.devices`. The result is saved as
    `results/<device>-<limit>ms.json`, or by the names of its other limits.

    Args:
        limits: one, or several that one child has to keep; the devices need predictors, in the run or published ones.
        run: the run folder.
        strategy: `guided`, `coarse-to-fine`, `evolution`, `nsga2`, `tpe` or `random`.
        evaluations: children to evaluate that were not known before.
        confidence: with which a child that was not measured has to keep the limits.
        baseline: whether to run random search with as many evaluations beside it.
        front: a device, or `macs`, `params`, `size` or `memory`: look for the best child of every latency on it (of
            every cost), up to its limit where there is one.
        storage: URL of the database; None for `$HWNAS_STORAGE`, or the run's own.
        study: a name; all searches of this name, in however many processes and on however many machines, work together
            and get the same answer. None: all that ask the same do.
        data: what the run was trained on, if that was a dataset of PyTorch.
        seed: of all chance.
        report: told the progress.
        notice: told what a user should know.

    Raises:
        InputError: neither limit nor front, bad numbers, no trained supernet, no predictor, or a study of this name
            that asks something else.
        LimitError: no child keeps the limits.
        DeviceError: children fail on a device that can be reached.
    """
    from hwnas.searching.limits import Limit

    asked = [limits] if isinstance(limits, Limit) else list(limits)
    _check(asked, front)
    with ExitStack() as stack:
        session = _Session(stack, Run(run, storage=storage), confidence, strategy, data, seed, notice)
        return session.answer(
            session.searcher(asked, front, study),
            result_name(asked, front),
            evaluations,
            baseline=baseline,
            report=report,
        )


def search_all(
    questions: Sequence[Limit | Sequence[Limit]],
    run: str | Path | None = None,
    *,
    tolerance: float = 0.002,
    strategy: str = "guided",
    evaluations: int = 100,
    confidence: float = 0.95,
    baseline: bool = True,
    fronts: Sequence[str | None] = (),
    storage: str | None = None,
    study: str | None = None,
    data: TorchDatasets | None = None,
    seed: int = 0,
    report: Report = silent,
    notice: Notice = unheard,
) -> Portfolio:
    """Find the most accurate child for each of several questions, and the fewest children that answer all of them.

        portfolio = hwnas.search_all([hwnas.LatencyLimit("pixel", 20), hwnas.LatencyLimit("jetson", 5)], "run")
        portfolio.results["pixel-20ms"].best, portfolio.child_for("jetson-5ms")

    Accuracies are shared: the question with the loosest limits is searched first; every further one starts from the
    children that are known by then, and gets a fifth of the evaluations. Saved is a result for each, and
    `results/portfolio-<names>.json`.

    Args:
        questions: for each the limits that its child has to keep.
        run: see `search`, as for all that is not here.
        tolerance: accuracy that an answer of the portfolio may lose against the best child for its question.
        strategy: of all searches.
        evaluations: for the question with the loosest limits; a fifth of it for each further one.
        confidence: of all searches.
        baseline: whether to run random search beside each, with as many evaluations.
        fronts: for each question its `front`; none by default.
        storage: see `search`.
        study: see `search`; it holds one study for each question.
        data: the images.
        seed: of all chance.
        report: told the progress.
        notice: told what a user should know.

    Raises:
        InputError: as `search`; fewer than two questions, or one that is asked twice; a tolerance under 0.
        LimitError: for one of them no child keeps the limits.
        DeviceError: children fail on a device that can be reached.
    """
    from hwnas.searching.limits import Limit
    from hwnas.searching.portfolio import Portfolio, choose_members

    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance={tolerance}: must be a number from 0")
    asked = [[one] if isinstance(one, Limit) else list(one) for one in questions]
    axes = list(fronts) or [None] * len(asked)
    if len(axes) != len(asked):
        raise InputError(f"{len(axes)} fronts for {len(asked)} questions: give one for each, or none at all")
    names = [result_name(limits, axis) for limits, axis in zip(asked, axes, strict=True)]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise InputError(f"{len(names)} questions ({', '.join(names) or 'none'}): ask two or more different ones")
    for limits, axis in zip(asked, axes, strict=True):
        _check(limits, axis)
    with ExitStack() as stack:
        session = _Session(stack, Run(run, storage=storage), confidence, strategy, data, seed, notice)
        searchers = {
            name: session.searcher(limits, axis, study and f"{study}, {name}")
            for name, limits, axis in zip(names, asked, axes, strict=True)
        }
        for searcher in searchers.values():
            searcher.explored.check()  # before the first evaluation is spent
        budgets = [evaluations] + [math.ceil(FURTHER * evaluations)] * (len(names) - 1)
        found = {}
        for number, name in enumerate(_loosest_first(searchers)):
            found[name] = session.answer(
                searchers[name],
                name,
                budgets[number],
                baseline=baseline,
                report=_part_of(report, sum(budgets[:number]) / sum(budgets), budgets[number] / sum(budgets), name),
            )
        results = {name: found[name] for name in names}
        members, exact = choose_members(searchers, results, tolerance)
    made = Portfolio(results=results, members=tuple(members), tolerance=tolerance, exact=exact)
    write_text(session.run.result_path(_portfolio_name(names)), json.dumps(made.to_dict(), indent=2) + "\n")
    return made


class _Session:
    """What the searches of one command share: the run, its database, its images, the opened devices."""

    def __init__(
        self,
        stack: ExitStack,
        run: Run,
        confidence: float,
        strategy: str,
        data: TorchDatasets | None,
        seed: int,
        notice: Notice,
    ) -> None:
        self.run, self._stack, self._data, self._notice = run, stack, data, notice
        self._confidence, self._strategy, self._seed = confidence, strategy, seed
        self._store = stack.enter_context(run.store())
        self._devices: dict[str, tuple[Device, dict[str, str], str]] = {}

    @cached_property
    def _evaluator(self) -> Evaluator:
        return open_evaluator(self.run, self._notice, self._data)

    def searcher(self, limits: Sequence[Limit], front: str | None, study: str | None) -> Searcher:
        """For one question, with the predictors as they are in the run."""
        from hwnas.searching.costs import LAYER_COSTS
        from hwnas.searching.searcher import Searcher
        from hwnas.searching.strategies import Scored

        devices = dict.fromkeys(limit.device for limit in limits)
        if front is not None and front not in LAYER_COSTS:
            devices[front] = None
        energy = {limit.device for limit in limits if limit.kind == "energy"}
        targets = [self._target(given, given in energy) for given in devices if given is not None]
        return Searcher(
            self.run.space,
            _named(limits),
            {target.name: target for target in targets},
            front=front and device_name(front),
            evaluate=lambda archs: self._evaluator.accuracies(archs, self._store),
            known=lambda: [
                Scored(arch, accuracy)
                for arch, accuracy in self._evaluator.known(self._store)
                if self.run.space.has_resolution_of(arch)
            ],
            storage_url=self.run.storage_url,
            weights=self._evaluator.supernet.identity(),
            study=study,
            at_once=self._evaluator.at_once,
            confidence=self._confidence,
            strategy=self._strategy,
            seed=self._seed,
            notice=self._notice,
        )

    def answer(self, searcher: Searcher, name: str, evaluations: int, *, baseline: bool, report: Report) -> Result:
        """Search, save what was found, and say where it was not measured."""
        found = replace(searcher.run(evaluations, baseline=baseline, report=report), versions=versions(PACKAGES))
        for device, source in found.devices.items():
            if not source.measured:
                self._notice(_predicted(device, source))
        write_text(self.run.result_path(name), json.dumps(found.to_dict(), indent=2) + "\n")
        return found

    def _target(self, given: str, wants_energy: bool) -> Target:
        from hwnas.searching.targets import Target

        name = device_name(given)
        predictor = self.run.predictor(name)
        if name not in self._devices:
            self._devices[name] = self._reach(given)
        device, versions, reason = self._devices[name]

        def bench(archs: Sequence[Architecture]) -> list[Measurement]:
            with self._store.claimed(f"measure on {name}"):  # what another worker measures now is not measured again
                return measure(archs, self.run.space, device, device.timing, self._store, role="finalist")

        knows_energy = wants_energy or self.run.energy_path(name).is_file()
        return Target(
            name,
            predictor,
            measure=None if reason else bench,
            measurements=last_measurements(name, device.timing, self._store, "fit"),
            energy=energy_predictor(self.run, name) if knows_energy else None,
            reason=reason,
            runtime=f"{device.runtime}, {device.precision}",
            versions=versions,
            notice=self._notice,
        )

    def _reach(self, given: str) -> tuple[Device, dict[str, str], str]:
        """The device, its versions, and why it cannot be reached: better known before hours of evaluations."""
        device = self._stack.enter_context(open_device(given, self.run))
        try:
            return device, device.versions(), ""
        except DeviceGoneError as error:
            return device, {}, str(error)


def _loosest_first(searchers: Mapping[str, Searcher]) -> list[str]:
    """The questions' names, those first that the most children of the space keep the limits of.

    What is known of a tight limit's children does not help with a loose one (benchmarks/results/many_devices.md).
    """

    def share(name: str) -> float:
        searcher = searchers[name]
        return float(searcher.explored.feasible(searcher.space.sample_genes(DRAWS, np.random.default_rng(0))).mean())

    return sorted(searchers, key=lambda name: -share(name))


def _part_of(report: Report, start: float, share: float, name: str) -> Report:
    """For a part of the whole: tells percent of it."""

    def tell(done: float, total: float, note: str = "") -> None:
        report(round(100 * (start + share * done / total)), 100, f"{name}: {note}")

    return tell


def _check(limits: Sequence[Limit], front: str | None) -> None:
    if not limits and front is None:
        raise InputError(
            "nothing asked for: give a limit, such as --device cpu --latency-ms 20 or --max-macs 600M, or a device and "
            "--front"
        )


def _predicted(device: str, source: Source) -> str:
    """What to know of an answer that was not measured."""
    if source.source:
        return f"{device}: latencies are {source.source} (it cannot be used now: {source.reason})"
    return (
        f"{device}: latencies are predicted, not measured, from what was measured there before: typical error "
        f"{source.error_pct:.1f}%; it cannot be used now ({source.reason}): see `hwnas devices check {device}`"
    )


def _named(limits: Sequence[Limit]) -> list[Limit]:
    """The limits with the names of devices that were given by their files."""
    return [limit if limit.device is None else _replaced(limit) for limit in limits]


def _replaced(limit: Limit) -> Limit:
    from hwnas.searching.limits import Limit

    assert limit.device is not None
    return Limit.from_dict({**limit.to_dict(), "device": device_name(limit.device)})


def result_name(limits: Sequence[Limit], front: str | None = None) -> str:
    """What a search's result is called: `cpu-20ms`, `pixel-20ms+jetson-5ms`, `macs-600M`, `cpu-front`."""
    parts = []
    for limit in _named(limits):
        if limit.device is not None:
            parts.append(f"{limit.device}-{limit.value:g}{limit.unit}")
        elif limit.unit in ("MACs", "parameters"):
            parts.append(f"{limit.kind}-{limit.value / 1e6:g}M")
        else:
            parts.append(f"{limit.kind}-{limit.value:g}{limit.unit}")
    return "+".join(parts + ([] if front is None else [f"{device_name(front)}-front"]))


def _portfolio_name(names: Sequence[str]) -> str:
    joined = "+".join(names)
    if len(joined) > 100:  # file names have 255 bytes at most
        joined = f"{len(names)}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return f"{PORTFOLIO}{joined}"
