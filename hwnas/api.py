"""The verbs: what `hwnas train`, `profile`, `fit`, `search`, `export`, `predict` and `cost` do, as functions.

Each works on a run folder and finds there what the one before left. Heavy packages load when a verb needs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from hwnas import __version__
from hwnas.config import check, read_json
from hwnas.devices import Device, device_files, device_name, load_device, load_spec, user_folder
from hwnas.devices.base import Check, Timing
from hwnas.diagnose import diagnose
from hwnas.errors import DeviceError, InputError
from hwnas.files import write_text
from hwnas.layers import Layer, lower, total_macs, total_params
from hwnas.measure import choose_children, measure
from hwnas.measurement import Measurement, Role
from hwnas.predictors import LatencyPredictor, PredictionReport, cross_validate, make_predictor
from hwnas.predictors import report as prediction_report
from hwnas.progress import Report, silent
from hwnas.run import DataConfig, Run, RunConfig
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store
from hwnas.training.recipes import RECIPES, TrainConfig

if TYPE_CHECKING:
    from hwnas.data import Dataset
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.evaluator import Evaluator
    from hwnas.exporters.base import Artifact
    from hwnas.searcher import Result
    from hwnas.training.plan import Plan
    from hwnas.training.processes import Processes
    from hwnas.training.trainer import Trainer

Notice = Callable[[str], None]

PYTORCH = "a dataset of PyTorch"  # the name, in a run's configuration, of data that only its own program can load


def _quiet(text: str) -> None:
    pass


# -------------------------------------------------------------------- train


def train(
    run: str | Path | None = None,
    *,
    space: str | Path | None = None,
    data: str | Path | TorchDatasets | None = None,
    recipe: str = "short",
    changes: dict[str, Any] | None = None,
    report: Report = silent,
    notice: Notice = _quiet,
) -> Run:
    """Train a supernet, or go on where an earlier call was interrupted.

    Under `torchrun` every process calls this, and they train together; the run folder is on a disk that all of them
    see, and only the first one writes there.

    Args:
        run: the run folder.
        space: a space's name or file; by default `tiny`. Its channels and classes come from the data.
        data: a data set's name, a folder of images or of Parquet files, or a dataset of PyTorch (see
            `hwnas.data.load_dataset`), which `search` and `export` then need too. Not needed when the run already has
            it.
        recipe: one of `hwnas.training.recipes.RECIPES`.
        changes: fields to change, such as `{"train.epochs": 1, "train.biggest.dropout": 0.3, "data.size": 32}`.
        report: told the progress.
        notice: told what a user should know.

    Returns:
        The run, with its trained supernet.

    Raises:
        InputError: bad data, space or configuration, or the run folder holds another run.
    """
    from hwnas.supernet import WEIGHTS

    folder = Run.locate(run)
    with _training(run, space, data, recipe, changes, notice) as (config, images, team):
        if team.first:
            Run.create(run, config)
        trainer = _trainer(config, images, folder, team, notice)
        supernet = trainer.run(report)
        if team.first:
            about = {"data": images.name, "train": json.dumps(trainer.config.to_dict())}
            supernet.save(folder / WEIGHTS, about)
            evaluations = [one.to_dict() for one in trainer.evaluations]
            write_text(folder / "training.json", json.dumps({"evaluations": evaluations}, indent=2) + "\n")
        team.wait()
    return Run(run)


def plan(
    run: str | Path | None = None,
    *,
    space: str | Path | None = None,
    data: str | Path | TorchDatasets | None = None,
    recipe: str = "short",
    changes: dict[str, Any] | None = None,
    notice: Notice = _quiet,
) -> tuple[RunConfig, Plan]:
    """What `train` with the same arguments would do, and what it would cost on this hardware: a few steps are trained.

    Nothing is kept, but for data that had to be downloaded.

    Args:
        run: see `train`, as for all others.
        space: a name or file.
        data: a name or folder.
        recipe: a name.
        changes: fields to change.
        notice: told what a user should know.

    Returns:
        The whole configuration, and its cost.

    Raises:
        InputError: bad data, space or configuration.
    """
    from hwnas.training.plan import plan as measure_plan

    with _training(run, space, data, recipe, changes, notice) as (config, images, team):
        return config, measure_plan(_trainer(config, images, None, team, notice))


@contextmanager
def _training(
    run: str | Path | None,
    space: str | Path | None,
    data: str | Path | TorchDatasets | None,
    recipe: str,
    changes: dict[str, Any] | None,
    notice: Notice,
) -> Iterator[tuple[RunConfig, Dataset, Processes]]:
    """What a training starts from: the configuration, with the images' channels and classes; the images; who trains."""
    from hwnas.training.processes import processes

    config = _training_config(run, space, data, recipe, changes)
    assert config.train is not None
    with processes(config.train.device) as team:
        told = notice if team.first else _quiet
        images = team.one_after_the_first(lambda: load_data(config, Run.locate(run), told, data))
        channels = images.preprocessing.channels
        suited = replace(config.space, in_channels=channels, num_classes=len(images.classes))
        yield replace(config, space=suited), images, team


def _training_config(
    run: str | Path | None,
    space: str | Path | None,
    data: str | Path | TorchDatasets | None,
    recipe: str,
    changes: dict[str, Any] | None,
) -> RunConfig:
    if data is not None:
        return _configure(space or "tiny", data, recipe, changes or {})
    folder = Run.find(run)
    if folder is None or folder.config.data is None:
        raise InputError("which images? Name a data set or a folder with --data")
    if space is not None or changes:
        raise InputError("this run has its configuration already: leave out the options, or give --data too")
    return folder.config


def _trainer(config: RunConfig, images: Dataset, folder: Path | None, team: Processes, notice: Notice) -> Trainer:
    from hwnas.training.trainer import Trainer

    assert config.train is not None
    space = config.space
    watch = {
        Path(name).stem: space.check(read_architecture(name, space), any_resolution=True) for name in config.train.watch
    }
    return Trainer(space, images, config.train, folder, notice, processes=team, watch=watch)


def _configure(space: str | Path, data: str | Path | TorchDatasets, recipe: str, changes: dict[str, Any]) -> RunConfig:
    if recipe not in RECIPES:
        raise InputError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    name = str(data) if isinstance(data, str | Path) else PYTORCH
    parts: dict[str, dict[str, Any]] = {"space": {}, "data": {"name": name}, "train": RECIPES[recipe]().to_dict()}
    for key, value in changes.items():
        part, _, name = key.partition(".")
        if part not in parts or not name:
            raise InputError(f"{key}: options are named train.<key>, data.<key> or space.<key>")
        *path, leaf = name.split(".")
        record = parts[part]
        for step in path:
            record = record.setdefault(step, {})
            if not isinstance(record, dict):
                raise InputError(f"{key}: {step} is a single value, it has no {leaf!r}")
        record[leaf] = value
    return RunConfig(
        hwnas=__version__,
        space=SearchSpace.load(space, **parts["space"]),
        data=check(DataConfig, parts["data"], source="data"),
        train=TrainConfig.from_dict(parts["train"], source="train"),
    )


def load_data(
    config: RunConfig, folder: Path, notice: Notice = _quiet, data: str | Path | TorchDatasets | None = None
) -> Dataset:
    """The images of a run; of `data`, where they are a dataset of PyTorch.

    Raises:
        InputError: they cannot be loaded, or the run has none.
    """
    from hwnas.data import load_dataset

    if config.data is None:
        raise InputError(f"the run at {folder} has no data: train with `hwnas train --data ...`")
    options = asdict(config.data)
    name = options.pop("name")
    given = None if data is None or isinstance(data, str | Path) else data
    if (name == PYTORCH) != (given is not None):
        raise InputError(
            f"the run at {folder} has the images of a dataset of PyTorch: give that as data, in Python"
            if name == PYTORCH
            else f"the run at {folder} has the images of {name}: give no dataset of PyTorch"
        )
    return load_dataset(name if given is None else given, cache=folder / "cache", notice=notice, **options)


def inspect_data(
    data: str | Path, cache: str | Path, *, check: bool = False, report: Report = silent, notice: Notice = _quiet
) -> dict[str, Any]:
    """What a data set is: its classes, its parts, its images.

    Args:
        data: a data set's name, a folder of images or of Parquet files.
        cache: folder for downloads.
        check: also decode every image, to find all damaged ones before a long training meets the first.
        report: told the progress.
        notice: told what a user should know.

    Returns:
        `name`, `classes`, `splits` (number of images, and of the rarest class), `preprocessing`, and `unreadable`:
        a line for each damaged image, None without `check`.

    Raises:
        InputError: it cannot be loaded.
    """
    from hwnas.data import load_dataset, unreadable

    found = load_dataset(data, cache=Path(cache), notice=notice)
    splits = {name: getattr(found, name) for name in ("train", "calibration", "validation", "test")}
    return {
        "name": found.name,
        "classes": list(found.classes),
        "splits": {
            name: {"images": len(split), "rarest_class": int(split.labels.bincount(minlength=len(found.classes)).min())}
            for name, split in splits.items()
        },
        "preprocessing": asdict(found.preprocessing),
        "unreadable": unreadable(*splits.values(), report=report) if check else None,
    }


# -------------------------------------------------------------------- profile, fit, predict


@dataclass(frozen=True, slots=True)
class Profile:
    """What `profile` and `fit` leave: a predictor and how good it is.

    Attributes:
        device: its name.
        predictor: fitted to the children measured for it.
        num_children: how many those are.
        num_failed, num_rejected: children whose measurement failed, and that were measured but cannot be trusted.
        num_unstable: children among those used that were disturbed, but whose latency can be trusted.
        write_s, run_s: seconds that a child took to write and to measure, median.
        cross_validation: errors on children left out of the fit in turn.
        holdout: errors on fresh random children measured for this only; None if there are none.
    """

    device: str
    predictor: LatencyPredictor
    num_children: int
    num_failed: int
    num_rejected: int
    num_unstable: int
    write_s: float
    run_s: float
    cross_validation: PredictionReport
    holdout: PredictionReport | None

    @property
    def choice(self) -> str:
        """What `auto` chose and why; empty for other kinds."""
        return getattr(self.predictor, "choice", "")

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
            "write_s": self.write_s,
            "run_s": self.run_s,
            "cross_validation": asdict(self.cross_validation),
            "holdout": self.holdout and asdict(self.holdout),
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
        children: how many to fit to, spread over the space, the smallest and biggest among them.
        holdout: how many fresh random ones to test the predictor on.
        space: for a run folder that holds no run yet: profile before training.
        kind: of predictor.
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
        children: to fit to, the same on every device.
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
    targets = [_device(device, opened) for device in devices]
    if len({target.name for target in targets}) < len(targets):
        raise InputError(f"{', '.join(target.name for target in targets)}: a device is named twice")
    chosen = choose_children(opened.space, children, np.random.default_rng([seed, 0]))
    rng = np.random.default_rng([seed, 1])
    fresh: list[Architecture] = []
    while len(fresh) < min(holdout, opened.space.size() - len(chosen)):
        arch = opened.space.sample(rng)
        if arch not in fresh and arch not in chosen:
            fresh.append(arch)
    stop = Event()

    def bench(target: Device, report: Report) -> DeviceError | None:
        def told(before: int) -> Report:
            def tell(done: float, total: float, note: str = "") -> None:
                report(before + done, len(chosen) + len(fresh), note)
                if stop.is_set():
                    raise KeyboardInterrupt

            return tell

        try:
            with target, opened.store() as store:
                measure(chosen, opened.space, target, target.timing, store, role="fit", report=told(0))
                measure(fresh, opened.space, target, target.timing, store, role="holdout", report=told(len(chosen)))
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
            _fit(opened, target.name, target.timing, store, kind) if error is None else error
            for target, error in zip(targets, errors, strict=True)
        ]


def _profile_only(run: str | Path | None, space: str | Path) -> RunConfig:
    known = Run.find(run)
    if known is not None and known.config.data is not None:
        raise InputError(f"{known.path}: has its space already: leave out --space")
    return RunConfig(hwnas=__version__, space=SearchSpace.load(space))


def _device(name: str | Path, run: Run) -> Device:
    return load_device(name, _own_devices(run.path))


def fit(device: str | Path, run: str | Path | None = None, *, kind: str = "auto") -> Profile:
    """Fit a device's latency predictor to what the run's database holds, and save it.

    Raises:
        InputError: unknown kind or device, or nothing measured on the device.
        DeviceError: too little that was measured can be trusted.
    """
    opened = Run(run)
    target = _device(device, opened)
    with opened.store() as store:
        return _fit(opened, target.name, target.timing, store, kind)


def _fit(run: Run, device: str, timing: Timing, store: Store, kind: str) -> Profile:
    """Finalists of searches count among the children that the predictor is fitted to; held-out ones never do."""
    last = _last(device, timing, store)
    if not last:
        raise InputError(f"nothing measured on {device!r} in {run.path}: run `hwnas profile --device {device}`")
    used = [m for m in last if m.trusted]
    train = [m for m in used if m.role != "holdout" and m.arch.resolution in run.space.resolution]
    test = [m for m in used if m.role == "holdout"]
    rejected = [m for m in last if m.rejection is not None]
    if len(train) < 5 and rejected:
        raise DeviceError(
            f"device {device!r}: {len(rejected)} of {len(last)} children cannot be trusted, the last: "
            f"{rejected[-1].rejection}: end what else runs there, or cool it, and profile again"
        )
    archs, latency_ms = [m.arch for m in train], [m.latency_ms for m in train]
    predictor = make_predictor(kind, run.space).fit(archs, latency_ms)
    validated = cross_validate(
        lambda: make_predictor(kind, run.space), archs, latency_ms, folds=5, rng=np.random.default_rng(0)
    )
    tested = None
    if test:
        mean, std = predictor.predict([m.arch for m in test])
        tested = prediction_report([m.latency_ms for m in test], mean, std)
    predictor.save(run.predictor_path(device))
    return Profile(
        device=device,
        predictor=predictor,
        num_children=len(train),
        num_failed=sum(m.error is not None for m in last),
        num_rejected=len(rejected),
        num_unstable=sum(m.unstable for m in [*train, *test]),
        write_s=float(np.median([m.write_s for m in used])),
        run_s=float(np.median([m.run_s for m in used])),
        cross_validation=validated,
        holdout=tested,
    )


def _last(device: str, timing: Timing, store: Store, role: Role | None = None) -> list[Measurement]:
    """The last measurement of each child on a device, all by the same protocol: the last one used there.

    One that can be trusted goes before a later one that cannot.
    """
    found = store.measurements(device=device, timing=timing, role=role)
    last: dict[Architecture, Measurement] = {}
    for measurement in found:
        before = last.get(measurement.arch)
        if measurement.protocol == found[-1].protocol and (measurement.trusted or before is None or not before.trusted):
            last[measurement.arch] = measurement
    return list(last.values())


def predict(
    device: str, archs: Sequence[str | Path | Architecture], run: str | Path | None = None
) -> list[dict[str, Any]]:
    """Predicted latencies of children on a device.

    Args:
        device: a device with a predictor in the run.
        archs: architectures, `smallest`, `biggest`, or files (see `read_architecture`).
        run: the run folder.

    Returns:
        For each child `architecture`, `predicted_ms` and `std_ms`.

    Raises:
        InputError: no predictor for the device yet, or an architecture outside the space.
    """
    opened = Run(run)
    predictor = opened.predictor(device_name(device))
    children = [opened.space.check(read_architecture(arch, opened.space)) for arch in archs]
    mean, std = predictor.predict(children)
    return [
        {"architecture": arch.to_dict(), "predicted_ms": float(m), "std_ms": float(s)}
        for arch, m, s in zip(children, mean, std, strict=True)
    ]


# -------------------------------------------------------------------- search


def search(
    device: str,
    latency_ms: float,
    run: str | Path | None = None,
    *,
    evaluations: int = 100,
    confidence: float = 0.95,
    baseline: bool = True,
    data: TorchDatasets | None = None,
    seed: int = 0,
    report: Report = silent,
    notice: Notice = _quiet,
) -> Result:
    """Find the most accurate child that keeps a latency limit on a device. Saved as `results/<device>-<limit>ms.json`.

    Accuracies are on the validation images. What an earlier search evaluated or measured is not worked out again.

    Args:
        device: a device with a predictor in the run.
        latency_ms: the limit, milliseconds.
        run: the run folder.
        evaluations: children to evaluate.
        confidence: with which a child that was not measured has to keep the limit.
        baseline: whether to run random search with as many evaluations beside it.
        data: what the run was trained on, if that was a dataset of PyTorch.
        seed: of all chance.
        report: told the progress.
        notice: told what a user should know.

    Raises:
        InputError: bad numbers, no trained supernet, no predictor.
        LimitError: no child keeps the limit.
        DeviceError: the device cannot be used.
    """
    from hwnas.searcher import Searcher
    from hwnas.strategies import Scored

    opened = Run(run)
    predictor = opened.predictor(device_name(device))
    with opened.store() as store, _device(device, opened) as target:
        evaluator = _evaluator(opened, notice, data)
        bench = partial(measure, space=opened.space, device=target, timing=target.timing, store=store)
        searcher = Searcher(
            opened.space,
            predictor,
            device=target.name,
            limit_ms=latency_ms,
            confidence=confidence,
            evaluate=lambda archs: evaluator.accuracies(archs, store),
            measure=partial(bench, role="finalist"),
            measurements=[m for m in _last(target.name, target.timing, store, "fit") if m.trusted],
            storage_url=opened.storage_url,
            known=lambda: [
                Scored(arch, accuracy)
                for arch, accuracy in evaluator.known(store)
                if arch.resolution in opened.space.resolution
            ],
            seed=seed,
            notice=notice,
        )
        result = searcher.run(evaluations, baseline=baseline, report=report)
    document = {**result.to_dict(), "weights": evaluator.supernet.identity(), "hwnas": __version__}
    write_text(opened.result_path(f"{target.name}-{latency_ms:g}ms"), json.dumps(document, indent=2) + "\n")
    return result


def accuracy(
    arch: Architecture,
    run: str | Path | None = None,
    *,
    split: str = "validation",
    data: TorchDatasets | None = None,
) -> float:
    """The accuracy of a child with the run's weights, calibrated, 0 to 1.

    Args:
        arch: the child.
        run: the run folder.
        split: `validation`, or `test`: for the last table, never for choosing.
        data: what the run was trained on, if that was a dataset of PyTorch.

    Raises:
        InputError: no trained supernet, an architecture outside the space, or an unknown split.
    """
    opened = Run(run)
    with opened.store() as store:
        return _evaluator(opened, data=data).accuracy(opened.space.check(arch, any_resolution=True), store, split)


def _evaluator(run: Run, notice: Notice = _quiet, data: TorchDatasets | None = None) -> Evaluator:
    import torch

    from hwnas.evaluator import Evaluator
    from hwnas.supernet import Supernet

    supernet = Supernet.load(run.path)
    if supernet.space != run.space:
        raise InputError(f"{run.path}: the supernet's space is not that of run.yaml: one of them was replaced")
    torch.set_num_threads(json.loads(supernet.about["train"])["threads"])  # what training found fastest
    return Evaluator(supernet, load_data(run.config, run.path, notice, data), cache=run.folder("cache") / "prepared")


# -------------------------------------------------------------------- export


def export(
    run: str | Path | None = None,
    *,
    format: str = "onnx",
    result: str | None = None,
    arch: str | Path | Architecture | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    num_parity_images: int = 64,
    data: TorchDatasets | None = None,
    notice: Notice = _quiet,
) -> tuple[Path, dict[str, Any]]:
    """Write a child as a deployable bundle: a folder with the model file and `manifest.json`.

    The child is calibrated, its file is run in its own runtime on real images and compared with the child, measured on
    the device, and evaluated on the test images.

    Args:
        run: the run folder.
        format: of the file.
        result: name of a search result (`cpu-0.2ms`), whose best child is exported; by default the last search's.
        arch: a child of your own in its place: an architecture, `smallest`, `biggest`, or a file.
        device: where to measure the file; by default the search's device.
        output: the bundle's folder; by default `exports/<name>` in the run.
        num_parity_images: test images to compare logits on.
        data: what the run was trained on, if that was a dataset of PyTorch.
        notice: told what a user should know.

    Returns:
        The folder and the manifest.

    Raises:
        InputError: unknown format, no search result, an architecture outside the space, an unwritable target.
        ExportError: the file does not compute what the child computes; nothing is written.
        DeviceError: the device cannot be used.
    """
    from hwnas.bundle import write_bundle
    from hwnas.exporters.base import exporter

    opened = Run(run)
    writer = exporter(format)
    if arch is None:
        name, found = _result(opened, result)
        child_arch, device = found.best.architecture, device or found.device
    else:
        found, child_arch = None, opened.space.check(read_architecture(arch, opened.space), any_resolution=True)
        name = arch if arch in ("smallest", "biggest") else child_arch.id
    target = Path(output) if output is not None else opened.folder("exports") / f"{name}-{format}"
    evaluator = _evaluator(opened, notice, data)
    images_of, space = evaluator.data, opened.space
    child = evaluator.child(child_arch)
    with ExitStack() as stack:
        bench: Callable[[Path], dict[str, Any]] | None = None
        if device is not None:
            bench_device = stack.enter_context(_device(device, opened))
            if bench_device.accepts != format:
                raise InputError(
                    f"device {device!r} runs {bench_device.accepts} files, but the exporter writes {format}: "
                    f"use --format {bench_device.accepts}"
                )
            store = stack.enter_context(opened.store())
            bench = partial(_measure_file, opened, child_arch, bench_device, store)

        def about(artifact: Artifact) -> dict[str, Any]:
            latency = None if bench is None else bench(artifact.path)
            if found is not None and latency is not None and latency["measured_ms"] > found.limit_ms:
                notice(
                    f"the file takes {latency['measured_ms']:.4g} ms, over the search's limit of {found.limit_ms:g} ms"
                )
            test = evaluator.score(child, child_arch, images_of.test)
            return {
                "architecture": child_arch.to_dict(),
                "architecture_text": child_arch.describe(),
                "space": space.name,
                "preprocessing": {
                    **asdict(images_of.preprocessing),
                    "resolution": child_arch.resolution,
                    "resize": "bicubic",
                },
                "classes": list(images_of.classes),
                "accuracy": {"split": "test", "value": test.accuracy, "num_images": test.num_images},
                "latency": latency,
                "limit": None if found is None else {"device": found.device, "latency_ms": found.limit_ms},
                "training": {"data": images_of.name, "weights": evaluator.supernet.identity()},
            }

        images = evaluator.images(images_of.test, child_arch.resolution, num_parity_images)
        path, _ = write_bundle(child, writer, images, target, about)
    return path, read_json(path / "manifest.json")


def _measure_file(run: Run, arch: Architecture, device: Device, store: Store, file: Path) -> dict[str, Any]:
    """A child's own file measured on a device, for its manifest."""
    (measured,) = measure([arch], run.space, device, device.timing, store, role="export", files={arch: file})
    if measured.error is not None:
        raise DeviceError(f"the file could not be measured on {measured.device}: {measured.error}")
    document: dict[str, Any] = {
        "device": measured.device,
        "runtime": measured.runtime,
        "versions": dict(measured.versions),
        "precision": measured.precision,
        "timing": asdict(measured.timing),
        "measured_ms": measured.latency_ms,
        "relative_iqr": measured.relative_iqr,
        "rejection": measured.rejection,
        "predicted_ms": None,
        "std_ms": None,
    }
    if arch.resolution in run.space.resolution and run.predictor_path(device.name).is_file():
        mean, std = run.predictor(device.name).predict([arch])
        document |= {"predicted_ms": float(mean[0]), "std_ms": float(std[0])}
    return document


def _result(run: Run, name: str | None) -> tuple[str, Result]:
    from hwnas.searcher import Result

    paths = sorted((run.path / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise InputError(f"no finished search in {run.path}: run `hwnas search --device cpu --latency-ms ...` first")
    path = paths[-1] if name is None else run.result_path(name)
    if path not in paths:
        raise InputError(f"no result {name!r} in {run.path}: not one of {', '.join(p.stem for p in paths)}")
    return path.stem, Result.from_dict(read_json(path))


# -------------------------------------------------------------------- cost, devices


def cost(
    arch: str | Path | Architecture, *, space: str | Path | None = None, run: str | Path | None = None
) -> dict[str, Any]:
    """Multiply-adds, parameters and layers of a child.

    Args:
        arch: an architecture, `smallest`, `biggest`, or a file; it need not be a member of the space.
        space: a space's name or file; by default the run's.
        run: the run folder.

    Raises:
        InputError: unknown space, or a file that is no architecture of as many stages.
    """
    chosen = SearchSpace.load(space) if space is not None else Run(run).space
    child = read_architecture(arch, chosen)
    if len(child.stages) != len(chosen.stages):
        raise InputError(
            f"the architecture has {len(child.stages)} stages, space {chosen.name!r} has {len(chosen.stages)}: "
            "name its own space with --space"
        )
    layers = lower(chosen, child)
    try:
        chosen.check(child)
        in_space = True
    except InputError:
        in_space = False
    return {
        "space": chosen.name,
        "in_space": in_space,
        "architecture": child.to_dict(),
        "architecture_text": child.describe(),
        "macs": total_macs(layers),
        "params": total_params(layers),
        "layers": [_layer(layer) for layer in layers],
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {**asdict(layer), "out_size": layer.out_size, "macs": layer.macs, "params": layer.params}


def read_architecture(arch: str | Path | Architecture, space: SearchSpace) -> Architecture:
    """An architecture as given, by the names `smallest` and `biggest`, or from a JSON file.

    The file holds an architecture, or a document with one under `architecture` (a manifest, an entry of a front) or
    under `best` (a search result).

    Raises:
        InputError: the file is missing or holds no architecture.
    """
    if isinstance(arch, Architecture):
        return arch
    if arch == "smallest":
        return space.smallest()
    if arch in ("biggest", "largest"):
        return space.largest()
    content = read_json(Path(arch))
    for key in ("best", "architecture"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return Architecture.from_dict(content, source=str(arch))


def devices(run: str | Path | None = None) -> list[dict[str, Any]]:
    """The devices that can be named, and whether the run has a predictor for them.

    Raises:
        InputError: a mistake in a device's file.
    """
    found = Run.find(run)
    listed = []
    for name, path in device_files(_own_devices(run)).items():
        _, spec = load_spec(path, _own_devices(run))
        listed.append(
            {
                "name": name,
                "description": spec.description,
                "transport": spec.transport,
                "runtime": spec.runs,
                "accepts": spec.accepts,
                "precision": spec.precision,
                "file": str(path),
                "predictor": found is not None and found.predictor_path(name).is_file(),
            }
        )
    return listed


def show_device(device: str | Path, run: str | Path | None = None) -> dict[str, Any]:
    """All that a device's file says, with what it takes over from others, as plain values.

    Raises:
        InputError: unknown device, or a mistake in its file.
    """
    name, spec = load_spec(device, _own_devices(run))
    plain: dict[str, Any] = json.loads(json.dumps(asdict(spec), default=str))
    return {"name": name, **plain}


def add_device(name: str, base: str, changes: dict[str, Any] | None = None, *, overwrite: bool = False) -> Path:
    """Describe a device of your own: another one with some keys changed. It is known to all runs from now on.

    Args:
        name: what you call it.
        base: the device whose keys it takes over.
        changes: keys of `DeviceSpec`, such as `{"host": "me@10.0.0.7"}`; `timing.repeats` for those below others.
        overwrite: whether a device of this name that you added before is replaced.

    Returns:
        The file, in `hwnas.devices.user_folder()`.

    Raises:
        InputError: a bad name, an unknown base or key, a device of this name that is there already.
    """
    path = _device_path(name)
    if path.exists() and not overwrite:
        raise InputError(
            f"{path}: is there already: remove it with `hwnas devices remove {name}`, or take another name"
        )
    content: dict[str, Any] = {"base": base}
    for key, value in (changes or {}).items():
        part, _, leaf = key.partition(".")
        if leaf:
            content.setdefault(part, {})[leaf] = value
        else:
            content[key] = value
    with TemporaryDirectory() as folder:  # a mistake is found before anything is replaced
        trial = Path(folder) / path.name
        write_text(trial, text := yaml.safe_dump(content, sort_keys=False))
        try:
            load_spec(trial)
        except InputError as error:
            raise InputError(str(error).replace(str(trial), name)) from None
    write_text(path, text)
    return path


def remove_device(name: str) -> Path:
    """Forget a device that you added.

    Returns:
        The file that was there.

    Raises:
        InputError: you added none of this name.
    """
    path = _device_path(name)
    if not path.exists():
        raise InputError(f"device {name!r}: not one that you added: there is no {path}")
    path.unlink()
    return path


def check_device(device: str | Path, run: str | Path | None = None, *, duration_s: float = 5.0) -> Iterator[Check]:
    """Look whether a device can be measured on, step by step; measures the reference child of the run's space.

    Args:
        device: a name or file.
        run: the run folder; without one, the space `tiny` is used.
        duration_s: of the measurement.

    Yields:
        One `Check` a step; those after one that failed for good are left out.

    Raises:
        InputError: unknown device, or a mistake in its file.
    """
    found = Run.find(run)
    space = SearchSpace.load("tiny") if found is None else found.space
    with load_device(device, _own_devices(run)) as target:
        yield from diagnose(target, space, duration_s)


def _own_devices(run: str | Path | None) -> Path:
    return Run.locate(run) / "devices"


def _device_path(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII):
        raise InputError(f"device {name!r}: a name has letters, digits, dots, dashes and underscores only")
    return user_folder() / f"{name}.yaml"
