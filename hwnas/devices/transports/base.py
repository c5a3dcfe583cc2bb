"""What a transport is: it runs programs on a machine, and copies files there."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hwnas.devices.base import Check, DeviceGoneError
from hwnas.errors import DeviceError
from hwnas.files import parts

CONNECT_TIMEOUT_S = 30.0
COPY_TIMEOUT_S = 300.0
MAX_COPIES = 6  # files kept there, the last used: a program and its runtime, a child, the reference, and two more

# Runs on the machine for as long as we use it. Its stdin ends when we close it, when this process dies, or when the
# connection does; then it leaves the machine as it was found.
_HOLD = """trap '' HUP INT TERM PIPE
umask 077
folder=$(mktemp -d "${{1:-${{TMPDIR:-/tmp}}}}/hwnas-XXXXXXXX") || exit 1
echo "$folder"
cat >/dev/null
rm -rf "$folder"
{undo}"""


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended.

    Attributes:
        status: its exit status.
        stdout: what it printed; bytes that are not UTF-8 are replaced.
        stderr: likewise.
    """

    status: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """The last line it said: mostly why it failed."""
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1].strip()[:300] if lines else f"it ended with status {self.status} and said nothing"


class Transport(ABC):
    """Runs programs on a machine, and copies files there.

    A device calls `send` for each program and network, `start` for a program that answers as it goes, and `run` for one
    that ends. The first of these opens the machine: a private temporary folder is made there, and the machine is
    prepared. At `close`, and also where this process is killed or the connection breaks, the folder is removed and the
    preparation undone. After a broken connection the next call opens it anew.

    A new transport has to say what to run on this host so that a command runs there (`argv`).

    Args:
        prepare: commands that bring the machine into the state to measure in, run when it is opened.
        undo: commands that bring it back.
        folder: where the temporary folder is made there; None for $TMPDIR, or /tmp.

    Attributes:
        address: of the machine, for messages and for locking it: `ssh jetson`.
        python: the command that runs Python there.
        folder: the temporary folder there; empty while it is not open.
    """

    address: str
    python: tuple[str, ...] = ("python3",)

    def __init__(
        self, *, prepare: Sequence[Sequence[str]] = (), undo: Sequence[Sequence[str]] = (), folder: str | None = None
    ) -> None:
        self._prepare, self._undo, self._parent = prepare, undo, folder
        self._holder: subprocess.Popen[bytes] | None = None
        self._sent: OrderedDict[tuple[Path, int, int], list[str]] = OrderedDict()
        self._num_sent = 0
        self.folder = ""

    @abstractmethod
    def argv(self, command: Sequence[str]) -> list[str]:
        """The command line on this host that runs `command` there, its stdin, stdout, stderr and status passed on.

        Whatever characters `command` holds arrive as they are: what passes through a shell is quoted.
        """

    def failure(self, status: int, stderr: str) -> str | None:
        """Why the connection failed, given how `argv`'s process ended; None where it is the program there that ended.

        A line that says what to do, where that is known.
        """
        return None

    def copy(self, path: Path, there: str) -> None:
        """Copy a file to the machine.

        Raises:
            DeviceError: it could not be copied.
        """
        with path.open("rb") as file:
            done = self.run(["sh", "-c", 'cat >"$1"', "sh", there], timeout_s=COPY_TIMEOUT_S, stdin=file)
        if done.status:
            raise DeviceError(done.reason)

    def send(self, path: Path) -> str:
        """Make a file available on the machine, and its `hwnas.files.parts`: its path there. Cheap if sent before.

        Raises:
            DeviceError: there is no such file, or it cannot be copied.
            DeviceGoneError: the machine cannot be reached, or has no room.
        """
        self._open()
        try:
            stat = path.stat()
        except OSError as error:
            raise DeviceError(f"{path}: {error.strerror}") from None
        key = (path.absolute(), stat.st_mtime_ns, stat.st_size)
        if key not in self._sent:
            while len(self._sent) >= MAX_COPIES:
                self.run(["rm", "-f", *self._sent.popitem(last=False)[1]])
            self._num_sent += 1
            stem = f"{self.folder}/{self._num_sent}"
            names = {part: stem + re.sub(r"[^\w.]", "_", part.suffix, flags=re.ASCII) for part in parts(path)}
            for part, there in names.items():
                try:
                    self.copy(part, there)
                except DeviceError as error:
                    said = f"{self.address}: {part.name} could not be copied to {self.folder}: {error}"
                    full = "no space left" in said.lower() or "quota" in said.lower()
                    raise (DeviceGoneError if full else DeviceError)(said) from None
            self._sent[key] = [names.pop(path), *names.values()]
        self._sent.move_to_end(key)
        return self._sent[key][0]

    def start(self, command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program on the machine, with pipes for its stdin and stdout, which ends when its stdin does.

        Raises:
            DeviceGoneError: the machine cannot be reached.
        """
        self._open()
        return self._popen(self.argv(command), stderr)

    def run(self, command: Sequence[str], *, timeout_s: float = 60.0, stdin: IO[bytes] | None = None) -> Finished:
        """Run a program there to its end, whatever its status.

        Raises:
            DeviceError: it took over `timeout_s`, or the connection broke.
            DeviceGoneError: the machine cannot be reached.
        """
        self._open()
        try:
            done = subprocess.run(
                self.argv(command),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                capture_output=True,
                timeout=timeout_s,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.address}: `{command[0]}` did not end within {timeout_s:g} s") from None
        except OSError as error:
            raise DeviceGoneError(f"{self.address}: {error.filename} cannot be started: {error.strerror}") from None
        finished = Finished(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
        lost = self.failure(finished.status, finished.stderr)
        if lost is not None:
            self._forget()
            raise DeviceError(f"{self.address}: {lost}")
        return finished

    def check(self) -> Iterator[Check]:
        """Whether the machine can be reached, and has room."""
        try:
            self._open()
        except DeviceError as error:
            yield Check("reached", self.address, str(error))
            return
        yield Check("reached", self.address)
        try:
            done = self.run(["df", "-Pk", self.folder])
            free_mb = int(done.stdout.splitlines()[-1].split()[3]) // 1024
        except (DeviceError, IndexError, ValueError):
            return  # a machine without df
        remedy = None if free_mb >= 200 else f"make room in {self.folder.rpartition('/')[0]} there: 200 MB are enough"
        yield Check("room", f"{free_mb:,} MB free in {self.folder.rpartition('/')[0]}", remedy)

    def about(self) -> dict[str, str]:
        """What the machine is, for `Device.versions`: other values, other times."""
        return {}

    def state(self) -> dict[str, Any]:
        """The machine's state now, as far as it tells, for `RunTimes.facts`: `celsius`, `mhz`, `battery_pct`, ..."""
        return {}

    def close(self) -> None:
        """Remove the temporary folder, and undo the preparation. Never raises; a later call opens it again."""
        holder = self._holder
        self._forget(end=False)
        if holder is not None:
            _end(holder, patience_s=20)

    def lost(self) -> None:
        """Told by a device whose program ended because the connection broke: the next call opens it anew."""
        self._forget()

    # ------------------------------------------------------------ the holder

    def _open(self) -> None:
        if self._holder is not None:
            if self._holder.poll() is None:
                return
            self._forget()  # it broke between two calls
        undo = "\n".join(shlex.join(command) for command in self._undo)
        script = _HOLD.format(undo=undo)
        with tempfile.TemporaryFile() as stderr:
            holder = self._popen(self.holder_argv(["sh", "-c", script, "sh", self._parent or ""]), stderr)
            folder = _first_line(holder, CONNECT_TIMEOUT_S)
            if not folder.startswith("/"):
                status = _end(holder)
                stderr.seek(0)
                said = stderr.read().decode(errors="replace")
                reason = self.failure(status, said) or Finished(status, folder, said).reason
                raise DeviceGoneError(f"{self.address}: {reason}")
        self._holder, self.folder = holder, folder
        for command in self._prepare:
            try:
                done = self.run(command)
            except DeviceError:
                self.close()
                raise
            if done.status:
                self.close()
                raise DeviceGoneError(f"{self.address}: preparing it, `{shlex.join(command)}`, failed: {done.reason}")

    def holder_argv(self, command: Sequence[str]) -> list[str]:
        """Like `argv`, for the program that runs there as long as the machine is open."""
        return self.argv(command)

    def _forget(self, *, end: bool = True) -> None:
        holder, self._holder, self.folder = self._holder, None, ""
        self._sent.clear()
        if holder is not None and end:
            _end(holder)

    def _popen(self, argv: list[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches us, and we end it
            )
        except OSError as error:
            raise DeviceGoneError(f"{argv[0]} cannot be started: {error.strerror}") from None


def _first_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """The first line of a program's output, without its end; what there is of it after `timeout_s`."""
    assert process.stdout is not None
    line = b""
    end = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(0.0, end - time.monotonic())):
            byte = os.read(process.stdout.fileno(), 1)
            if not byte:
                break
            line += byte
    return line.decode(errors="replace").strip()


def _end(process: subprocess.Popen[bytes], patience_s: float = 2.0) -> int:
    """Close a program's stdin, wait for it, and kill it where that does not help; its status."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        status = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    process.stdout.close()
    return status
