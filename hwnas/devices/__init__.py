"""The devices that children are measured on: a transport and a runtime each, described by one YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, with_config

from hwnas.config import check, read_yaml
from hwnas.devices.base import Device, Timing
from hwnas.errors import InputError

__all__ = ["Device", "DeviceSpec", "device_names", "load_device"]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device's file.

    Attributes:
        transport: how the machine is reached: `host` is this one.
        runtime: what runs the networks there.
        precision: of the arithmetic.
        cores: to run on; `auto` takes the least busy ones.
        timing: the keys of `Timing` that differ from its defaults.
        description: a few words for lists of devices.
    """

    transport: Literal["host"]
    runtime: Literal["onnxruntime"]
    precision: Literal["fp32"] = "fp32"
    cores: Literal["auto"] | tuple[int, ...] = "auto"
    timing: Timing = Timing()  # noqa: RUF009 - frozen
    description: str = ""

    def open(self, name: str) -> Device:
        """The device."""
        from hwnas.devices.host import Host
        from hwnas.devices.worker_device import WorkerDevice

        cores = None if self.cores == "auto" else self.cores
        return WorkerDevice(name, Host(), self.runtime, precision=self.precision, timing=self.timing, cores=cores)


def _files(run_devices: Path | None) -> dict[str, Path]:
    """The known device files by name; a run's own hide those of the catalogue."""
    folders = [Path(str(resources.files("hwnas.devices").joinpath("catalog")))]
    if run_devices is not None and run_devices.is_dir():
        folders.append(run_devices)
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def device_names(run_devices: Path | None = None) -> tuple[str, ...]:
    """The devices known by name: those that come with hwnas, and the files of a run's own folder."""
    return tuple(sorted(_files(run_devices)))


def load_device(name_or_path: str | Path, run_devices: Path | None = None) -> Device:
    """A device by its name (`cpu`) or from a YAML file, which names it.

    Nothing is started: that the device can be reached shows when it is first used.

    Args:
        name_or_path: one of `device_names()`, or a path that ends in .yaml or .yml.
        run_devices: a folder of further device files.

    Raises:
        InputError: unknown name, or a mistake in the file (with file, line, key, rule and value).
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        files = _files(run_devices)
        if str(name_or_path) not in files:
            close = get_close_matches(str(name_or_path), files, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "describe your own in a .yaml file"
            raise InputError(f"unknown device {str(name_or_path)!r}: not one of {', '.join(sorted(files))}; {hint}")
        path = files[str(name_or_path)]
    content, lines = read_yaml(path)
    return check(DeviceSpec, content, source=str(path), lines=lines).open(path.stem)
