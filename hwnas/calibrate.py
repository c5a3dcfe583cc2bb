"""Batch-norm calibration and evaluation of children."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.network import Network, batch_norms


@torch.no_grad()
def calibrate(child: Network, batches: Iterable[Tensor]) -> Network:
    """Give a child its own batch-norm statistics, and put it into evaluation mode.

    Statistics of the supernet or of another child do not fit: each child's layers see other inputs. The statistics
    start anew and are the plain average over the batches (cumulative, no momentum), as BigNAS does.

    Args:
        child: changed in place, and returned.
        batches: normalised training images (n, in_channels, resolution, resolution), at the child's resolution.

    Raises:
        ValueError: there are no batches.
    """
    norms = list(batch_norms(child))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    child.train()
    count = 0
    for image in batches:
        child(image)
        count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    child.eval()
    if not count:
        raise ValueError("calibration needs at least one batch")
    return child


@dataclass(frozen=True, slots=True)
class Score:
    """What a child got on a split.

    Attributes:
        accuracy: share of images whose highest logit is their label, 0 to 1.
        loss: mean cross-entropy.
        num_images: how many.
    """

    accuracy: float
    loss: float
    num_images: int


@torch.no_grad()
def evaluate(child: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Accuracy and loss of a calibrated child in evaluation mode.

    Args:
        child: any network that maps images to logits (n, num_classes).
        batches: images at the child's resolution, and labels (n,).

    Raises:
        ValueError: there are no images.
    """
    correct, loss, count = 0, 0.0, 0
    for image, labels in batches:
        logits = child(image)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    if not count:
        raise ValueError("evaluation needs at least one image")
    return Score(correct / count, loss / count, count)
