"""The training loop: steps, checkpoints, exact resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hwnas.data import Dataset, resize, steps_per_epoch, train_batch, train_batches
from hwnas.errors import InputError
from hwnas.objectives import SandwichRule, StepMetrics, zero_gradients
from hwnas.optim import make_optimizer
from hwnas.progress import Report, silent
from hwnas.recipes import TrainConfig
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet
from hwnas.weights import load_tensors, save_tensors

KEEP = 2  # checkpoints


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment of a training run.

    Attributes:
        step: steps that are done.
        config: the run's configuration, with the number of threads that was chosen.
        space: what is trained.
        data: the images it is trained on, in a few words.
        tensors: of the supernet (`model.*`) and of the optimizer (`optimizer.<parameter>.<name>`).
    """

    step: int
    config: TrainConfig
    space: SearchSpace
    data: str
    tensors: dict[str, Tensor]

    def save(self, folder: Path) -> Path:
        """Write `step-<step>.safetensors`: under another name first, so that a kill never leaves half a file.

        The last `KEEP` checkpoints stay.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.step:09d}.safetensors"
        metadata = {
            "step": str(self.step),
            "config": json.dumps(self.config.to_dict()),
            "space": json.dumps(self.space.to_dict()),
            "data": self.data,
        }
        save_tensors(self.tensors, path, metadata)
        for old in _checkpoints(folder)[:-KEEP]:
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
            return cls(int(metadata["step"]), config, space, metadata["data"], tensors)
        except (KeyError, ValueError) as error:
            raise InputError(f"{paths[-1]}: not a checkpoint of hwnas ({error})") from None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


class Trainer:
    """Trains a supernet. The state after a step is a pure function of space, data and configuration.

    Images, augmentation, children and dropout of a step come from (seed, step) alone, so a checkpoint needs only
    the step, the weights and the optimizer's state, and a resumed run ends with the same weights bit for bit.

    Args:
        space: with the data's channels and classes.
        data: the images; only `data.train` is used.
        config: the recipe.
        folder: for checkpoints; training goes on from the newest one there.
        notice: told what a user should know.

    Raises:
        InputError: the newest checkpoint is damaged, or belongs to another space or configuration.
    """

    def __init__(
        self,
        space: SearchSpace,
        data: Dataset,
        config: TrainConfig,
        folder: Path,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.space, self.data, self.folder, self.notice = space, data, folder, notice
        self.supernet = Supernet(space, seed=config.seed)
        # Depthwise convolutions are about twice as fast with channels last, on processors and on GPUs.
        self.supernet.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.supernet, config)
        self.config = config
        self.step = 0
        self.steps_per_epoch = steps_per_epoch(data.train, config.batch_size)
        self.num_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.rule = SandwichRule(
            num_random=config.num_random,
            dropout=config.dropout,
            label_smoothing=config.label_smoothing,
            loss_reduction=config.loss_reduction,
        )
        checkpoint = Checkpoint.newest(folder)
        if checkpoint is not None:
            self._resume(checkpoint)

    def run(self, report: Report = silent, *, checkpoint_every_s: float = 20.0) -> Supernet:
        """Train to the end of the recipe, and return the supernet.

        Args:
            report: told steps, losses and images/s.
            checkpoint_every_s: time between checkpoints, seconds.

        Raises:
            InputError: a loss is not finite; the last checkpoint is intact.
        """
        if self.step >= self.num_steps:
            return self.supernet
        self._choose_threads()
        config, first = self.config, self.step
        started = saved = time.monotonic()
        losses: tuple[float, ...] = ()
        stream = train_batches(
            self.data.train, config.batch_size, config.seed, augment=config.augment, start_step=first
        )
        with closing(stream) as batches:
            while self.step < self.num_steps:
                losses = _smooth(losses, self.train_step(*next(batches)))
                now = time.monotonic()
                rate = (self.step - first) * config.batch_size / (now - started)
                report(self.step, self.num_steps, f"{_describe(losses)}, {rate:.0f} images/s")
                if now - saved > checkpoint_every_s:
                    self.checkpoint()
                    saved = now
        self.checkpoint()
        return self.supernet

    def train_step(self, pixels: Tensor, labels: Tensor) -> StepMetrics:
        """One step of the recipe: the gradients of all children, then one update.

        Args:
            pixels: (batch_size, channels, size, size) uint8.
            labels: (batch_size,) int64.

        Raises:
            InputError: a loss is not finite.
        """
        metrics = self.gradients(pixels, labels)
        lr = self.config.learning_rate(self.step / self.steps_per_epoch)
        if not np.isfinite([metrics.biggest, metrics.smallest, *metrics.random]).all():
            losses = _describe(_smooth((), metrics))
            raise InputError(
                f"the loss is not finite at step {self.step}, learning rate {lr:g} ({losses}): "
                "lower train.lr; the last checkpoint is intact"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.supernet.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        return metrics

    def gradients(self, pixels: Tensor, labels: Tensor) -> StepMetrics:
        """The gradients of this step, in the supernet's parameters; arguments as in `train_step`."""
        seed = np.random.SeedSequence([self.config.seed, 1, self.step])
        preprocessing = self.data.preprocessing

        def resized(resolution: int) -> Tensor:
            image = resize(pixels, resolution, preprocessing)
            return image.contiguous(memory_format=torch.channels_last)

        self.supernet.train()
        zero_gradients(self.supernet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            return self.rule(self.supernet, resized, labels, np.random.default_rng(seed))

    def checkpoint(self) -> Path:
        """Save the state after the last step.

        Raises:
            OSError: the disk is full, for example; the older checkpoints are intact.
        """
        names = {parameter: name for name, parameter in self.supernet.named_parameters()}
        tensors: dict[str, Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
        for parameter, name in names.items():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}:{key}"] = value
        return Checkpoint(self.step, self.config, self.space, self._data_identity(), tensors).save(self.folder)

    def _data_identity(self) -> str:
        return f"{self.data.name}: {len(self.data.train)} images, {self.data.preprocessing}"

    def _resume(self, checkpoint: Checkpoint) -> None:
        if checkpoint.data != self._data_identity():
            raise InputError(
                f"{self.folder}: training began with other images ({checkpoint.data}; now {self._data_identity()}): "
                "use another run folder"
            )
        if checkpoint.space != self.space:
            raise InputError(
                f"{self.folder}: holds checkpoints of another space ({checkpoint.space.name!r}): use another run folder"
            )
        ours = replace(self.config, threads=checkpoint.config.threads)
        changed = [
            f"{name}={theirs} there, {mine} now"
            for (name, theirs), mine in zip(checkpoint.config.to_dict().items(), ours.to_dict().values(), strict=True)
            if theirs != mine
        ]
        if changed:
            raise InputError(
                f"{self.folder}: holds checkpoints of another configuration ({'; '.join(changed)}): "
                "use another run folder, or give the same options"
            )
        parameters = dict(self.supernet.named_parameters())
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            parameter_name, _, key = rest.partition(":")
            parameter = parameters[parameter_name]
            # In the parameter's own memory layout, so that later results are equal bit for bit.
            copy = torch.empty_like(parameter, requires_grad=False) if tensor.ndim else torch.empty(())
            copy.copy_(tensor)
            if kind == "model":
                parameter.data.copy_(copy)
            else:
                self.optimizer.state[parameter][key] = copy
        self.config, self.step = ours, checkpoint.step
        self.notice(f"going on from step {self.step} of {self.num_steps}")

    def _choose_threads(self) -> None:
        """Use the recipe's number of threads, or the one that makes a step fastest, as measured now.

        More threads can be many times slower where other work runs; fewer are often as fast on small networks.
        """
        threads = self.config.threads
        if threads is None:
            batch = train_batch(
                self.data.train, self.step, self.config.batch_size, self.config.seed, augment=self.config.augment
            )
            best = float("inf")
            available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            for number in sorted({1, max(1, available // 2), available}):
                torch.set_num_threads(number)
                self.gradients(*batch)
                elapsed = min(_elapsed(lambda: self.gradients(*batch)) for _ in range(3))
                if elapsed < best:
                    best, threads = elapsed, number
            self.notice(f"{threads} of {available} processors make a step fastest: {best * 1e3:.0f} ms")
            self.config = replace(self.config, threads=threads)
        assert threads is not None
        torch.set_num_threads(threads)


def _elapsed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _smooth(old: tuple[float, ...], metrics: StepMetrics, weight: float = 0.05) -> tuple[float, ...]:
    """Losses of the biggest, the smallest and the mean random child as running means."""
    random: Iterable[float] = [float(np.mean(metrics.random))] if metrics.random else []
    new = (metrics.biggest, metrics.smallest, *random)
    return tuple((1 - weight) * a + weight * b for a, b in zip(old, new, strict=True)) if old else new


def _describe(losses: tuple[float, ...]) -> str:
    names = ("biggest", "smallest", "random")
    return "loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=False))
