"""What a report shows: plain values that the page, the PNG files and the CSV files are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from hwnas.report.charts import Plot

Facts: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts.

    Attributes:
        columns: their names.
        rows: (num_rows, num_columns).
        title: above it; may be empty.
        children: id of the architecture behind each row, (num_rows,); empty if there are none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    children: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        id: of its anchor.
        title, text: heading, and a sentence or two below it.
        plots: its charts.
        tables: below them.
        facts: lists of names and values, each under a title.
    """

    id: str
    title: str
    text: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    facts: tuple[tuple[str, Facts], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.plots or self.tables or self.facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One search's answer, in words.

    Attributes:
        title: the limits.
        best: id of the best child.
        figures: what counts most: each a name, a value, and a remark that may be empty.
        facts: how it was found.
    """

    title: str
    best: str
    figures: tuple[tuple[str, str, str], ...]
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that a report shows.

    Attributes:
        title: the run folder's name.
        summary: a line about the run.
        created: when the report was made.
        space: the search space, as `SearchSpace.to_dict` gives it, for the drawings.
        children: by id, every child that can be opened: `text`, `architecture`, `sizes` (sides of the feature maps
            after the stem and each stage, pixels), `accuracy` (None if not known), `macs`, `params`,
            `file_bytes`, `peak_bytes`, `latency`.
        overview: the answers as a table.
        answers: one by one, the latest first.
        sections: in order.
    """

    title: str
    summary: str
    created: str
    space: Mapping[str, Any]
    children: Mapping[str, Mapping[str, Any]]
    overview: Table
    answers: tuple[Answer, ...]
    sections: tuple[Section, ...]

    @property
    def plots(self) -> list[Plot]:
        """Every plot of the report."""
        return [plot for section in self.sections for plot in section.plots]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        value = asdict(self)
        for section, plain in zip(self.sections, value["sections"], strict=True):
            plain["plots"] = [plot.to_dict() for plot in section.plots]
        return value
