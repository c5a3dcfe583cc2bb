"""What a transport is: it runs programs on a machine, and copies files there."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
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
from weakref import WeakKeyDictionary

from hwnas.devices.base import Check, DeviceGoneError
from hwnas.errors import DeviceError
from hwnas.files import parts

CONNECT_TIMEOUT_S = 30.0
PREPARE_TIMEOUT_S = 60.0  # of each command
UNDO_TIMEOUT_S = 20.0  # of all: longer ones go on, but we do not wait for them
COPY_TIMEOUT_S = 300.0
KILL_TIMEOUT_S = 5.0
MAX_COPIES = 6  # files kept there, the last used: a program and its runtime, a child, the reference, and two more

# Runs on the machine for as long as we use it. Its stdin ends when we close it, when this process dies, or when the
# connection does; then it leaves the machine as it was found. Signals are caught, not ignored, while it prepares:
# programs inherit that. Its own shell runs nothing of the user's but `env`: no builtin can end it. It has one line and
# no backslash, which not all login shells read alike.
_HOLD = (
    "trap : HUP INT TERM PIPE; umask 077; {end}"
    'folder=$(cd -- "${{1:-${{TMPDIR:-/tmp}}}}" >/dev/null && mktemp -d "$PWD/hwnas-XXXXXXXX") || exit 1; '
    'echo "$folder"; {prepare}cat >/dev/null; '
    "trap '' HUP INT TERM PIPE; {undo}"
    'rm -rf "$folder"'
)
# What a lost connection left there is ended before anything is prepared anew: a program that computes does not look at
# its stdin, and where the network is down, the machine learns it hours after us; the holder's undoing is waited for. A
# PID may be another program's by now, if the machine was restarted. `timeout` makes a group of its own, in our session.
_KILL = 'pkill -KILL -s "$1"; kill -s KILL -- "-$1" || kill -s KILL "$1"'
_END_PROGRAM = 'if grep -qs hwnas "/proc/{group}/cmdline"; then sh -c {kill} sh {group} 2>/dev/null; fi; '
_END_HOLDER = (
    'if grep -qs hwnas "/proc/{group}/cmdline"; then kill -s TERM -- -{group}; n=0; '
    "while [ -d {folder} ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done; fi; "
)
_PREPARE = 'env {command} </dev/null >"$folder/said" 2>&1 && echo prepared && '
_PREPARED = 'rm -f "$folder/said" || echo "failed: $(tail -n 1 "$folder/said")"; '
_UNDO = "env {command} </dev/null >/dev/null 2>&1; "


class ConnectionLostError(DeviceError):
    """The connection broke while something ran there. The next call opens it anew."""


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

    A transport is used by one thread at a time.

    Args:
        prepare: commands that bring the machine into the state to measure in, run when it is opened.
        undo: commands that bring it back, run also where one of `prepare` failed.
        folder: where the temporary folder is made there; None for $TMPDIR, or /tmp.

    Attributes:
        address: of the machine, for messages and for locking it: `ssh jetson`.
        python: the command that runs Python there.
        announces: whether what `argv` runs first prints a line `hwnas PID`, the PID that of a process group there. What
            precedes it, such as the greetings of a shell's profile, is not the program's.
        folder: the temporary folder there; empty while it is not open. Another folder, another connection.
    """

    address: str
    python: tuple[str, ...] = ("python3",)
    announces: bool = False

    def __init__(
        self, *, prepare: Sequence[Sequence[str]] = (), undo: Sequence[Sequence[str]] = (), folder: str | None = None
    ) -> None:
        self._prepare, self._undo, self._parent = prepare, undo, folder
        self._holder: subprocess.Popen[bytes] | None = None
        self._holder_stderr: IO[bytes] | None = None
        self._lost_holder: tuple[str, str] | None = None  # its process group and folder there
        self._lost_programs: list[str] = []  # their process groups
        self._groups: WeakKeyDictionary[subprocess.Popen[bytes], str] = WeakKeyDictionary()  # there, by process here
        self._sent: OrderedDict[tuple[tuple[Path, int, int], ...], list[str]] = OrderedDict()
        self._num_sent = 0
        self._greeting = ""  # what came before the last program's own output
        self.folder = ""

    @abstractmethod
    def argv(self, command: Sequence[str]) -> list[str]:
        """The command line on this host that runs `command` there, its stdin, stdout, stderr and status passed on.

        Whatever characters `command` holds arrive as they are: what passes through a shell is quoted.
        """

    def failure(self, status: int, stderr: str) -> str | None:
        """Why the connection failed, given how `argv`'s process ended; None where it is the program there that ended.

        A line that says what to do, where that is known.

        Raises:
            DeviceGoneError: no other connection would do better.
        """
        return None

    def copy(self, path: Path, there: str) -> None:
        """Copy a file to the machine: all of it, or nothing is left there.

        Raises:
            DeviceError: it could not be copied.
        """
        script = '{ cat >"$1" && wc -c <"$1"; } || { rm -f "$1"; exit 1; }'
        try:
            with path.open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                done = self.run(["sh", "-c", script, "sh", there], timeout_s=COPY_TIMEOUT_S, stdin=file)
        except OSError as error:
            raise DeviceError(error.strerror) from None
        if done.status:
            raise DeviceError(done.reason)
        if done.stdout.strip() != str(size_bytes):
            raise DeviceError(f"{done.stdout.strip()} of {size_bytes} bytes arrived")

    def send(self, path: Path) -> str:
        """Make a file available on the machine, and its `hwnas.files.parts`: its path there. Cheap if sent before.

        Raises:
            DeviceError: there is no such file, or it cannot be copied.
            DeviceGoneError: the machine cannot be reached, or has no room.
        """
        self._open()
        files = [path, *(part for part in parts(path) if part != path)]
        try:
            stats = [file.stat() for file in files]
        except OSError as error:
            raise DeviceError(f"{path}: {error.strerror}") from None
        key = tuple((file.absolute(), stat.st_mtime_ns, stat.st_size) for file, stat in zip(files, stats, strict=True))
        if key not in self._sent:
            while len(self._sent) >= MAX_COPIES:
                self.run(["rm", "-f", *self._sent.popitem(last=False)[1]])
            self._num_sent += 1
            folder = self.folder
            stem = f"{folder}/{self._num_sent}"
            names = [stem + re.sub(r"[^\w.]", "_", file.suffix, flags=re.ASCII) for file in files]
            for file, there in zip(files, names, strict=True):
                try:
                    self.copy(file, there)
                    if self.folder != folder:
                        raise ConnectionLostError(f"{self.address}: the connection broke")
                except (ConnectionLostError, DeviceGoneError):
                    raise
                except DeviceError as error:
                    full = "no space left" in str(error).lower() or "quota" in str(error).lower()
                    said = f"{self.address}: {file.name} could not be copied to {folder}: {error}"
                    raise (DeviceGoneError if full else DeviceError)(said) from None
            self._sent[key] = names
        self._sent.move_to_end(key)
        return self._sent[key][0]

    def start(self, command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program on the machine, with pipes for its stdin and stdout, which ends when its stdin does.

        Raises:
            DeviceGoneError: the machine cannot be reached.
        """
        self._open()
        return self._popen(self.argv(command), stdin=subprocess.PIPE, stderr=stderr)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a program that `start` started, here and there, whatever it is doing. Never raises."""
        group = self._groups.pop(process, None)
        connected = self._holder is not None and self._holder.poll() is None
        if group is not None and not connected:
            self._lost_programs.append(group)
        if process.poll() is None:
            if group is not None and connected:
                try:
                    subprocess.run(
                        self.argv(["sh", "-c", _KILL, "sh", group]),
                        stdin=subprocess.DEVNULL,
                        capture_output=True,
                        timeout=KILL_TIMEOUT_S,
                        start_new_session=True,
                        check=False,
                    )
                except (OSError, subprocess.TimeoutExpired):
                    self._lost_programs.append(group)
                    self._forget()  # it hangs
            _signal(process, signal.SIGKILL)
        process.wait()

    def run(self, command: Sequence[str], *, timeout_s: float = 60.0, stdin: IO[bytes] | None = None) -> Finished:
        """Run a program there to its end, whatever its status.

        Raises:
            DeviceError: it took over `timeout_s`, and was ended.
            ConnectionLostError: the connection broke.
            DeviceGoneError: the machine cannot be reached.
        """
        self._open()
        end = time.monotonic() + timeout_s
        source = subprocess.DEVNULL if stdin is None else stdin
        with self._popen(self.argv(command), stdin=source, stderr=subprocess.PIPE, timeout_s=timeout_s) as process:
            try:
                stdout, stderr = process.communicate(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill(process)
                raise DeviceError(f"{self.address}: `{command[0]}` did not end within {timeout_s:g} s") from None
            except BaseException:
                self.kill(process)
                raise
        finished = Finished(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
        lost = self.failure(finished.status, finished.stderr)
        if lost is not None:
            self._forget()
            self.kill(process)
            raise ConnectionLostError(f"{self.address}: the connection broke: {lost}")
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
        self._forget(patience_s=UNDO_TIMEOUT_S)

    def lost(self) -> None:
        """Told by a device whose program ended because the connection broke: the next call opens it anew."""
        self._forget()

    # ------------------------------------------------------------ the holder

    def holder_argv(self, command: Sequence[str]) -> list[str]:
        """Like `argv`, for the program that runs there as long as the machine is open."""
        return self.argv(command)

    def _open(self) -> None:
        if self._holder is not None:
            if self._holder.poll() is None:
                return
            self._forget()  # it broke between two calls
        prepare = "".join(_PREPARE.format(command=shlex.join(command)) for command in self._prepare)
        end = "".join(_END_PROGRAM.format(group=group, kill=shlex.quote(_KILL)) for group in self._lost_programs)
        if self._lost_holder is not None:
            group, folder = self._lost_holder
            end += _END_HOLDER.format(group=group, folder=shlex.quote(folder))
        script = _HOLD.format(
            end=end,
            prepare=prepare + _PREPARED if prepare else "",
            undo="".join(_UNDO.format(command=shlex.join(command)) for command in self._undo),
        )
        argv = self.holder_argv(["sh", "-c", script, "sh", self._parent or ""])
        self._holder_stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _forget
        try:
            self._holder = self._popen(argv, stdin=subprocess.PIPE, stderr=self._holder_stderr)
            self.folder = self._answer(self._holder, CONNECT_TIMEOUT_S, r"/.*/hwnas-\w{8}", "cannot be used")
            for command in self._prepare:
                what = f"preparing it, `{shlex.join(command)}`, failed"
                self._answer(self._holder, PREPARE_TIMEOUT_S, "prepared", what)
        except BaseException:
            self._forget(patience_s=UNDO_TIMEOUT_S if self.folder else 1)
            raise
        self._lost_holder = None
        self._lost_programs.clear()

    def _answer(self, holder: subprocess.Popen[bytes], timeout_s: float, wanted: str, what: str) -> str:
        """The next line of the holder."""
        line = _line(holder, timeout_s)
        if re.fullmatch(wanted, line):
            return line
        if line:
            raise DeviceGoneError(f"{self.address}: {what}: {line.removeprefix('failed: ')}")
        try:
            status = holder.wait(1)
        except subprocess.TimeoutExpired:
            raise DeviceGoneError(f"{self.address}: {what}: no answer within {timeout_s:g} s") from None
        said = self._said()
        reason = self.failure(status, said) or Finished(status, self._greeting, said).reason
        raise DeviceGoneError(f"{self.address}: {reason}")

    def _said(self) -> str:
        """What the holder printed to its stderr."""
        if self._holder_stderr is None:
            return ""
        size = os.fstat(self._holder_stderr.fileno()).st_size
        return os.pread(self._holder_stderr.fileno(), size, 0).decode(errors="replace")  # the position is the holder's

    def _forget(self, *, patience_s: float = 2.0) -> None:
        holder, self._holder = self._holder, None
        stderr, self._holder_stderr = self._holder_stderr, None
        if holder is not None and holder in self._groups and self.folder:
            self._lost_holder = self._groups[holder], self.folder
        self.folder = ""
        self._sent.clear()
        if holder is not None:
            _end(holder, patience_s)
        if stderr is not None:
            stderr.close()

    def _popen(
        self, argv: list[str], *, stdin: IO[bytes] | int, stderr: IO[bytes] | int, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> subprocess.Popen[bytes]:
        """A process with a pipe for its stdout, which is at the beginning of what the program there prints."""
        try:
            # A session of its own: Ctrl-C reaches us, and we end it.
            process = subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
        except OSError as error:
            raise DeviceGoneError(f"{self.address}: {argv[0]} cannot be started: {error.strerror}") from None
        if self.announces:
            end = time.monotonic() + timeout_s
            self._greeting = ""
            try:
                while line := _line(process, end - time.monotonic(), keep_end=True):
                    if found := re.search(r"hwnas (\d+)\n$", line):
                        self._groups[process] = found[1]
                        break
                    self._greeting += line
            except BaseException:
                _end(process, 0)
                if process.stderr is not None:
                    process.stderr.close()
                raise
        return process


def _line(process: subprocess.Popen[bytes], timeout_s: float, *, keep_end: bool = False) -> str:
    """The next line of a program's output; what there is of it after `timeout_s`."""
    assert process.stdout is not None
    line = b""
    end = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(0.0, end - time.monotonic())):
            byte = os.read(process.stdout.fileno(), 1)  # no more: the rest is for others to read
            if not byte:
                break
            line += byte
    text = line.decode(errors="replace")
    return text if keep_end else text.removesuffix("\n")


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process that `start_new_session` started, and to those that it started."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Close a program's stdin, wait for it, and kill it where that does not help."""
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            process.wait(patience_s)
            break
        except subprocess.TimeoutExpired:
            _signal(process, number)
            patience_s = 1
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
