"""`hwnas devices`: the devices that can be named."""

from __future__ import annotations

from typing import Any

import click

from hwnas.cli.base import JSON, RUN, cli, command, finish, next_line, parse_changes, table
from hwnas.errors import DeviceError, printable


@cli.group(invoke_without_command=True)
@RUN
@JSON
@click.pass_context
def devices(context: click.Context, run: str | None, as_json: bool) -> None:
    """List the devices that can be named; show, add, remove or check one."""
    if context.invoked_subcommand is not None:
        return
    from hwnas import api

    found = api.devices(run)
    columns = ["device", "", "reached by", "runtime", "files", "precision", "predictor"]
    rows = [
        [d["name"], d["description"], d["transport"], d["runtime"], d["accepts"], d["precision"],
         _predictor_at_hand(d)]
        for d in found
    ]  # fmt: skip
    finish(as_json, {"devices": found}, table("devices", columns, rows))


def _predictor_at_hand(device: dict[str, Any]) -> str:
    """What predicts a device without measuring: the run's own, a published model with its typical error, nothing."""
    published = device["published"]
    if device["predictor"] or published is None:
        return "in this run" if device["predictor"] else ""
    other = f" of {published['machine']}" if published["stands_in"] else ""
    return f"published{other}, ±{published['typical_error_pct']:.0f}%"


NAME = click.argument("name")


@command(RUN, NAME, JSON, group=devices)
def show(run: str | None, name: str, as_json: bool) -> None:
    """Show all that a device's file says."""
    import yaml

    from hwnas import api

    document = api.show_device(name, run)
    told = {key: value for key, value in document.items() if value not in (None, [], {}, "")}
    install = told.pop("install", None)
    lines = [yaml.safe_dump(told, sort_keys=False, width=110).rstrip()]
    finish(as_json, document, *lines, *([f"\nto install there:\n{install.rstrip()}"] if install else []))


@command(
    NAME,
    click.option("--base", required=True, metavar="DEVICE", help="The device whose settings it takes over."),
    click.option("--host", metavar="[USER@]HOST", help="Of ssh: the address, or a host of ~/.ssh/config."),
    click.option("--port", type=int, help="Of ssh."),
    click.option("--serial", help="Of adb: the phone, as `adb devices` prints it."),
    click.option("-o", "pairs", multiple=True, metavar="KEY=VALUE", help="Any key of the file: -o timing.threads=2."),
    click.option("--overwrite", is_flag=True, help="Replace a device of this name that you added before."),
    JSON,
    group=devices,
)
def add(
    name: str,
    base: str,
    host: str | None,
    port: int | None,
    serial: str | None,
    pairs: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Describe a device of your own, for all runs."""
    from hwnas import api

    given = {"host": host, "port": port, "serial": serial}
    changes = {key: value for key, value in given.items() if value is not None} | parse_changes(pairs, None)
    path = api.add_device(name, base, changes, overwrite=overwrite)
    finish(as_json, {"device": name, "file": str(path)}, f"added: {path}", f"next: hwnas devices check {name}")


@command(NAME, JSON, group=devices)
def remove(name: str, as_json: bool) -> None:
    """Forget a device that you added."""
    from hwnas import api

    path = api.remove_device(name)
    finish(as_json, {"device": name, "file": str(path)}, f"removed: {path}")


@command(
    RUN,
    NAME,
    click.option("--seconds", default=5.0, show_default=True, help="How long to measure."),
    JSON,
    group=devices,
)
def check(run: str | None, name: str, seconds: float, as_json: bool) -> None:
    """Check a device step by step: reached, room, runtime, state, a short measurement."""
    from hwnas import api
    from hwnas.run import Run

    done = []
    for step in api.check_device(name, run, duration_s=seconds):
        done.append(step)
        if not as_json:
            mark = "pass" if step.passed else "FAIL"
            finish(False, {}, printable(f"{mark}  {step.step}: {step.found}"))
            if step.remedy is not None and step.remedy != step.found:
                finish(False, {}, printable(f"      {step.remedy}"))
    failed = [step for step in done if not step.passed]
    steps = [{"step": s.step, "passed": s.passed, "found": s.found, "remedy": s.remedy} for s in done]
    if as_json:
        finish(True, {"device": name, "passed": not failed, "steps": steps})
    if failed:
        raise DeviceError(f"device {name!r}: {failed[0].step}: {failed[0].found}")
    if not as_json:
        finish(False, {}, next_line("profile", Run.locate(run), "--device", name))
