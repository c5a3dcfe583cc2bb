"""The accuracy of children: calibrated, evaluated, and never worked out twice."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hwnas.calibrate import Score, calibrate, evaluate
from hwnas.data import Dataset, Split, batches, resize
from hwnas.errors import InputError
from hwnas.network import Network
from hwnas.space import Architecture
from hwnas.store import Evaluation, Store
from hwnas.supernet import Supernet


@dataclass(frozen=True, slots=True)
class EvaluationProtocol:
    """How a child is evaluated; recorded with each result.

    Attributes:
        calibration_images: for batch-norm statistics.
        batch_size: of calibration and evaluation.
    """

    calibration_images: int = 1024
    batch_size: int = 256

    def key(self) -> str:
        """A short text that tells protocols apart."""
        return f"calibration={self.calibration_images} batch={self.batch_size}"


class Evaluator:
    """Cuts children out of a supernet, calibrates and evaluates them.

    Args:
        supernet: trained.
        data: its splits.
        protocol: how.
    """

    def __init__(self, supernet: Supernet, data: Dataset, protocol: EvaluationProtocol | None = None) -> None:
        self.supernet, self.data = supernet, data
        self.protocol = protocol or EvaluationProtocol()
        self._weights: str | None = None

    def child(self, arch: Architecture) -> Network:
        """The calibrated child, in evaluation mode."""
        protocol = self.protocol
        split = self.data.calibration
        # Full batches only: each counts the same in the average.
        count = max(1, min(protocol.calibration_images, len(split)) // protocol.batch_size)
        images = (
            image.contiguous(memory_format=torch.channels_last)
            for image, _ in islice(batches(split, protocol.batch_size, arch.resolution), count)
        )
        child = self.supernet.child(arch).to(memory_format=torch.channels_last)
        return calibrate(child, images)

    def images(self, split: Split, resolution: int, count: int) -> Tensor:
        """The first images of a split as network input, (count, channels, resolution, resolution)."""
        return resize(split.load(torch.arange(min(count, len(split)))), resolution, split.preprocessing)

    def score(self, child: Network, arch: Architecture, split: Split) -> Score:
        """What a calibrated child gets on a split."""
        return evaluate(
            child,
            (
                (image.contiguous(memory_format=torch.channels_last), labels)
                for image, labels in batches(split, self.protocol.batch_size, arch.resolution)
            ),
        )

    def accuracy(self, arch: Architecture, store: Store, split: str = "validation") -> float:
        """The child's accuracy on a split, 0 to 1; worked out only if the store does not know it."""
        if self._weights is None:
            self._weights = self.supernet.identity()
        protocol = f"{self.protocol.key()} images={len(self._split(split))} data={self.data.name}"
        known = store.evaluation(arch, self._weights, split, protocol)
        if known is None:
            started = time.perf_counter()
            score = self.score(self.child(arch), arch, self._split(split))
            known = Evaluation(
                arch=arch,
                weights=self._weights,
                split=split,
                protocol=protocol,
                accuracy=score.accuracy,
                num_images=score.num_images,
                loss=score.loss,
                seconds=time.perf_counter() - started,
            )
            store.add_evaluation(known)
        return known.accuracy

    def _split(self, name: str) -> Split:
        splits = {"validation": self.data.validation, "test": self.data.test}
        if name not in splits:
            raise InputError(f"split {name!r} is not one of {', '.join(splits)}")
        return splits[name]
