"""Depthwise kernels of 7x7 in XNNPACK, as one convolution and as the pieces that hwnas writes (`exporters.base.rings`).

    python benchmarks/large_kernels.py --output benchmarks/results/large_kernels.md

Single layers, and children of `ofa-mbv3` with kernels of 7 wherever it has them, in LiteRT and ExecuTorch on one
thread; int8 files all of integers, and as hwnas writes them, with these layers in float32. Every turn runs each file
once, so that they share whatever the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from environment import heading

from hwnas.exporters import executorch, tflite
from hwnas.exporters.base import exporter, random_tensors, rings
from hwnas.layers import IMAGE, Layer, lower
from hwnas.space import Architecture, SearchSpace

FORMATS = ("tflite", "executorch")
LAYERS = ((56, 96, 2), (28, 120, 1), (28, 240, 2), (14, 480, 1), (7, 960, 1))  # size, channels, stride


def whole(kernel: int) -> Iterator[tuple[slice, slice]]:
    yield slice(0, kernel), slice(0, kernel)


def one_layer(kernel: int, size: int, channels: int, stride: int) -> list[Layer]:
    """A depthwise convolution, behind a layer that makes its channels."""
    depthwise = Layer(
        name="depthwise", kind="conv", inputs=("stem",), in_channels=channels, out_channels=channels, in_size=size,
        kernel=kernel, stride=stride, groups=channels, bias=True,
    )  # fmt: skip
    stem = replace(depthwise, name="stem", inputs=(IMAGE,), in_channels=3, kernel=1, stride=1, groups=1)
    pool = replace(
        depthwise, name="pool", kind="global_pool", inputs=("depthwise",), in_size=depthwise.out_size, kernel=1,
        stride=1, groups=1, bias=False,
    )  # fmt: skip
    classes = replace(pool, name="classes", kind="linear", inputs=("pool",), out_channels=10, in_size=1, bias=True)
    return [stem, depthwise, pool, classes]


def milliseconds(
    files: dict[str, tuple[Sequence[Layer], Any]], format: str, turns: int, precision: str = "fp32"
) -> dict[str, float]:
    """Median of each file's runs; `files` gives its layers and how its large kernels are cut."""
    writer, rng = exporter(format, precision), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[], object]] = {}
        for number, (name, (layers, cut)) in enumerate(files.items()):
            path = Path(folder) / f"{number}{writer.suffix}"
            with (
                patch.object(tflite, "rings", cut),
                patch.object(executorch, "rings", cut),
                patch.object(type(writer), "in_rings", cut is rings),
            ):
                writer.write(layers, random_tensors(layers, rng), path)
            sides = (1, layers[0].in_size, layers[0].in_size, 3)
            image = rng.standard_normal(sides, dtype=np.float32)
            if writer.takes.layout == "NCHW":
                image = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
            runs[name] = partial(writer.load(path), image)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns + 3):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def layers_table(turns: int) -> list[str]:
    lines = [
        "| format | layer | 5x5, ms | 7x7 whole, ms | 7x7 in pieces, ms | whole / pieces |",
        "|---|---|---|---|---|---|",
    ]
    for format in FORMATS:
        for size, channels, stride in LAYERS:
            found = milliseconds(
                {
                    "5": (one_layer(5, size, channels, stride), rings),
                    "whole": (one_layer(7, size, channels, stride), whole),
                    "pieces": (one_layer(7, size, channels, stride), rings),
                    "1": (one_layer(1, size, channels, stride), rings),
                },
                format,
                turns,
            )
            # what stands around the layer is taken off: it is there with a kernel of 1, too
            five, one, three = (found[name] - found["1"] for name in ("5", "whole", "pieces"))
            layer = f"{size}x{size}, {channels} channels, stride {stride}"
            lines.append(f"| {format} | {layer} | {five:.3f} | {one:.3f} | {three:.3f} | {one / three:.1f} |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def with_kernels_of_7(space: SearchSpace, arch: Architecture) -> Architecture:
    """The same child with kernels of 7 in every block that can have one."""
    stages = tuple(
        replace(
            stage,
            blocks=tuple(replace(block, kernel=7 if 7 in spec.kernel else block.kernel) for block in stage.blocks),
        )
        for spec, stage in zip(space.stages, arch.stages, strict=True)
    )
    return space.check(replace(arch, stages=stages))


def children_table(turns: int) -> list[str]:
    lines = [
        "| format | precision | child | whole, ms | in pieces, ms | whole / pieces |",
        "|---|---|---|---|---|---|",
    ]
    space = SearchSpace.load("ofa-mbv3")
    for format in FORMATS:
        for precision in ("fp32", "int8"):
            for child, arch in (("smallest", space.smallest()), ("biggest", space.largest())):
                arch = with_kernels_of_7(space, arch)
                layers = lower(space, arch)
                found = milliseconds({"whole": (layers, whole), "pieces": (layers, rings)}, format, turns, precision)
                one, three = found["whole"], found["pieces"]
                lines.append(
                    f"| {format} | {precision} | {child}, {arch.resolution} px | {one:.2f} | {three:.2f} "
                    f"| {one / three:.1f} |"
                )
                print(lines[-1], flush=True)
    return [*lines, ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the results there too")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    how = f"medians of {options.turns} turns, one thread; load when it began {load:.2f}"
    text = heading("Large depthwise kernels in XNNPACK", how)
    text += ["Of single layers, without what a kernel of 1x1 in their place takes:", "", *layers_table(options.turns)]
    text += [
        "Of children of `ofa-mbv3` with kernels of 7; int8 in pieces is with these layers in float32:",
        "",
        *children_table(options.turns),
    ]
    if options.output is not None:
        options.output.write_text("\n".join(text), encoding="utf-8")
