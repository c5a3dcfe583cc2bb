"""The accuracy of children: calibrated, evaluated, many at a time, and never worked out twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hwnas.calibrate import Score, calibrate, evaluate, fold, logits, statistics
from hwnas.data import Dataset, Split, batches, resize
from hwnas.errors import InputError
from hwnas.layers import total_macs
from hwnas.machine import num_processors
from hwnas.network import Network
from hwnas.progress import Report, silent
from hwnas.space import Architecture
from hwnas.store import Evaluation, Store
from hwnas.supernet import Supernet

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EvaluationProtocol:
    """What the accuracy of a child depends on beside its weights and the images; recorded with each result.

    Attributes:
        calibration_images: for batch-norm statistics; full batches only, as each counts the same in the average.
        batch_size: of calibration. That of evaluation makes no difference.
    """

    calibration_images: int = 1024
    batch_size: int = 256

    def key(self) -> str:
        """A short text that tells protocols apart."""
        return f"calibration={self.calibration_images} batch={self.batch_size}"


class Evaluator:
    """Cuts children out of a supernet, calibrates and evaluates them, on the supernet's device.

    On processors several children are evaluated at a time, each by one thread of this process: they share the supernet
    and the images, and torch lets go of Python's lock while it computes. Two threads that work on one child gain less,
    and lose more than everything where other programs compute, as each operation waits for the slower one.

    Args:
        supernet: its weights may change between calls: nothing of them is kept.
        data: its splits.
        protocol: how.
        cache: folder for prepared images (see `hwnas.data.Split.resized`); None to keep them in memory.
        workers: children at a time; by default the available processors, and one on other devices. With one, torch's
            own threads share the work.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: Dataset,
        protocol: EvaluationProtocol | None = None,
        *,
        cache: Path | None = None,
        workers: int | None = None,
    ) -> None:
        self.supernet, self.data = supernet, data
        self.protocol = protocol or EvaluationProtocol()
        for split in (data.calibration, data.validation, data.test):
            split.cache = cache
        self._workers = workers
        self._parts: dict[tuple[str, int], Split] = {}

    # ------------------------------------------------------------ many children

    def accuracy(self, arch: Architecture, store: Store, split: str = "validation") -> float:
        """The child's accuracy on a split, 0 to 1; worked out only if the store does not know it.

        Raises:
            InputError: an unknown split, or an image cannot be read.
        """
        return self.accuracies([arch], store, split)[0]

    def accuracies(
        self, archs: Sequence[Architecture], store: Store, split: str = "validation", report: Report = silent
    ) -> list[float]:
        """The children's accuracies on a split, 0 to 1, in their order; only those are worked out that are not known.

        Each goes into the store as soon as it is there; an interruption loses the few in work.

        Args:
            archs: children; one may be there twice.
            store: the database.
            split: `validation` or `test`.
            report: told the children that were worked out, of those that had to be.

        Raises:
            InputError: an unknown split, or an image cannot be read.
        """
        images = self._split(split)
        weights, protocol = self._which(split)
        found: dict[Architecture, float] = {}
        for arch in dict.fromkeys(archs):
            known = store.evaluation(arch, weights, split, protocol)
            if known is not None:
                found[arch] = known.accuracy
        unknown = [arch for arch in dict.fromkeys(archs) if arch not in found]
        with closing(self._scores(unknown, images)) as scores:
            for number, (arch, score, seconds) in enumerate(scores, 1):
                found[arch] = score.accuracy
                store.add_evaluation(
                    Evaluation(
                        arch=arch,
                        weights=weights,
                        split=split,
                        protocol=protocol,
                        accuracy=score.accuracy,
                        num_images=score.num_images,
                        loss=score.loss,
                        seconds=seconds,
                    )
                )
                report(number, len(unknown), arch.describe())
        return [found[arch] for arch in archs]

    def known(self, store: Store, split: str = "validation") -> list[tuple[Architecture, float]]:
        """Children whose accuracy the store knows for these weights, and that accuracy, 0 to 1, in order."""
        weights, protocol = self._which(split)
        return [(one.arch, one.accuracy) for one in store.evaluations(weights, split, protocol)]

    def _which(self, split: str) -> tuple[str, str]:
        """What the store identifies evaluations by, beside the child and the split: weights and protocol."""
        protocol = f"{self.protocol.key()} images={len(self._split(split))} data={self.data.name}"
        return self.supernet.identity(), protocol

    def scores(
        self, archs: Sequence[Architecture], split: str = "validation", *, num_images: int | None = None
    ) -> list[Score]:
        """What children get with the supernet's weights of this moment, in their order; nothing is recorded.

        For training, to watch its progress.

        Args:
            archs: different children.
            split: `validation` or `test`.
            num_images: at most so many, spread evenly over the split; None for all.

        Raises:
            InputError: an unknown split, no images asked for, or an image cannot be read.
        """
        images = self._split(split)
        if num_images is not None and num_images < len(images):
            images = self._part(split, num_images)
        with closing(self._scores(archs, images)) as scores:
            found = {arch: score for arch, score, _ in scores}
        return [found[arch] for arch in archs]

    def _scores(
        self, archs: Sequence[Architecture], split: Split
    ) -> Generator[tuple[Architecture, Score, float], None, None]:
        """Children, their scores and the seconds each took, as they are ready."""
        workers = min(self.at_once, len(archs))
        if workers <= 1:
            for arch in archs:
                yield arch, *self._timed_score(arch, split, threading.Event())
            return
        stop = threading.Event()
        # The longest first, so that all workers end at about the same time.
        order = sorted(archs, key=lambda arch: -total_macs(self.supernet.lower(arch)))
        with _pool(workers) as pool:
            futures: dict[Future[tuple[Score, float]], Architecture] = {}
            try:
                for arch in order:
                    futures[pool.submit(self._timed_score, arch, split, stop)] = arch
                for future in as_completed(futures):
                    yield futures[future], *future.result()
            except BaseException:  # a failure or Ctrl-C: the children in work end with their next batch
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @property
    def at_once(self) -> int:
        """Children evaluated at a time."""
        if self._workers is not None:
            return self._workers
        if self._device.type != "cpu":
            return 1
        return num_processors()

    def _timed_score(self, arch: Architecture, split: Split, stop: threading.Event) -> tuple[Score, float]:
        started = time.perf_counter()
        layers, tensors = self.supernet.lower(arch), self.supernet.corners(arch)
        calibration = _until(stop, self._calibration_batches(arch.resolution))
        found, _ = statistics(layers, tensors, calibration)
        folded = fold(layers, {**tensors, **found})
        evaluation = _until(stop, self._batches(split, arch.resolution))
        score = evaluate(partial(logits, layers, folded), evaluation)
        return score, time.perf_counter() - started

    # ------------------------------------------------------------ one child

    def child(self, arch: Architecture) -> Network:
        """The calibrated child as a network of its own, in evaluation mode."""
        return calibrate(self.supernet.child(arch), self._calibration_batches(arch.resolution))

    def score(self, child: Network, arch: Architecture, split: Split) -> Score:
        """What a calibrated child gets on a split, whose batches workers share."""
        network = partial(logits, child.layers, fold(child.layers, child.state_dict()))
        workers = self.at_once
        with closing(self._batches(split, arch.resolution)) as stream, _pool(workers) as pool:

            def each(function: Callable[[T], Any], items: Iterator[T]) -> Iterator[Any]:
                while group := [*islice(items, workers)]:  # no more than these are in memory
                    yield from pool.map(function, group)

            return evaluate(network, stream, each)

    def images(self, split: Split, resolution: int, count: int) -> Tensor:
        """The first images of a split as network input, (count, channels, resolution, resolution)."""
        return resize(split.load(torch.arange(min(count, len(split)))), resolution, split.preprocessing)

    # ------------------------------------------------------------ images

    @property
    def _device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    def _calibration_batches(self, resolution: int) -> Generator[Tensor, None, None]:
        split, batch_size = self.data.calibration, self.protocol.batch_size
        count = max(1, min(self.protocol.calibration_images, len(split)) // batch_size)
        with closing(batches(split, batch_size, resolution, self._device)) as stream:
            yield from (image for image, _ in islice(stream, count))

    def _batches(self, split: Split, resolution: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        # On a processor feature maps should stay in its cache, but each operation has a cost of its own: 250 images of
        # 28x28 took 6% less time than 100 and 30% less than 32; 500 took 2% less still.
        batch_size = min(256, max(8, 200_000 // resolution**2)) if self._device.type == "cpu" else 256
        return batches(split, batch_size, resolution, self._device)

    def _split(self, name: str) -> Split:
        splits = {"validation": self.data.validation, "test": self.data.test}
        if name not in splits:
            raise InputError(f"split {name!r} is not one of {', '.join(splits)}")
        return splits[name]

    def _part(self, name: str, num_images: int) -> Split:
        if num_images < 1:
            raise InputError(f"num_images={num_images} is not at least 1")
        if (name, num_images) not in self._parts:
            split = self._split(name)
            spread = torch.arange(num_images) * len(split) // num_images
            self._parts[name, num_images] = split.subset(spread, split.preprocessing)
        return self._parts[name, num_images]


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Workers of one thread each.

    Torch's own threads share each operation, and wait for each other after it: very long where other programs have the
    processors. On two busy ones (load 6 to 9) an export took 270 s so, and 5 s on one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="hwnas-evaluate") as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class _StoppedError(Exception):
    """The evaluation was interrupted."""


def _until(stop: threading.Event, items: Generator[T, None, None]) -> Iterator[T]:
    with closing(items):  # now, not when the garbage is collected: it may have a thread of its own
        for item in items:
            if stop.is_set():
                raise _StoppedError
            yield item
