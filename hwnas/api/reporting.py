"""`hwnas report` and `hwnas dashboard`: what a run found, to look at."""

from __future__ import annotations

import shlex
from pathlib import Path

from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.progress import Notice, unheard
from hwnas.run import Run


def report(
    run: str | Path | None = None, output: str | Path | None = None, *, notice: Notice = unheard
) -> tuple[Path, list[Path]]:
    """Write what a run found as one HTML page that needs nothing but itself, and its plots as PNG and CSV.

    The plots go into a folder beside the page, named as the page without its `.html`.

    Args:
        run: the run folder; what is missing in it is missing in the report.
        output: the page; by default `report.html` in the run folder.
        notice: told what a user should know.

    Returns:
        The page, and the plots' files.

    Raises:
        InputError: no run, a damaged file in it, or a page that cannot be written.
    """
    from hwnas.report.charts import to_csv
    from hwnas.report.gather import gather
    from hwnas.report.page import page
    from hwnas.report.png import REMEDY, can_draw, write_png

    opened = Run(run)
    target = opened.path / "report.html" if output is None else Path(output)
    if target.suffix not in (".html", ".htm"):
        raise InputError(f"{target}: a report is an HTML page: name a file that ends in .html")
    words = ["hwnas", "report", "--run", str(opened.path)]
    contents = gather(opened, shlex.join(words if output is None else [*words, "--output", str(output)]))
    texts = {id: child["text"] for id, child in contents.children.items()}
    draws, folder = can_draw(), target.with_suffix("")
    files = []
    try:
        write_text(target, page(contents))
        for plot in contents.plots:
            files.append(folder / f"{plot.name}.csv")
            write_text(files[-1], to_csv(plot, texts))
            if draws:
                files.append(folder / f"{plot.name}.png")
                write_png(files[-1], [plot])
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}): name another file with --output") from None
    if contents.plots and not draws:
        notice(f"no PNG files of the plots, only CSV: {REMEDY} to have them")
    return target, files


def dashboard(run: str | Path | None = None, *, port: int = 8080, notice: Notice = unheard) -> None:
    """Serve optuna-dashboard on the run's studies, to this machine only, until it is interrupted.

    Args:
        run: the run folder.
        port: to serve on.
        notice: told the address.

    Raises:
        InputError: no run, optuna-dashboard is not installed, or the port cannot be used.
    """
    opened = Run(run)
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise InputError("optuna-dashboard is not installed: pip install 'hwnas[dashboard]'") from None
    notice(f"http://localhost:{port}/dashboard (end with Ctrl-C)")
    try:
        run_server(opened.storage_url, host="localhost", port=port)
    except OSError as error:
        raise InputError(f"port {port}: cannot be used ({error.strerror}): name another with --port") from None
