"""`hwnas train` and `hwnas data`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hwnas.cli.base import JSON, RUN, command, finish, next_line, notice, parse_changes, table
from hwnas.errors import InputError

if TYPE_CHECKING:
    from hwnas.run import RunConfig
    from hwnas.training.plan import Plan


@command(
    RUN,
    click.option("--data", metavar="NAME|FOLDER", help="A data set's name, or a folder of images."),
    click.option("--space", metavar="NAME|FILE", help="A space's name or YAML file [default: tiny]."),
    click.option("--recipe", default="short", show_default=True, help="short, bignas, sgd_cosine or alphanet."),
    click.option("--config", metavar="FILE", help="YAML with the keys of -o."),
    click.option("-o", "pairs", multiple=True, metavar="KEY=VALUE", help="train.<key>, data.<key> or space.<key>."),
    click.option("--dry-run", is_flag=True, help="Only print the configuration, and time and memory it takes here."),
    JSON,
)
def train(
    run: str | None,
    data: str | None,
    space: str | None,
    recipe: str,
    config: str | None,
    pairs: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a supernet, or go on with an interrupted training.

    On several GPUs: torchrun --nproc-per-node 8 -m hwnas train --run-folder ... (torchrun keeps --run for itself).
    """
    from hwnas import api
    from hwnas.config import read_json
    from hwnas.machine import torchrun_ranks
    from hwnas.progress import reporting

    first = torchrun_ranks()[0] == 0  # of torchrun's processes, the one that talks
    changes = parse_changes(pairs, config)
    if dry_run:
        resolved, plan = api.plan(run, data=data, space=space, recipe=recipe, changes=changes, notice=notice)
        if first:
            _show_plan(resolved, plan, as_json)
        return
    with reporting("train", quiet=not first) as (report,):
        trained = api.train(run, data=data, space=space, recipe=recipe, changes=changes, report=report, notice=notice)
    if not first:
        return
    evaluations = read_json(trained.path / "training.json")["evaluations"]
    last = {one["child"]: one for one in evaluations}
    rows = [
        [name, f"{one['epoch']:.2f}", f"{one['accuracy']:.2%}", f"{one['loss']:.3f}", one["num_images"]]
        for name, one in last.items()
    ]
    document = {"run": str(trained.path), "space": trained.space.name, "evaluations": evaluations}
    shown = [table("trained", ["child", "epoch", "validation", "loss", "images"], rows)] if rows else []
    done = f"trained: {trained.path / 'supernet.safetensors'}"
    finish(as_json, document, *shown, done, next_line("profile", trained.path, "--device", "cpu"))


def _show_plan(config: RunConfig, plan: Plan, as_json: bool) -> None:
    import yaml

    document = {**config.to_dict(), "plan": plan.to_dict()}
    hours = plan.total_s / 3600
    total = f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
    total = f"{plan.total_s / 60:.1f} min" if hours < 1 else total
    where = plan.device + (f", {plan.threads} threads" if plan.device == "cpu" else "")
    rows = [
        ["on", where + (f", {plan.num_processes} processes" if plan.num_processes > 1 else "")],
        ["a step", f"{plan.step_s * 1e3:.1f} ms ({plan.loading_s * 1e3:.1f} ms of it waiting for images), "
                   f"{plan.images_per_s:.0f} images/s"],
        ["an evaluation", f"{plan.evaluation_s:.1f} s" if plan.num_evaluations else "none"],
        ["peak memory", f"{plan.peak_memory_mb:.0f} MiB"],
        ["the whole", f"{plan.num_steps} steps and {plan.num_evaluations} evaluations: {total}"],
    ]  # fmt: skip
    lines = yaml.safe_dump(config.to_dict()["train"], sort_keys=False, width=110).rstrip()
    finish(as_json, document, f"train:\n{lines}", table("cost", ["", ""], rows))


@command(
    RUN,
    click.argument("data", metavar="NAME|FOLDER"),
    click.option("--check", is_flag=True, help="Decode every image, and name those that cannot be read."),
    JSON,
)
def data(run: str | None, data: str, check: bool, as_json: bool) -> None:
    """Show a data set: parts, classes, preprocessing; perhaps its damaged images."""
    from hwnas import api
    from hwnas.progress import reporting
    from hwnas.run import Run

    with reporting("check", quiet=not check) as (report,):
        found = api.inspect_data(data, Run.locate(run) / "cache", check=check, report=report, notice=notice)
    rows = [[name, part["images"], part["rarest_class"]] for name, part in found["splits"].items()]
    classes = found["classes"]
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    finish(
        as_json,
        found,
        table(found["name"], ["part", "images", "of the rarest class"], rows),
        f"{len(classes)} classes: {shown}",
        f"preprocessing: {found['preprocessing']}",
    )
    if found["unreadable"]:
        for line in found["unreadable"]:
            notice(line)
        raise InputError(f"{len(found['unreadable'])} images cannot be read: replace or remove them")
