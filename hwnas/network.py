"""A network built from its list of layers: as a plain module, or run as a function over given tensors."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwnas.layers import BN_EPS, IMAGE, Layer


class ActivationForms(NamedTuple):
    """One activation as a module, as a function, and as a function that writes into its argument."""

    module: type[nn.Module]
    function: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "relu": ActivationForms(nn.ReLU, F.relu, torch.relu_),
    "swish": ActivationForms(nn.SiLU, F.silu, partial(F.silu, inplace=True)),
    "h-swish": ActivationForms(nn.Hardswish, F.hardswish, partial(F.hardswish, inplace=True)),
    "sigmoid": ActivationForms(nn.Sigmoid, torch.sigmoid, torch.sigmoid_),
    "h-sigmoid": ActivationForms(nn.Hardsigmoid, F.hardsigmoid, partial(F.hardsigmoid, inplace=True)),
}

# On a CPU, torch's oneDNN compiles a kernel for every new shape of a convolution and by default remembers 1,024; the
# children of a supernet have many thousands. A sandwich step of the demo's space took 151 ms with the default and 93 ms
# with all of them remembered (2 threads, batch 32). Read once, before the first convolution.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")


def run(layers: Sequence[Layer], call: Callable[..., Tensor], image: Tensor) -> Tensor:
    """Execute the dataflow graph: `call(layer, *inputs)` for each layer, in order; the last one's output.

    An intermediate value is let go after its last use.
    """
    last_use = {name: index for index, layer in enumerate(layers) for name in layer.inputs}
    values = {IMAGE: image}
    out = image
    for index, layer in enumerate(layers):
        out = values[layer.name] = call(layer, *(values[name] for name in layer.inputs))
        for name in layer.inputs:
            if last_use[name] == index:
                values.pop(name, None)
    return out


def function(
    layer: Layer,
    tensors: Mapping[str, Tensor],
    training: bool,
    *inputs: Tensor,
    batch_norm: Callable[..., Tensor] = F.batch_norm,
) -> Tensor:
    """One layer as a function of its tensors; the same operations as the module that `build` gives.

    Batch norm uses the batch's statistics in training, or where `tensors` has no running ones; `batch_norm` has the
    arguments of torch's.
    """
    x = inputs[0]
    match layer.kind:
        case "conv":
            name = layer.name
            x = F.conv2d(
                x,
                tensors[f"{name}.conv.weight"],
                tensors.get(f"{name}.conv.bias"),
                layer.stride,
                layer.kernel // 2,
                1,
                layer.groups,
            )
            if layer.norm:
                mean = tensors.get(f"{name}.norm.running_mean")
                x = batch_norm(
                    x,
                    mean,
                    tensors.get(f"{name}.norm.running_var"),
                    tensors[f"{name}.norm.weight"],
                    tensors[f"{name}.norm.bias"],
                    training=training or mean is None,
                    eps=BN_EPS,
                )
            return ACTIVATIONS[layer.activation].function(x) if layer.activation else x
        case "linear":
            return F.linear(x.flatten(1), tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"])
        case "avg_pool":
            return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        case "global_pool":
            return x.mean((2, 3), keepdim=True)
        case "scale":
            return x * inputs[1]
        case "add":
            return x + inputs[1]


class _Function(nn.Module):
    """A layer without tensors."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of feature maps (n, channels, size, size)."""
        return function(self.layer, {}, self.training, *inputs)

    def extra_repr(self) -> str:
        return self.layer.kind


class _Conv2d(nn.Conv2d):
    """Leaves its weights as they are: they come from `initialise` or from a supernet."""

    def reset_parameters(self) -> None:
        pass


class _Classifier(nn.Linear):
    """Reads (n, channels, 1, 1)."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def build(layer: Layer, **options: Any) -> nn.Module:
    """The module of one layer; a convolution has the children `conv`, `norm` and `act`, as far as it has them.

    `options` go to the modules with tensors: `device`, for example.
    """
    if layer.kind == "linear":
        return _Classifier(layer.in_channels, layer.out_channels, **options)
    if layer.kind != "conv":
        return _Function(layer)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = _Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel,
        stride=layer.stride,
        padding=layer.kernel // 2,
        groups=layer.groups,
        bias=layer.bias,
        **options,
    )
    if layer.norm:
        parts["norm"] = nn.BatchNorm2d(layer.out_channels, eps=BN_EPS, **options)
    if layer.activation:
        parts["act"] = ACTIVATIONS[layer.activation].module()
    return nn.Sequential(parts)


class Network(nn.Module):
    """A plain convolutional network: conventional modules under the layers' names, run in the layers' order.

    Its weights are not initialised: see `initialise`, or load some.

    Args:
        layers: what `hwnas.layers.lower` gives.
        options: `device` and `dtype` of the tensors.
    """

    def __init__(self, layers: Sequence[Layer], **options: Any) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self._module_of: dict[str, nn.Module] = {}
        for layer in self.layers:
            *path, leaf = layer.name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            self._module_of[layer.name] = build(layer, **options)
            parent.add_module(leaf, self._module_of[layer.name])

    def forward(self, image: Tensor) -> Tensor:
        """Logits (n, num_classes) of normalised images (n, in_channels, resolution, resolution)."""
        return run(self.layers, lambda layer, *inputs: self._module_of[layer.name](*inputs), image)


def batch_norms(network: nn.Module) -> Iterator[nn.BatchNorm2d]:
    """The batch-norm modules of a network."""
    return (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))


@torch.no_grad()
def initialise(
    layers: Sequence[Layer], tensors: Mapping[str, Tensor], generator: torch.Generator, *, gamma_zero: bool = True
) -> None:
    """He initialisation (arXiv 1502.01852, fan-in), in place.

    With `gamma_zero`, gamma is zero in the last batch norm of every branch that is added to a shortcut, one elsewhere:
    Goyal et al., arXiv 1706.02677, 5.1, and BigNAS, 3.1: deep children start as shallow ones; without it the learning
    rate must fall to about 30%.
    """
    for layer in layers:
        for name in layer.tensors:
            tensor = tensors[name]
            if name.endswith("norm.weight"):
                tensor.fill_(0 if gamma_zero and layer.residual else 1)
            elif name.endswith("bias"):
                tensor.zero_()
            elif layer.kind == "linear":
                tensor.normal_(0, 0.01, generator=generator)
            else:
                tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
