"""The devices that children are measured on: a transport times a runtime each, described by one YAML file."""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from hwnas.config import check, read_yaml
from hwnas.devices.base import Device
from hwnas.devices.spec import DeviceSpec
from hwnas.errors import InputError

__all__ = ["Device", "DeviceSpec", "device_files", "device_name", "load_device", "load_spec", "user_folder"]


def user_folder() -> Path:
    """Where `hwnas devices add` puts files: `$XDG_CONFIG_HOME/hwnas/devices`, or `~/.config/hwnas/devices`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hwnas" / "devices"


def device_files(run_devices: Path | None = None) -> dict[str, Path]:
    """The known devices' files by name: a run's own hide the user's, which hide those of the catalogue.

    Args:
        run_devices: the run's folder of device files.
    """
    folders = [Path(str(resources.files("hwnas.devices").joinpath("catalog"))), user_folder()]
    if run_devices is not None:
        folders.append(run_devices)
    found = {file.stem: file for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def device_name(name_or_path: str | Path) -> str:
    """The name of a device, given so or by its YAML file, which names it."""
    path = Path(name_or_path)
    return path.stem if path.suffix in (".yaml", ".yml") else str(name_or_path)


def load_spec(name_or_path: str | Path, run_devices: Path | None = None) -> tuple[str, DeviceSpec]:
    """A device's name and description, by its name (`cpu`) or from a YAML file, which names it.

    Args:
        name_or_path: one of `device_files()`, or a path that ends in .yaml or .yml.
        run_devices: a folder of further device files.

    Raises:
        InputError: unknown name, or a mistake in the file (with file, line, key, rule and value).
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = _find(str(name_or_path), run_devices)
    content, lines = _read(path, run_devices, ())
    return device_name(path), check(DeviceSpec, content, source=str(path), lines=lines)


def _find(name: str, run_devices: Path | None) -> Path:
    files = device_files(run_devices)
    if name not in files:
        close = get_close_matches(name, files, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "add yours with `hwnas devices add`"
        raise InputError(f"unknown device {name!r}: not one of {', '.join(files)}; {hint}")
    return files[name]


def _read(path: Path, run_devices: Path | None, above: tuple[Path, ...]) -> tuple[Any, dict[str, int]]:
    """The content of a device's file over that of its `base`, and the lines of its own keys."""
    content, lines = read_yaml(path)
    if isinstance(content, dict) and str(content.get("runtime")).endswith(".py"):
        content["runtime"] = str(path.parent / content["runtime"])
    if isinstance(content, dict) and "base" in content:
        base = content.pop("base")
        if not isinstance(base, str):
            raise InputError(f"{path}:{lines['base']}: base: must be the name of a device, not {base!r}")
        below = _find(base, run_devices)
        if below == path:  # a file may build on the one that it hides
            below = device_files().get(base, path)
        if below in (path, *above):
            raise InputError(f"{path}:{lines['base']}: base: {base} builds on itself")
        inherited, _ = _read(below, run_devices, (*above, path))
        content = {**inherited, **content}
    return content, lines


def load_device(name_or_path: str | Path, run_devices: Path | None = None) -> Device:
    """A device by its name or from a YAML file (see `load_spec`).

    Nothing is started: that the device can be reached shows when it is first used.

    Raises:
        InputError: unknown name, or a mistake in the file.
    """
    name, spec = load_spec(name_or_path, run_devices)
    return spec.open(name)
