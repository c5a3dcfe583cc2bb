"""`hwnas cost` and `hwnas space`: what children cost; and architectures as users give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.config import read_json
from hwnas.devices import device_name
from hwnas.errors import InputError
from hwnas.exporters.base import file_bytes
from hwnas.layers import Layer, lower, peak_activation_bytes, total_macs, total_params
from hwnas.measurement import Measurement
from hwnas.predictors import LatencyPredictor, load_predictor, make_predictor
from hwnas.run import Run
from hwnas.searching.bounds import Bounds, extreme
from hwnas.searching.costs import Cost, DeviceCost, LayerCosts
from hwnas.searching.limits import Limit
from hwnas.space import Architecture, SearchSpace

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
MIN_ENERGIES = 5  # measurements, to fit an energy predictor


def cost(
    arch: str | Path | Architecture, *, space: str | Path | None = None, run: str | Path | None = None
) -> dict[str, Any]:
    """Multiply-adds, parameters, memory, file size and layers of a child.

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
        "peak_activation_bytes": peak_activation_bytes(layers),
        "onnx_file_bytes": file_bytes(layers),
        "layers": [layer_values(layer) for layer in layers],
    }


def space_report(
    space: str | Path | None = None,
    run: str | Path | None = None,
    *,
    devices: Sequence[str | Path] = (),
    limits: Sequence[Limit] = (),
    confidence: float = 0.95,
    samples: int = 100_000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the children of a space cost, and how many of them keep some limits.

    Args:
        space: a space's name or file; by default the run's.
        run: the run folder.
        devices: whose latency, and energy where it is known, to tell beside what the layers cost; by default all that
            the run has a predictor of. Those of the limits are added.
        limits: of which to tell the share of children that keep them.
        confidence: with which a predicted cost has to keep its limit.
        samples: random children to look at, each choice uniform.
        seed: of their choice.

    Returns:
        `space`, `size` (children it has), `samples`, `seed`, `confidence`; `costs`: of each its `kind`, `device`,
        `unit`, `least` and `greatest` (as a search for it tells: `value` and `architecture`), and `quantiles` over the
        samples; `limits`: of each what `Limit.to_dict` gives, `share` of the samples that keep it, `low` and `high`
        (95% interval of the share of all children so drawn), `least` (what a limit can be at the least, with the
        confidence asked for) and `possible` (whether any child keeps it); `all`: the same of all limits together, but
        for `least`, and None without limits.

    Raises:
        InputError: unknown space, no run, no predictor of a device, or numbers that make no sense.
    """
    if samples < 100:
        raise InputError(f"samples={samples}: at least 100 tell something")
    opened = Run.find(run) if space is not None else Run(run)
    chosen = SearchSpace.load(space) if space is not None else opened.space  # type: ignore[union-attr]
    named = [device_name(device) for device in devices]
    if space is not None and (opened is None or opened.space != chosen):
        if named or any(limit.device for limit in limits):
            raise InputError(
                f"what space {chosen.name!r} costs on a device is not known: leave out --space for that of the run, or "
                f"profile it: hwnas profile --space {chosen.name} --run FOLDER --device ..."
            )
        opened = None
    if opened is not None and not named:
        named = opened.profiled()
    named = list(dict.fromkeys([*named, *(limit.device for limit in limits if limit.device)]))

    costs: dict[tuple[str, str | None], Cost] = {
        (kind, None): cost for kind, cost in LayerCosts(chosen).by_kind.items()
    }
    for device in named:
        assert opened is not None
        costs["latency", device] = DeviceCost(opened.predictor(device))
        wanted = any((limit.kind, limit.device) == ("energy", device) for limit in limits)
        if wanted or opened.energy_path(device).is_file():
            costs["energy", device] = DeviceCost(energy_predictor(opened, device), unit="mJ")

    genes = chosen.sample_genes(samples, np.random.default_rng(seed))
    bounds = Bounds(chosen, [(limit, costs[limit.kind, limit.device]) for limit in limits], confidence)
    kept = bounds.over(genes) <= 0
    least = [bounds.least(limit)[0] for limit in limits]
    found = []
    for (kind, where), cost in costs.items():
        values = cost.expected(genes)
        ends = {}
        for name, sign in (("least", 1), ("greatest", -1)):
            row, value = extreme(chosen, lambda rows, cost=cost, sign=sign: sign * cost.expected(rows))  # type: ignore[misc]
            ends[name] = {"value": sign * value, "architecture": chosen.decode(row).to_dict()}
        quantiles = {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
        found.append({"kind": kind, "device": where, "unit": cost.unit, **ends, "quantiles": quantiles})
    return {
        "space": chosen.name,
        "size": chosen.size(),
        "samples": samples,
        "seed": seed,
        "confidence": confidence,
        "costs": found,
        "limits": [
            {
                **limit.to_dict(),
                **_share(int(kept[:, column].sum()), samples),
                "least": least[column],
                "possible": least[column] <= limit.value,
            }
            for column, limit in enumerate(limits)
        ],
        "all": {**_share(int(kept.all(axis=1).sum()), samples), "possible": bounds.possible()} if limits else None,
    }


def _share(count: int, samples: int) -> dict[str, float]:
    """A share and its exact 95% interval (Clopper and Pearson, Biometrika 26, 1934)."""
    from scipy.stats import binomtest

    interval = binomtest(count, samples).proportion_ci(0.95)
    return {"share": count / samples, "low": float(interval.low), "high": float(interval.high)}


# -------------------------------------------------------------------- energy


def energy_predictor(run: Run, device: str) -> LatencyPredictor:
    """The energy predictor of a device: a latency predictor that gives mJ in place of ms.

    Raises:
        InputError: there is none, its file is damaged, or it is for another space.
    """
    path = run.energy_path(device)
    if not path.is_file():
        raise InputError(
            f"no energy predictor for {device!r} in {run.path}: `hwnas profile --device {device}` makes one where the "
            "device tells its energy (RAPL that may be read, a Jetson)"
        )
    predictor = load_predictor(path)
    if predictor.space != run.space:
        raise InputError(f"{path}: is for another space: run `hwnas profile --device {device}`")
    return predictor


def fit_energy(
    run: Run, device: str, measurements: Sequence[Measurement], *, kind: str = "auto"
) -> LatencyPredictor | None:
    """Fit a device's energy predictor, and save it; None, and nothing is saved, where the device told too little.

    Args:
        run: the run.
        device: its name.
        measurements: those that its latency predictor is fitted to.
        kind: of predictor.
    """
    told = [(m.arch, m.energy_mj) for m in measurements if m.energy_mj is not None]
    if len(told) < MIN_ENERGIES:
        return None
    predictor = make_predictor(kind, run.space).fit([arch for arch, _ in told], [mj for _, mj in told])
    predictor.save(run.energy_path(device))
    return predictor


# -------------------------------------------------------------------- one child


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
