"""What a training will cost, measured on the first steps and thrown away."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hwnas.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Plan:
    """The cost of a training on this hardware.

    Attributes:
        num_steps: of the recipe that remain.
        step_s: median time of a step, data loading included, seconds.
        loading_s: of which waiting for the images, seconds.
        images_per_s: of all processes together.
        evaluation_s: one evaluation of the watched children, seconds.
        num_evaluations: that remain.
        total_s: estimated time of the whole, seconds.
        peak_memory_mb: of this process on a processor, of the GPU on a GPU; MiB.
        device: where it was measured.
        threads: of torch.
        num_processes: that train together.
    """

    num_steps: int
    step_s: float
    loading_s: float
    images_per_s: float
    evaluation_s: float
    num_evaluations: int
    total_s: float
    peak_memory_mb: float
    device: str
    threads: int
    num_processes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan(trainer: Trainer, *, warmup: int = 3, steps: int = 10) -> Plan:
    """Train a few steps and evaluate once, to estimate what the whole run will take.

    Args:
        trainer: made without a folder; its weights change.
        warmup: steps before the clock runs: caches fill, kernels are chosen.
        steps: that are timed.
    """
    config, device = trainer.config, trainer.processes.device
    remaining = trainer.num_steps - trainer.step
    trainer.choose_threads()
    totals, waits = [], []
    with closing(trainer.batches()) as batches:
        for index in range(warmup + steps):
            started = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            trainer.train_step(*batch)  # waits for the device: it reads the losses
            if index >= warmup:
                totals.append(time.perf_counter() - started)
                waits.append(loaded - started)
    started = time.perf_counter()
    if config.evaluate_every:
        trainer.evaluate()
    evaluation_s = time.perf_counter() - started if config.evaluate_every else 0.0
    every = config.evaluate_every * trainer.steps_per_epoch
    num_evaluations = -int(-remaining // every) if every else 0
    step_s = statistics.median(totals)
    return Plan(
        num_steps=remaining,
        step_s=step_s,
        loading_s=statistics.median(waits),
        images_per_s=config.batch_size / step_s,
        evaluation_s=evaluation_s,
        num_evaluations=num_evaluations,
        total_s=remaining * step_s + num_evaluations * evaluation_s,
        peak_memory_mb=_peak_memory(device) / 2**20,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=trainer.config.threads or 1,
        num_processes=trainer.processes.count,
    )


def _peak_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
