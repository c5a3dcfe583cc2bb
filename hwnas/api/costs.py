"""`hwnas cost`, and architectures as users give them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hwnas.config import read_json
from hwnas.errors import InputError
from hwnas.layers import Layer, lower, total_macs, total_params
from hwnas.run import Run
from hwnas.space import Architecture, SearchSpace


def cost(
    arch: str | Path | Architecture, *, space: str | Path | None = None, run: str | Path | None = None
) -> dict[str, Any]:
    """Multiply-adds, parameters and layers of a child.

    Args:
        arch: an architecture, `smallest`, `biggest`, or a file; it need not be a member of the space.
        space: a space's name or file; by default the run's.
        run: the run folder.

    Raises:
        InputError: unknown space, or a file that is no architecture of as many stages.
    """
    chosen = SearchSpace.load(space) if space is not None else Run(run).space
    child = read_architecture(arch, chosen)
    if len(child.stages) != len(chosen.stages):
        raise InputError(
            f"the architecture has {len(child.stages)} stages, space {chosen.name!r} has {len(chosen.stages)}: "
            "name its own space with --space"
        )
    layers = lower(chosen, child)
    try:
        chosen.check(child)
        in_space = True
    except InputError:
        in_space = False
    return {
        "space": chosen.name,
        "in_space": in_space,
        "architecture": child.to_dict(),
        "architecture_text": child.describe(),
        "macs": total_macs(layers),
        "params": total_params(layers),
        "layers": [layer_values(layer) for layer in layers],
    }


def layer_values(layer: Layer) -> dict[str, Any]:
    """A layer as plain values, with the size of its output, pixels, its multiply-adds and its parameters."""
    return {**asdict(layer), "out_size": layer.out_size, "macs": layer.macs, "params": layer.params}


def read_architecture(arch: str | Path | Architecture, space: SearchSpace) -> Architecture:
    """An architecture as given, by the names `smallest` and `biggest`, or from a JSON file.

    The file holds an architecture, or a document with one under `architecture` (a manifest, an entry of a front) or
    under `best` (a search result).

    Raises:
        InputError: the file is missing or holds no architecture.
    """
    if isinstance(arch, Architecture):
        return arch
    if arch == "smallest":
        return space.smallest()
    if arch in ("biggest", "largest"):
        return space.largest()
    content = read_json(Path(arch))
    for key in ("best", "architecture"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return Architecture.from_dict(content, source=str(arch))
