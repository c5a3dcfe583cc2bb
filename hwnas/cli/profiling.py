"""`hwnas profile`, `hwnas fit` and `hwnas predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from hwnas.cli.base import DEVICE, JSON, RUN, SEED, command, finish, next_line, notice, table
from hwnas.errors import DeviceError

if TYPE_CHECKING:
    from rich.table import Table

    from hwnas.api import Profile

DISTURBED = 0.5  # share of children from which the reference may never have been seen at its usual speed
BUSY = 0.3  # processors kept busy by others, from which latencies are off by more than repeating them shows


@command(
    RUN,
    click.option("--device", "devices", metavar="NAME", multiple=True, required=True,
                 help="A device's name or file: see `hwnas devices`. May repeat: all at the same time."),
    click.option("--children", default=60, show_default=True, help="Children to fit the predictor to."),
    click.option("--holdout", default=0, show_default=True, help="Fresh random children to test it on."),
    click.option("--space", metavar="NAME|FILE", help="To profile before training, in a new run folder."),
    click.option("--kind", default="auto", show_default=True, help="Kind of predictor."),
    SEED,
    JSON,
)  # fmt: skip
def profile(
    run: str | None,
    devices: tuple[str, ...],
    children: int,
    holdout: int,
    space: str | None,
    kind: str,
    seed: int,
    as_json: bool,
) -> None:
    """Measure children on devices, and fit their latency predictors."""
    from hwnas import api
    from hwnas.progress import reporting

    with reporting(*(f"profile {device}" for device in devices)) as reports:
        made = api.profile_all(
            devices, run, children=children, holdout=holdout, space=space, kind=kind, seed=seed, reports=reports
        )
    profiles = [one for one in made if not isinstance(one, DeviceError)]
    errors = [one for one in made if isinstance(one, DeviceError)]
    if profiles:
        _show_profiles(profiles, run, as_json, devices[made.index(profiles[0])])
    for error in errors[:-1]:
        notice(f"hwnas: {error}")
    if errors:
        raise errors[-1]


@command(RUN, DEVICE, click.option("--kind", default="auto", show_default=True, help="Kind of predictor."), JSON)
def fit(run: str | None, device: str, kind: str, as_json: bool) -> None:
    """Fit a device's predictor anew to what was measured."""
    from hwnas import api

    _show_profiles([api.fit(device, run, kind=kind)], run, as_json, device)


def _show_profiles(profiles: Sequence[Profile], run: str | None, as_json: bool, device: str) -> None:
    from hwnas.run import Run

    columns = ["tested on", "children", "Spearman", "mean error", "within 5%", "within 10%", "in 90% interval"]
    shown: list[Table | str] = []
    for made in profiles:
        rows = [
            [name, r.num, f"{r.spearman:.3f}", f"{r.mape_pct:.1f}%", f"{r.within_5_pct:.0f}%",
             f"{r.within_10_pct:.0f}%", f"{r.coverage_90:.0f}%"]
            for name, r in (("cross-validation", made.cross_validation), ("held out", made.holdout))
            if r is not None
        ]  # fmt: skip
        counts = (
            f"{made.num_children} children fitted, {made.num_failed} failed, {made.num_rejected} rejected, "
            f"{made.num_unstable} of those used were disturbed"
        )
        shown += [
            table(f"latency predictor of {made.device} ({made.predictor.kind})", columns, rows),
            counts + (f"; {made.choice}" if made.choice else ""),
            f"a child: {made.write_s:.2g} s to write, {made.run_s:.2g} s to measure",
            f"predicted against measured: {made.plots[0]}",
        ]
        if made.energy is not None:
            shown.append("it tells its energy: a predictor of that was fitted, too; see --energy-mj of `hwnas search`")
        if made.others_busy is not None and made.others_busy > BUSY:
            notice(
                f"{made.device}: other programs kept {made.others_busy:.1f} processors busy meanwhile, which can shift "
                "latencies by some percent: end them and profile again where that matters"
            )
        elif made.num_unstable > DISTURBED * made.num_children:
            notice(
                f"{made.device}: was disturbed while most children were measured: they agree with each other, but all "
                "may be off by the same few percent: profile again at a quieter time where that matters"
            )
    document = profiles[0].to_dict() if len(profiles) == 1 else {"profiles": [made.to_dict() for made in profiles]}
    finish(
        as_json,
        document,
        *shown,
        next_line("search", Run.locate(run), "--device", device, "--latency-ms", "..."),
    )


@command(
    RUN,
    DEVICE,
    click.option("--arch", "archs", multiple=True, required=True, metavar="smallest|biggest|FILE", help="May repeat."),
    click.option("--layers", is_flag=True, help="Also where the milliseconds go, layer by layer."),
    JSON,
)
def predict(run: str | None, device: str, archs: tuple[str, ...], layers: bool, as_json: bool) -> None:
    """Predict the latency of children on a device; perhaps where the milliseconds go."""
    from hwnas import api

    found = api.predict(device, archs, run, layers=layers)
    rows = [[name, f"{p['predicted_ms']:.4f}", f"{p['std_ms']:.4f}"] for name, p in zip(archs, found, strict=True)]
    columns = ["child", "predicted ms", "standard deviation"]
    shown: list[Table | str] = [table(f"on {device}", columns, rows)]
    if source := found[0]["source"]:
        shown.append(source)
    if layers:
        titles = (f"{name}: {p['architecture_text']}" for name, p in zip(archs, found, strict=True))
        shown += [_show_layers(title, p["layers"]) for title, p in zip(titles, found, strict=True)]
    finish(as_json, {"device": device, "predictions": found}, *shown)


def _show_layers(title: str, layers: Sequence[dict[str, Any]]) -> Table:
    """Each layer with its milliseconds, its share, and a bar as long as that."""
    total, most = sum(layer["ms"] for layer in layers), max(layer["ms"] for layer in layers)
    rows = []
    for layer in layers:
        what = layer["kind"].replace("_", " ")
        if layer["kind"] == "conv":
            what = f"{layer['kernel']}x{layer['kernel']}{' depthwise' if layer['groups'] > 1 else ''}"
        size = f"{layer['in_channels']} > {layer['out_channels']}, {layer['out_size']} px"
        bar = "█" * round(40 * layer["ms"] / most)
        rows.append([layer["name"], what, size, f"{layer['ms']:.4f}", f"{layer['ms'] / total:.1%}", bar])
    return table(title, ["layer", "", "channels", "ms", "share", ""], rows)
