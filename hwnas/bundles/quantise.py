"""int8: the ranges of a network's values, and which blocks should stay in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwnas.errors import ExportError
from hwnas.exporters.base import Exporter
from hwnas.layers import IMAGE, Layer
from hwnas.network import ACTIVATIONS, Network, function, run


@torch.inference_mode()
def value_ranges(network: Network, batches: Iterable[Tensor]) -> dict[str, NDArray[np.float32]]:
    """Between which values a network's image, layers, and layers before their activation lie.

    The least and the greatest value of each batch, averaged over the batches: single images with values far from all
    others would coarsen the steps of everything (Jacob et al., arXiv 1712.05877, section 3.1, smooth ranges likewise).

    Args:
        network: calibrated, in evaluation mode.
        batches: normalised images (n, in_channels, resolution, resolution), of the calibration split.

    Returns:
        `image.range`, `{layer}.range`, `{layer}.preactivation.range`, (2,) each: see `Exporter.write`.
    """
    state, sums, count = network.state_dict(), dict[str, Tensor](), 0

    def note(name: str, values: Tensor) -> Tensor:
        extremes = torch.stack([values.min(), values.max()]).double()
        sums[f"{name}.range"] = sums.get(f"{name}.range", 0) + extremes
        return values

    def call(layer: Layer, *inputs: Tensor) -> Tensor:
        if not layer.activation:
            return note(layer.name, function(layer, state, False, *inputs))
        before = function(replace(layer, activation=None), state, False, *inputs)
        note(f"{layer.name}.preactivation", before)
        return note(layer.name, ACTIVATIONS[layer.activation].function(before))

    for images in batches:
        run(network.layers, call, note(IMAGE, images))
        count += 1
    return {name: (total / count).float().cpu().numpy() for name, total in sums.items()}


def within_drop(
    network: Network,
    tensors: Mapping[str, NDArray[Any]],
    whole: Exporter,
    images: NDArray[np.float32],
    accuracy: Callable[[Exporter, Path], float],
    least: float,
) -> tuple[Exporter, float]:
    """An int8 exporter whose file is accurate enough: blocks stay in float32 until it is, the most sensitive first.

    A block's sensitivity is the mean squared error of the logits that goes away when it alone stays in float32.

    Args:
        network: calibrated, in evaluation mode, on the CPU.
        tensors: see `Exporter.write`.
        whole: the exporter that keeps nothing in float32.
        images: for the sensitivities, (num_images, in_channels, resolution, resolution).
        accuracy: of a file, in its runtime.
        least: what `accuracy` has to be, 0 to 1.

    Returns:
        The exporter and the accuracy of its file.

    Raises:
        ExportError: the file loses too much, and it is none of int8, or of a format that cannot keep layers in float32.
    """
    with TemporaryDirectory() as folder:

        def write(keep: Iterable[str]) -> tuple[Exporter, Path]:
            writer = whole.but(keep=frozenset(keep))
            return writer, writer.write(network.layers, tensors, Path(folder) / f"model{writer.suffix}").path

        _, path = write(())
        found = accuracy(whole, path)
        if found >= least:
            return whole, found
        if not (whole.mixes and whole.precision.startswith("int8")):
            raise ExportError(
                f"the {whole.precision} {whole.format} file has a validation accuracy of {found:.2%}, under "
                f"the {least:.2%} that --max-accuracy-drop allows, and such files cannot keep layers in float32: "
                "nothing was written; allow more, or export fp32"
            )

        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()

        def error(names: Sequence[str]) -> float:
            writer, path = write(names)
            return float(((writer.infer(path, images) - expected) ** 2).mean())

        blocks = list(blocks_of(network.layers))
        errors = [error(names) for names in blocks]
        kept: list[str] = []
        for index in np.argsort(errors):
            kept += blocks[index]
            writer, path = write(kept)
            found = accuracy(writer, path)
            if found >= least:
                return writer, found
        return writer, found  # all in float32: as accurate as the network


def blocks_of(layers: Sequence[Layer]) -> Iterator[list[str]]:
    """The names of the layers of each block: `stage2.block1.*`; those outside the stages one by one."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        first, _, rest = layer.name.partition(".")
        block = f"{first}.{rest.partition('.')[0]}" if first.startswith("stage") else layer.name
        blocks.setdefault(block, []).append(layer.name)
    yield from blocks.values()
