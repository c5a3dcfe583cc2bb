"""One measurement at a time on a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = "host"  # the address of this machine


@contextmanager
def exclusive(address: str) -> Iterator[None]:
    """Wait until no other thread or process of this user on this host holds an address, and hold it.

    The locks are files in `$XDG_CACHE_HOME/hwnas/locks`, or `~/.cache/hwnas/locks`.

    Args:
        address: of the machine (`Device.address`).
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hwnas" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    # Homes may be shared between hosts, each of which has its own idea of an address.
    name = hashlib.sha256(f"{socket.gethostname()} {address}".encode()).hexdigest()[:16]
    with (folder / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a kill
        yield
