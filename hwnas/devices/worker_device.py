"""Runtimes that Python drives: `worker.py` runs them on the device, and this side asks it."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hwnas.devices import runtimes, worker
from hwnas.devices.base import Check, Device, DeviceGoneError, RunTimes, Timing
from hwnas.devices.transports.base import ConnectionLostError, Transport
from hwnas.errors import DeviceError

START_TIMEOUT_S = 120.0  # importing a runtime from a cold disk, at the worst


def runtime_file(runtime: str) -> Path:
    """The file of a runtime, by its name or path."""
    return Path(runtime) if runtime.endswith(".py") else Path(runtimes.__path__[0]) / f"{runtime}.py"


class WorkerDevice(Device):
    """A runtime in a Python process of its own on the other side of a transport.

    The process starts at the first use, and anew after a crash or a hang, which end as a `DeviceError`.

    Args:
        name: of the device.
        transport: to the machine.
        runtime: the name of a file in `hwnas.devices.runtimes`, or the path of a file like those.
        precision: of the arithmetic.
        options: further arguments of the runtime's class.
        timing: the protocol that suits the device.
        cores: to run on; None for the least busy ones.
        python: the command that runs Python there; None for the transport's.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        runtime: str,
        *,
        precision: str = "fp32",
        options: Mapping[str, Any] | None = None,
        timing: Timing | None = None,
        cores: tuple[int, ...] | None = None,
        python: tuple[str, ...] | None = None,
    ) -> None:
        self.name, self.runtime, self.precision = name, Path(runtime).stem, precision
        self._file = runtime_file(runtime)
        self._kind = worker.load_class(str(self._file))
        self.accepts = self._kind.accepts
        self.int8 = getattr(self._kind, "int8", "int8")
        self.install = f"install there: {self._kind.install}"
        self.timing = timing or Timing()
        self.address = transport.address
        self._options = {"precision": precision, **(options or {})}
        self._transport, self._cores, self._python = transport, cores, python or transport.python
        self._process: _Process | None = None
        self._folder = ""  # of the connection that it uses
        self._versions: dict[str, str] = {}

    def versions(self) -> dict[str, str]:
        """See `Device`."""
        self._open()
        return dict(self._versions)

    def run(self, path: Path, timing: Timing) -> RunTimes:
        """See `Device`."""
        there = self._transport.send(path)
        if self._transport.folder != self._folder:  # the connection broke between two calls, and is there anew
            self._kill()
        request = {
            "op": "run",
            "path": there,
            "cores": self._cores,
            "threads": timing.threads,
            "warmup_s": timing.warmup_s,
            "warmup_runs": timing.warmup_runs,
            "repeats": timing.repeats,
            "min_duration_s": timing.min_duration_s,
        }
        answer = self._ask(self._open(), request, timing.timeout_s)
        try:
            return RunTimes(
                tuple(ns / 1e6 for ns in answer["times_ns"]),
                tuple(map(bool, answer["preempted"])),
                dict(answer["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"device {self.name!r}: {self.runtime} sent no times: {error!r}") from None

    def close(self) -> None:
        """See `Device`."""
        self._kill()
        self._transport.close()

    def check(self) -> Iterator[Check]:
        """See `Device`."""
        yield from (checks := list(self._transport.check()))
        if checks[0].passed:  # reached
            yield from super().check()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _open(self) -> _Process:
        if self._process is None:
            script = self._transport.send(Path(worker.__file__))
            self.address = self._transport.address  # of the one phone there is, known only now
            runtime = self._transport.send(self._file)
            command = [*self._python, script, runtime, json.dumps(self._options)]
            self._process = _Process(self._transport, command)
            self._folder = self._transport.folder
            try:
                self._versions = self._ask(self._process, {"op": "versions"}, START_TIMEOUT_S)
            except ConnectionLostError:
                raise
            except DeviceError as error:
                self._kill()
                needs = f"is {self.runtime} installed there? It needs {self._kind.install}"
                raise DeviceGoneError(f"{error}; {needs}") from None
        return self._process

    def _ask(self, process: _Process, request: dict[str, Any], timeout_s: float) -> Any:
        try:
            answer = process.ask({**request, "limit_s": timeout_s + 5}, timeout_s)  # it ends itself if we are gone
        except _Ended as ended:
            if ended.lost:
                self._transport.lost()
            self._kill()
            if ended.lost:
                raise ConnectionLostError(f"device {self.name!r}: {ended}") from None
            raise DeviceError(f"device {self.name!r}: {self.runtime} {ended}") from None
        except BaseException:  # interrupted: its answer would be taken for that of the next request
            self._kill()
            raise
        if "error" in answer:
            raise DeviceError(f"device {self.name!r}: {_first_line(str(answer['error']))}")
        return answer["ok"]


class _Ended(Exception):
    """The worker cannot answer any more; the message completes the sentence `onnxruntime ...`.

    If the connection was lost, it is a sentence of its own.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class _Process:
    """A running worker."""

    def __init__(self, transport: Transport, command: list[str]) -> None:
        self._transport = transport
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in kill
        try:
            self._process: subprocess.Popen[bytes] = transport.start(command, self._stderr)
        except BaseException:
            self._stderr.close()
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._rest = b""

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            _Ended: it died, said something else, or took over `timeout_s`.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise self._ended() from None
        line = self._read_line(timeout_s)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"ok", "error"}:
            raise _Ended(f"sent what is no answer: {line[:100]!r}")
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise _Ended(f"did not answer within {timeout_s:g} s, and was ended")
                data = os.read(self._answers.fileno(), 1 << 16)
                if not data:
                    raise self._ended()
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> _Ended:
        """Why the worker died."""
        try:
            status = self._process.wait(2)
        except subprocess.TimeoutExpired:
            return _Ended("closed its output")
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        lost = self._transport.failure(status, said)
        if lost is not None:
            return _Ended(f"the connection broke: {lost}", lost=True)
        number = -status if status < 0 else status - 128  # as a shell tells it
        if number in set(signal.Signals):
            hint = " (out of memory, or somebody killed it)" if number == signal.SIGKILL else ""
            return _Ended(f"was ended by {signal.Signals(number).name}{hint}")
        return _Ended(f"ended with status {status}: {said.splitlines()[-1] if said else 'it said nothing'}")

    def kill(self) -> None:
        """End the worker, whatever it is doing."""
        self._transport.kill(self._process)
        for file in (self._requests, self._answers, self._stderr):
            try:
                file.close()
            except OSError:  # a request that never left
                continue


def _first_line(text: str, limit: int = 300) -> str:
    line = (text.strip() or "it did not say why").splitlines()[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."
