"""The accuracy of a run's children."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hwnas.api.data import load_data
from hwnas.errors import InputError
from hwnas.progress import Notice, unheard
from hwnas.run import Run
from hwnas.space import Architecture

if TYPE_CHECKING:
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.evaluator import Evaluator


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
        return open_evaluator(opened, data=data).accuracy(opened.space.check(arch, any_resolution=True), store, split)


def open_evaluator(run: Run, notice: Notice = unheard, data: TorchDatasets | None = None) -> Evaluator:
    """What evaluates the children of a run: its supernet, its images.

    Raises:
        InputError: there is no trained supernet, or the images cannot be loaded.
    """
    import torch

    from hwnas.evaluator import Evaluator
    from hwnas.supernet import Supernet

    supernet = Supernet.load(run.path)
    if supernet.space != run.space:
        raise InputError(f"{run.path}: the supernet's space is not that of run.yaml: one of them was replaced")
    torch.set_num_threads(json.loads(supernet.about["train"])["threads"])  # what training found fastest
    return Evaluator(supernet, load_data(run.config, run.path, notice, data), cache=run.folder("cache") / "prepared")
