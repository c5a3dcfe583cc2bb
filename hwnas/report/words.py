"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime


def digits(value: float, count: int = 3) -> str:
    """So many significant digits, never with an exponent: `0.0967`, `12.3`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


def scaled(value: float) -> str:
    """A count in thousands, millions or billions: `2.88 M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{digits(value / size)} {letter}"
    return f"{value:g}"


def size(num_bytes: float) -> str:
    """Bytes as kB or MB: `424 kB`."""
    return f"{digits(num_bytes / 1e6)} MB" if num_bytes >= 1e6 else f"{digits(num_bytes / 1e3)} kB"


def dates(times: Sequence[datetime]) -> str:
    """The days between the first and the last of some times."""
    first, last = f"{min(times):%Y-%m-%d}", f"{max(times):%Y-%m-%d}"
    return first if first == last else f"{first} to {last}"
