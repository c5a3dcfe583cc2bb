"""Moments of a training run, on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hwnas.errors import InputError
from hwnas.space import SearchSpace
from hwnas.training.recipes import TrainConfig
from hwnas.weights import load_tensors, save_tensors


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment of a training run.

    Order of the images, augmentation, children and dropout of a step come from (seed, step) alone, so they need no
    state here.

    Attributes:
        step: steps that are done.
        config: the run's configuration, with the number of threads that was chosen.
        space: what is trained.
        data: the images it is trained on, in a few words.
        tensors: of the supernet (`model.*`), of its moving average (`average.*`) and of the optimizer
            (`optimizer.<parameter>:<name>`).
        state: plain values: evaluations so far, the loss scaler's.
    """

    step: int
    config: TrainConfig
    space: SearchSpace
    data: str
    tensors: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write `step-<step>.safetensors`: under another name first, so that a kill never leaves half a file.

        The last `config.keep_checkpoints` stay.

        Raises:
            OSError: it cannot be written; the older ones are intact.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.step:09d}.safetensors"
        metadata = {
            "step": str(self.step),
            "config": json.dumps(self.config.to_dict()),
            "space": json.dumps(self.space.to_dict()),
            "data": self.data,
            "state": json.dumps(self.state),
        }
        save_tensors(self.tensors, path, metadata)
        for old in _checkpoints(folder)[: -self.config.keep_checkpoints]:
            old.unlink()
        return path

    @classmethod
    def newest(cls, folder: Path) -> Checkpoint | None:
        """The last checkpoint of a folder; None if there is none.

        Raises:
            InputError: the file is damaged.
        """
        paths = _checkpoints(folder)
        if not paths:
            return None
        tensors, metadata = load_tensors(paths[-1], remedy="delete it to go on from the one before")
        try:
            config = TrainConfig.from_dict(json.loads(metadata["config"]), source=str(paths[-1]))
            space = SearchSpace.from_dict(json.loads(metadata["space"]), source=str(paths[-1]))
            state = json.loads(metadata["state"])
            return cls(int(metadata["step"]), config, space, metadata["data"], tensors, state)
        except (KeyError, ValueError) as error:
            raise InputError(f"{paths[-1]}: not a checkpoint of hwnas ({error})") from None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))
