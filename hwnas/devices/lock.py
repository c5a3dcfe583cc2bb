"""One measurement at a time on a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = "host"  # the address of this machine


@contextmanager
def exclusive(address: str) -> Iterator[None]:
    """Wait until no other thread or process of this user on this host holds an address, and hold it.

    Args:
        address: of the machine (`Device.address`).
    """
    folder = Path(tempfile.gettempdir()) / f"hwnas-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    with (folder / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a kill
        yield
