"""The sandwich step against its limit and against its naive form; times alternate in one run, medians.

(a) ours: `hwnas.training.Objective`, gradients of detached corners added into place;
(b) limit: the same four children as plain static networks, the same forward, loss and backward;
(c) naive: the supernet's views differentiated by autograd, which pads every gradient with zeros.

Peak memory is that of a process of its own for each, beyond what it takes once torch is loaded.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from environment import heading

from hwnas.files import write_text
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet
from hwnas.training.losses import soft_cross_entropy
from hwnas.training.objectives import Batch, Noise, Objective
from hwnas.training.processes import FlatGradients
from hwnas.training.recipes import Regularisation, short

ROOT = Path(__file__).parent.parent
WAYS = ("ours", "limit", "naive")
CASES = {"tiny": 32, "bignas": 16}  # batch sizes


@dataclass(frozen=True)
class Case:
    """A space, a batch and a precision."""

    name: str
    precision: str

    def space(self) -> SearchSpace:
        if self.name == "bignas":
            return SearchSpace.load("bignas", resolution=[128])
        return SearchSpace.load(ROOT / "examples" / "fashion-mnist.yaml", in_channels=1, num_classes=10)

    def step(self, way: str) -> Callable[[], list[float]]:
        """One step, without the update, of equal children on equal images."""
        space, size = self.space(), CASES[self.name]
        supernet = Supernet(space).to(memory_format=torch.channels_last).train()
        generator = torch.Generator().manual_seed(0)
        images = {
            r: torch.randn(size, space.in_channels, r, r, generator=generator).contiguous(
                memory_format=torch.channels_last
            )
            for r in space.resolution
        }
        labels = torch.randint(space.num_classes, (size,), generator=generator)
        config = replace(short(), biggest=Regularisation(), precision=self.precision)  # type: ignore[arg-type]
        if way == "ours":
            gradients = FlatGradients(supernet, extra=0)
            objective = Objective(space, config)
            batch = Batch(images.__getitem__, labels, Noise(generator, size, slice(0, size)))

            def ours() -> list[float]:
                gradients.flat.zero_()
                return objective(supernet, batch, np.random.default_rng(0))[1].tolist()

            return ours
        rng = np.random.default_rng(0)
        children = [space.largest(), space.smallest(), space.sample(rng), space.sample(rng)]

        def autocast() -> AbstractContextManager[object]:
            return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext()

        if way == "limit":
            networks = [supernet.child(arch).to(memory_format=torch.channels_last) for arch in children]
            forwards: list[Callable[[torch.Tensor], torch.Tensor]] = list(networks)
            clear = [network.zero_grad for network in networks]
        else:
            forwards = [lambda image, arch=arch: supernet(image, arch) for arch in children]  # type: ignore[misc]
            clear = [supernet.zero_grad]

        def plain() -> list[float]:
            for each in clear:
                each(set_to_none=True)
            teacher, losses = None, []
            for arch, forward in zip(children, forwards, strict=True):
                with autocast():
                    logits = forward(images[arch.resolution])
                logits = logits.float()
                loss = F.cross_entropy(logits, labels) if teacher is None else soft_cross_entropy(logits, teacher)
                loss.backward()
                teacher = logits.detach() if teacher is None else teacher
                losses.append(loss.detach())
            return torch.stack(losses).tolist()

        return plain


def peak_mb(case: Case, way: str) -> float:
    """Of a fresh process."""
    command = [sys.executable, __file__, "--memory", case.name, case.precision, way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(name: str, precision: str, way: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak: a process inherits its parent's
    before = resident_mb("VmHWM")
    step = Case(name, precision).step(way)
    for _ in range(3):
        step()
    print(resident_mb("VmHWM") - before)


def resident_mb(name: str) -> float:
    """VmRSS, or VmHWM, the peak of it, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        measure_memory(*arguments.memory)
        return
    how = f"{arguments.threads} thread, medians of {arguments.rounds} rounds in turn; MiB beyond the loaded libraries"
    lines = [
        *heading("A sandwich step: four children, forward, loss and backward", how),
        "| space | precision | ours ms | limit ms | naive ms | ours / limit | naive / limit | ours MiB | limit MiB "
        "| naive MiB | memory ours / limit |",
        "|" + "---|" * 11,
    ]
    for name in CASES:
        for precision in ("fp32", "bf16"):
            case = Case(name, precision)
            steps = {way: case.step(way) for way in WAYS}
            first = {way: step() for way, step in steps.items()}
            assert np.allclose(first["ours"], first["limit"], rtol=1e-2), first  # they do compute the same
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(arguments.rounds + 1):
                for way, step in steps.items():
                    started = time.perf_counter()
                    step()
                    if number:
                        times[way].append(time.perf_counter() - started)
            ms = {way: 1e3 * statistics.median(times[way]) for way in WAYS}
            del steps
            mb = {way: peak_mb(case, way) for way in WAYS}
            cells = [name, precision, *(f"{ms[way]:.1f}" for way in WAYS)]
            cells += [f"{ms['ours'] / ms['limit']:.3f}", f"{ms['naive'] / ms['limit']:.3f}"]
            cells += [*(f"{mb[way]:.0f}" for way in WAYS), f"{mb['ours'] / mb['limit']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(json.dumps({"case": [name, precision], "ms": ms, "MiB": mb}), flush=True)
    text = "\n".join(lines) + "\n"
    write_text(ROOT / "benchmarks" / "results" / "train_step.md", text)
    print(text)


if __name__ == "__main__":
    main()
