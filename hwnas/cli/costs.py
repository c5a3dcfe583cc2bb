"""`hwnas cost` and `hwnas space`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hwnas.cli.base import JSON, RUN, SEED, command, finish, table
from hwnas.cli.limits import limit_options

if TYPE_CHECKING:
    from hwnas.searching.limits import Limit


@command(
    RUN,
    click.option("--space", metavar="NAME|FILE", help="The space [default: the run's]."),
    click.option("--arch", required=True, metavar="smallest|biggest|FILE", help="The child."),
    JSON,
)
def cost(run: str | None, space: str | None, arch: str, as_json: bool) -> None:
    """Multiply-adds, parameters, memory, file size and layers of a child."""
    from hwnas import api

    document = api.cost(arch, space=space, run=run)
    rows = [
        [layer["name"], layer["kind"], layer["in_channels"], layer["out_channels"], layer["kernel"], layer["stride"],
         layer["in_size"], layer["out_size"], layer["macs"], layer["params"]]
        for layer in document["layers"]
    ]  # fmt: skip
    columns = ["layer", "kind", "in", "out", "kernel", "stride", "in px", "out px", "MACs", "params"]
    total = f"{document['macs'] / 1e6:,.2f} M MACs, {document['params'] / 1e6:,.3f} M parameters"
    outside = "" if document["in_space"] else f"; not a member of space {document['space']}"
    memory = (
        f"in float32: {document['peak_activation_bytes'] / 1e6:,.2f} MB of activations at their peak, "
        f"{document['onnx_file_bytes'] / 1e6:,.2f} MB as an ONNX file"
    )
    finish(as_json, document, table(document["architecture_text"], columns, rows), total + outside, memory)


@command(
    RUN,
    click.option("--space", metavar="NAME|FILE", help="The space [default: the run's]."),
    limit_options,
    click.option("--confidence", default=0.95, show_default=True, help="With which a predicted cost keeps its limit."),
    click.option("--samples", default=100_000, show_default=True, help="Random children to look at."),
    SEED,
    JSON,
)
def space(
    run: str | None,
    space: str | None,
    devices: tuple[str, ...],
    limits: tuple[Limit, ...],
    confidence: float,
    samples: int,
    seed: int,
    as_json: bool,
) -> None:
    """What the children of a space cost, and how many of them keep some limits."""
    from hwnas import api
    from hwnas.searching.limits import show_cost

    document = api.space_report(
        space, run, devices=devices, limits=limits, confidence=confidence, samples=samples, seed=seed
    )
    names = {"macs": "M MACs", "params": "M parameters", "size": "MB of ONNX file, float32",
             "memory": "MB of activations, float32", "latency": "ms", "energy": "mJ"}  # fmt: skip
    shown = ("0.1", "0.5", "0.9")
    rows: list[list[str]] = []
    for cost in document["costs"]:
        values = [cost["least"]["value"], *(cost["quantiles"][q] for q in shown), cost["greatest"]["value"]]
        factor = 1e6 if cost["kind"] in ("macs", "params") else 1
        name = names[cost["kind"]] + (f" on {cost['device']}" if cost["device"] else "")
        rows.append([name, *(f"{value / factor:.4g}" for value in values)])
    title = f"space {document['space']}: {document['size']:.3g} children, of which {samples:,} random ones"
    tables = [table(title, ["", "smallest", "10%", "median", "90%", "biggest"], rows)]
    kept = [
        [limit.describe(), *_show_share(share, f"the least is {show_cost(share['least'], limit.unit)}")]
        for limit, share in zip(limits, document["limits"], strict=True)
    ]
    if len(limits) > 1:
        kept.append(["all of them", *_show_share(document["all"], "no child found that keeps all")])
    if kept:
        tables.append(table("kept by", ["limit", "children", "95% interval"], kept))
    finish(as_json, document, *tables)


def _show_share(share: dict[str, Any], why_none: str) -> tuple[str, str]:
    if not share["possible"]:
        return "none", why_none
    return f"{share['share']:.2%}", f"{share['low']:.3%} to {share['high']:.3%}"
