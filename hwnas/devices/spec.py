"""A device's file."""

from __future__ import annotations

import pkgutil
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, with_config

from hwnas.devices import worker
from hwnas.devices.base import Device, Timing
from hwnas.devices.tool_device import ToolDevice
from hwnas.devices.transports.base import Transport
from hwnas.devices.worker_device import WorkerDevice, runtime_file

# The keys that only some transports have.
_OF_TRANSPORT = {"ssh": ("host", "port", "ssh_config"), "adb": ("serial", "model"), "host": ()}


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What a device's file says: how the machine is reached, and what runs the networks there.

    Commands are split into words as a shell would, and passed on as these words: no pipes, no variables.

    Attributes:
        transport: how the machine is reached: `host` is this one.
        host: of `ssh`: a host of ~/.ssh/config, or [user@]address; by default the device's name.
        port: of `ssh`, where ~/.ssh/config does not say.
        ssh_config: of `ssh`: a file in place of ~/.ssh/config.
        serial: of `adb`, as `adb devices` prints it; by default the one phone there is, of `model`.
        model: of `adb`: the phone's ro.product.model, in which `*` stands for anything: `Pixel 8`, `SM-N97*`.
        runtime: a runtime that Python drives there: a file in `hwnas/devices/runtimes`, or the path of one like these,
            `my_runtime.py`, relative to the device's file.
        tool: or a program that times networks there: a file in `hwnas/devices/tools`.
        program: where the tool is, if not at its usual place.
        python: the command that runs Python there.
        precision: of the arithmetic.
        options: of the runtime or the tool.
        cores: to run on; `auto` takes the least busy ones, or leaves it to the tool.
        timing: the keys of `Timing` that differ from its defaults.
        prepare: commands that bring the machine into the state to measure in: power mode, clocks.
        undo: commands that bring it back.
        folder: where temporary files go there.
        install: what to install there, for people.
        description: a few words for lists of devices.
    """

    transport: Literal["host", "ssh", "adb"]
    host: str | None = None
    port: int | None = None
    ssh_config: Path | None = None
    serial: str | None = None
    model: str | None = None
    runtime: str | None = None
    tool: str | None = None
    program: str | None = None
    python: str | None = None
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)
    cores: Literal["auto"] | tuple[int, ...] = "auto"
    timing: Timing = Timing()  # noqa: RUF009 - frozen
    prepare: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()
    folder: str | None = None
    install: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if (self.runtime is None) == (self.tool is None):
            raise ValueError("a device has either a runtime, which Python drives, or a tool, a program that times")
        of_tool, of_runtime = ("program",), ("python",)
        misplaced = [
            key
            for transport, keys in _OF_TRANSPORT.items()
            for key in keys
            if transport != self.transport and getattr(self, key) is not None
        ]
        if misplaced:
            raise ValueError(f"{misplaced[0]}: transport {self.transport} has no such key")
        for key in of_tool if self.tool is None else of_runtime:
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: is only for devices with a {'tool' if self.tool is None else 'runtime'}")
        for key in ("host", "serial"):
            if (getattr(self, key) or "").startswith("-"):
                raise ValueError(f"{key}={getattr(self, key)!r}: must not start with -, which begins an option")
        known = _modules("tools" if self.runtime is None else "runtimes")
        what, name = ("tool", self.tool) if self.runtime is None else ("runtime", self.runtime)
        if str(name).endswith(".py"):
            if what == "tool" or not Path(str(name)).is_file():
                raise ValueError(f"{what} {name!r}: there is no such file")
        elif name not in known:
            raise ValueError(f"{what} {name!r} is not one of {', '.join(known)}")
        precisions = self._kind().precisions
        if self.precision not in precisions:
            raise ValueError(f"precision {self.precision!r}: {name} knows {', '.join(precisions)}")

    @property
    def runs(self) -> str:
        """The runtime, for lists of devices."""
        return f"{self._kind().runtime} ({self.tool})" if self.runtime is None else Path(self.runtime).stem

    @property
    def accepts(self) -> str:
        """The format of its files."""
        return str(self._kind().accepts)

    def _kind(self) -> Any:
        """The runtime's or the tool's class."""
        if self.runtime is not None:
            return worker.load_class(str(runtime_file(self.runtime)))
        return import_module(f"hwnas.devices.tools.{self.tool}").Program

    def open(self, name: str) -> Device:
        """The device."""
        cores = None if self.cores == "auto" else self.cores
        transport = self._transport(name)
        if self.runtime is None:
            tool = self._kind()(self.precision, **self.options)
            return ToolDevice(name, transport, tool, program=self.program, timing=self.timing, cores=cores)
        return WorkerDevice(
            name,
            transport,
            self.runtime,
            precision=self.precision,
            options=self.options,
            timing=self.timing,
            cores=cores,
            python=None if self.python is None else tuple(shlex.split(self.python)),
        )

    def _transport(self, name: str) -> Transport:
        common: dict[str, Any] = {
            "prepare": [shlex.split(command) for command in self.prepare],
            "undo": [shlex.split(command) for command in self.undo],
            "folder": self.folder,
        }
        if self.transport == "ssh":
            from hwnas.devices.transports.ssh import Ssh

            return Ssh(self.host or name, port=self.port, config=self.ssh_config, **common)
        if self.transport == "adb":
            from hwnas.devices.transports.adb import Adb

            return Adb(self.serial, model=self.model, **common)
        from hwnas.devices.transports.host import Host

        return Host(**common)


def _modules(room: str) -> list[str]:
    """The names of the modules in a folder beside this one, but for its base."""
    package = import_module(f"hwnas.devices.{room}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")
