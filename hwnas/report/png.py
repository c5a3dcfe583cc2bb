"""Charts as PNG files, drawn by matplotlib where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas.files import replacing
from hwnas.report.charts import Bars, Chart, Plot, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCENT, INK, MUTED, GRID = "#0b62c4", "#1d2329", "#68727d", "#e3e7eb"
REMEDY = "pip install 'hwnas[plot]'"

_MARKERS = {"dot": "o", "ring": "o", "diamond": "D", "cross": "X"}
_STYLE: dict[Any, object] = {
    "axes.edgecolor": "#9aa4ae",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def can_draw() -> bool:
    """Whether matplotlib is installed; else `REMEDY` brings it."""
    return find_spec("matplotlib") is not None


def write_png(path: Path, plots: Sequence[Plot]) -> None:
    """Draw plots side by side.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4 * len(plots), 4.4), layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            axes.set_title(plot.title)
            if isinstance(plot, Chart):
                _draw_chart(axes, plot)
            else:
                _draw_bars(axes, plot)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)


def _draw_chart(axes: Axes, chart: Chart) -> None:
    axes.grid(visible=True, zorder=0)
    axes.set_xlabel(str(chart.x))
    axes.set_ylabel(str(chart.y))
    for series in chart.series:
        _draw_series(axes, series)
    if chart.band == "level":
        axes.axhspan(-10, 10, color=MUTED, alpha=0.12, linewidth=0, label="within 10%")
        axes.axhline(0, color=MUTED, linewidth=1)
    if chart.band == "ratio":
        low, high = axes.get_xlim()
        ends = [max(low, 0), high]
        lower, upper = ([share * end for end in ends] for share in (0.9, 1.1))
        axes.fill_between(ends, lower, upper, color=MUTED, alpha=0.12, linewidth=0, label="within 10%")
        axes.plot(ends, ends, color=MUTED, linewidth=1)
    for value, label in chart.rules:
        axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            label, (value, 0), xycoords=("data", "axes fraction"), xytext=(-3, 4), textcoords="offset points",
            rotation=90, ha="right", va="bottom", color=MUTED, fontsize=8,
        )  # fmt: skip
    if len(chart.series) > 1 or chart.band:
        axes.legend(fontsize=8)


def _draw_series(axes: Axes, series: Series) -> None:
    colour = ACCENT if series.strong else MUTED
    if series.mark in ("line", "step"):
        style: dict[str, Any] = {"drawstyle": "steps-post"} if series.mark == "step" else {"marker": "o"}
        width, dashes = (1.8, "-") if series.strong else (1.4, "--")
        axes.plot(series.x, series.y, color=colour, linewidth=width, linestyle=dashes, markersize=4,
                  label=series.name, zorder=3, **style)  # fmt: skip
        return
    if series.std:
        axes.errorbar(series.x, series.y, yerr=series.std, fmt="none", ecolor=colour, alpha=0.35, linewidth=0.8)
    large = series.mark in ("diamond", "cross")
    axes.scatter(series.x, series.y, marker=_MARKERS[series.mark], s=46 if large else 16,
                 facecolors="none" if series.mark == "ring" else colour, edgecolors=colour, linewidths=0.9,
                 label=series.name, zorder=4 if large else 2)  # fmt: skip


def _draw_bars(axes: Axes, plot: Bars) -> None:
    labels = [label for label, _ in plot.bars]
    left = [0.0] * len(labels)
    for index, part in enumerate(plot.parts):
        widths = [values[index] for _, values in plot.bars]
        shade = 1 - 0.75 * index / max(1, len(plot.parts) - 1)
        axes.barh(range(len(labels)), widths, left=left, color=ACCENT, alpha=shade, height=0.7, label=part, zorder=2)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", zorder=0)
    axes.set_xlabel(str(plot.value))
    if len(plot.parts) > 1:
        axes.legend(fontsize=8)
