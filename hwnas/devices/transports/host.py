"""This machine as a device's transport."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hwnas.devices.lock import HOST
from hwnas.devices.transports import linux
from hwnas.devices.transports.base import Transport


class Host(Transport):
    """Runs programs on this machine; files are where they are."""

    address = HOST
    python = (sys.executable, "-P")  # without the script's folder: its modules have names of packages

    def argv(self, command: Sequence[str]) -> list[str]:
        """See `Transport`."""
        return list(command)

    def send(self, path: Path) -> str:
        """See `Transport`."""
        self._open()  # what reads the file may need the temporary folder
        return str(path.absolute())

    def about(self) -> dict[str, str]:
        """See `Transport`."""
        return linux.about(self)

    def state(self) -> dict[str, Any]:
        """See `Transport`."""
        return linux.state(self)
