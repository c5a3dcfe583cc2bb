"""One training in one process or in many, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hwnas.errors import InputError
from hwnas.machine import torchrun_ranks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: its number; the one of rank 0 writes files and talks to the user.
        count: how many there are.
        local_rank, local_count: its number on this machine, and how many are here.
        device: where it computes.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this one writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, in place, summed over all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, *tensors: Tensor) -> None:
        """Give every process the first one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def text(self, make: Callable[[], str]) -> str:
        """What `make` returns in the first process; it is not called in the others."""
        if self.count == 1:
            return make()
        content = torch.tensor(list(make().encode()) if self.first else [], dtype=torch.uint8, device=self.device)
        size = torch.tensor(len(content), device=self.device)
        self.share(size)
        if not self.first:
            content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self.share(content)
        return bytes(content.cpu().tolist()).decode()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def one_after_the_first(self, work: Callable[[], T]) -> T:
        """`work()` in the first process of each machine, then in the others: what it downloads is there for them."""
        if self.local_rank > 0:
            self.wait()
        done = work()
        if self.local_rank == 0:
            self.wait()
        return done


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """This process and the others that `torchrun` started with it; by itself if it was started in another way.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    rank, count, local_rank, local_count = torchrun_ranks()
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda: torch finds no CUDA device here: use auto or cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    here = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if count == 1:
        yield Processes(device=here)
        return
    # After a restart, torch 2.14's elastic agent may serve the store of the attempt before: a process would then be
    # told a dead one's address, and wait for it. So each attempt has its own part of the store.
    found, _, _ = next(rendezvous("env://"))
    store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, device_id=here if cuda else None)
    try:
        yield Processes(rank, count, local_rank, local_count, here)
    finally:
        dist.destroy_process_group()


class FlatGradients:
    """All gradients of a network in one piece of memory, so that zeroing and summing them is one operation each.

    Every parameter's `grad` is a view of it, in the parameter's own memory layout.

    Args:
        network: its parameters get their gradients.
        extra: further numbers that are summed over the processes together with the gradients.

    Attributes:
        flat: (num_parameters + extra,) float32.
        extra: the further numbers, (extra,).
    """

    def __init__(self, network: nn.Module, extra: int) -> None:
        parameters = list(network.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        self.flat = torch.zeros(total + extra, device=parameters[0].device)
        self.extra = self.flat[total:]
        start = 0
        for parameter in parameters:
            # A dense tensor's strides permute those of a contiguous one: they fit any stretch of as many elements.
            parameter.grad = self.flat[start : start + parameter.numel()].as_strided(
                parameter.shape, parameter.stride()
            )
            start += parameter.numel()

    def mean(self, processes: Processes) -> None:
        """The mean over the processes: one all-reduce."""
        if processes.count > 1:
            processes.sum(self.flat).div_(processes.count)


class _Gather(torch.autograd.Function):
    """(channels, 2) of each process as (num_processes, channels, 2) in all of them."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine.contiguous())
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every process's loss depends on my statistics.
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    training: bool,
    eps: float,
) -> Tensor:
    """`F.batch_norm` with the statistics of the images of all processes, which have equally many.

    torch's SyncBatchNorm computes the same on GPUs only. No running statistics are kept.

    Args:
        x: (n, channels, height, width).
        running_mean: used outside training, (channels,).
        running_var: likewise.
        weight: gamma, (channels,).
        bias: beta, (channels,).
        training: whether to use the batch's statistics.
        eps: added to the variance.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    full = x.float()
    mine = torch.stack(torch.var_mean(full, (0, 2, 3), correction=0), dim=1)
    statistics: Tensor = _Gather.apply(mine)
    var, mean = statistics.unbind(2)  # each (num_processes, channels)
    # Variance of the whole: mean of the parts' variances, and variance of their means (Chan et al. 1979).
    total_var = var.mean(0) + mean.var(0, correction=0)
    scale = weight * (total_var + eps).rsqrt()
    shift = bias - mean.mean(0) * scale
    return (full * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
