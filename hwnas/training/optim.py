"""Optimizers for supernets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hwnas.training.recipes import TrainConfig


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow computes it: eps inside the root, squares start at one, momentum on the scaled step.

    The form in which EfficientNet and BigNAS were trained; `torch.optim.RMSprop` adds eps outside the root.

        square = decay * square + (1 - decay) * grad ** 2
        velocity = momentum * velocity + lr * grad / sqrt(square + eps)
        weight = weight - velocity

    Args:
        params: parameters or groups, each with its own `weight_decay` (L2, added to the gradient).
        lr: learning rate.
        decay, momentum, eps: see the formula.
        weight_decay: default of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["square"] = torch.ones_like(param)
                    self.state[param]["velocity"] = torch.zeros_like(param)
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            squares = [self.state[p]["square"] for p in params]
            velocities = [self.state[p]["velocity"] for p in params]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_addcdiv_(velocities, grads, roots, group["lr"])
            torch._foreach_sub_(params, velocities)


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer. Weight decay reaches weights, not biases, gammas and betas."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, nesterov=nesterov, foreach=True)
    return RMSpropTF(
        groups,
        lr=config.peak_lr,
        decay=config.rmsprop_decay,
        momentum=config.momentum,
        eps=config.rmsprop_eps,
    )


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average's parameters towards the network's: average += (1 - decay) (network - average).

    While there are few steps to average over, the decay is at most (1 + step) / (10 + step), as in TensorFlow's
    ExponentialMovingAverage with `num_updates`.

    Args:
        average: changed in place; the same module as `network`.
        network: after its `step`-th update.
        decay: of the average.
        step: counted from 1.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
