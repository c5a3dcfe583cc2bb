"""What this machine offers to this process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from hwnas import __version__


def num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of hwnas, of Python, and of those packages of PyPI that are installed, in this order."""
    found = {"hwnas": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def torchrun_ranks() -> tuple[int, int, int, int]:
    """Rank and number of processes, in all and on this machine, as `torchrun` sets them; (0, 1, 0, 1) without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return 0, 1, 0, 1
    rank, count, local_rank, local_count = (int(os.environ[name]) for name in names)
    return rank, count, local_rank, local_count
