"""`hwnas report` and `hwnas dashboard`."""

from __future__ import annotations

import click

from hwnas.cli.base import JSON, RUN, command, finish, notice


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
