"""The run folder: the only state between commands."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, with_config

from hwnas.config import check, read_yaml
from hwnas.devices import Device, device_files, device_name, load_device
from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.predictors import LatencyPredictor, load_predictor
from hwnas.predictors.published import PublishedModel, candidates, describe, find_published
from hwnas.space import SearchSpace
from hwnas.store import Store
from hwnas.training.recipes import TrainConfig

DEFAULT = "run"
PORTFOLIO = "portfolio-"  # what the names of documents of several answers begin with
ENVIRONMENT = "HWNAS_RUN"
STORAGE = "HWNAS_STORAGE"
ENERGY = ".energy"  # what the names of energy predictors end with


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which images a run uses, and how they are cut.

    Attributes:
        name: a folder, or a data set's name.
        size: side of the square images, pixels; None for the data's own, or what suits the space.
        seed: of the split.
        validation, calibration: images taken off the training part; None for a share of it.
        limit: use only so many training images; None for all.
    """

    name: str
    size: int | None = None
    seed: int = 0
    validation: int | None = None
    calibration: int | None = None
    limit: int | None = None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What a run folder was made for.

    Attributes:
        hwnas: version that made it.
        space: the search space, whole.
        data: the images; None in a run that was only profiled.
        train: the training recipe; None likewise.
        storage: URL of the database; None for a file in the folder.
    """

    hwnas: str
    space: SearchSpace
    data: DataConfig | None = None
    train: TrainConfig | None = None
    storage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


class Run:
    """A run folder.

        run.yaml               the space, the data
        checkpoints/           of training
        training.json          accuracies of the watched children
        tensorboard/           losses, speed and accuracies while training
        supernet.safetensors   the trained weights
        hwnas.db               measurements, evaluations, Optuna's studies
        predictors/            one JSON file a device
        devices/               device files of this run only
        plots/                 predicted against measured, by device
        results/               what searches found
        exports/               deployable files
        report.html, report/   the report and its plots
        cache/                 downloaded data sets, prepared images

    Args:
        path: the folder; None for `$HWNAS_RUN`, or `./run`.
        storage: URL of the database; None for `$HWNAS_STORAGE`, or what `run.yaml` says, or a file in the folder.

    Raises:
        InputError: there is no run there, or its `run.yaml` is damaged.
    """

    def __init__(self, path: str | Path | None = None, *, storage: str | None = None) -> None:
        self.path = self.locate(path)
        self._storage = storage or os.environ.get(STORAGE)
        file = self.path / "run.yaml"
        if not file.is_file():
            raise InputError(
                f"no run at {self.path}: start one with `hwnas train --data ...`, or name another with --run"
            )
        content, lines = read_yaml(file)
        self.config = check(RunConfig, content, source=str(file), lines=lines)

    @staticmethod
    def locate(path: str | Path | None) -> Path:
        """The folder meant by `path`; None means `$HWNAS_RUN`, or `./run`."""
        return Path(path or os.environ.get(ENVIRONMENT) or DEFAULT)

    @classmethod
    def find(cls, path: str | Path | None) -> Run | None:
        """The run at `path`; None if there is none yet."""
        return cls(path) if (cls.locate(path) / "run.yaml").is_file() else None

    @classmethod
    def create(cls, path: str | Path | None, config: RunConfig) -> Run:
        """Start a run, or reopen the one that was started in this folder with the same configuration.

        A run that was only profiled takes over the data and the recipe.

        Raises:
            InputError: the folder holds a run of another space, data or recipe, or cannot be written.
        """
        folder = cls.locate(path)
        file = folder / "run.yaml"
        if file.is_file():
            known = cls(folder).config
            if known.data is None:
                known = replace(known, data=config.data, train=config.train)
            for what in ("space", "data", "train"):
                old, new = getattr(known, what), getattr(config, what)
                differences = [] if new is None and what != "space" else _differences(old, new)
                if differences:
                    raise InputError(
                        f"{folder}: holds a run with another {what} ({'; '.join(differences)}): "
                        "name another folder with --run"
                    )
            config = replace(known, train=config.train or known.train, storage=config.storage or known.storage)
        try:
            write_text(file, yaml.safe_dump(config.to_dict(), sort_keys=False, width=120))
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written ({error.strerror}): name another folder with --run"
            ) from None
        return cls(folder)

    @property
    def space(self) -> SearchSpace:
        """The search space, with the data's channels and classes."""
        return self.config.space

    @property
    def storage_url(self) -> str:
        """The database's URL, for SQLAlchemy and for Optuna."""
        return self._storage or self.config.storage or self._own_url

    @property
    def _own_url(self) -> str:
        return f"sqlite:///{(self.path / 'hwnas.db').absolute()}"

    def store(self) -> Store:
        """The run's database. One elsewhere gets what the file in the folder has, and it has not.

        Raises:
            InputError: it is damaged, or cannot be reached.
        """
        store = Store(self.storage_url)
        if self.storage_url != self._own_url and (self.path / "hwnas.db").is_file():
            try:
                with Store(self._own_url) as own:
                    store.adopt(own)
            except BaseException:
                store.close()
                raise
        return store

    def folder(self, name: str) -> Path:
        """A folder of the run, made if it is not there."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def devices(self) -> Path:
        """The run's own device files."""
        return self.path / "devices"

    def predictor_path(self, device: str) -> Path:
        """Where a device's predictor is, or will be."""
        return self.path / "predictors" / f"{device}.json"

    def energy_path(self, device: str) -> Path:
        """Where a device's energy predictor is, or will be: beside that of its latency."""
        return self.predictor_path(f"{device}{ENERGY}")

    def profiled(self) -> list[str]:
        """The devices whose latency the run has a predictor of, by name."""
        files = (self.path / "predictors").glob("*.json")
        return sorted(file.stem for file in files if not file.stem.endswith(ENERGY))

    def predictor(self, device: str | Path) -> LatencyPredictor:
        """The latency predictor of a device, given by name or file: the run's own, or one from published measurements.

        The latter says so in its `source`.

        Raises:
            InputError: there is neither, its file is damaged, or it is for another space.
        """
        name = device_name(device)
        path = self.predictor_path(name)
        if not path.is_file():
            known = name != str(device) or name in device_files(self.devices)
            model = published_model(load_device(device, self.devices)) if known else None
            if model is not None:
                return model.predictor(self.space, name)
            alike = describe(candidates(name))
            raise InputError(
                f"no latency predictor for {name!r} in {self.path}: run `hwnas profile --device {device}`"
                + (f", or take a device with published measurements: {alike}" if alike else "")
            )
        predictor = load_predictor(path)
        if predictor.space != self.space:
            raise InputError(f"{path}: is for another space: run `hwnas profile --device {device}`")
        return predictor

    def results(self) -> list[Path]:
        """What searches have left, single answers and portfolios, the last one last."""
        paths = (self.path / "results").glob("*.json")
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def result_path(self, name: str) -> Path:
        """Where a search's result is, or will be."""
        return self.path / "results" / f"{name}.json"


def published_model(device: Device) -> PublishedModel | None:
    """What ships with hwnas for a device in its runtime, precision and threads; None where there is nothing."""
    return find_published(
        device.name, runtime=device.runtime, precision=device.precision, threads=device.timing.threads
    )


def _differences(old: object, new: object) -> list[str]:
    if isinstance(old, TrainConfig) and isinstance(new, TrainConfig):
        return new.differences(old)
    if old is None or new is None:
        return [] if old == new else [f"{old} there, {new} now"]
    before, now = asdict(old), asdict(new)  # type: ignore[call-overload]
    return [f"{key}={before[key]!r} there, {now[key]!r} now" for key in before if before[key] != now[key]]
