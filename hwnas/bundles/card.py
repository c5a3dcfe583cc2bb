"""`README.md` of a bundle, the model card, and the plot in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from hwnas.bundles.manifest import Manifest

PLOT = "front.svg"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 320, 64, 52, 16, 24  # pixels


@dataclass(frozen=True, slots=True)
class Front:
    """What a search found, for the plot.

    Attributes:
        costs: of the children on the front, with `this` among them.
        accuracies: on the validation images, 0 to 1.
        this: index of the child in the bundle.
        cost_name: what the costs are, with their unit.
    """

    costs: tuple[float, ...]
    accuracies: tuple[float, ...]
    this: int
    cost_name: str


def card(manifest: Manifest, front: Front | None, install: str) -> str:
    """The text.

    Args:
        manifest: all of it, but for this file among `files`.
        front: of the search; None for a child that was not searched for.
        install: the packages that `run.py` needs.
    """
    m, how = manifest, manifest.preprocessing
    shorter = f"shorter side to {how.shorter_side}, centre of" if how.shorter_side is not None else "whole image to"
    final = "" if how.size == how.resolution else f", then to {how.resolution} x {how.resolution}"
    inside = ", the last step in the file itself" if m.input.values == "pixels" else ""
    rows = [
        ("file", f"`{m.file.name}`, {m.file.format}, {m.file.precision}, {m.file.size_bytes:,} bytes"),
        ("accuracy", f"{m.accuracy.value:.2%} of {m.accuracy.num_images:,} {m.accuracy.split} images"
                     f" (computed by {m.accuracy.computed_by})"),
        ("latency", _latency(m)),
        ("architecture", f"{m.architecture_text}, of space {m.space}"),
        ("size", f"{m.macs / 1e6:,.2f} M multiply-adds, {m.params / 1e6:,.3f} M parameters"),
        ("checked", f"in {m.parity.runtime}, against the trained network: {m.parity}"),
        ("input", f"`{m.input.name}`, {m.input.dtype} {m.input.layout} {_shape(m.input.shape)}, "
                  f"{m.input.values}"),
        ("preprocessing", f"{'grey' if how.channels == 1 else 'RGB'}; {shorter} {how.size} x {how.size}{final}, "
                          f"bicubic; (pixel / 255 - {list(how.mean)}) / {list(how.std)}{inside}"),
        ("output", f"`{m.output.name}`, {m.output.shape[1]} logits"),
        ("trained on", str(m.training.get("data", "?"))),
        ("limits", "; ".join(_limit(limit) for limit in m.limits) or "none"),
    ]  # fmt: skip
    if m.file.float32_layers:
        rows.insert(1, ("kept in float32", ", ".join(m.file.float32_layers)))
    shown = ", ".join(m.classes[:20]) + (f", ... ({len(m.classes)} in all)" if len(m.classes) > 20 else "")
    parts = [
        f"# {_plain(m.training.get('data', 'image'))} classifier: {_plain(m.architecture_text)}",
        f"Made by hwnas {m.versions['hwnas']} on {m.created[:10]}. All figures are in `manifest.json`.",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {_plain(text)} |" for name, text in rows)]),
        f"Classes: {_plain(shown)}",
    ]
    if front is not None:
        parts.append(
            f"![accuracy against {_plain(front.cost_name)} of the children on the front of the search]({PLOT})\n\n"
            "This child among those that no other child of the search beats in both accuracy and cost."
        )
    parts += [
        f"## Use\n\n    pip install {install} numpy pillow\n    python run.py IMAGE...\n\nWith hwnas installed: "
        "`hwnas verify .` checks every file and runs the network on the images in `check.npz`; in Python, "
        '`hwnas.load_bundle(".").predict(images)`.',
        "## Licences\n\n" + "\n".join(f"- {name}: {_plain(text)}" for name, text in m.licences.items()),
    ]
    return "\n\n".join(parts) + "\n"


def plot(front: Front) -> str:
    """Accuracy against cost as an SVG, this child marked."""
    xs, ys = _scale(front.costs, LEFT, WIDTH - RIGHT), _scale(front.accuracies, HEIGHT - BOTTOM, TOP)
    points = sorted(zip(front.costs, front.accuracies, strict=True))
    steps = " ".join(f"{xs(cost):.1f},{ys(accuracy):.1f}" for cost, accuracy in points)
    dots = "".join(
        f'<circle cx="{xs(cost):.1f}" cy="{ys(accuracy):.1f}" r="4" fill="#7a8ca3"/>' for cost, accuracy in points
    )
    x, y = xs(front.costs[front.this]), ys(front.accuracies[front.this])
    label = f"this child: {front.accuracies[front.this]:.1%} at {front.costs[front.this]:.3g}"
    axes = [_text(xs(cost), HEIGHT - BOTTOM + 18, f"{cost:.3g}", "middle") for cost in _ends(front.costs)]
    axes += [_text(LEFT - 8, ys(value) + 4, f"{value:.1%}", "end") for value in _ends(front.accuracies)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        f'<path d="M{LEFT - 4} {TOP - 6}V{HEIGHT - BOTTOM + 4}H{WIDTH - RIGHT + 6}" fill="none" stroke="#999"/>\n'
        f'<polyline points="{steps}" fill="none" stroke="#b8c4d4" stroke-width="1.5"/>\n{dots}\n'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="#d1495b"/>\n'
        # Fronts rise to the right: here is room.
        f'<circle cx="{LEFT + 14}" cy="{TOP + 4}" r="5" fill="#d1495b"/>\n'
        f"{_text(LEFT + 26, TOP + 8, label, 'start')}\n"
        f"{''.join(axes)}\n"
        f"{_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, front.cost_name, 'middle')}\n"
        f'<g transform="translate(14 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)">'
        f"{_text(0, 0, 'accuracy on the validation images', 'middle')}</g>\n</svg>\n"
    )


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _ends(values: Sequence[float]) -> list[float]:
    return sorted({min(values), max(values)})


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if side is None else str(side) for side in shape) + ")"


def _latency(m: Manifest) -> str:
    if m.latency is None:
        return "not measured"
    found = m.latency
    if found.measured_ms is None:
        return f"{found.predicted_ms or 0:.3f} ± {found.std_ms or 0:.3f} ms predicted on {found.device}; not measured"
    where = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    predicted = "" if found.predicted_ms is None else f" (predicted {found.predicted_ms:.3f} ms)"
    doubt = "" if found.rejection is None else f"; not to be trusted: {found.rejection}"
    return f"{found.measured_ms:.3f} ms on {found.device}{predicted}, in {found.runtime}, {where}{doubt}"


def _limit(limit: Mapping[str, Any]) -> str:
    on = f" on {limit['device']}" if limit.get("device") else ""
    return " ".join(str(part) for part in (limit["kind"], "of at most", limit["value"], limit.get("unit") or "")) + on


def _plain(text: object) -> str:
    """For Markdown: names from outside start no markup, link, HTML or table cell."""
    return re.sub(r"([\\[\]<>|*])", r"\\\1", " ".join(str(text).split()))
