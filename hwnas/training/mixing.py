"""Mixup and cutmix: two images, and their labels, made into one."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mix(
    pixels: Tensor, labels: Tensor, num_classes: int, rng: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix every image of a batch with its neighbour: images 2k and 2k + 1, which the shuffled order made neighbours.

    Neighbours rather than a permutation, so that every process mixes its own images as one process would all of them.

    Args:
        pixels: (n, channels, size, size) uint8, n even.
        labels: (n,) int64.
        num_classes: of the classifier.
        rng: draws share and rectangle of this step, in all processes the same.
        mixup: alpha of Beta(alpha, alpha), from which the share of the first image is drawn (Zhang et al., arXiv
            1710.09412); 0 for none.
        cutmix: likewise; a rectangle of that area is replaced (Yun et al., arXiv 1905.04899); with both, one of them
            by chance.

    Returns:
        Pixels, (n, channels, size, size) uint8, and probabilities of the classes, (n, num_classes).
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    other = pixels.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if cut:
        size = pixels.shape[-1]
        side = size * math.sqrt(1 - share)
        row, column = rng.uniform(0, size, 2)
        top, left = (round(max(0.0, centre - side / 2)) for centre in (row, column))
        bottom, right = (round(min(float(size), centre + side / 2)) for centre in (row, column))
        mixed = pixels.clone()
        mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / size**2  # of the rectangle that is inside the image
    else:
        mixed = torch.lerp(other.float(), pixels.float(), share).round_().byte()
    targets = F.one_hot(labels, num_classes).float()
    return mixed, torch.lerp(targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), targets, share)
