"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class Report(Protocol):
    """What a long-running function tells its caller about its progress."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """`done` of `total` are finished; `note` is a few words or figures."""


def silent(done: float, total: float, note: str = "") -> None:
    """Reports nothing."""


class Reporter:
    """Shows the progress of one piece of work on stderr; nothing if `quiet`."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what, self._quiet = what, quiet
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = self._start = time.monotonic()
        self._first: float | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """See `Report`."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._what, total=total, note=note)
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        if self._quiet:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now  # a resumed run's time left counts what this run does
        if now - self._last_line >= LINE_EVERY_S or done >= total:
            rate = (done - self._first) / max(now - self._start, 1e-9)
            left = f"{(total - done) / rate:.0f} s left" if rate else "?"
            print(f"{self._what}: {done:g}/{total:g}, {left}, {note}", file=sys.stderr, flush=True)
            self._last_line = now
