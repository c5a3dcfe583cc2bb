"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hwnas.errors import printable

LINE_EVERY_S = 15.0


class Report(Protocol):
    """What a long-running function tells its caller about its progress."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """`done` of `total` are finished; `note` is a few words or figures."""


class Notice(Protocol):
    """What a function tells the user beside its result."""

    def __call__(self, text: str) -> None:
        """`text` is a sentence."""


def unheard(text: str) -> None:
    """Tells nobody."""


def silent(done: float, total: float, note: str = "") -> None:
    """Reports nothing."""


@contextmanager
def reporting(*names: str, quiet: bool = False) -> Iterator[list[Report]]:
    """Shows the progress of pieces of work that go on at the same time, on stderr.

        with reporting("train") as (report,):
            report(1, 10, "loss 2.3")

    Args:
        names: of the pieces of work.
        quiet: whether to show nothing.

    Yields:
        A `Report` for each, which may be called from a thread of its own.
    """
    console = Console(stderr=True)
    if quiet:
        yield [silent] * len(names)
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),  # perhaps a device's own words
        )
        with Progress(*columns, console=console) as bar:
            yield [_Bar(bar, name) for name in names]
    else:
        yield [_Lines(name) for name in names]


class _Bar:
    """One bar of those on a terminal; there from its first report on."""

    def __init__(self, bar: Progress, name: str) -> None:
        self._bar, self._name = bar, name
        self._task: TaskID | None = None

    def __call__(self, done: float, total: float, note: str = "") -> None:
        if self._task is None:
            self._task = self._bar.add_task(self._name, total=total, note="")
        self._bar.update(self._task, completed=done, total=total, note=printable(note))


class _Lines:
    """A line now and then, and one at the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last_line = self._start = time.monotonic()
        self._first: float | None = None

    def __call__(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now  # a resumed run's time left counts what this run does
        if now - self._last_line >= LINE_EVERY_S or done >= total:
            rate = (done - self._first) / max(now - self._start, 1e-9)
            left = f"{(total - done) / rate:.0f} s left" if rate else "?"
            print(f"{self._name}: {done:g}/{total:g}, {left}, {printable(note)}", file=sys.stderr, flush=True)
            self._last_line = now
