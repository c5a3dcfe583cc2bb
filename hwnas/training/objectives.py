"""What one training step does to the supernet's gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.layers import Layer
from hwnas.space import Architecture, SearchSpace
from hwnas.supernet import Before, Supernet, corner
from hwnas.training.losses import adaptive_alpha_divergence, soft_cross_entropy
from hwnas.training.processes import Processes, sync_batch_norm
from hwnas.training.recipes import Regularisation, TrainConfig
from hwnas.training.sampling import make_sampler


def backward_in_place(
    supernet: Supernet,
    arch: Architecture,
    image: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    scale: float = 1.0,
    before: Before | None = None,
    batch_norm: Callable[..., Tensor] = F.batch_norm,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one child, its gradient added into the child's corner of the supernet's.

    The corners are detached leaves, so a child's gradient has the child's size; differentiating through the views
    would pad every one to full size with zeros.

    Args:
        supernet: its parameters have gradients (zeros at the start of a step).
        arch: the child.
        image: (n, in_channels, resolution, resolution), at the child's resolution.
        loss: of the logits (n, num_classes) float32.
        scale: of the gradient.
        before: see `Supernet.forward`.
        batch_norm: see there.
        autocast: context of the forward pass.

    Returns:
        Logits and loss, both without gradient.
    """
    leaves = {name: view.detach().requires_grad_() for name, view in supernet.corners(arch).items()}
    with autocast():
        logits = supernet(image, arch, tensors=leaves, before=before, batch_norm=batch_norm)
    logits = logits.float()
    value = loss(logits)
    gradients = torch.autograd.grad(value * scale if scale != 1 else value, list(leaves.values()))
    totals = {name: parameter.grad for name, parameter in supernet.named_parameters()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        total = totals[name]
        assert total is not None
        corner(total, leaf.shape).add_(gradient)
    return logits.detach(), value.detach()


class Noise:
    """Random masks for the images of one process, the same that one process alone would draw for them.

    Args:
        generator: on the device where the masks are used.
        batch_size: images of all processes.
        share: those of this one.
    """

    def __init__(self, generator: torch.Generator, batch_size: int, share: slice) -> None:
        self.generator, self.batch_size, self.share = generator, batch_size, share

    def mask(self, shape: tuple[int, ...], drop: float) -> Tensor:
        """0 with probability `drop`, else 1 / (1 - drop): (n, *shape) float32."""
        device = self.generator.device
        draws = torch.rand(self.batch_size, *shape, generator=self.generator, device=device)[self.share]
        return (draws >= drop).float() / (1 - drop)


def regulariser(
    rule: Regularisation, space: SearchSpace, layers: tuple[Layer, ...], noise: Noise, num_stages: int
) -> Before | None:
    """Dropout and drop-connect of one child, as `Supernet.forward` takes them; None where there are none.

    Drop-connect rises linearly with depth: block i of n drops `i / n * rule.drop_connect`, counted from 0, as
    EfficientNet and AttentiveNAS do.

    Args:
        rule: how much.
        space: the child's.
        layers: the child's.
        noise: where the masks come from.
        num_stages: how many of the last stages drop-connect reaches.
    """
    adds = [layer.name for layer in layers if layer.kind == "add"]
    last = tuple(f"stage{number}." for number in range(len(space.stages) - num_stages + 1, len(space.stages) + 1))
    drops = {
        name: rule.drop_connect * index / len(adds)
        for index, name in enumerate(adds)
        if rule.drop_connect and index and name.startswith(last)
    }
    if not rule.dropout and not drops:
        return None

    def before(layer: Layer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if layer.name in drops:
            return (x * noise.mask((1, 1, 1), drops[layer.name]).to(x.dtype), *inputs[1:])
        if layer.kind == "linear" and rule.dropout:
            return (x * noise.mask(tuple(x.shape[1:]), rule.dropout).to(x.dtype),)
        return inputs

    return before


@dataclass(frozen=True, slots=True)
class Batch:
    """What one process learns from in a step.

    Attributes:
        resized: its images at a resolution, (n, in_channels, resolution, resolution).
        labels: (n,) int64, or (n, num_classes) probabilities.
        noise: for dropout.
    """

    resized: Callable[[int], Tensor]
    labels: Tensor
    noise: Noise


class Objective:
    """Which children learn in a step, and from what: BigNAS's sandwich rule and in-place distillation, or others'.

    BigNAS (arXiv 2003.11142, 3.1): the biggest child learns from the labels, the smallest and some random ones from
    the biggest one's soft labels alone.

    Args:
        space: the search space.
        config: the recipe.
        processes: those that train together.
    """

    def __init__(self, space: SearchSpace, config: TrainConfig, processes: Processes | None = None) -> None:
        self.space, self.config, self.processes = space, config, processes or Processes()
        self.sampler = make_sampler(config.sampling, space, config.num_candidates)
        several = self.processes.count > 1
        self._batch_norm: Callable[..., Tensor] = sync_batch_norm if config.sync_bn and several else F.batch_norm

    def __call__(
        self, supernet: Supernet, batch: Batch, rng: np.random.Generator, *, scale: float = 1.0
    ) -> tuple[list[Architecture], Tensor]:
        """Add the gradients of one step into the supernet's.

        Args:
            supernet: in training mode; its parameters have gradients.
            batch: what to learn from.
            rng: draws the random children, in all processes the same.
            scale: of the gradients, beside the recipe's own: loss scaling.

        Returns:
            The children and their losses on this process's images, (num_children,).
        """
        config = self.config
        scale = scale if config.loss_reduction == "sum" else scale / len(config.children)
        children, losses = [], []
        teacher: Tensor | None = None
        for role in config.children:
            arch = self._child(role, supernet, batch, rng)
            rule = config.biggest if role == "biggest" else config.others
            logits, loss = backward_in_place(
                supernet,
                arch,
                batch.resized(arch.resolution),
                self._loss(batch.labels, teacher, rule),
                scale=scale,
                before=regulariser(rule, self.space, supernet.lower(arch), batch.noise, config.drop_connect_stages),
                batch_norm=self._batch_norm,
                autocast=self._autocast,
            )
            if teacher is None and config.distillation != "none":
                teacher = logits
            children.append(arch)
            losses.append(loss)
        return children, torch.stack(losses)

    def _child(self, role: str, supernet: Supernet, batch: Batch, rng: np.random.Generator) -> Architecture:
        if role != "random":
            return self.space.largest() if role == "biggest" else self.space.smallest()
        candidates = self.sampler.candidates(rng)
        if len(candidates) == 1:
            return candidates[0]
        with torch.no_grad(), self._autocast():
            losses = torch.stack(
                [
                    F.cross_entropy(
                        supernet(batch.resized(arch.resolution), arch, batch_norm=self._batch_norm).float(),
                        batch.labels,
                    )
                    for arch in candidates
                ]
            )
        return candidates[int(self.processes.sum(losses).argmin())]

    def _loss(self, labels: Tensor, teacher: Tensor | None, rule: Regularisation) -> Callable[[Tensor], Tensor]:
        if teacher is None:
            return lambda logits: F.cross_entropy(logits, labels, label_smoothing=rule.label_smoothing)
        if self.config.distillation == "soft-labels":
            return lambda logits: soft_cross_entropy(logits, teacher)
        return lambda logits: adaptive_alpha_divergence(logits, teacher, self.config.alpha, self.config.alpha_clip)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.processes.device.type, dtype)
