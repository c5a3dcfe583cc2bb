"""The accuracy of children: calibrated, evaluated, and never worked out twice."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from hwnas.calibrate import Score, calibrate, evaluate
from hwnas.data import Dataset, Split, batches
from hwnas.network import Network
from hwnas.space import Architecture
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

    def child(self, arch: Architecture) -> Network:
        """The calibrated child, in evaluation mode."""
        protocol = self.protocol
        split = self.data.calibration
        # Full batches only: each counts the same in the average.
        count = max(1, min(protocol.calibration_images, len(split)) // protocol.batch_size)
        images = (
            image.contiguous(memory_format=torch.channels_last)
            for image, _ in _first(count, batches(split, protocol.batch_size, arch.resolution))
        )
        child = self.supernet.child(arch).to(memory_format=torch.channels_last)
        return calibrate(child, images)

    def score(self, arch: Architecture, split: Split) -> tuple[Score, float]:
        """What the calibrated child gets on a split, and the seconds it took."""
        started = time.perf_counter()
        score = self.score_child(self.child(arch), arch, split)
        return score, time.perf_counter() - started

    def score_child(self, child: Network, arch: Architecture, split: Split) -> Score:
        """What a calibrated child gets on a split."""
        return evaluate(
            child,
            (
                (image.contiguous(memory_format=torch.channels_last), labels)
                for image, labels in batches(split, self.protocol.batch_size, arch.resolution)
            ),
        )


def _first(count: int, items: Any) -> Any:
    for index, item in enumerate(items):
        if index == count:
            return
        yield item
