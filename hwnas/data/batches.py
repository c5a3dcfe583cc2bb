"""Batches for evaluation and training. What a training step sees is a pure function of step and seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hwnas.data.augment import NUM_POLICY_DRAWS, Augmentation, apply_policy, check_augmentation
from hwnas.data.splits import NUM_DRAWS, PHOTO_SIZE, Split, resize
from hwnas.errors import InputError
from hwnas.machine import num_processors

T = TypeVar("T")
U = TypeVar("U")

# Kinds of random numbers, so that the same seed and number give unrelated ones.
_ORDER, _AUGMENTATION, _POLICY = range(3)


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
    split: Split,
    step: int,
    batch_size: int,
    seed: int,
    *,
    augment: Augmentation = "standard",
    rank: int = 0,
    num_ranks: int = 1,
) -> tuple[Tensor, Tensor]:
    """The batch of a training step, augmented. Everything random is a pure function of (seed, step).

    Args:
        split: the training images.
        step: counted from 0 over the whole training; every `steps_per_epoch` steps begin a new order.
        batch_size: images of all processes together.
        seed: at least 0.
        augment: "none": as evaluated. "standard": a random crop and flip, see the kinds of `Split`.
            "autoaugment", "randaugment": that, and then the policy of `hwnas.data.augment`.
        rank: which process asks. The batches of all ranks, one after the other, are the batch of one process.
        num_ranks: number of processes.

    Returns:
        Images (n, channels, size, size) uint8 and labels (n,) int64, with n = batch_size / num_ranks.

    Raises:
        InputError: the batch is larger than the split or does not divide among the processes, there is no such
            augmentation, or an image cannot be read.
    """
    check_augmentation(augment)
    start, stop = _share(batch_size, rank, num_ranks)
    indices = _indices(split, step, batch_size, seed)[start:stop]
    return _images(split, step, batch_size, seed, augment, start, stop), split.labels[indices]


def train_batches(
    split: Split,
    batch_size: int,
    seed: int,
    *,
    augment: Augmentation = "standard",
    start_step: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    threads: int | None = None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The batches of `train_batch` from `start_step` on, endless, prepared ahead in background threads.

    Its `close()` (or `contextlib.closing`) ends the threads. What `train_batch` raises is raised here.

    Threads rather than processes: decoders let go of Python's lock (of a photo's 2.4 ms all but about 0.1), threads
    share what is loaded, and a process cannot be forked safely once torch has computed in several threads.

    Args:
        split: the training images.
        batch_size: images of all processes together.
        seed: at least 0.
        augment: see `train_batch`.
        start_step: of the first batch.
        rank: which process asks.
        num_ranks: number of processes.
        threads: that share each batch, where its images are decoded every time; None for one a processor. At most
            what the split allows: a dataset of PyTorch is asked by one.
    """
    check_augmentation(augment)
    start, stop = _share(batch_size, rank, num_ranks)
    if not split.decodes or augment == "none":  # in memory
        threads = 1
    threads = min(threads or num_processors(), split.threads, stop - start)
    edges = [start + (stop - start) * number // threads for number in range(threads + 1)]

    def stream() -> Generator[tuple[Tensor, Tensor], None, None]:
        with ThreadPoolExecutor(threads, thread_name_prefix="hwnas-images") as pool:

            def batch(step: int) -> tuple[Tensor, Tensor]:
                parts = pool.map(lambda ends: _images(split, step, batch_size, seed, augment, *ends), pairwise(edges))
                indices = _indices(split, step, batch_size, seed)[start:stop]
                return torch.cat(list(parts)), split.labels[indices]

            yield from _ahead(batch, count(start_step))

    return stream()


def _share(batch_size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First image and end of a process's part of each batch."""
    if batch_size % num_ranks:
        raise InputError(f"batch size {batch_size} does not divide among {num_ranks} processes: use a multiple")
    return rank * batch_size // num_ranks, (rank + 1) * batch_size // num_ranks


def _indices(split: Split, step: int, batch_size: int, seed: int) -> Tensor:
    """(batch_size,) int64, which images the batch of a step has."""
    epoch, position = divmod(step, steps_per_epoch(split, batch_size))
    return _order(len(split), seed, epoch)[position * batch_size : (position + 1) * batch_size]


def _images(
    split: Split, step: int, batch_size: int, seed: int, augment: Augmentation, start: int, stop: int
) -> Tensor:
    """The images `start` to `stop` of the batch of a step."""

    def draws(kind: int, number: int) -> Tensor:
        """(stop - start, number) in [0, 1), drawn for the whole batch so that they are the same in any part of it."""
        generator = _generator(seed, kind, step)
        return torch.rand(batch_size, number, dtype=torch.float64, generator=generator)[start:stop]

    indices = _indices(split, step, batch_size, seed)[start:stop]
    images = split.pixels(indices, None if augment == "none" else draws(_AUGMENTATION, NUM_DRAWS))
    photos = split.preprocessing.size >= PHOTO_SIZE
    return apply_policy(images, augment, draws(_POLICY, NUM_POLICY_DRAWS), photos=photos)


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


@lru_cache(maxsize=1)
def _order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch; remembered, as each step needs a little of it (ImageNet's takes 20 ms to make)."""
    return torch.randperm(num_images, generator=_generator(seed, _ORDER, epoch))


def _generator(seed: int, kind: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, kind, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
