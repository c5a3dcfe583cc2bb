"""`hwnas export` and `hwnas verify`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from hwnas.cli.base import JSON, RUN, command, finish, notice, table
from hwnas.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table


@command(
    RUN,
    click.option("--format", "formats", metavar="FORMAT", multiple=True,
                 help="Of the file [default: what the device takes, or onnx]. May repeat: a bundle each."),
    click.option("--precision", help="fp32, fp16, int8 [default: what the device takes, or fp32]."),
    click.option("--max-accuracy-drop", type=float, metavar="SHARE",
                 help="Of an int8 file on the validation images, 0.01 for a point: more stays in float32 until then."),
    click.option("--result", metavar="NAME", help="Of a search [default: the last one]."),
    click.option("--all", "every", is_flag=True, help="The winner for each device of the last search."),
    click.option("--arch", metavar="smallest|biggest|FILE", help="A child of your own, in place of a search's."),
    click.option("--device", metavar="NAME", help="Measure the file there [default: the search's device]."),
    click.option("--batch", metavar="N|any", default="1", show_default=True, help="Images that one call takes."),
    click.option("--pixels", is_flag=True, help="The file takes pixels (uint8), and normalises them itself."),
    click.option("--output", metavar="FOLDER|ZIP", help="The bundle [default: in the run folder]."),
    JSON,
)  # fmt: skip
def export(
    run: str | None,
    formats: tuple[str, ...],
    precision: str | None,
    max_accuracy_drop: float | None,
    result: str | None,
    every: bool,
    arch: str | None,
    device: str | None,
    output: str | None,
    batch: str,
    pixels: bool,
    as_json: bool,
) -> None:
    """Write a child as a deployable bundle, checked against its parent."""
    from hwnas import api

    if every and (result or arch or device or output):
        raise InputError(
            "--all exports every winner into the run folder: leave out --result, --arch, --device, --output"
        )
    if batch != "any" and not batch.isdecimal():
        raise InputError(f"--batch {batch!r} is not a number of images: give 1 or more, or any")
    made = [
        bundle
        for name in (api.last_results(run) if every else [result])
        for bundle in api.export_all(
            formats,
            run,
            precision=precision,
            max_accuracy_drop=max_accuracy_drop,
            result=name,
            arch=arch,
            device=device,
            output=output,
            batch="any" if batch == "any" else int(batch),
            pixels=pixels,
            notice=notice,
        )
    ]
    documents = [{"bundle": str(path), **manifest} for path, manifest in made]
    shown = [_show_bundle(path, manifest) for path, manifest in made]
    verify_it = "next: " + shlex.join(["hwnas", "verify", str(made[-1][0])])
    finish(as_json, documents[0] if len(made) == 1 else {"bundles": documents}, *shown, verify_it)


def _show_bundle(path: object, manifest: dict[str, Any]) -> Table:
    file, accuracy, parity, latency = (manifest[key] for key in ("file", "accuracy", "parity", "latency"))
    kept = f", {len(file['float32_layers'])} layers in float32" if file["float32_layers"] else ""
    ms = "not measured"
    if latency is not None and latency["measured_ms"] is None:
        ms = (
            f"{latency['predicted_ms']:.3f} ± {latency['std_ms']:.3f} ms predicted on {latency['device']}, not measured"
        )
    elif latency is not None:
        ms = f"{latency['measured_ms']:.3f} ms on {latency['device']}"
    rows = [
        ["bundle", str(path)],
        ["file", f"{file['name']}, {file['precision']}{kept} ({file['size_bytes']:,} bytes)"],
        ["architecture", manifest["architecture_text"]],
        ["accuracy", f"{accuracy['value']:.2%} of {accuracy['num_images']:,} {accuracy['split']} images"
                     f" (in {accuracy['computed_by']})"],
        ["parity", f"logits within {parity['max_abs_diff']:.1e} (correlation {parity['correlation']:.5f}), top class "
                   f"agrees on {parity['top1_agreement']:.0%} of {parity['num_images']} images"
                   f" (in {parity['runtime']})"],
        ["latency", ms],
    ]  # fmt: skip
    return table(f"exported: {file['format']}", ["", ""], rows)


@command(click.argument("bundle", metavar="FOLDER|ZIP"), JSON)
def verify(bundle: str, as_json: bool) -> None:
    """Check a bundle: every file is as it was exported, and the network still computes the same."""
    from hwnas import api

    found = api.verify(bundle)
    manifest, parity = found["manifest"], found["parity"]
    files = manifest["files"]
    rows = [
        ["manifest", f"schema {manifest['schema']}, made by hwnas {manifest['versions']['hwnas']} on "
                     f"{manifest['created']}"],
        ["files", f"{len(files)} as exported ({sum(file['size_bytes'] for file in files):,} bytes)"],
        ["network", f"runs in {parity['runtime']}: logits within {parity['max_abs_diff']:.1e} of those at export, for "
                    f"{parity['num_images']} images"],
        ["sha256", f"{found['sha256']} (of {bundle}'s manifest.json: compare it with what its maker tells you)"],
    ]  # fmt: skip
    finish(as_json, found, table(f"verified: {bundle}", ["", ""], rows))
