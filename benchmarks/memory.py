"""Peak activation memory as worked out from the layers, against the arena that LiteRT lays out for the same network.

    python benchmarks/memory.py --output benchmarks/results/memory.md

Children are written as TFLite files and opened with LiteRT's own kernels, without XNNPACK, whose memory LiteRT does not
tell. LiteRT's planner then gives every feature map its place in one arena; where each lies is asked of the interpreter,
and the arena's extent is compared with `peak_activation_bytes`. The planner is LiteRT's alone: nothing of the file says
what lives when.

LiteRT differs from what the layers alone tell in four ways, and the comparison is also made with these: it keeps the
image to the end, h-swish is an operator of its own, the symmetric padding of convolutions of stride 2 is one, too, and
large depthwise kernels are written in pieces.

The last column is how many architectures a second `LayerPeaks` costs from their genes, the median of 7 batches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from environment import heading
from scipy.stats import spearmanr

from hwnas.exporters.base import exporter, rings, write_random
from hwnas.layers import IMAGE, Layer, LayerPeaks, lower, peak_activation_bytes
from hwnas.space import Activation, SearchSpace

BATCH = 200_000
SPACES = ("bignas", "attentivenas", "ofa-mbv3", "tiny")


def arena_bytes(path: Path) -> int:
    """From where the first feature map starts to where the last one ends; weights lie in the file."""
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), num_threads=1, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    starts, ends = [], []
    for tensor in interpreter.get_tensor_details():
        if tensor["name"].endswith((".weight", ".bias")) or tensor["name"].startswith(
            ("axes", "padding.", "three", "sixth")
        ):
            continue
        values = interpreter.tensor(tensor["index"])()
        starts.append(values.__array_interface__["data"][0])
        ends.append(starts[-1] + values.nbytes)
    return max(ends) - min(starts)


LITERT_SPARE: dict[Activation, int] = {"swish": 1, "h-swish": 1}


def as_litert(layers: Sequence[Layer]) -> list[Layer]:
    """The same with paddings and pieces of large kernels as layers, and the image read at the end."""
    found: list[Layer] = []
    for layer in layers:
        spans = [max(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in rings(layer.kernel)]
        spans = spans if layer.depthwise else [layer.kernel]
        sums: tuple[str, ...] = ()  # of the pieces so far: every next one is added in place
        for number, span in enumerate(spans, 1):
            name = layer.name if number == len(spans) else f"{layer.name}.{number}"
            piece = replace(layer, name=name, inputs=(*layer.inputs, *sums), activation=None)
            total = max(0, (layer.out_size - 1) * layer.stride + span - layer.in_size)
            if layer.kind == "conv" and span // 2 != total // 2:
                size, channels = layer.in_size + total, layer.in_channels
                padded = Layer(
                    name=f"{name}.padded",
                    kind="add",
                    inputs=layer.inputs,
                    in_channels=channels,
                    out_channels=channels,
                    in_size=size,
                )
                found.append(padded)
                piece = replace(piece, inputs=(padded.name, *sums))
            found.append(replace(piece, activation=layer.activation) if name == layer.name else piece)
            sums = (name,)
    return [*found[:-1], replace(found[-1], inputs=(*found[-1].inputs, IMAGE))]


def measure(name: str, children: int) -> str:
    space, rng = SearchSpace.load(name), np.random.default_rng(0)
    archs = [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(children - 2))]
    writer = exporter("tflite")
    arenas, plain, alike = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            arenas.append(arena_bytes(write_random(writer, space, arch, Path(folder) / "child", rng)))
            plain.append(peak_activation_bytes(lower(space, arch)))
            alike.append(peak_activation_bytes(as_litert(lower(space, arch)), spare=LITERT_SPARE))
    peaks, genes, seconds = LayerPeaks(space), space.sample_genes(BATCH, rng), []
    assert np.array_equal(peaks(space.encode(archs)), plain)
    for _ in range(7):
        started = time.perf_counter()
        peaks(genes)
        seconds.append(time.perf_counter() - started)
    cells = [name, str(len(archs)), f"{min(arenas) / 1e6:.2f} to {max(arenas) / 1e6:.2f}"]
    for values in (plain, alike):
        ratios = np.array(arenas) / values
        cells += [
            f"{spearmanr(arenas, values).statistic:.4f}",
            f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})",
        ]
    cells.append(f"{BATCH / statistics.median(seconds):,.0f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--children", type=int, default=30, help="of each space")
    parser.add_argument("--output", type=Path, help="write the results there too")
    options = parser.parse_args()
    lines = heading(
        "Peak activation memory against LiteRT's arena",
        "smallest, biggest and random children, float32, one image; LiteRT's own kernels, without XNNPACK",
    )
    lines += [
        "Ratio: LiteRT's arena over `peak_activation_bytes`, median (least to greatest). As LiteRT: with the image",
        "kept, paddings, h-swish and pieces of large kernels as operators of their own.",
        "",
        "| space | children | arena, MB | Spearman | ratio | Spearman, as LiteRT | ratio, as LiteRT | a second |",
        "|---|---|---|---|---|---|---|---|",
        *(measure(name, options.children) for name in SPACES),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
