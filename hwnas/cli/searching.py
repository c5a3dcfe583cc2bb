"""`hwnas search`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from hwnas.cli.base import JSON, RUN, SEED, command, finish, next_line, notice, table
from hwnas.cli.limits import limit_options
from hwnas.errors import InputError

if TYPE_CHECKING:
    from hwnas.searching.limits import Limit
    from hwnas.searching.portfolio import Portfolio
    from hwnas.searching.result import Candidate, Result, Source


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
        next_line("export", where, "--result", name),
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
        next_line("export", where, "--all"),
    )
