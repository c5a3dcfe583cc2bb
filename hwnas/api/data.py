"""The images of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas.errors import InputError
from hwnas.progress import Notice, Report, silent, unheard
from hwnas.run import RunConfig

if TYPE_CHECKING:
    from hwnas.data import Dataset
    from hwnas.data.torch_dataset import TorchDatasets


PYTORCH = "a dataset of PyTorch"  # the name, in a run's configuration, of data that only its own program can load


def load_data(
    config: RunConfig, folder: Path, notice: Notice = unheard, data: str | Path | TorchDatasets | None = None
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
    data: str | Path, cache: str | Path, *, check: bool = False, report: Report = silent, notice: Notice = unheard
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
