"""What one training step does to the supernet's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.space import Architecture
from hwnas.supernet import Supernet, corner


def backward_in_place(
    supernet: Supernet,
    arch: Architecture,
    image: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> tuple[Tensor, float]:
    """Forward and backward of one child, its gradient added into the child's corner of the supernet's.

    The corners are detached leaves, so a child's gradient has the child's size; differentiating through the views
    would pad every one to full size with zeros.

    Args:
        supernet: its parameters have gradients (zeros at the start of a step).
        arch: the child.
        image: (n, in_channels, resolution, resolution), at the child's resolution.
        loss: of the logits (n, num_classes).
        scale: of the gradient.
        dropout: see `Supernet.forward`.

    Returns:
        The detached logits and the loss.
    """
    leaves = {name: view.detach().requires_grad_() for name, view in supernet.corners(arch).items()}
    logits = supernet(image, arch, tensors=leaves, dropout=dropout)
    value = loss(logits)
    gradients = torch.autograd.grad(value * scale if scale != 1 else value, list(leaves.values()))
    totals = {name: parameter.grad for name, parameter in supernet.named_parameters()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        total = totals[name]
        assert total is not None
        corner(total, leaf.shape).add_(gradient)
    return logits.detach(), value.item()


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Losses of one step.

    Attributes:
        biggest: cross-entropy of the biggest child with the labels.
        smallest: cross-entropy of the smallest child with the biggest one's soft labels.
        random: the same for the random children, in the order drawn.
    """

    biggest: float
    smallest: float
    random: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandwichRule:
    """BigNAS's step (arXiv 2003.11142, 3.1).

    The biggest child learns from the labels, the smallest and some random ones from the biggest one's soft labels
    alone (in-place distillation).

    Attributes:
        num_random: random children a step.
        dropout, label_smoothing: of the biggest child only.
        loss_reduction: `sum` or `mean` of the children's gradients.
    """

    num_random: int = 2
    dropout: float = 0.2
    label_smoothing: float = 0.1
    loss_reduction: str = "sum"

    def __call__(
        self,
        supernet: Supernet,
        resized: Callable[[int], Tensor],
        labels: Tensor,
        rng: np.random.Generator,
    ) -> StepMetrics:
        """Add the gradients of one step into the supernet's.

        Args:
            supernet: in training mode; its parameters have gradients.
            resized: the batch at a resolution, (n, in_channels, resolution, resolution).
            labels: (n,) int64.
            rng: draws the random children.
        """
        space = supernet.space
        children = [space.smallest(), *(space.sample(rng) for _ in range(self.num_random))]
        scale = 1.0 if self.loss_reduction == "sum" else 1 / (1 + len(children))
        biggest = space.largest()
        teacher, first = backward_in_place(
            supernet,
            biggest,
            resized(biggest.resolution),
            lambda logits: F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing),
            scale=scale,
            dropout=self.dropout,
        )
        soft_labels = teacher.softmax(dim=1)
        losses = [
            backward_in_place(
                supernet,
                child,
                resized(child.resolution),
                # Summed over the classes, mean over the batch: a mean over both would make it vanish.
                lambda logits: F.cross_entropy(logits, soft_labels),
                scale=scale,
            )[1]
            for child in children
        ]
        return StepMetrics(first, losses[0], tuple(losses[1:]))


def zero_gradients(supernet: Supernet) -> None:
    """Give every parameter a gradient of zeros, reusing the memory of the last step."""
    parameters = list(supernet.parameters())
    if all(parameter.grad is not None for parameter in parameters):
        torch._foreach_zero_([parameter.grad for parameter in parameters if parameter.grad is not None])
    else:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
