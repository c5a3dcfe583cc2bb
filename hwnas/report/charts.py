"""Charts as plain values: the page, the PNG and the CSV of a plot are drawn from the same record."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Mark: TypeAlias = Literal["dot", "ring", "diamond", "cross", "line", "step"]
Band: TypeAlias = Literal["", "ratio", "level"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis shows; `unit` is empty for a plain number."""

    label: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points that share a mark.

    Attributes:
        name: for the legend.
        mark: how a point is drawn; `line` and `step` join the points in their order, a step after each.
        x, y: coordinates, (num_points,) each.
        std: standard deviations of y, (num_points,); empty if there are none.
        children: ids of the architectures behind the points, (num_points,); empty if they are something else.
        strong: whether it is what the chart is about.
    """

    name: str
    mark: Mark
    x: tuple[float, ...]
    y: tuple[float, ...]
    std: tuple[float, ...] = ()
    children: tuple[str, ...] = ()
    strong: bool = False

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), len(self.std or self.x), len(self.children or self.x)}
        if len(lengths) > 1:
            raise ValueError(f"series {self.name!r}: x, y, std and children differ in length: {sorted(lengths)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Points over two axes.

    Attributes:
        name: of its files, such as `front-cpu`.
        title: for people.
        x, y: the axes.
        series: from back to front.
        rules: upright lines, each with its label: limits.
        band: `ratio` for the line y = x and 10% about it, `level` for y = 0 and 10 about it, empty for neither.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    rules: tuple[tuple[float, str], ...] = ()
    band: Band = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": "chart", **asdict(self)}

    def rows(self) -> tuple[list[str], list[list[object]]]:
        """Column names and rows, one a point, for a table."""
        columns = ["series", str(self.x), str(self.y)]
        with_std, with_child = any(s.std for s in self.series), any(s.children for s in self.series)
        columns += ["standard deviation"] * with_std + ["child"] * with_child
        rows: list[list[object]] = []
        for series in self.series:
            for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
                row: list[object] = [series.name, x, y]
                row += [series.std[index] if series.std else ""] * with_std
                row += [series.children[index] if series.children else ""] * with_child
                rows.append(row)
        return columns, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars, one a row, each made up of parts.

    Attributes:
        name: of its files.
        title: for people.
        value: what the length of a bar means.
        parts: names of the parts.
        bars: of each bar its label and the value of each part, (num_parts,).
    """

    name: str
    title: str
    value: Axis
    parts: tuple[str, ...]
    bars: tuple[tuple[str, tuple[float, ...]], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": "bars", **asdict(self)}

    def rows(self) -> tuple[list[str], list[list[object]]]:
        """Column names and rows, one a bar, for a table."""
        return ["", *(f"{part} ({self.value.unit})" for part in self.parts)], [
            [label, *values] for label, values in self.bars
        ]


Plot: TypeAlias = Chart | Bars


def file_name(*words: str) -> str:
    """The words as a plot's name, which is also that of its files: `front-cpu`."""
    return re.sub(r"[^\w.-]+", "_", "-".join(words))


def to_csv(plot: Plot, texts: Mapping[str, str]) -> str:
    """The plot's numbers, one line a point or bar below a line of column names.

    Args:
        plot: the plot.
        texts: descriptions of the architectures by their ids.
    """
    columns, rows = plot.rows()
    if "child" in columns:
        index = columns.index("child")
        columns, rows = [*columns, "architecture"], [[*row, texts.get(str(row[index]), "")] for row in rows]
    return table_csv(columns, rows)


def table_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows below their column names, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
