"""`hwnas train`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas import __version__
from hwnas.api.costs import read_architecture
from hwnas.api.data import PYTORCH, load_data
from hwnas.config import check, put
from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.progress import Notice, Report, silent, unheard
from hwnas.run import DataConfig, Run, RunConfig
from hwnas.space import SearchSpace
from hwnas.training.recipes import RECIPES, TrainConfig

if TYPE_CHECKING:
    from hwnas.data import Dataset
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.training.plan import Plan
    from hwnas.training.processes import Processes
    from hwnas.training.trainer import Trainer


def train(
    run: str | Path | None = None,
    *,
    space: str | Path | None = None,
    data: str | Path | TorchDatasets | None = None,
    recipe: str = "short",
    changes: dict[str, Any] | None = None,
    report: Report = silent,
    notice: Notice = unheard,
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
    notice: Notice = unheard,
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
        told = notice if team.first else unheard
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
        put(parts, key, value)
    return RunConfig(
        hwnas=__version__,
        space=SearchSpace.load(space, **parts["space"]),
        data=check(DataConfig, parts["data"], source="data"),
        train=TrainConfig.from_dict(parts["train"], source="train"),
    )
