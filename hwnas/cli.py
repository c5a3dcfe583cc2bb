"""The command line: a table of commands, each a thin layer over a function of `hwnas.api`.

Every command takes `--json` (one document on stdout, everything else on stderr) and ends with what it made and the
next command to run. Exit codes: 0 done, 1 bug, 2 wrong input, 3 limit not satisfiable, 4 device unavailable,
5 export failed its parity check.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from hwnas.errors import DeviceError, HwnasError, InputError, printable

if TYPE_CHECKING:
    from rich.table import Table

    from hwnas.api import Profile
    from hwnas.run import RunConfig
    from hwnas.searching.limits import Limit
    from hwnas.searching.portfolio import Portfolio
    from hwnas.searching.result import Candidate, Result, Source
    from hwnas.training.plan import Plan

# Under torchrun, which takes --run for an abbreviation of its own --run-path, the long form is needed.
RUN = click.option("--run", "--run-folder", "run", metavar="FOLDER", help="Run folder [default: $HWNAS_RUN, or ./run].")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
DEVICE = click.option("--device", metavar="NAME", required=True, help="A device's name or file: see `hwnas devices`.")
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all chance.")

DISTURBED = 0.5  # share of children from which the reference may never have been seen at its usual speed
BUSY = 0.3  # processors kept busy by others, from which latencies are off by more than repeating them shows


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hwnas")
def cli() -> None:
    """One training run, the right network for every device."""


def command(*options: Callable[..., Any], group: click.Group = cli) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with some options."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        for option in reversed(options):
            function = option(function)
        return group.command()(function)

    return decorate


def count(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    """The value of an option that takes `600M`, `0.6G`, `500k` or `6e8`."""
    if text is None:
        return None
    factor = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:])
    try:
        return float(text) if factor is None else factor * float(text[:-1])
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number such as 600M, 0.6G or 6e8") from None


def limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all limits; the function gets them as `devices`, a tuple of names, and `limits`, one of `Limit`s.

    `--latency-ms` and `--energy-mj` are given once for each `--device`, in the same order, or once for all of them.
    Limits on devices come first, those of the first device before those of the second.
    """

    @wraps(function)
    def with_limits(
        *args: Any,
        devices: tuple[str, ...],
        latency_ms: tuple[float, ...],
        energy_mj: tuple[float, ...],
        max_macs: float | None,
        max_params: float | None,
        max_size_mb: float | None,
        max_memory_mb: float | None,
        **options: Any,
    ) -> Any:
        from hwnas.searching import limits as kinds

        on_devices = [
            *(kinds.LatencyLimit(*pair) for pair in _per_device("--latency-ms", latency_ms, devices)),
            *(kinds.EnergyLimit(*pair) for pair in _per_device("--energy-mj", energy_mj, devices)),
        ]
        on_devices.sort(key=lambda limit: devices.index(limit.device))
        on_layers: dict[Callable[[float], kinds.Limit], float | None] = {
            kinds.MacsLimit: max_macs,
            kinds.ParamsLimit: max_params,
            kinds.SizeLimit: max_size_mb,
            kinds.MemoryLimit: max_memory_mb,
        }
        limits = (*on_devices, *(kind(bound) for kind, bound in on_layers.items() if bound is not None))
        return function(*args, devices=devices, limits=limits, **options)

    for option in reversed((
        click.option("--device", "devices", metavar="NAME", multiple=True, help="See `hwnas devices`. May repeat."),
        click.option("--latency-ms", type=float, multiple=True, help="At most so long: one, or one for each --device."),
        click.option("--energy-mj", type=float, multiple=True, help="At most so many millijoules; likewise."),
        click.option("--max-macs", metavar="COUNT", callback=count, help="Multiply-adds, at most: 600M."),
        click.option("--max-params", metavar="COUNT", callback=count, help="Parameters, at most: 5M."),
        click.option("--max-size-mb", type=float, help="Of the ONNX file in float32, at most (10^6 bytes)."),
        click.option("--max-memory-mb", type=float, help="Of float32 activations at any time, at most (10^6 bytes)."),
    )):  # fmt: skip
        with_limits = option(with_limits)
    return with_limits


def _per_device(option: str, bounds: Sequence[float], devices: Sequence[str]) -> Iterator[tuple[str, float]]:
    if len(set(devices)) < len(devices):
        raise InputError(f"--device {' --device '.join(devices)}: name each device once")
    if bounds and not devices:
        raise InputError(f"{option} {bounds[0]:g}: on which device? Name it with --device")
    if len(bounds) not in (0, 1, len(devices)):
        raise InputError(
            f"{option} is given {len(bounds)} times, --device {len(devices)} times: give one for each device, in the "
            "same order, or one for all"
        )
    return zip(devices, list(bounds) * (len(devices) if len(bounds) == 1 else 1), strict=False)


def notice(text: str) -> None:
    """Tell the user, beside the result."""
    click.echo(printable(text), err=True)


def finish(as_json: bool, document: dict[str, Any], *show: Table | str) -> None:
    """The end of a command: the document, or the tables and lines for people."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console

    # In a file or a pipe nothing is wrapped; a terminal folds what is too wide for it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for item in show:
        console.print(item, soft_wrap=isinstance(item, str), markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table for people; numbers to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        numbers = all(re.fullmatch(r"[-\d.,%±\s]*", str(row[index])) for row in rows)
        made.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


def parse_changes(pairs: Sequence[str], config: str | None) -> dict[str, Any]:
    """`("train.lr=0.1",)`, and a YAML file of the same keys, as a dict; a pair overrides the file."""
    import yaml

    from hwnas.config import read_yaml

    changes: dict[str, Any] = {}
    if config is not None:
        from pathlib import Path

        content, _ = read_yaml(Path(config))
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise InputError(f"{config}: a configuration has the keys train, data and space, each with keys below it")
        changes = {f"{part}.{key}": value for part, keys in content.items() for key, value in keys.items()}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"-o {pair}: write key=value, such as -o train.lr=0.1")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"-o {pair}: the value is not YAML") from None
    return changes


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


@command(
    RUN,
    click.option("--device", "devices", metavar="NAME", multiple=True, required=True,
                 help="A device's name or file: see `hwnas devices`. May repeat: all at the same time."),
    click.option("--children", default=60, show_default=True, help="Children to fit the predictor to."),
    click.option("--holdout", default=0, show_default=True, help="Fresh random children to test it on."),
    click.option("--space", metavar="NAME|FILE", help="To profile before training, in a new run folder."),
    click.option("--kind", default="auto", show_default=True, help="Kind of predictor."),
    SEED,
    JSON,
)  # fmt: skip
def profile(
    run: str | None,
    devices: tuple[str, ...],
    children: int,
    holdout: int,
    space: str | None,
    kind: str,
    seed: int,
    as_json: bool,
) -> None:
    """Measure children on devices, and fit their latency predictors."""
    from hwnas import api
    from hwnas.progress import reporting

    with reporting(*(f"profile {device}" for device in devices)) as reports:
        made = api.profile_all(
            devices, run, children=children, holdout=holdout, space=space, kind=kind, seed=seed, reports=reports
        )
    profiles = [one for one in made if not isinstance(one, DeviceError)]
    errors = [one for one in made if isinstance(one, DeviceError)]
    if profiles:
        _show_profiles(profiles, run, as_json, devices[made.index(profiles[0])])
    for error in errors[:-1]:
        notice(f"hwnas: {error}")
    if errors:
        raise errors[-1]


@command(RUN, DEVICE, click.option("--kind", default="auto", show_default=True, help="Kind of predictor."), JSON)
def fit(run: str | None, device: str, kind: str, as_json: bool) -> None:
    """Fit a device's predictor anew to what was measured."""
    from hwnas import api

    _show_profiles([api.fit(device, run, kind=kind)], run, as_json, device)


def _show_profiles(profiles: Sequence[Profile], run: str | None, as_json: bool, device: str) -> None:
    from hwnas.run import Run

    columns = ["tested on", "children", "Spearman", "mean error", "within 5%", "within 10%", "in 90% interval"]
    shown: list[Table | str] = []
    for made in profiles:
        rows = [
            [name, r.num, f"{r.spearman:.3f}", f"{r.mape_pct:.1f}%", f"{r.within_5_pct:.0f}%",
             f"{r.within_10_pct:.0f}%", f"{r.coverage_90:.0f}%"]
            for name, r in (("cross-validation", made.cross_validation), ("held out", made.holdout))
            if r is not None
        ]  # fmt: skip
        counts = (
            f"{made.num_children} children fitted, {made.num_failed} failed, {made.num_rejected} rejected, "
            f"{made.num_unstable} of those used were disturbed"
        )
        shown += [
            table(f"latency predictor of {made.device} ({made.predictor.kind})", columns, rows),
            counts + (f"; {made.choice}" if made.choice else ""),
            f"a child: {made.write_s:.2g} s to write, {made.run_s:.2g} s to measure",
            f"predicted against measured: {made.plots[0]}",
        ]
        if made.energy is not None:
            shown.append("it tells its energy: a predictor of that was fitted, too; see --energy-mj of `hwnas search`")
        if made.others_busy is not None and made.others_busy > BUSY:
            notice(
                f"{made.device}: other programs kept {made.others_busy:.1f} processors busy meanwhile, which can shift "
                "latencies by some percent: end them and profile again where that matters"
            )
        elif made.num_unstable > DISTURBED * made.num_children:
            notice(
                f"{made.device}: was disturbed while most children were measured: they agree with each other, but all "
                "may be off by the same few percent: profile again at a quieter time where that matters"
            )
    document = profiles[0].to_dict() if len(profiles) == 1 else {"profiles": [made.to_dict() for made in profiles]}
    finish(
        as_json,
        document,
        *shown,
        next_line("search", Run.locate(run), "--device", device, "--latency-ms", "..."),
    )


@command(
    RUN,
    limit_options,
    click.option("--together", is_flag=True, help="One child for all the devices, not one for each."),
    click.option("--front", is_flag=True, help="The best child of every latency: the whole range, or up to the limit."),
    click.option("--strategy", default="guided", show_default=True,
                 help="guided, coarse-to-fine, evolution, nsga2, tpe or random."),
    click.option("--evaluations", default=100, show_default=True,
                 help="Children to evaluate; a fifth of it for each further device."),
    click.option("--confidence", default=0.95, show_default=True, help="With which an unmeasured child keeps limits."),
    click.option("--baseline/--no-baseline", default=True, show_default=True, help="Random search beside it."),
    click.option("--storage", metavar="URL", help="Database, to share it [default: $HWNAS_STORAGE, or the run's]."),
    click.option("--study", metavar="NAME", help="Workers that name the same study work on it together."),
    SEED,
    JSON,
)  # fmt: skip
def search(
    run: str | None,
    devices: tuple[str, ...],
    limits: tuple[Limit, ...],
    together: bool,
    front: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the most accurate child under limits: one for each device, and the fewest children that serve all.

    \b
    hwnas search --device pixel --latency-ms 20
    hwnas search --device pixel --latency-ms 20 --device jetson --latency-ms 5
    hwnas search --device pixel --device jetson --latency-ms 20 --together
    hwnas search --max-macs 600M
    hwnas search --device cpu --front
    """  # noqa: D301 - click's mark is the control character itself
    from hwnas import api
    from hwnas.progress import reporting

    for device in devices:
        if not front and device not in {limit.device for limit in limits}:
            raise InputError(f"--device {device}: give it a limit, such as --latency-ms 20, or look for its --front")
    if together and front and len(devices) > 1:
        raise InputError("--together looks for one child and --front for many: give one of them")
    with reporting(f"search {' '.join(devices)}".rstrip()) as (report,):
        options |= {"report": report, "notice": notice}
        if len(devices) < 2 or together:
            axis = next(iter([*devices, *(limit.kind for limit in limits)]), None) if front else None
            result = api.search(limits, run, front=axis, **options)
            _show_result(api.result_name(limits, axis), result, run, as_json)
            return
        questions = [[limit for limit in limits if limit.device in (None, device)] for device in devices]
        portfolio = api.search_all(questions, run, fronts=devices if front else (), **options)
    _show_portfolio(portfolio, run, as_json)


def _show_result(name: str, result: Result, run: str | None, as_json: bool) -> None:
    from hwnas.run import Run

    found = [("best", result.best), ("random search", result.random)]
    found += [("front", candidate) for candidate in result.front if candidate != result.best]
    candidates = [(name, candidate) for name, candidate in found if candidate is not None]
    columns = ["", "architecture", "validation", *_cost_columns(result.devices), "MMACs", "k params", "file MB"]
    if len(result.devices) == 1:
        columns[3:5] = ["predicted ms", "measured ms"]
    rows = [
        [name, c.architecture.describe(), f"{c.accuracy:.2%}", *_cost_cells(c, result.devices),
         f"{c.macs / 1e6:.2f}", f"{c.params / 1e3:.0f}", f"{(c.file_bytes or 0) / 1e6:.2f}"]
        for name, c in candidates
    ]  # fmt: skip
    known = f" and {result.num_known} known before" if result.num_known else ""
    title = f"{name}: {result.strategy}, {result.num_evaluations} evaluations{known}"
    where = Run.locate(run)
    finish(
        as_json,
        result.to_dict(),
        table(title, columns, rows),
        *_result_lines(result),
        f"result: {where / 'results' / f'{name}.json'}",
        next_line("export", where, "--format", "onnx", "--result", name),
    )


def _result_lines(result: Result) -> Iterator[str]:
    """What there is to say below a result's table."""
    for device, slope in result.slope.items():
        yield f"one more ms on {device} buys {slope.points_per_ms:+.2f} ± {slope.std:.2f} points"
    if not result.limits:
        areas = ", ".join(f"{strategy} {values[-1]:.4f}" for strategy, values in result.hypervolume.items())
        yield f"mean over all limits of the best accuracy (hypervolume): {areas}"
    for device, source in result.devices.items():
        if not source.measured:
            yield f"{device}: predicted, not measured, typical error {source.error_pct:.1f}%"


def _cost_columns(devices: Iterable[str]) -> list[str]:
    return [f"{word} ms on {name}" for name in devices for word in ("predicted", "measured")]


def _cost_cells(candidate: Candidate, devices: Mapping[str, Source]) -> list[str]:
    cells = []
    for name, source in devices.items():
        ms = candidate.latency[name]
        unmeasured = "-" if source.measured else "predicted only"
        cells += [f"{ms.predicted:.3f} ± {ms.std:.3f}", unmeasured if ms.measured is None else f"{ms.measured:.3f}"]
    return cells


def _show_portfolio(portfolio: Portfolio, run: str | None, as_json: bool) -> None:
    from hwnas.run import Run

    answers: list[list[object]] = []
    lines: list[str] = []
    for name, result in portfolio.results.items():
        best, random = result.best, result.random
        answers.append(
            [name, best.architecture.describe(), f"{best.accuracy:.2%}", "-" if random is None else
             f"{random.accuracy:.2%}", *_cost_cells(best, result.devices),
             result.num_evaluations, result.num_known]
        )  # fmt: skip
        lines += _result_lines(result)
    columns = ["", "architecture", "validation", "random search", "predicted ms", "measured ms", "evaluations", "known"]
    members = [
        [m.candidate.architecture.describe(), f"{m.candidate.accuracy:.2%}", f"{m.candidate.macs / 1e6:.2f}",
         name, f"{-100 * lost + 0.0:.2f}"]
        for m in portfolio.members
        for name, lost in m.serves.items()
    ]  # fmt: skip
    sure = "the fewest" if portfolio.exact else "the fewest that were found in time"
    title = f"portfolio: {sure} that serve all within {100 * portfolio.tolerance:g} points of the best"
    where = Run.locate(run)
    document = portfolio.to_dict() | {"results": {name: one.to_dict() for name, one in portfolio.results.items()}}
    finish(
        as_json,
        document,
        table("the best for each", columns, answers),
        table(title, ["child", "validation", "MMACs", "serves", "points"], members),
        *lines,
        f"results: {where / 'results'}",
        next_line("export", where, "--format", "onnx", "--result", next(iter(portfolio.results))),
    )


@command(
    RUN,
    click.option("--format", "formats", metavar="FORMAT", multiple=True,
                 help="Of the file [default: what the device takes, or onnx]. May repeat: a bundle each."),
    click.option("--precision", help="fp32, fp16, int8 [default: what the device takes, or fp32]."),
    click.option("--max-accuracy-drop", type=float, metavar="SHARE",
                 help="Of an int8 file on the validation images, 0.01 for a point: more stays in float32 until then."),
    click.option("--result", metavar="NAME", help="Of a search [default: the last one]."),
    click.option("--arch", metavar="smallest|biggest|FILE", help="A child of your own, in place of a search's."),
    click.option("--device", metavar="NAME", help="Measure the file there [default: the search's device]."),
    click.option("--output", metavar="FOLDER|ZIP", help="The bundle [default: in the run folder]."),
    JSON,
)  # fmt: skip
def export(
    run: str | None,
    formats: tuple[str, ...],
    precision: str | None,
    max_accuracy_drop: float | None,
    result: str | None,
    arch: str | None,
    device: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Write a child as a deployable bundle, checked against its parent."""
    from hwnas import api

    made = api.export_all(
        formats,
        run,
        precision=precision,
        max_accuracy_drop=max_accuracy_drop,
        result=result,
        arch=arch,
        device=device,
        output=output,
        notice=notice,
    )
    documents = [{"bundle": str(path), **manifest} for path, manifest in made]
    shown = [_show_bundle(path, manifest) for path, manifest in made]
    verify_it = "next: " + shlex.join(["hwnas", "verify", str(made[-1][0])])
    finish(as_json, documents[0] if len(made) == 1 else {"bundles": documents}, *shown, verify_it)


def _show_bundle(path: object, manifest: dict[str, Any]) -> Table:
    file, accuracy, parity, latency = (manifest[key] for key in ("file", "accuracy", "parity", "latency"))
    kept = f", {len(file['float32_layers'])} layers in float32" if file["float32_layers"] else ""
    ms = "not measured"
    if latency is not None and latency["measured_ms"] is None:
        ms = (
            f"{latency['predicted_ms']:.3f} ± {latency['std_ms']:.3f} ms predicted on {latency['device']}, not measured"
        )
    elif latency is not None:
        ms = f"{latency['measured_ms']:.3f} ms on {latency['device']}"
    rows = [
        ["bundle", str(path)],
        ["file", f"{file['name']}, {file['precision']}{kept} ({file['size_bytes']:,} bytes)"],
        ["architecture", manifest["architecture_text"]],
        ["accuracy", f"{accuracy['value']:.2%} of {accuracy['num_images']:,} {accuracy['split']} images"
                     f" (in {accuracy['computed_by']})"],
        ["parity", f"logits within {parity['max_abs_diff']:.1e} (correlation {parity['correlation']:.5f}), top class "
                   f"agrees on {parity['top1_agreement']:.0%} of {parity['num_images']} images"],
        ["latency", ms],
    ]  # fmt: skip
    return table(f"exported: {file['format']}", ["", ""], rows)


@command(click.argument("bundle", metavar="FOLDER|ZIP"), JSON)
def verify(bundle: str, as_json: bool) -> None:
    """Check a bundle: every file is as it was exported, and the network still computes the same."""
    from hwnas import api

    found = api.verify(bundle)
    manifest, parity = found["manifest"], found["parity"]
    files = manifest["files"]
    rows = [
        ["manifest", f"schema {manifest['schema']}, made by hwnas {manifest['versions']['hwnas']} on "
                     f"{manifest['created']}"],
        ["files", f"{len(files)} as exported ({sum(file['size_bytes'] for file in files):,} bytes)"],
        ["network", f"runs in {parity['runtime']}: logits within {parity['max_abs_diff']:.1e} of those at export, for "
                    f"{parity['num_images']} images"],
        ["sha256", f"{found['sha256']} (of {bundle}'s manifest.json: compare it with what its maker tells you)"],
    ]  # fmt: skip
    finish(as_json, found, table(f"verified: {bundle}", ["", ""], rows))


@command(
    RUN,
    DEVICE,
    click.option("--arch", "archs", multiple=True, required=True, metavar="smallest|biggest|FILE", help="May repeat."),
    click.option("--layers", is_flag=True, help="Also where the milliseconds go, layer by layer."),
    JSON,
)
def predict(run: str | None, device: str, archs: tuple[str, ...], layers: bool, as_json: bool) -> None:
    """Predict the latency of children on a device; perhaps where the milliseconds go."""
    from hwnas import api

    found = api.predict(device, archs, run, layers=layers)
    rows = [[name, f"{p['predicted_ms']:.4f}", f"{p['std_ms']:.4f}"] for name, p in zip(archs, found, strict=True)]
    columns = ["child", "predicted ms", "standard deviation"]
    shown: list[Table | str] = [table(f"on {device}", columns, rows)]
    if source := found[0]["source"]:
        shown.append(source)
    if layers:
        titles = (f"{name}: {p['architecture_text']}" for name, p in zip(archs, found, strict=True))
        shown += [_show_layers(title, p["layers"]) for title, p in zip(titles, found, strict=True)]
    finish(as_json, {"device": device, "predictions": found}, *shown)


def _show_layers(title: str, layers: Sequence[dict[str, Any]]) -> Table:
    """Each layer with its milliseconds, its share, and a bar as long as that."""
    total, most = sum(layer["ms"] for layer in layers), max(layer["ms"] for layer in layers)
    rows = []
    for layer in layers:
        what = layer["kind"].replace("_", " ")
        if layer["kind"] == "conv":
            what = f"{layer['kernel']}x{layer['kernel']}{' depthwise' if layer['groups'] > 1 else ''}"
        size = f"{layer['in_channels']} > {layer['out_channels']}, {layer['out_size']} px"
        bar = "█" * round(40 * layer["ms"] / most)
        rows.append([layer["name"], what, size, f"{layer['ms']:.4f}", f"{layer['ms'] / total:.1%}", bar])
    return table(title, ["layer", "", "channels", "ms", "share", ""], rows)


@command(
    RUN,
    click.option("--space", metavar="NAME|FILE", help="The space [default: the run's]."),
    click.option("--arch", required=True, metavar="smallest|biggest|FILE", help="The child."),
    JSON,
)
def cost(run: str | None, space: str | None, arch: str, as_json: bool) -> None:
    """Multiply-adds, parameters, memory, file size and layers of a child."""
    from hwnas import api

    document = api.cost(arch, space=space, run=run)
    rows = [
        [layer["name"], layer["kind"], layer["in_channels"], layer["out_channels"], layer["kernel"], layer["stride"],
         layer["in_size"], layer["out_size"], layer["macs"], layer["params"]]
        for layer in document["layers"]
    ]  # fmt: skip
    columns = ["layer", "kind", "in", "out", "kernel", "stride", "in px", "out px", "MACs", "params"]
    total = f"{document['macs'] / 1e6:,.2f} M MACs, {document['params'] / 1e6:,.3f} M parameters"
    outside = "" if document["in_space"] else f"; not a member of space {document['space']}"
    memory = (
        f"in float32: {document['peak_activation_bytes'] / 1e6:,.2f} MB of activations at their peak, "
        f"{document['onnx_file_bytes'] / 1e6:,.2f} MB as an ONNX file"
    )
    finish(as_json, document, table(document["architecture_text"], columns, rows), total + outside, memory)


@command(
    RUN,
    click.option("--space", metavar="NAME|FILE", help="The space [default: the run's]."),
    limit_options,
    click.option("--confidence", default=0.95, show_default=True, help="With which a predicted cost keeps its limit."),
    click.option("--samples", default=100_000, show_default=True, help="Random children to look at."),
    SEED,
    JSON,
)
def space(
    run: str | None,
    space: str | None,
    devices: tuple[str, ...],
    limits: tuple[Limit, ...],
    confidence: float,
    samples: int,
    seed: int,
    as_json: bool,
) -> None:
    """What the children of a space cost, and how many of them keep some limits."""
    from hwnas import api
    from hwnas.searching.limits import show_cost

    document = api.space_report(
        space, run, devices=devices, limits=limits, confidence=confidence, samples=samples, seed=seed
    )
    names = {"macs": "M MACs", "params": "M parameters", "size": "MB of ONNX file, float32",
             "memory": "MB of activations, float32", "latency": "ms", "energy": "mJ"}  # fmt: skip
    shown = ("0.1", "0.5", "0.9")
    rows: list[list[str]] = []
    for cost in document["costs"]:
        values = [cost["least"]["value"], *(cost["quantiles"][q] for q in shown), cost["greatest"]["value"]]
        factor = 1e6 if cost["kind"] in ("macs", "params") else 1
        name = names[cost["kind"]] + (f" on {cost['device']}" if cost["device"] else "")
        rows.append([name, *(f"{value / factor:.4g}" for value in values)])
    title = f"space {document['space']}: {document['size']:.3g} children, of which {samples:,} random ones"
    tables = [table(title, ["", "smallest", "10%", "median", "90%", "biggest"], rows)]
    kept = [
        [limit.describe(), *_show_share(share, f"the least is {show_cost(share['least'], limit.unit)}")]
        for limit, share in zip(limits, document["limits"], strict=True)
    ]
    if len(limits) > 1:
        kept.append(["all of them", *_show_share(document["all"], "no child found that keeps all")])
    if kept:
        tables.append(table("kept by", ["limit", "children", "95% interval"], kept))
    finish(as_json, document, *tables)


def _show_share(share: dict[str, Any], why_none: str) -> tuple[str, str]:
    if not share["possible"]:
        return "none", why_none
    return f"{share['share']:.2%}", f"{share['low']:.3%} to {share['high']:.3%}"


@command(
    RUN,
    click.option("--output", metavar="FILE", help="The page [default: report.html in the run folder]."),
    JSON,
)
def report(run: str | None, output: str | None, as_json: bool) -> None:
    """Write what a run found as one HTML page, and its plots as PNG and CSV."""
    from hwnas import api

    path, plots = api.report(run, output, notice=notice)
    lines = [f"report: {path}"]
    lines += [f"plots: {len(plots)} files in {plots[0].parent}"] if plots else []
    finish(as_json, {"report": str(path), "plots": [str(plot) for plot in plots]}, *lines)


@command(
    RUN, click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535), help="To serve on.")
)
def dashboard(run: str | None, port: int) -> None:
    """Watch a run's searches in optuna-dashboard, on this machine."""
    from hwnas import api

    api.dashboard(run, port=port, notice=notice)


@cli.group(invoke_without_command=True)
@RUN
@JSON
@click.pass_context
def devices(context: click.Context, run: str | None, as_json: bool) -> None:
    """List the devices that can be named; show, add, remove or check one."""
    if context.invoked_subcommand is not None:
        return
    from hwnas import api

    found = api.devices(run)
    columns = ["device", "", "reached by", "runtime", "files", "precision", "predictor"]
    rows = [
        [d["name"], d["description"], d["transport"], d["runtime"], d["accepts"], d["precision"],
         _predictor_at_hand(d)]
        for d in found
    ]  # fmt: skip
    finish(as_json, {"devices": found}, table("devices", columns, rows))


def _predictor_at_hand(device: dict[str, Any]) -> str:
    """What predicts a device without measuring: the run's own, a published model with its typical error, nothing."""
    published = device["published"]
    if device["predictor"] or published is None:
        return "in this run" if device["predictor"] else ""
    other = f" of {published['machine']}" if published["stands_in"] else ""
    return f"published{other}, ±{published['typical_error_pct']:.0f}%"


NAME = click.argument("name")


@command(RUN, NAME, JSON, group=devices)
def show(run: str | None, name: str, as_json: bool) -> None:
    """Show all that a device's file says."""
    import yaml

    from hwnas import api

    document = api.show_device(name, run)
    told = {key: value for key, value in document.items() if value not in (None, [], {}, "")}
    install = told.pop("install", None)
    lines = [yaml.safe_dump(told, sort_keys=False, width=110).rstrip()]
    finish(as_json, document, *lines, *([f"\nto install there:\n{install.rstrip()}"] if install else []))


@command(
    NAME,
    click.option("--base", required=True, metavar="DEVICE", help="The device whose settings it takes over."),
    click.option("--host", metavar="[USER@]HOST", help="Of ssh: the address, or a host of ~/.ssh/config."),
    click.option("--port", type=int, help="Of ssh."),
    click.option("--serial", help="Of adb: the phone, as `adb devices` prints it."),
    click.option("-o", "pairs", multiple=True, metavar="KEY=VALUE", help="Any key of the file: -o timing.threads=2."),
    click.option("--overwrite", is_flag=True, help="Replace a device of this name that you added before."),
    JSON,
    group=devices,
)
def add(
    name: str,
    base: str,
    host: str | None,
    port: int | None,
    serial: str | None,
    pairs: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Describe a device of your own, for all runs."""
    from hwnas import api

    given = {"host": host, "port": port, "serial": serial}
    changes = {key: value for key, value in given.items() if value is not None} | parse_changes(pairs, None)
    path = api.add_device(name, base, changes, overwrite=overwrite)
    finish(as_json, {"device": name, "file": str(path)}, f"added: {path}", f"next: hwnas devices check {name}")


@command(NAME, JSON, group=devices)
def remove(name: str, as_json: bool) -> None:
    """Forget a device that you added."""
    from hwnas import api

    path = api.remove_device(name)
    finish(as_json, {"device": name, "file": str(path)}, f"removed: {path}")


@command(
    RUN,
    NAME,
    click.option("--seconds", default=5.0, show_default=True, help="How long to measure."),
    JSON,
    group=devices,
)
def check(run: str | None, name: str, seconds: float, as_json: bool) -> None:
    """Check a device step by step: reached, room, runtime, state, a short measurement."""
    from hwnas import api
    from hwnas.run import Run

    done = []
    for step in api.check_device(name, run, duration_s=seconds):
        done.append(step)
        if not as_json:
            mark = "pass" if step.passed else "FAIL"
            finish(False, {}, printable(f"{mark}  {step.step}: {step.found}"))
            if step.remedy is not None and step.remedy != step.found:
                finish(False, {}, printable(f"      {step.remedy}"))
    failed = [step for step in done if not step.passed]
    steps = [{"step": s.step, "passed": s.passed, "found": s.found, "remedy": s.remedy} for s in done]
    if as_json:
        finish(True, {"device": name, "passed": not failed, "steps": steps})
    if failed:
        raise DeviceError(f"device {name!r}: {failed[0].step}: {failed[0].found}")
    if not as_json:
        finish(False, {}, next_line("profile", Run.locate(run), "--device", name))


def next_line(verb: str, run: object, *words: str) -> str:
    """The command to run next, ready to paste."""
    from hwnas.run import DEFAULT

    where = [] if str(run) == DEFAULT else ["--run", str(run)]
    return "next: " + shlex.join(["hwnas", verb, *where, *words])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="hwnas", standalone_mode=False)
    except click.exceptions.Abort:
        return 130
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        click.echo(f"hwnas: {error.format_message()}".replace("\n", " "), err=True)
        return 2
    except HwnasError as error:
        notice(f"hwnas: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        click.echo("hwnas: interrupted: the same command goes on from here", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
