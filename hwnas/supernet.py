"""Weight sharing: every child's tensors are corners of the supernet's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.errors import InputError
from hwnas.layers import Layer, lower, segments
from hwnas.network import Network, function, initialise, run
from hwnas.space import Architecture, SearchSpace
from hwnas.weights import digest, load_tensors, save_tensors

WEIGHTS = "supernet.safetensors"  # in a run folder

Before: TypeAlias = Callable[[Layer, tuple[Tensor, ...]], tuple[Tensor, ...]]


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
        gamma_zero: see `hwnas.network.initialise`.

    Attributes:
        about: what its file says of its training, as text.
    """

    def __init__(self, space: SearchSpace, *, seed: int = 0, gamma_zero: bool = True) -> None:
        super().__init__()
        self.space = space
        self.about: dict[str, str] = {}
        self.layers = shared_layers(space)
        for layer in self.layers:
            for name, shape in layer.tensors.items():
                self._register(name, nn.Parameter(torch.empty(shape)))
        generator = torch.Generator().manual_seed(seed)
        initialise(self.layers, dict(self.named_parameters()), generator, gamma_zero=gamma_zero)
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
        return {name: corner(own[name], shape) for layer in self.lower(arch) for name, shape in layer.tensors.items()}

    def forward(
        self,
        image: Tensor,
        arch: Architecture,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        before: Before | None = None,
        batch_norm: Callable[..., Tensor] = F.batch_norm,
    ) -> Tensor:
        """Logits (n, num_classes) of the child `arch` for images (n, in_channels, resolution, resolution).

        Args:
            image: normalised images.
            arch: the child.
            tensors: what to use in place of `corners(arch)`: the same, detached, or with a calibrated child's
                running statistics, which evaluation mode then uses.
            before: what becomes of a layer's inputs before it is run: dropout, for example.
            batch_norm: in place of torch's, with the same arguments.
        """
        tensors = self.corners(arch) if tensors is None else tensors

        def call(layer: Layer, *inputs: Tensor) -> Tensor:
            if before is not None:
                inputs = before(layer, inputs)
            return function(layer, tensors, self.training, *inputs, batch_norm=batch_norm)

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

    def identity(self) -> str:
        """Sixteen hexadecimal digits that identify the weights; accuracies are recorded under them."""
        return digest(dict(self.named_parameters()))

    def save(self, path: Path, about: Mapping[str, str] | None = None) -> None:
        """Write weights and space to a safetensors file; `about` is kept beside them.

        Raises:
            OSError: it cannot be written; an older file is intact.
        """
        metadata = {**(about or {}), "space": json.dumps(self.space.to_dict())}
        save_tensors(dict(self.named_parameters()), path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A supernet from its file, or from the run folder that holds it; in evaluation mode.

        Raises:
            InputError: there is none, or the file is damaged.
        """
        file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(f"no trained supernet at {file}: train one with `hwnas train`")
        remedy = "delete it and run `hwnas train` again, which goes on from its checkpoint"
        tensors, metadata = load_tensors(file, remedy=remedy)
        try:
            supernet = cls(SearchSpace.from_dict(json.loads(metadata["space"]), source=str(file)))
            supernet.load_state_dict(tensors)
            supernet.about = {name: text for name, text in metadata.items() if name != "space"}
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{file}: not a supernet of hwnas ({str(error).splitlines()[0]})") from None
        # Depthwise convolutions are about twice as fast with channels last, on processors and on GPUs.
        return supernet.to(memory_format=torch.channels_last).eval()
