"""This machine as a device's transport."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hwnas.devices.base import DeviceGoneError, Transport


class Host(Transport):
    """Runs programs on this machine; files are where they are."""

    def send(self, path: Path) -> str:
        """See `Transport`."""
        return str(path.absolute())

    def start(self, command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """See `Transport`."""
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches us, and we end it
            )
        except OSError as error:
            raise DeviceGoneError(f"{command[0]} cannot be started: {error.strerror}") from None

    @property
    def python(self) -> tuple[str, ...]:
        """See `Transport`."""
        return (sys.executable, "-P")  # without the script's folder: its modules have names of packages
