"""Runtimes that are timed by a program of their makers, on the other side of a transport."""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hwnas.devices.base import Check, Device, DeviceGoneError, RunTimes, Timing
from hwnas.devices.tools.base import Tool
from hwnas.devices.transports.base import MAX_COPIES, ConnectionLostError, Finished, Transport
from hwnas.devices.transports.linux import metered, run_power_mw
from hwnas.errors import DeviceError

BUILD_TIMEOUT_S = 600.0  # TensorRT tries many kernels for each layer, a Jetson Nano takes minutes


class ToolDevice(Device):
    """A program that runs once a round.

    Args:
        name: of the device.
        transport: to the machine.
        tool: the program's command line and output.
        program: where it is there; None for the tool's usual place.
        timing: the protocol that suits the device.
        cores: to run on; None leaves that to the system.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        tool: Tool,
        *,
        program: str | None = None,
        timing: Timing | None = None,
        cores: tuple[int, ...] | None = None,
    ) -> None:
        self.name, self.runtime, self.accepts, self.precision = name, tool.runtime, tool.accepts, tool.precision
        self.int8, self.install = tool.int8, tool.install
        self.timing = timing or Timing()
        self.address = transport.address
        self._transport, self._tool, self._program = transport, tool, program or tool.program
        self._cores = cores
        self._built: OrderedDict[tuple[str, str, int, int], str] = OrderedDict()
        self._num_built = 0

    def versions(self) -> dict[str, str]:
        """See `Device`."""
        try:
            done = self._transport.run(self._tool.version_command(self._program))
            self.address = self._transport.address  # of the one phone there is, known only now
            if done.status:
                raise DeviceError(done.reason)
            return {**self._tool.parse_version(done.stdout + done.stderr), **self._transport.about()}
        except (ConnectionLostError, DeviceGoneError):
            raise
        except DeviceError as error:
            raise DeviceGoneError(f"device {self.name!r}: {self._program}: {error}; {self.install}") from None

    def run(self, path: Path, timing: Timing) -> RunTimes:
        """See `Device`."""
        network = self._build(path, self._transport.send(path))
        command = list(self._tool.command(self._program, network, timing, self._transport.folder))
        pinned = [] if self._cores is None else ["taskset", f"{sum(1 << core for core in self._cores):x}"]
        command = [*pinned, *command]
        before = self._transport.state()
        log = f"{self._transport.folder}/power" if "power_mw" in before else None
        times = self._parse(self._run(metered(command, log) if log else command, timing.timeout_s))
        facts = {**times.facts, **self._transport.state(), **({"before": before} if before else {})}
        power = run_power_mw(self._transport.run(["cat", log]).stdout) if log else None
        return replace(times, facts=facts if power is None else {**facts, "run_power_mw": power})

    def _build(self, path: Path, network: str) -> str:
        """What the tool runs in place of a network's file, built at its first use; the file itself for most tools."""
        try:
            stat = path.stat()
        except OSError as error:
            raise DeviceError(f"{path}: {error.strerror}") from None
        folder = self._transport.folder
        key = (folder, network, stat.st_mtime_ns, stat.st_size)  # a connection that is opened anew has a new folder
        if key not in self._built:
            built = f"{folder}/built{self._num_built}"
            command = self._tool.build_command(self._program, network, built, folder)
            if command is None:
                return network
            self._num_built += 1
            done = self._run(command, BUILD_TIMEOUT_S)
            if done.status:
                self._parse(done)
            while len(self._built) >= MAX_COPIES:
                self._transport.run(["rm", "-f", self._built.popitem(last=False)[1]])
            self._built[key] = built
        self._built.move_to_end(key)
        return self._built[key]

    def _run(self, command: Sequence[str], timeout_s: float) -> Finished:
        limit = ["timeout", "-s", "KILL", str(int(timeout_s) + 5)]  # it ends also if we are gone
        return self._transport.run([*limit, *command], timeout_s=timeout_s)

    def _parse(self, done: Finished) -> RunTimes:
        try:
            times = self._tool.parse(f"{done.stdout}\n{done.stderr}")
            if done.status:
                raise DeviceError(f"it ended with status {done.status}: {done.reason}")
        except DeviceError as error:
            number = done.status - 128  # as a shell tells it
            killed = f"; it was ended by {signal.Signals(number).name}" if number in set(signal.Signals) else ""
            hint = " (out of memory, or somebody killed it)" if number == signal.SIGKILL else ""
            raise DeviceError(f"device {self.name!r}: {self._tool.runtime}: {error}{killed}{hint}") from None
        return times

    def check(self) -> Iterator[Check]:
        """See `Device`."""
        yield from (checks := list(self._transport.check()))
        if checks[0].passed:  # reached
            yield from super().check()

    def close(self) -> None:
        """See `Device`."""
        self._transport.close()
