"""Watching a training: accuracies of some children now and then, and scalars for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hwnas.data import Dataset
from hwnas.evaluator import Evaluator
from hwnas.space import Architecture
from hwnas.supernet import Supernet


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a watched child was at some moment of the training, on validation images.

    Attributes:
        step, epoch: when.
        child: its name.
        accuracy: share of the images, 0 to 1.
        loss: mean cross-entropy.
        num_images: how many.
        seconds: that calibration and evaluation took.
    """

    step: int
    epoch: float
    child: str
    accuracy: float
    loss: float
    num_images: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:.2f}: {self.child} child {self.accuracy:.2%} of {self.num_images} validation images "
            f"(loss {self.loss:.3f}; took {self.seconds:.1f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Watch:
    """Calibrates and evaluates children of a supernet that is being trained; the weights are left alone.

    Args:
        supernet: as it is when this is called.
        data: its calibration images, and `num_images` of its validation images, spread evenly.
        children: by name.
        num_images: at most.
    """

    def __init__(
        self, supernet: Supernet, data: Dataset, children: Mapping[str, Architecture], num_images: int
    ) -> None:
        self.children, self.num_images = dict(children), num_images
        self._evaluator = Evaluator(supernet, data, workers=1)

    def __call__(self, step: int, epoch: float) -> list[Evaluation]:
        """Evaluate all children now."""
        found = []
        for name, arch in self.children.items():
            started = time.perf_counter()
            (score,) = self._evaluator.scores([arch], num_images=self.num_images)
            seconds = time.perf_counter() - started
            found.append(Evaluation(step, epoch, name, score.accuracy, score.loss, score.num_images, seconds))
        return found


class Log:
    """Scalars in TensorBoard's format, where its package is installed.

    Args:
        folder: for the event files; None to write nothing.
        step: what was logged after it, by a run that was then interrupted, is dropped.
        notice: told if the package is missing.
    """

    def __init__(self, folder: Path | None, step: int, notice: Callable[[str], None]) -> None:
        self._writer: Any = None
        if folder is not None and find_spec("tensorboard") is None:
            notice("no scalars for TensorBoard: pip install 'hwnas[tensorboard]' to have them")
        elif folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars of a step."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
