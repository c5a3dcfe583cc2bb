"""BigNAS's claim, on Fashion-MNIST: children cut out of one supernet are as good as those trained by themselves.

For five children across the range: cut from the supernet, against the same child trained alone from scratch with the
same recipe, data and number of epochs, over several seeds and in trainings of several lengths; and each ingredient
changed in turn, in trainings of the first length. Every training keeps its checkpoints in --folder, so the benchmark
goes on where it was interrupted.

    python benchmarks/bignas_claim.py --folder /tmp/claim --epochs 2 8 --seeds 3 2 --workers 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from environment import heading

from hwnas.calibrate import evaluate
from hwnas.data import batches, load_dataset
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
FULL = "the recipe as it is"


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
    bignas = replace(config, schedule="exponential", final_lr=0.05)
    return {
        "without the sandwich rule (4 random children, labels)": replace(
            config, children=("random",) * 4, distillation="none"
        ),
        "without distillation (all from labels)": replace(config, distillation="none"),
        "with gamma-zero": replace(config, gamma_zero=True),
        "BigNAS's schedule, constant at 5% in the end": bignas,
        "the same without the constant ending": replace(bignas, final_lr=0.0),
        "weight decay 1e-5, as BigNAS": replace(config, weight_decay=1e-5),
        "regularising every child": replace(config, others=config.biggest),
    }


def supernet_job(space: SearchSpace, name: str, config: TrainConfig) -> Job:
    return Job(titled(name, config), space, config, children_of(space))


def single_job(space: SearchSpace, name: str, config: TrainConfig) -> Job:
    arch = children_of(space)[name]
    lone = replace(config, children=("biggest",), distillation="none")
    return Job(titled(f"alone: {name}", config), alone(space, arch), lone, {name: arch})


def titled(name: str, config: TrainConfig) -> str:
    return f"{name}, {config.epochs:g} epochs, seed {config.seed}"


def children_of(space: SearchSpace) -> dict[str, Architecture]:
    return {name: at(space, position) for name, position in POSITIONS.items()}


def jobs(space: SearchSpace, configs: list[TrainConfig]) -> Iterator[Job]:
    """The longest first, so that all workers end at about the same time; of `configs`, the first has ablations."""
    for config in sorted(configs, key=lambda config: -config.epochs):
        yield supernet_job(space, FULL, config)
    yield from (supernet_job(space, name, changed) for name, changed in ablations(configs[0]).items())
    for config in sorted(configs, key=lambda config: -config.epochs):
        yield from (single_job(space, name, config) for name in reversed(POSITIONS))


def run(job: Job, folder: Path) -> dict[str, float]:
    """Test accuracies of the job's children; trained and evaluated only if that was not done before."""
    torch.set_num_threads(1)
    here = folder / job.name.replace(" ", "_").replace(":", "")
    result = here / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    started = time.monotonic()
    data = load_dataset("fashion-mnist", cache=folder / "cache", notice=print)
    with reporting(job.name) as (report,):
        supernet = Trainer(job.space, data, job.config, here, print).run(report)
    evaluator = Evaluator(supernet, data, workers=1)
    scores = evaluator.scores(list(job.children.values()), "test")
    found = dict(zip(job.children, (score.accuracy for score in scores), strict=True))
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


def report(space: SearchSpace, found: dict[str, dict[str, float]], configs: list[TrainConfig]) -> list[str]:
    """The tables, in Markdown."""
    children = children_of(space)
    lines: list[str] = []
    for length, group in by_length(configs).items():
        several = f"mean ± standard deviation of {len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        lines += [
            f"{length:g} epochs of the `short` recipe; test accuracy in %, {several}:",
            "",
            "| child | MMACs | from the supernet | alone, from scratch | difference |",
            "|---|---|---|---|---|",
        ]
        for name, arch in children.items():
            cut, own = accuracies(found, name, group)
            macs = total_macs(lower(space, arch)) / 1e6
            difference = statistics.mean(cut) - statistics.mean(own)
            lines.append(f"| {name} | {macs:.2f} | {spread(cut)} | {spread(own)} | {difference:+.2f} |")
        lines.append("")
    first = configs[0]
    lines += [
        f"Ingredients changed in turn ({first.epochs:g} epochs, seed {first.seed}), test accuracy in %:",
        "",
        f"| | {' | '.join(children)} | mean |",
        f"|---|{'---|' * (len(children) + 1)}",
    ]
    base = found[titled(FULL, first)]
    rows = {FULL: base} | {name: found[titled(name, first)] for name in ablations(first)}
    rows["without calibration (the biggest child's statistics)"] = {n: base[f"{n} uncalibrated"] for n in children}
    for name, row in rows.items():
        values = [100 * row[child] for child in children]
        lines.append(f"| {name} | {' | '.join(f'{v:.2f}' for v in values)} | {statistics.mean(values):.2f} |")
    means = [
        f"{statistics.mean(100 * found[titled(FULL, config)][child] for child in children):.2f}"
        for config in by_length(configs)[first.epochs]
    ]
    lines += ["", f"Mean of the first row by seed: {', '.join(means)}. All other rows are one seed."]
    return lines


def by_length(configs: list[TrainConfig]) -> dict[float, list[TrainConfig]]:
    lengths = dict.fromkeys(config.epochs for config in configs)
    return {length: [config for config in configs if config.epochs == length] for length in lengths}


def accuracies(
    found: dict[str, dict[str, float]], child: str, group: list[TrainConfig]
) -> tuple[list[float], list[float]]:
    """Of a child cut from the supernet, and trained alone, by seed; in %."""
    cut = [100 * found[titled(FULL, config)][child] for config in group]
    return cut, [100 * found[titled(f"alone: {child}", config)][child] for config in group]


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def plot(space: SearchSpace, found: dict[str, dict[str, float]], configs: list[TrainConfig], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    children = children_of(space)
    macs = [total_macs(lower(space, arch)) / 1e6 for arch in children.values()]
    lengths = by_length(configs)
    figure, row = pyplot.subplots(
        1, len(lengths), figsize=(5.5 * len(lengths), 4.5), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (length, group) in zip(row[0], lengths.items(), strict=True):
        for index, label in enumerate(("cut from the supernet", "alone, from scratch")):
            values = [accuracies(found, name, group)[index] for name in children]
            mean = [statistics.mean(v) for v in values]
            least = [m - min(v) for m, v in zip(mean, values, strict=True)]
            most = [max(v) - m for m, v in zip(mean, values, strict=True)]
            axes.errorbar(macs, mean, yerr=[least, most], marker="o", capsize=4, label=label)
        axes.set(xscale="log", xlabel="million multiply-adds", title=f"Fashion-MNIST, {length:g} epochs")
        axes.set_xticks(macs, labels=[f"{name}\n{value:.2f}" for name, value in zip(children, macs, strict=True)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    row[0][0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for trainings; reused")
    parser.add_argument("--epochs", type=float, nargs="+", default=[2.0, 8.0], help="lengths of trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 2], help="of each length")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread, each with one training")
    arguments = parser.parse_args()
    data = load_dataset("fashion-mnist", cache=arguments.folder / "cache", notice=print)
    space = SearchSpace.load(ROOT / "examples" / "fashion-mnist.yaml", in_channels=1, num_classes=10)
    config = replace(short(), threads=1, evaluate_every=0.0, checkpoint_every_s=60.0)
    configs = [
        replace(config, epochs=epochs, seed=seed)
        for epochs, seeds in zip(arguments.epochs, arguments.seeds, strict=True)
        for seed in range(seeds)
    ]
    found = {}
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        work = partial(run, folder=arguments.folder)
        futures = {pool.submit(work, job): job.name for job in jobs(space, configs)}
        for future in as_completed(futures):
            name = futures[future]
            found[name] = future.result()
            print(name, {child: round(value, 4) for child, value in found[name].items()}, flush=True)
    minutes = sum(result["seconds"] for result in found.values()) / 60
    how = (
        f"all 60,000 images: {len(data.train)} to train on; {len(found)} trainings took {minutes:.0f} minutes of one "
        f"thread each, {arguments.workers} at a time"
    )
    tables = report(space, found, configs)
    lines = [*heading("BigNAS's claim on Fashion-MNIST", how), *tables, "", "![](bignas_claim.png)", ""]
    write_text(RESULTS / "bignas_claim.md", "\n".join(lines))
    plot(space, found, configs, RESULTS / "bignas_claim.png")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
