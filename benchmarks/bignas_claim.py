"""BigNAS's claim, on Fashion-MNIST: children cut out of one supernet are as good as those trained by themselves.

For five children across the range: cut from the supernet, against the same child trained alone from scratch with the
same recipe, data and number of epochs, over several seeds; and each ingredient of BigNAS left out in turn. Every
training keeps its checkpoints in --folder, so the benchmark goes on where it was interrupted.

    python benchmarks/bignas_claim.py --folder /tmp/claim --epochs 2 --seeds 3 --workers 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from environment import heading

from hwnas.calibrate import evaluate
from hwnas.data import Dataset, batches, load_dataset
from hwnas.evaluator import Evaluator
from hwnas.files import write_text
from hwnas.layers import lower, total_macs
from hwnas.progress import reporting
from hwnas.space import Architecture, SearchSpace
from hwnas.supernet import Supernet, corner
from hwnas.training.recipes import TrainConfig, short
from hwnas.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
POSITIONS = {"smallest": 0.0, "small": 0.25, "middle": 0.5, "big": 0.75, "biggest": 1.0}
FULL = "all of BigNAS"


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    space: SearchSpace
    config: TrainConfig
    children: dict[str, Architecture]


def at(space: SearchSpace, position: float) -> Architecture:
    """The child at a relative position of every choice, from 0 (least) to 1 (greatest)."""
    return space.walk(lambda _name, choices: choices[round(position * (len(choices) - 1))])


def alone(space: SearchSpace, arch: Architecture) -> SearchSpace:
    """The space that holds only this child, whose blocks are equal within a stage."""
    content = space.to_dict()
    content["resolution"] = [arch.resolution]
    content["stem"]["width"], content["head"]["width"] = [arch.stem], [arch.head]
    for stage, found in zip(content["stages"], arch.stages, strict=True):
        (block,) = set(found.blocks)
        stage |= {"width": [found.width], "depth": [len(found.blocks)], "kernel": [block.kernel]}
        stage["expand"] = [block.expand]
    only = SearchSpace.from_dict(content)
    assert only.size() == 1
    assert only.largest() == arch
    return only


def ablations(config: TrainConfig) -> dict[str, TrainConfig]:
    return {
        "without the sandwich rule (4 random children, labels)": replace(
            config, children=("random",) * 4, distillation="none"
        ),
        "without distillation (all from labels)": replace(config, distillation="none"),
        "without gamma-zero": replace(config, gamma_zero=False),
        "without the constant ending": replace(config, final_lr=0.0),
        "regularising every child": replace(config, others=config.biggest),
    }


def jobs(space: SearchSpace, config: TrainConfig, seeds: int) -> Iterator[Job]:
    children = {name: at(space, position) for name, position in POSITIONS.items()}

    def supernet(name: str, config: TrainConfig) -> Job:
        return Job(f"{name}, seed {config.seed}", space, config, children)

    def single(name: str, seed: int) -> Job:
        own = alone(space, children[name])
        lone = replace(config, seed=seed, children=("biggest",), distillation="none")
        return Job(f"alone: {name}, seed {seed}", own, lone, {name: children[name]})

    for seed in range(seeds):
        yield supernet(FULL, replace(config, seed=seed))
        yield from (single(name, seed) for name in children)
        if seed == 0:
            yield from (supernet(name, changed) for name, changed in ablations(config).items())


def run(job: Job, data: Dataset, folder: Path) -> dict[str, float]:
    """Test accuracies of the job's children; trained and evaluated only if that was not done before."""
    here = folder / job.name.replace(" ", "_").replace(":", "")
    result = here / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    started = time.monotonic()
    with reporting(job.name) as (report,):
        supernet = Trainer(job.space, data, job.config, here, print).run(report)
    evaluator = Evaluator(supernet, data)
    found = {
        name: evaluator.score(evaluator.child(arch), arch, data.test).accuracy for name, arch in job.children.items()
    }
    if job.name.startswith(FULL):
        for name, arch in job.children.items():
            found[f"{name} uncalibrated"] = carried_over(evaluator, supernet, arch)
    found["seconds"] = time.monotonic() - started
    write_text(result, json.dumps(found))
    return found


def carried_over(evaluator: Evaluator, supernet: Supernet, arch: Architecture) -> float:
    """The test accuracy of a child that is not calibrated, but takes its part of the biggest child's statistics."""
    biggest = evaluator.child(supernet.space.largest())
    statistics_of = {name: buffer for name, buffer in biggest.named_buffers() if "running" in name}
    child = supernet.child(arch).eval()
    for name, buffer in child.named_buffers():
        if "running" in name:
            buffer.copy_(corner(statistics_of[name], buffer.shape))
    with torch.no_grad():
        return evaluate(child, batches(evaluator.data.test, 256, arch.resolution)).accuracy


def report(space: SearchSpace, found: dict[str, dict[str, float]], seeds: int, config: TrainConfig) -> str:
    """The tables, in Markdown."""
    children = {name: at(space, position) for name, position in POSITIONS.items()}
    lines = [
        f"{config.epochs:g} epochs of the `short` recipe with gamma-zero; test accuracy in %, mean ± standard "
        f"deviation of {seeds} seeds.",
        "",
        "| child | MMACs | from the supernet | alone, from scratch | difference |",
        "|---|---|---|---|---|",
    ]
    for name, arch in children.items():
        cut = [100 * found[f"{FULL}, seed {seed}"][name] for seed in range(seeds)]
        own = [100 * found[f"alone: {name}, seed {seed}"][name] for seed in range(seeds)]
        macs = total_macs(lower(space, arch)) / 1e6
        difference = statistics.mean(cut) - statistics.mean(own)
        lines.append(f"| {name} | {macs:.2f} | {spread(cut)} | {spread(own)} | {difference:+.2f} |")
    lines += [
        "",
        "Ingredients left out in turn (seed 0), test accuracy in %:",
        "",
        f"| | {' | '.join(children)} | mean |",
        f"|---|{'---|' * (len(children) + 1)}",
    ]
    rows = {FULL: found[f"{FULL}, seed 0"]}
    rows |= {name: found[f"{name}, seed 0"] for name in ablations(config)}
    base = found[f"{FULL}, seed 0"]
    rows["without calibration (the biggest child's statistics)"] = {n: base[f"{n} uncalibrated"] for n in children}
    for name, row in rows.items():
        values = [100 * row[child] for child in children]
        lines.append(f"| {name} | {' | '.join(f'{v:.2f}' for v in values)} | {statistics.mean(values):.2f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def plot(space: SearchSpace, found: dict[str, dict[str, float]], seeds: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(POSITIONS)
    macs = [total_macs(lower(space, at(space, position))) / 1e6 for position in POSITIONS.values()]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, key in (("cut from the supernet", FULL), ("alone, from scratch", None)):
        values = [
            [100 * found[f"{key}, seed {s}" if key else f"alone: {name}, seed {s}"][name] for s in range(seeds)]
            for name in names
        ]
        mean = [statistics.mean(v) for v in values]
        axes.errorbar(
            macs,
            mean,
            yerr=[
                [m - min(v) for m, v in zip(mean, values, strict=True)],
                [max(v) - m for m, v in zip(mean, values, strict=True)],
            ],
            marker="o",
            capsize=4,
            label=label,
        )
    axes.set(xscale="log", xlabel="million multiply-adds", ylabel="test accuracy, %", title="Fashion-MNIST")
    axes.set_xticks(macs, labels=[f"{name}\n{value:.2f}" for name, value in zip(names, macs, strict=True)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for trainings; reused")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread, each training its share")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.shard is None and arguments.workers > 1:
        command = [sys.executable, *sys.argv, "--shard"]
        shards = [subprocess.Popen([*command, str(shard)]) for shard in range(arguments.workers)]
        if any(code != 0 for code in [shard.wait() for shard in shards]):
            sys.exit("a training failed: the same command goes on")
    data = load_dataset("fashion-mnist", cache=arguments.folder / "cache", notice=print)
    space = SearchSpace.load(ROOT / "examples" / "fashion-mnist.yaml", in_channels=1, num_classes=10)
    config = replace(short(), gamma_zero=True, epochs=arguments.epochs, threads=1)
    config = replace(config, evaluate_every=0.0, checkpoint_every_s=60.0)
    found = {}
    for number, job in enumerate(jobs(space, config, arguments.seeds)):
        if arguments.shard not in (None, number % arguments.workers):
            continue
        found[job.name] = run(job, data, arguments.folder)
        print(job.name, {name: round(value, 4) for name, value in found[job.name].items()}, flush=True)
    if arguments.shard is not None:
        return
    tables = report(space, found, arguments.seeds, config)
    trained_s = sum(result["seconds"] for result in found.values())
    how = f"all 60,000 images: {len(data.train)} to train on; {len(found)} trainings took {trained_s / 60:.0f} minutes"
    lines = [*heading("BigNAS's claim on Fashion-MNIST", how), tables, "", "![](bignas_claim.png)", ""]
    write_text(RESULTS / "bignas_claim.md", "\n".join(lines))
    plot(space, found, arguments.seeds, RESULTS / "bignas_claim.png")
    print(tables)


if __name__ == "__main__":
    main()
