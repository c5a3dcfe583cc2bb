"""Batch-norm calibration and evaluation of children: the forward passes of search, without gradients or modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hwnas.layers import BN_EPS, Layer
from hwnas.network import ACTIVATIONS, Network, function, run


@torch.inference_mode()
def statistics(
    layers: Sequence[Layer], tensors: Mapping[str, Tensor], batches: Iterable[Tensor]
) -> tuple[dict[str, Tensor], int]:
    """A network's own batch-norm statistics: the plain average over the batches (no momentum), as BigNAS does.

    Statistics of the supernet or of another child do not fit: each child's layers see other inputs.

    Args:
        layers: what `hwnas.layers.lower` gives.
        tensors: its parameters, by the names that `Layer.tensors` gives.
        batches: normalised training images (n, in_channels, resolution, resolution), in one pass.

    Returns:
        Mean and unbiased variance, `{layer}.norm.running_mean` and `{layer}.norm.running_var`, (channels,) each;
        and the number of batches.

    Raises:
        ValueError: there are no batches.
    """
    weights = {name: _packed(tensor) for name, tensor in tensors.items()}  # corners are no blocks of memory
    found: dict[str, Tensor] = {}
    for layer in layers:
        if layer.norm:
            weight = weights[f"{layer.name}.norm.weight"]
            found[f"{layer.name}.norm.running_mean"] = torch.zeros_like(weight)
            found[f"{layer.name}.norm.running_var"] = torch.ones_like(weight)
    count = 0

    def normalise(layer: Layer, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            tensors[f"{layer.name}.norm.{part}"]
            for tensors, part in (
                (found, "running_mean"),
                (found, "running_var"),
                (weights, "weight"),
                (weights, "bias"),
            )
        )
        return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1 / count, eps=BN_EPS)

    for image in batches:
        count += 1
        run(layers, lambda layer, *inputs: _layer(layer, weights, normalise, *inputs), _channels_last(image))
    if not count:
        raise ValueError("calibration needs at least one batch")
    return found, count


@torch.no_grad()
def calibrate(child: Network, batches: Iterable[Tensor]) -> Network:
    """Give a child its own batch-norm `statistics`, and put it into evaluation mode.

    Args:
        child: changed in place, and returned.
        batches: see `statistics`.

    Raises:
        ValueError: there are no batches.
    """
    found, count = statistics(child.layers, dict(child.named_parameters()), batches)
    for name, buffer in child.named_buffers():
        buffer.copy_(found[name] if name in found else torch.tensor(count))  # num_batches_tracked
    return child.eval()


@torch.inference_mode()
def fold(layers: Sequence[Layer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A calibrated network's tensors with batch norm folded into the convolutions, for `logits`.

    Args:
        layers: what `hwnas.layers.lower` gives.
        tensors: parameters and `statistics`.

    Returns:
        `{layer}.conv.weight`, `{layer}.conv.bias`, ..., copies; folded in double precision.
    """
    folded: dict[str, Tensor] = {}
    for layer in layers:
        for name in layer.tensors:
            if ".norm." not in name:
                folded[name] = _packed(tensors[name])
        if layer.norm:
            gamma, beta, mean, var = (
                tensors[f"{layer.name}.norm.{part}"].double()
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            weight, bias = f"{layer.name}.conv.weight", f"{layer.name}.conv.bias"
            scale = gamma / torch.sqrt(var + BN_EPS)
            shift = beta + (tensors[bias] - mean if layer.bias else -mean) * scale
            folded[weight] = _packed((tensors[weight] * scale.reshape(-1, 1, 1, 1)).float())
            folded[bias] = shift.float()
    return folded


@torch.inference_mode()
def logits(layers: Sequence[Layer], folded: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """(n, num_classes) for normalised images (n, in_channels, resolution, resolution); `folded` comes from `fold`."""
    return run(layers, lambda layer, *inputs: _layer(layer, folded, None, *inputs), _channels_last(image))


def _layer(
    layer: Layer, tensors: Mapping[str, Tensor], normalise: Callable[[Layer, Tensor], Tensor] | None, *inputs: Tensor
) -> Tensor:
    """One layer; `normalise` is its batch norm, None where that is folded in. It may write into its first input.

    A convolution of 1x1 is a matrix product over pixels: at these sizes torch's convolutions take 0.1 ms a call to set
    up, on processors. That, writing in place and folding make this twice as fast as the modules.
    """
    x = inputs[0]
    match layer.kind:
        case "conv":
            weight, bias = tensors[f"{layer.name}.conv.weight"], tensors.get(f"{layer.name}.conv.bias")
            if layer.kernel == 1 and layer.stride == 1:
                x = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
            else:
                x = F.conv2d(x, weight, bias, layer.stride, layer.kernel // 2, 1, layer.groups)
            if layer.norm and normalise is not None:
                x = normalise(layer, x)
            # In place: nothing else reads what it overwrites.
            return ACTIVATIONS[layer.activation].in_place(x) if layer.activation else x
        case "scale":
            return x.mul_(inputs[1])  # the pooled features, its other reader, are worked out before
        case _:
            return function(layer, tensors, False, *inputs)


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous(
        memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    )


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


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


def evaluate(
    network: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], each: Callable[..., Any] = map
) -> Score:
    """Accuracy and loss of a calibrated network in evaluation mode.

    Args:
        network: maps images to logits (n, num_classes).
        batches: images at the network's resolution, and labels (n,).
        each: gives what a function makes of each of the batches, in their order, as `map` does; perhaps in threads.

    Raises:
        ValueError: there are no images.
    """

    @torch.inference_mode()  # of the thread that it runs in
    def counted(batch: tuple[Tensor, Tensor]) -> tuple[int, float, int]:
        images, labels = batch
        out = network(images)
        loss = F.cross_entropy(out, labels, reduction="sum")
        return int((out.argmax(1) == labels).sum()), float(loss), len(labels)

    correct, loss, count = 0, 0.0, 0
    for right, summed, number in each(counted, batches):
        correct, loss, count = correct + right, loss + summed, count + number
    if not count:
        raise ValueError("evaluation needs at least one image")
    return Score(correct / count, loss / count, count)
