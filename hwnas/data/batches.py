"""Batches for evaluation and training. What a training step sees is a pure function of step and seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hwnas.data.splits import NUM_DRAWS, Split, resize
from hwnas.errors import InputError

T = TypeVar("T")
U = TypeVar("U")

# Kinds of random numbers, so that the same seed and number give unrelated ones.
_ORDER, _AUGMENTATION = range(2)


def batches(
    split: Split, batch_size: int, resolution: int, device: torch.device | str = "cpu"
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The whole split in its own order, as network input; the last batch may be smaller.

    Its pixels are those that `Split.resized` keeps, where it does.

    Yields:
        Images (n, channels, resolution, resolution) float32 and labels (n,) int64, on `device`.
    """
    labels = split.labels.to(device).split(batch_size)
    whole = split.resized(resolution)
    loaded: Iterable[Tensor]
    loaded = (
        _ahead(split.load, torch.arange(len(split)).split(batch_size)) if whole is None else whole.split(batch_size)
    )
    for images, their_labels in zip(loaded, labels, strict=True):
        yield resize(images.to(device), resolution, split.preprocessing), their_labels


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Training steps that visit (almost) every image once: the last, partial batch of an epoch is dropped.

    Raises:
        InputError: the batch is larger than the split.
    """
    if not 1 <= batch_size <= len(split):
        raise InputError(f"batch size {batch_size} is not between 1 and {len(split)}, the number of training images")
    return len(split) // batch_size


def train_batch(
    split: Split, step: int, batch_size: int, seed: int, *, rank: int = 0, num_ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """The batch of a training step, augmented. Everything random is a pure function of (seed, step).

    Args:
        split: the training images.
        step: counted from 0 over the whole training; every `steps_per_epoch` steps begin a new order.
        batch_size: images of all processes together.
        seed: at least 0.
        rank: which process asks. The batches of all ranks, one after the other, are the batch of one process.
        num_ranks: number of processes.

    Returns:
        Images (n, channels, size, size) uint8 and labels (n,) int64, with n = batch_size / num_ranks.

    Raises:
        InputError: the batch is larger than the split or does not divide among the processes, or an image
            cannot be read.
    """
    if batch_size % num_ranks:
        raise InputError(f"batch size {batch_size} does not divide among {num_ranks} processes: use a multiple")
    epoch, position = divmod(step, steps_per_epoch(split, batch_size))
    share = slice(rank * batch_size // num_ranks, (rank + 1) * batch_size // num_ranks)
    indices = _order(len(split), seed, epoch)[position * batch_size : (position + 1) * batch_size][share]
    generator = _generator(seed, _AUGMENTATION, step)
    draws = torch.rand(batch_size, NUM_DRAWS, dtype=torch.float64, generator=generator)[share]
    return split.pixels(indices, draws if split.augment else None), split.labels[indices]


def train_batches(
    split: Split, batch_size: int, seed: int, *, start_step: int = 0, rank: int = 0, num_ranks: int = 1
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The batches of `train_batch` from `start_step` on, endless, prepared ahead in one background thread.

    Its `close()` (or `contextlib.closing`) ends the thread. What `train_batch` raises is raised here.
    """

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return train_batch(split, step, batch_size, seed, rank=rank, num_ranks=num_ranks)

    return _ahead(batch, count(start_step))


def _ahead(make: Callable[[T], U], arguments: Iterable[T], num_ahead: int = 2) -> Generator[U, None, None]:
    """`map(make, arguments)`, with the next results in preparation in one background thread."""
    waiting = iter(arguments)
    worker = ThreadPoolExecutor(1, thread_name_prefix="hwnas-batches")
    try:
        prepared = deque(worker.submit(make, argument) for argument in islice(waiting, num_ahead))
        while prepared:
            result = prepared.popleft().result()
            prepared.extend(worker.submit(make, argument) for argument in islice(waiting, 1))
            yield result
    finally:
        worker.shutdown(cancel_futures=True)


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch; remembered, as each step needs a little of it (ImageNet's takes 20 ms to make)."""
    return torch.randperm(num_images, generator=_generator(seed, _ORDER, epoch))


def _generator(seed: int, kind: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, kind, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
