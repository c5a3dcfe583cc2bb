"""Which layer of a network a file computes wrongly: found by writing the network cut off after a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwnas.bundles.parity import correlation
from hwnas.errors import ExportError
from hwnas.exporters.base import Exporter
from hwnas.layers import IMAGE, Layer
from hwnas.network import Network

NUM_PROBES = 16  # outputs of the layer that replaces the classifier
NUM_IMAGES = 16
TOLERANCE = 1e-4  # of a probe in fp32, relative to the largest; runtimes differ by about 1e-6
CORRELATION = 0.8  # of the probes' differences between images, where rounding is meant


def culprit(
    layers: Sequence[Layer],
    tensors: Mapping[str, NDArray[Any]],
    network: Network,
    exporter: Exporter,
    images: NDArray[np.float32],
) -> str | None:
    """The first layer whose output the exporter's files get wrong.

    Every format can write a network that ends after any layer, as files are written from the layers: its feature map is
    pooled and multiplied by a random matrix in place of the classifier's. Bisection goes over the layers that read, in
    the end, all layers before them; on branches (a shortcut) every layer is tried.

    Args:
        layers: of the network.
        tensors: what the exporter gets.
        network: in evaluation mode, on the CPU.
        exporter: whose file failed.
        images: (num_images, in_channels, resolution, resolution); the first `NUM_IMAGES` are used.

    Returns:
        The layer's name; None where every cut network can be written and is right, or one cannot be written.
    """
    images = images[:NUM_IMAGES]
    values = feature_maps(network, torch.from_numpy(images))
    needed = ancestors(layers)

    def wrong(index: int) -> bool:
        kept = [layer for layer in layers[: index + 1] if layer.name in needed[layers[index].name]]
        if layers[index].kind == "linear":
            cut, given, expected = kept, tensors, values[layers[index].name]
        else:
            probes, more, expected = _probe(layers[index], values[layers[index].name])
            cut, given = [*kept, *probes], {**tensors, **more}
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"model{exporter.suffix}"
            exporter.write(cut, given, path)
            return differs(expected, exporter.infer(path, images), exporter.precision)

    try:
        trunk = [index for index, layer in enumerate(layers) if len(needed[layer.name]) == index + 1]
        first = bisect(trunk, wrong)
        if first is None:
            return None
        before = max((index for index in trunk if index < first), default=-1)
        return next(layers[index].name for index in range(before + 1, first + 1) if index == first or wrong(index))
    except ExportError:
        return None


def bisect(indices: Sequence[int], wrong: Callable[[int], bool]) -> int | None:
    """The first of the rising indices that is wrong, where all after it are, too; None if the last one is not."""
    if not wrong(indices[-1]):
        return None
    low, high = 0, len(indices) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(indices[middle]) else (middle + 1, high)
    return indices[high]


def differs(expected: NDArray[np.float32], found: NDArray[np.float32], precision: str) -> bool:
    """Whether the outputs of a cut network are wrong, for its precision."""
    if not np.isfinite(found).all():
        return True
    if precision == "fp32":
        return bool(np.abs(expected - found).max() > TOLERANCE * max(1e-6, float(np.abs(expected).max())))
    return correlation(expected - expected.mean(0), found - found.mean(0)) < CORRELATION


def ancestors(layers: Sequence[Layer]) -> dict[str, set[str]]:
    """For each layer, the layers that it reads in the end, and itself."""
    needed: dict[str, set[str]] = {IMAGE: set()}
    for layer in layers:
        needed[layer.name] = {layer.name}.union(*(needed[name] for name in layer.inputs))
    return needed


@torch.inference_mode()
def feature_maps(network: Network, images: Tensor) -> dict[str, NDArray[np.float32]]:
    """What every layer puts out, (num_images, channels, size, size), the classifier (num_images, num_classes)."""
    values = {IMAGE: images}
    for layer in network.layers:
        values[layer.name] = network.get_submodule(layer.name)(*(values[name] for name in layer.inputs))
    return {name: value.numpy() for name, value in values.items()}


def _probe(
    layer: Layer, values: NDArray[np.float32]
) -> tuple[list[Layer], dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Layers that end a network after `layer`, their tensors and ranges, and their output for its `values`."""
    probe = Layer(
        name="probe", kind="linear", inputs=(layer.name,), in_channels=layer.out_channels, out_channels=NUM_PROBES,
        in_size=1, bias=True,
    )  # fmt: skip
    pool = replace(
        probe,
        name="probe.pool",
        kind="global_pool",
        in_size=layer.out_size,
        out_channels=layer.out_channels,
        bias=False,
    )
    pooled = values.mean((2, 3))
    layers = [probe] if layer.out_size == 1 else [pool, replace(probe, inputs=(pool.name,))]
    weight = np.random.default_rng(0).standard_normal((NUM_PROBES, layer.out_channels), dtype=np.float32)
    expected = pooled @ weight.T
    tensors = {
        "probe.weight": weight,
        "probe.bias": np.zeros(NUM_PROBES, dtype=np.float32),
        "probe.pool.range": _range(pooled),
        "probe.range": _range(expected),
    }
    return layers, tensors, expected


def _range(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array([values.min(), values.max()], dtype=np.float32)
