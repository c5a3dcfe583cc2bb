"""The training loop: steps, evaluations, checkpoints, exact resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwnas.data import Dataset, resize, steps_per_epoch, train_batches
from hwnas.errors import InputError
from hwnas.machine import num_processors
from hwnas.progress import Report, silent
from hwnas.space import Architecture, SearchSpace
from hwnas.supernet import Supernet
from hwnas.training.checkpoint import Checkpoint
from hwnas.training.mixing import mix
from hwnas.training.objectives import Batch, Noise, Objective
from hwnas.training.optim import make_optimizer, update_average
from hwnas.training.processes import FlatGradients, Processes
from hwnas.training.recipes import TrainConfig
from hwnas.training.watch import Evaluation, Log, Watch

LOG_EVERY = 10  # steps between scalars for TensorBoard


class Trainer:
    """Trains a supernet. The state after a step is a pure function of space, data and configuration.

    Images, augmentation, children and dropout of a step come from (seed, step) alone, so a checkpoint needs only
    the step, the weights and the optimizer's state, and a resumed run ends with the same weights bit for bit. With
    several processes each computes its share of every batch; their number may change when a training goes on.

    Args:
        space: with the data's channels and classes.
        data: the images; `train` is learnt from, `calibration` and `validation` serve the evaluations.
        config: the recipe.
        folder: the run's; training goes on from the newest of its checkpoints. None to keep nothing.
        notice: told what a user should know.
        processes: those that train together.
        watch: children to evaluate, by name; by default the smallest and the biggest.

    Attributes:
        supernet: what is trained.
        average: the moving average of its weights, where the recipe has one.
        step: steps that are done.
        evaluations: of the watched children so far.

    Raises:
        InputError: the newest checkpoint is damaged, or belongs to another space, data or configuration; the batch
            does not divide among the processes.
    """

    def __init__(
        self,
        space: SearchSpace,
        data: Dataset,
        config: TrainConfig,
        folder: Path | None,
        notice: Callable[[str], None] = lambda text: None,
        *,
        processes: Processes | None = None,
        watch: Mapping[str, Architecture] | None = None,
    ) -> None:
        self.space, self.data, self.config, self.folder = space, data, config, folder
        self.processes = processes or Processes()
        self.notice = notice if self.processes.first else lambda text: None
        self._check_batch()
        self.supernet = self._make_supernet()
        self.average = self._make_supernet() if config.ema is not None else None
        self.optimizer = make_optimizer(self.supernet, config)
        device = self.processes.device
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._gradients = FlatGradients(self.supernet, extra=len(config.children))
        self._objective = Objective(space, config, self.processes)
        ends = {"smallest": space.smallest(), "biggest": space.largest()}
        self._watch = Watch(self.result, data, watch or ends, config.watch_images)
        self._fingerprint = data.train.fingerprint()
        self.step = 0
        self.evaluations: list[Evaluation] = []
        self.steps_per_epoch = steps_per_epoch(data.train, config.batch_size)
        self.num_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self._resume()

    @property
    def result(self) -> Supernet:
        """What the training is for: the moving average where there is one, or the supernet itself."""
        return self.supernet if self.average is None else self.average

    def run(self, report: Report = silent) -> Supernet:
        """Train to the end of the recipe.

        Args:
            report: told steps, losses and images/s.

        Returns:
            `result`.

        Raises:
            InputError: a loss is not finite, or a checkpoint cannot be written; the last one is intact.
        """
        if self.step >= self.num_steps:
            return self.result
        self.choose_threads()
        config, first = self.config, self.step
        report = report if self.processes.first else silent
        started = saved = time.monotonic()
        smooth: tuple[float, ...] = ()
        with closing(self._log()) as log, closing(self.batches()) as batches:
            while self.step < self.num_steps:
                losses = self.train_step(*next(batches))
                smooth = tuple(0.95 * a + 0.05 * b for a, b in zip(smooth or losses, losses, strict=True))
                now = time.monotonic()
                rate = (self.step - first) * config.batch_size / (now - started)
                report(self.step, self.num_steps, f"loss {self._describe(smooth)}, {rate:.0f} images/s")
                if self.step % LOG_EVERY == 0:
                    scalars = {f"loss/{name}": loss for name, loss in self._by_role(smooth).items()}
                    log.add(self.step, scalars | {"images/s": rate, "learning rate": self.learning_rate})
                if self._is_due():
                    before = time.monotonic()
                    self.evaluate(log)
                    started += time.monotonic() - before
                if now - saved > config.checkpoint_every_s:
                    self.checkpoint()
                    saved = time.monotonic()
        self.checkpoint()
        return self.result

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's share of the batches from `step` on, endless; see `hwnas.data.train_batches`."""
        processes, config = self.processes, self.config
        return train_batches(
            self.data.train,
            config.batch_size,
            config.seed,
            start_step=self.step,
            augment=config.augment,
            rank=processes.rank,
            num_ranks=processes.count,
            threads=max(1, num_processors() // processes.local_count),
        )

    def train_step(self, pixels: Tensor, labels: Tensor) -> tuple[float, ...]:
        """One step of the recipe: the gradients of all children, then one update.

        Args:
            pixels: this process's images, (n, channels, size, size) uint8.
            labels: (n,) int64.

        Returns:
            The loss of each of the recipe's children, mean over all processes' images.

        Raises:
            InputError: a loss is not finite.
        """
        children, losses = self.gradients(pixels, labels)
        for child, loss in zip(children, losses, strict=True):
            if not np.isfinite(loss):
                raise InputError(
                    f"the loss of child {child.describe()} is {loss} at step {self.step}, learning rate "
                    f"{self.learning_rate:g} (all: {self._describe(losses)}): lower train.lr; "
                    "the last checkpoint is intact"
                )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._scaler.unscale_(self.optimizer)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.supernet.parameters(), self.config.clip_norm)
        if self.config.clip_value is not None:
            self._gradients.flat.clamp_(-self.config.clip_value, self.config.clip_value)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.step += 1
        if self.average is not None and self.config.ema is not None:
            update_average(self.average, self.supernet, self.config.ema, self.step)
        return losses

    def gradients(self, pixels: Tensor, labels: Tensor) -> tuple[list[Architecture], tuple[float, ...]]:
        """The gradients of this step in the supernet's parameters, mean over all processes; arguments as above.

        Returns:
            The children that learn, and the loss of each.
        """
        config, processes = self.config, self.processes
        for_children, for_noise, for_mixing = np.random.SeedSequence([config.seed, 1, self.step]).spawn(3)
        pixels, labels = (tensor.to(processes.device, non_blocking=True) for tensor in (pixels, labels))
        if config.mixup or config.cutmix:
            rng = np.random.default_rng(for_mixing)
            pixels, labels = mix(pixels, labels, self.space.num_classes, rng, mixup=config.mixup, cutmix=config.cutmix)
        images: dict[int, Tensor] = {}

        def resized(resolution: int) -> Tensor:
            if resolution not in images:
                image = resize(pixels, resolution, self.data.preprocessing)
                images[resolution] = image.contiguous(memory_format=torch.channels_last)
            return images[resolution]

        generator = torch.Generator(processes.device)
        generator.manual_seed(int(for_noise.generate_state(1, np.uint64)[0] >> 1))
        share = slice(processes.rank * len(labels), (processes.rank + 1) * len(labels))
        batch = Batch(resized, labels, Noise(generator, config.batch_size, share))
        scale = float(self._scaler.scale(torch.ones((), device=processes.device)))
        self.supernet.train()
        self._gradients.flat.zero_()
        children, losses = self._objective(self.supernet, batch, np.random.default_rng(for_children), scale=scale)
        self._gradients.extra.copy_(losses)
        self._gradients.mean(processes)
        return children, tuple(self._gradients.extra.tolist())

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.config.learning_rate(self.step / self.steps_per_epoch)

    def evaluate(self, log: Log | None = None) -> list[Evaluation]:
        """Calibrate and evaluate the watched children, in the first process, and remember the results."""
        if not self.processes.first:
            return []
        found = self._watch(self.step, self.step / self.steps_per_epoch)
        self.evaluations += found
        for one in found:
            self.notice(str(one))
        if log is not None:
            log.add(self.step, {f"accuracy/{one.child}": one.accuracy for one in found})
        return found

    def checkpoint(self) -> Path | None:
        """Save the state after the last step, in the first process.

        Raises:
            InputError: it cannot be written, as the disk is full, for example; the older checkpoints are intact.
        """
        if not self.processes.first or self.folder is None:
            return None
        state = {"evaluations": [one.to_dict() for one in self.evaluations], "scaler": self._scaler.state_dict()}
        checkpoint = Checkpoint(self.step, self.config, self.space, self._data_identity(), self._tensors(), state)
        folder = self.folder / "checkpoints"
        try:
            return checkpoint.save(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: the checkpoint of step {self.step} cannot be written ({error.strerror}): free some space; "
                "the one before is intact, and the same command goes on from it"
            ) from None

    def choose_threads(self) -> None:
        """Use the recipe's number of threads, or the one that makes a step fastest, as measured now.

        More threads can be many times slower where other work runs; fewer are often as fast on small networks.
        """
        threads, device = self.config.threads, self.processes.device
        share = max(1, num_processors() // self.processes.local_count)
        if threads is None and device.type == "cpu":
            with closing(self.batches()) as batches:
                batch = next(batches)
            seconds: dict[int, float] = {}
            for number in sorted({1, max(1, share // 2), share}):
                torch.set_num_threads(number)
                self.gradients(*batch)
                seconds[number] = min(_elapsed(lambda: self.gradients(*batch)) for _ in range(3))
            chosen = torch.tensor(min(seconds, key=lambda number: seconds[number]))
            self.processes.share(chosen)
            threads = int(chosen)
            self.notice(f"{threads} of {share} processors make a step fastest: {seconds[threads] * 1e3:.0f} ms")
        threads = threads or min(share, torch.get_num_threads())
        self.config = replace(self.config, threads=threads)
        torch.set_num_threads(threads)

    # ---------------------------------------------------------------- parts

    def _make_supernet(self) -> Supernet:
        supernet = Supernet(self.space, seed=self.config.seed, gamma_zero=self.config.gamma_zero)
        # Depthwise convolutions are about twice as fast with channels last, on processors and on GPUs.
        return supernet.to(self.processes.device).to(memory_format=torch.channels_last)

    def _check_batch(self) -> None:
        size, count = self.config.batch_size, self.processes.count
        if size % count:
            raise InputError(f"train.batch_size={size} does not divide among {count} processes: use a multiple")
        if (self.config.mixup or self.config.cutmix) and size // count % 2:
            raise InputError(f"train.batch_size={size}: mixup and cutmix pair images: use a multiple of {2 * count}")

    def _is_due(self) -> bool:
        every = self.config.evaluate_every * self.steps_per_epoch
        if not every:
            return False
        return self.step == self.num_steps or int(self.step / every) > int((self.step - 1) / every)

    def _log(self) -> Log:
        folder = self.folder / "tensorboard" if self.folder is not None and self.processes.first else None
        return Log(folder, self.step, self.notice)

    def _by_role(self, losses: tuple[float, ...]) -> dict[str, float]:
        """Mean loss of each kind of child, in the recipe's order."""
        roles = self.config.children
        return {
            role: float(np.mean([loss for other, loss in zip(roles, losses, strict=True) if other == role]))
            for role in dict.fromkeys(roles)
        }

    def _describe(self, losses: tuple[float, ...]) -> str:
        return ", ".join(f"{role} {loss:.3f}" for role, loss in self._by_role(losses).items())

    def _data_identity(self) -> str:
        return f"{self.data.name}: {len(self.data.train)} images ({self._fingerprint}), {self.data.preprocessing}"

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by its name in a checkpoint."""
        names = {parameter: name for name, parameter in self.supernet.named_parameters()}
        tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": p.detach() for name, p in self.average.named_parameters()}
        for parameter, name in names.items():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}:{key}"] = value
        return tensors

    def _resume(self) -> None:
        """Go on from the newest checkpoint; the first process reads it, the others are told."""

        def read() -> str:
            checkpoint = Checkpoint.newest(self.folder / "checkpoints") if self.folder is not None else None
            if checkpoint is None:
                return json.dumps({"step": 0})
            self._check(checkpoint)
            if checkpoint.step:  # else the weights are those of the seed
                self._load(checkpoint)
            return json.dumps({"step": checkpoint.step, "threads": checkpoint.config.threads, **checkpoint.state})

        told: dict[str, Any] = json.loads(self.processes.text(read))
        if told["step"] == 0:
            return
        self.step = told["step"]
        self.evaluations = [Evaluation(**one) for one in told["evaluations"]]
        if told["scaler"]:
            self._scaler.load_state_dict(told["scaler"])
        if self.config.threads is None:
            self.config = replace(self.config, threads=told["threads"])
        if not self.processes.first:
            self._make_optimizer_state()
        self.processes.share(*(tensor for _, tensor in sorted(self._tensors().items())))
        self.notice(f"going on from step {self.step} of {self.num_steps}")

    def _check(self, checkpoint: Checkpoint) -> None:
        if checkpoint.data != self._data_identity():
            raise InputError(
                f"{self.folder}: training began with other images ({checkpoint.data}; now {self._data_identity()}): "
                "use another run folder"
            )
        if checkpoint.space != self.space:
            raise InputError(
                f"{self.folder}: holds checkpoints of another space ({checkpoint.space.name!r}): use another run folder"
            )
        changed = self.config.differences(checkpoint.config)
        if changed:
            raise InputError(
                f"{self.folder}: holds checkpoints of another configuration ({'; '.join(changed)}): "
                "use another run folder, or give the same options"
            )

    def _load(self, checkpoint: Checkpoint) -> None:
        self._make_optimizer_state()
        for name, tensor in self._tensors().items():
            tensor.copy_(checkpoint.tensors[name])  # into its own memory layout, so that later results are equal

    def _make_optimizer_state(self) -> None:
        """Have the optimizer make its tensors, by a step that changes nothing."""
        before = [parameter.detach().clone() for parameter in self.supernet.parameters()]
        self._gradients.flat.zero_()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, value in zip(self.supernet.parameters(), before, strict=True):
                parameter.copy_(value)


def _elapsed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
