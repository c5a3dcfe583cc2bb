"""Children evaluated a minute, and whether accuracies are those of the first version.

    python benchmarks/evaluate.py [--run demo-run]

On the demo's data and space: calibration on 1,024 images, evaluation on 5,000. Both versions run in this process, in
turns on the same few children; each turn is one figure. Where other programs compute, two threads on one child wait for
each other: compare with one thread then. The supernet is that of a run folder, or a fresh one with
noise on its weights: what a child takes does not depend on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from environment import heading
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hwnas import __version__
from hwnas.data import Dataset, Split, load_dataset, resize
from hwnas.evaluator import EvaluationProtocol, Evaluator
from hwnas.layers import total_macs
from hwnas.network import batch_norms
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store
from hwnas.supernet import WEIGHTS, Supernet

DEMO = Path(__file__).parent.parent / "examples" / "fashion-mnist.yaml"
TURN = 8  # children
SIDE = 1024  # of the matrices whose product is timed


class FirstVersion:
    """What commit abffa04 did: one child after the other as a module, with torch's own threads."""

    def __init__(self, supernet: Supernet, data: Dataset) -> None:
        self.supernet, self.data = supernet, data
        self.protocol = EvaluationProtocol()
        self._resized: dict[tuple[Split, int], Tensor] = {}

    def batches(self, split: Split, resolution: int) -> Iterator[tuple[Tensor, Tensor]]:
        if (split, resolution) not in self._resized:
            pixels = split.load(torch.arange(len(split)))
            self._resized[split, resolution] = resize(pixels, resolution, split.preprocessing)
        size = self.protocol.batch_size
        for image, labels in zip(self._resized[split, resolution].split(size), split.labels.split(size), strict=True):
            yield image.contiguous(memory_format=torch.channels_last), labels

    @torch.no_grad()
    def accuracy(self, arch: Architecture) -> float:
        child = self.supernet.child(arch).to(memory_format=torch.channels_last)
        for norm in batch_norms(child):
            norm.reset_running_stats()
            norm.momentum = None
        child.train()
        count = self.protocol.calibration_images // self.protocol.batch_size
        for image, _ in islice(self.batches(self.data.calibration, arch.resolution), count):
            child(image)
        child.eval()
        correct = 0
        for image, labels in self.batches(self.data.validation, arch.resolution):
            logits = child(image)
            correct += int((logits.argmax(1) == labels).sum())
            float(F.cross_entropy(logits, labels, reduction="sum"))
        return correct / len(self.data.validation)


def open_supernet(run: Path | None) -> Supernet:
    if run is not None:
        return Supernet.load(run / WEIGHTS)
    supernet = Supernet(SearchSpace.load(DEMO, in_channels=1, num_classes=10))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return supernet.to(memory_format=torch.channels_last).eval()


def evaluate(supernet: Supernet, data: Dataset, archs: Sequence[Architecture], folder: Path) -> list[str]:
    first, now = FirstVersion(supernet, data), Evaluator(supernet, data, cache=folder / "prepared")
    threads = torch.get_num_threads()

    def in_one_thread(group: Sequence[Architecture], store: Store) -> list[float]:
        torch.set_num_threads(1)
        found = [first.accuracy(arch) for arch in group]
        torch.set_num_threads(threads)
        return found

    ways = {
        f"first version, {threads} threads": lambda group, store: [first.accuracy(a) for a in group],
        "first version, 1 thread": in_one_thread,
        "now, one at a time": lambda group, store: [now.accuracy(a, store) for a in group],
        f"now, {now.at_once} at a time, as search does": lambda group, store: [
            accuracy
            for start in range(0, len(group), now.at_once)
            for accuracy in now.accuracies(group[start : start + now.at_once], store)
        ],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    groups = [archs[start : start + TURN] for start in range(0, len(archs), TURN)]
    for resolution in supernet.space.resolution:  # images are prepared, and what torch compiles is compiled
        arch = next(arch for arch in archs if arch.resolution == resolution)
        for number, work in enumerate(ways.values()):
            with Store(folder / f"warm{number}-{resolution}.db") as store:
                work([arch], store)
    for turn, group in enumerate(groups):
        for way, work in ways.items():
            with Store(folder / f"{len(seconds[way])}-{len(way)}.db") as store:  # nothing known yet
                started = time.perf_counter()
                accuracies = work(group, store)
                seconds[way].append((time.perf_counter() - started) / len(group))
            found[way] += accuracies
        print(f"turn {turn + 1} of {len(groups)}: " + ", ".join(f"{s[-1]:.2f} s" for s in seconds.values()), flush=True)
    base, *_, last = ways
    ratios = {way: statistics.median(a / b for a, b in zip(seconds[base], seconds[way], strict=True)) for way in ways}
    lines = [
        "| | children a minute | seconds a child, quartiles | times the first version (median of turns) |",
        "|---|---|---|---|",
    ]
    for way, taken in seconds.items():
        low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75])
        lines.append(f"| {way} | {60 / middle:.0f} | {low:.3f}, {middle:.3f}, {high:.3f} | {ratios[way]:.1f} |")
    num_images = len(data.validation)
    correct = [[round(num_images * accuracy) for accuracy in found[way]] for way in (base, last)]
    off = [abs(a - b) for a, b in zip(*correct, strict=True)]
    accuracies = sorted(found[base])
    lines += [
        "",
        f"- accuracies of {len(archs)} children, {accuracies[0]:.2%} to {accuracies[-1]:.2%}: the same number of "
        f"{num_images:,} images right for {off.count(0)}; the others differ by at most {max(off)}",
        arithmetic_alone(supernet, data, now.protocol, archs, 60 / statistics.median(seconds[base])),
        f"- load when it began {LOAD[0]:.2f}, when it ended {os.getloadavg()[0]:.2f} (itself included)",
    ]
    return lines


def arithmetic_alone(
    supernet: Supernet, data: Dataset, protocol: EvaluationProtocol, archs: Sequence[Architecture], base: float
) -> str:
    """What the children's multiply-adds alone would allow at the speed of a large matrix product, as a bound.

    Args:
        base: children a minute of the first version.
    """
    macs_per_s = torch.get_num_threads() * max(product(torch_product()), product(onnxruntime_product()))
    macs = statistics.mean(total_macs(supernet.lower(arch)) for arch in archs)
    num_images = protocol.calibration_images + len(data.validation)
    most = 60 * macs_per_s / (macs * num_images)
    return (
        f"- a child has {macs / 1e6:.2f} million multiply-adds an image, and {num_images:,} images: at the speed of a "
        f"matrix product of {SIDE} ({macs_per_s / 1e9:.0f} billion a second on {torch.get_num_threads()} processors, "
        "the faster of torch's and onnxruntime's) these alone would allow "
        f"{most:.0f} children a minute, {most / base:.1f} times the first version"
    )


def product(multiply: Callable[[], object]) -> float:
    """Multiply-adds a second of a product of matrices of `SIDE`, median."""
    multiply()
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        multiply()
        taken.append(time.perf_counter() - started)
    return SIDE**3 / statistics.median(taken)


def torch_product() -> Callable[[], object]:
    left, right = torch.randn(2, SIDE, SIDE)

    def multiply() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        left @ right
        torch.set_num_threads(threads)

    return multiply


def onnxruntime_product() -> Callable[[], object]:
    left, right = np.random.default_rng(0).standard_normal((2, SIDE, SIDE), dtype=np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in ("left", "out")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["left", "right"], ["out"])], "product", ends[:1], ends[1:],
        [numpy_helper.from_array(right, "right")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="run folder with a trained supernet of the demo's space")
    parser.add_argument("--children", type=int, default=40)
    parser.add_argument("--output", type=Path, help="write the results there too")
    options = parser.parse_args()
    LOAD = os.getloadavg()
    supernet = open_supernet(options.run)
    rng = np.random.default_rng(0)
    archs: dict[Architecture, None] = {}
    while len(archs) < options.children:
        archs[supernet.space.sample(rng)] = None
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset("fashion-mnist", cache=Path(folder), download=False)
        lines = heading(
            "Children evaluated a minute, Fashion-MNIST",
            f"hwnas {__version__}, medians over turns of {TURN} children, {options.children} in all",
        )
        lines += evaluate(supernet, data, list(archs), Path(folder))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
