"""`hwnas devices`: what is known by name, and a user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from hwnas.config import put
from hwnas.devices import Device, device_files, load_device, load_spec, user_folder
from hwnas.devices.base import Check
from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.measuring.diagnose import diagnose
from hwnas.run import Run, published_model
from hwnas.space import SearchSpace


def devices(run: str | Path | None = None) -> list[dict[str, Any]]:
    """The devices that can be named, and whether the run has a predictor for them, or hwnas a published model.

    Raises:
        InputError: a mistake in a device's file.
    """
    found = Run.find(run)
    listed = []
    for name, path in device_files(_own_devices(run)).items():
        _, spec = load_spec(path, _own_devices(run))
        model = published_model(spec.open(name))
        listed.append(
            {
                "name": name,
                "description": spec.description,
                "transport": spec.transport,
                "runtime": spec.runs,
                "accepts": spec.accepts,
                "precision": spec.precision,
                "file": str(path),
                "predictor": found is not None and found.predictor_path(name).is_file(),
                "published": model
                and {
                    "machine": model.machine,
                    "stands_in": name in model.stands_in_for,
                    "typical_error_pct": model.statistics.left_out_pct,
                },
            }
        )
    return listed


def show_device(device: str | Path, run: str | Path | None = None) -> dict[str, Any]:
    """All that a device's file says, with what it takes over from others, as plain values.

    Under `published` is what its published model is, None without one.

    Raises:
        InputError: unknown device, or a mistake in its file.
    """
    name, spec = load_spec(device, _own_devices(run))
    plain: dict[str, Any] = json.loads(json.dumps(asdict(spec), default=str))
    model = published_model(spec.open(name))
    published = model and {
        "machine": model.machine,
        "setting": model.setting,
        "fitted_to": f"{model.num_networks} {model.what}",
        "typical_error_pct": model.statistics.left_out_pct,
        "sources": [f"{one.table}, {one.url} ({one.licence})" for one in model.sources],
        "note": model.note,
    }
    return {"name": name, **plain, "published": published}


def add_device(name: str, base: str, changes: dict[str, Any] | None = None, *, overwrite: bool = False) -> Path:
    """Describe a device of your own: another one with some keys changed. It is known to all runs from now on.

    Args:
        name: what you call it.
        base: the device whose keys it takes over.
        changes: keys of `DeviceSpec`, such as `{"host": "me@10.0.0.7"}`; `timing.repeats` for those below others.
        overwrite: whether a device of this name that you added before is replaced.

    Returns:
        The file, in `hwnas.devices.user_folder()`.

    Raises:
        InputError: a bad name, an unknown base or key, a device of this name that is there already.
    """
    path = _device_path(name)
    if path.exists() and not overwrite:
        raise InputError(
            f"{path}: is there already: remove it with `hwnas devices remove {name}`, or take another name"
        )
    content: dict[str, Any] = {"base": base}
    for key, value in (changes or {}).items():
        put(content, key, value)
    with TemporaryDirectory() as folder:  # a mistake is found before anything is replaced
        trial = Path(folder) / path.name
        write_text(trial, text := yaml.safe_dump(content, sort_keys=False))
        try:
            load_spec(trial)
        except InputError as error:
            raise InputError(str(error).replace(str(trial), name)) from None
    write_text(path, text)
    return path


def remove_device(name: str) -> Path:
    """Forget a device that you added.

    Returns:
        The file that was there.

    Raises:
        InputError: you added none of this name.
    """
    path = _device_path(name)
    if not path.exists():
        raise InputError(f"device {name!r}: not one that you added: there is no {path}")
    path.unlink()
    return path


def check_device(device: str | Path, run: str | Path | None = None, *, duration_s: float = 5.0) -> Iterator[Check]:
    """Look whether a device can be measured on, step by step; measures the reference child of the run's space.

    Args:
        device: a name or file.
        run: the run folder; without one, the space `tiny` is used.
        duration_s: of the measurement.

    Yields:
        One `Check` a step; those after one that failed for good are left out.

    Raises:
        InputError: unknown device, or a mistake in its file.
    """
    found = Run.find(run)
    space = SearchSpace.load("tiny") if found is None else found.space
    with load_device(device, _own_devices(run)) as target:
        yield from diagnose(target, space, duration_s)


def open_device(name: str | Path, run: Run) -> Device:
    """A device by name or file, as a run knows it; nothing is started.

    Raises:
        InputError: unknown device, or a mistake in its file.
    """
    return load_device(name, _own_devices(run.path))


def _own_devices(run: str | Path | None) -> Path:
    return Run.locate(run) / "devices"


def _device_path(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII):
        raise InputError(f"device {name!r}: a name has letters, digits, dots, dashes and underscores only")
    return user_folder() / f"{name}.yaml"
