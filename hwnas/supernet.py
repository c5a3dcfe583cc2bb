"""Weight sharing: every child's tensors are corners of the supernet's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.layers import Layer, lower, segments
from hwnas.network import Network, function, initialise, run
from hwnas.space import Architecture, SearchSpace


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The one rule that cuts weights: the first channels, and the centre of the kernel; a view.

    Args:
        tensor: (out, in, kernel, kernel) or fewer dimensions.
        shape: the child's shape, nowhere larger, with as many dimensions.
    """
    for dim, size in enumerate(shape):
        full = tensor.shape[dim]
        if size != full:
            tensor = tensor.narrow(dim, (full - size) // 2 if dim >= 2 else 0, size)
    return tensor


def shared_layers(space: SearchSpace) -> tuple[Layer, ...]:
    """For every layer name in the space, that layer large enough for all children.

    These are the biggest child's, and what it alone lacks: for example a shortcut's convolution that only children
    with unequal widths have.
    """
    shared: dict[str, Layer] = {}
    for segment in segments(replace(space, resolution=space.resolution[-1:])):
        for layers in segment.layers():
            for layer in layers:
                known = shared.setdefault(layer.name, layer)
                shared[layer.name] = replace(
                    known,
                    in_channels=max(known.in_channels, layer.in_channels),
                    out_channels=max(known.out_channels, layer.out_channels),
                    groups=max(known.groups, layer.groups),
                    kernel=max(known.kernel, layer.kernel),
                    residual=known.residual or layer.residual,
                )
    return tuple(shared.values())


class Supernet(nn.Module):
    """All networks of a space in one set of weights.

    It holds parameters only, under the names that they have in the children. Running statistics of batch norm
    belong to one child, after calibration (`hwnas.calibrate`); without them batch norm uses the batch's own.

    Args:
        space: the search space.
        seed: of the initialisation.
    """

    def __init__(self, space: SearchSpace, *, seed: int = 0) -> None:
        super().__init__()
        self.space = space
        self.layers = shared_layers(space)
        for layer in self.layers:
            for name, shape in layer.tensors.items():
                self._register(name, nn.Parameter(torch.empty(shape)))
        initialise(self.layers, dict(self.named_parameters()), torch.Generator().manual_seed(seed))
        self.lower = lru_cache(maxsize=1024)(partial(lower, space))

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        *path, leaf = name.split(".")
        parent: nn.Module = self
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, parameter)

    def corners(self, arch: Architecture) -> dict[str, Tensor]:
        """The child's parameters by name, as views of the supernet's."""
        own = dict(self.named_parameters())
        return {
            name: corner(own[name], shape)
            for layer in self.lower(arch)
            for name, shape in layer.tensors.items()
        }

    def forward(
        self,
        image: Tensor,
        arch: Architecture,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Logits (n, num_classes) of the child `arch` for images (n, in_channels, resolution, resolution).

        Args:
            image: normalised images.
            arch: the child.
            tensors: what to use in place of `corners(arch)`: the same, detached, or with a calibrated child's
                running statistics, which evaluation mode then uses.
            dropout: on the classifier's input, in training mode.
        """
        tensors = self.corners(arch) if tensors is None else tensors

        def call(layer: Layer, *inputs: Tensor) -> Tensor:
            if dropout and layer.kind == "linear":
                inputs = (F.dropout(inputs[0], dropout, self.training),)
            return function(layer, tensors, self.training, *inputs)

        return run(self.lower(arch), call, image)

    def child(self, arch: Architecture) -> Network:
        """A network of its own, with a copy of the child's weights, on the same device, in the same mode.

        Its batch-norm statistics are still empty (mean 0, variance 1): `hwnas.calibrate` fills them, before
        evaluation mode means anything.
        """
        device = next(self.parameters()).device
        child = Network(self.lower(arch), device=device).train(self.training)
        corners = self.corners(arch)
        with torch.no_grad():
            for name, parameter in child.named_parameters():
                parameter.copy_(corners[name])
        return child
