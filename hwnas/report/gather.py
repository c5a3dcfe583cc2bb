"""From a run folder to a report's contents, section by section."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hwnas import __version__
from hwnas.config import read_json
from hwnas.errors import InputError
from hwnas.layers import Layer, lower
from hwnas.report import words
from hwnas.report.charts import Axis, Bars, Chart, Series, file_name
from hwnas.report.contents import Answer, Contents, Facts, Section, Table
from hwnas.report.exported import exported
from hwnas.report.findings import Findings
from hwnas.report.fit import fit_charts
from hwnas.run import Run
from hwnas.searching.fronts import pareto
from hwnas.searching.limits import Limit, show_cost
from hwnas.searching.result import Candidate, Estimate, Result
from hwnas.space import Architecture, SearchSpace

MAX_CHILDREN = 3000  # drawn in one series: more make a page slow and show no more


def gather(run: Run, command: str) -> Contents:
    """Everything that a report of a run shows; what is missing in the run is missing in the report.

    Args:
        run: the run folder.
        command: that makes the report, for its provenance.

    Raises:
        InputError: a file of the run, or its database, is damaged.
    """
    found = Findings(run)
    sections = [
        _fronts(found),
        _searches(found),
        _milliseconds(found),
        _predictions(found),
        _portfolio(found),
        _training(found),
        _exports(found),
        _provenance(found, command),
    ]
    sections = [section for section in sections if not section.empty]
    fitted = {point.arch: math.nan for points in found.fits.values() for point in points}
    children = {one.architecture.id: one for one in found.candidates(list(fitted), list(fitted.values()))}
    children |= found.evaluated
    shown = {id for section in sections for plot in section.plots for id in _children(plot)}
    shown |= {one.best.architecture.id for one in found.results.values()}
    shown |= {id for section in sections for table in section.tables for id in table.children}
    latest_first = list(reversed(found.results.values()))
    return Contents(
        title=run.path.resolve().name,
        summary=_summary(found),
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        space=run.space.to_dict(),
        children=_children_to_open(run.space, {id: one for id, one in children.items() if id in shown}),
        overview=_overview(latest_first),
        answers=tuple(_answer(result) for result in latest_first),
        sections=tuple(sections),
    )


def _summary(found: Findings) -> str:
    data, count = found.run.config.data, len(found.evaluations)
    measured = sum(len(children) for children in found.measurements.values())
    devices = f"{len(found.measurements)} device{'s' * (len(found.measurements) != 1)}"
    parts = [f"space {found.run.space.name}"]
    parts += [] if data is None else [f"data {Path(data.name).name}, {found.run.space.num_classes} classes"]
    parts += [f"{count:,} children evaluated"] if count else []
    parts += [f"{measured:,} measured on {devices}"] if measured else []
    return " · ".join(parts)


def _children_to_open(space: SearchSpace, children: Mapping[str, Candidate]) -> dict[str, dict[str, Any]]:
    one_each = {one.architecture.resolution: one.architecture for one in children.values()}
    sizes = {resolution: _sizes(space, arch) for resolution, arch in one_each.items()}  # all that they depend on
    return {id: _child(one, sizes[one.architecture.resolution]) for id, one in children.items()}


def _sizes(space: SearchSpace, arch: Architecture) -> list[int]:
    """Sides of the feature maps after the stem and each stage, pixels."""
    last = {layer.name.partition(".")[0]: layer.out_size for layer in lower(space, arch)}
    return [last["stem"], *(last[f"stage{number}"] for number in range(1, len(arch.stages) + 1))]


def _child(candidate: Candidate, sizes: list[int]) -> dict[str, Any]:
    arch = candidate.architecture
    return {
        "text": arch.describe(),
        "architecture": arch.to_dict(),
        "sizes": sizes,
        "accuracy": candidate.accuracy if math.isfinite(candidate.accuracy) else None,
        "macs": candidate.macs,
        "params": candidate.params,
        "file_bytes": candidate.file_bytes,
        "peak_bytes": candidate.peak_bytes,
        "latency": {device: asdict(estimate) for device, estimate in candidate.latency.items()},
    }


def _children(plot: object) -> Iterable[str]:
    return [id for series in plot.series for id in series.children] if isinstance(plot, Chart) else []


# -------------------------------------------------------------------- answers


def _title(result: Result) -> str:
    limits = [f"≤ {Limit.from_dict(limit).describe()}" for limit in result.limits]
    front = [f"Front over {' on '.join(filter(None, result.question['front']))}"] if _is_front(result) else []
    return ", ".join([*front, *limits])


def _is_front(result: Result) -> bool:
    """Whether it was to find the best child of every cost, not of the limits only."""
    return result.question.get("front") is not None


def _overview(results: Sequence[Result]) -> Table:
    rows = []
    for result in results:
        best, random = result.best, result.random
        costs = ", ".join(
            f"{words.digits(one.value)} ms" + (f" on {device}" if len(best.latency) > 1 else "")
            for device, one in best.latency.items()
        )
        known = "measured" if all(one.measured is not None for one in best.latency.values()) else "predicted"
        gain = "" if random is None else f"{100 * (best.accuracy - random.accuracy):+.2f}"
        accuracy = f"{best.accuracy:.2%}"
        rows.append((_title(result), accuracy, gain, costs, known if costs else "", words.scaled(best.macs)))
    columns = ("limit", "accuracy", "points over random", "latency", "", "multiply-adds")
    return Table(columns=columns, rows=tuple(rows), children=tuple(one.best.architecture.id for one in results))


def _answer(result: Result) -> Answer:
    best, random = result.best, result.random
    figures = [("Accuracy", f"{best.accuracy:.2%}", "of the validation images")]
    for device, estimate in best.latency.items():
        latency = f"{words.digits(estimate.value)} ms"
        figures.append((f"Latency on {device}", latency, _how_known(estimate, result, device)))
    if random is not None:
        gain = f"{100 * (best.accuracy - random.accuracy):+.2f} points"
        figures.append(("Against random", gain, f"random search found {random.accuracy:.2%}"))
    figures.append(("Multiply-adds", words.scaled(best.macs), ""))
    figures.append(("Parameters", words.scaled(best.params), ""))
    figures += [] if best.file_bytes is None else [("File", words.size(best.file_bytes), "ONNX, fp32")]
    figures += [] if best.peak_bytes is None else [("Peak memory", words.size(best.peak_bytes), "activations, fp32")]
    for device, energy in best.energy.items():
        known = "predicted" if energy.measured is None else "measured"
        figures.append((f"Energy on {device}", f"{words.digits(energy.value)} mJ", known))
    for device, slope in result.slope.items():
        limits = [one["value"] for one in result.limits if (one["kind"], one["device"]) == ("latency", device)]
        for ms in limits:  # a whole millisecond is too much for a small network
            bought = f"{slope.points_per_ms * ms / 10:+.2f} points"
            remark = f"± {slope.std * ms / 10:.2f}, for {words.digits(ms / 10)} ms by the slope of the front"
            figures.append((f"10% more time on {device}", bought, remark))
    known = f", {result.num_known:,} known before" if result.num_known else ""
    facts = [
        ("Strategy", f"{result.strategy}, seed {result.seed}"),
        ("Evaluations", f"{result.num_evaluations:,}{known}"),
        ("Confidence", f"{result.confidence:.0%} that an unmeasured child keeps the limit"),
    ]
    for device, source in result.devices.items():
        notes = [part for part in (source.source, source.reason) if part]
        facts += [(f"Latencies on {device}", "; ".join(notes))] if notes else []
    facts.append(("Child", best.architecture.describe()))
    return Answer(title=_title(result), best=best.architecture.id, figures=tuple(figures), facts=tuple(facts))


def _how_known(estimate: Estimate, result: Result, device: str) -> str:
    std = words.digits(estimate.std, 2)
    if estimate.measured is not None:
        return f"measured; predicted {words.digits(estimate.predicted)} ± {std}"
    source = result.devices.get(device)
    error = "" if source is None or source.error_pct is None else f", typical error {source.error_pct:.1f}%"
    return f"predicted, ± {std} ms{error}"


# -------------------------------------------------------------------- plots


def _fronts(found: Findings) -> Section:
    results = found.results.values()
    kinds = dict.fromkeys(kind for result in results for kind in _asked(result))
    return Section(
        id="fronts",
        title="Accuracy against cost",
        text="Every evaluated child. The line is the front: no other child is both cheaper and more accurate. Filled "
        "marks are measured or exact, open ones are predicted.",
        plots=tuple(_front(found, kind, device) for kind, device in kinds),
    )


def _asked(result: Result) -> list[tuple[str, str | None]]:
    """The costs that a search was about, each with its device."""
    return [(str(one["kind"]), one["device"]) for one in (*result.limits, result.axis) if one]


# What a front is drawn over: the axis, and the cost of a child on it (for `latency` and `energy` on the device).
_COSTS: dict[str, tuple[Axis, Callable[[Candidate, str | None], float | Estimate | None]]] = {
    "latency": (Axis(label="latency", unit="ms"), lambda one, device: one.latency.get(str(device))),
    "energy": (Axis(label="energy", unit="mJ"), lambda one, device: one.energy.get(str(device))),
    "macs": (Axis(label="multiply-adds", unit="M"), lambda one, _: one.macs / 1e6),
    "params": (Axis(label="parameters", unit="M"), lambda one, _: one.params / 1e6),
    "size": (Axis(label="file size", unit="MB"), lambda one, _: one.file_bytes and one.file_bytes / 1e6),
    "memory": (Axis(label="peak memory", unit="MB"), lambda one, _: one.peak_bytes and one.peak_bytes / 1e6),
}


def _front(found: Findings, kind: str, device: str | None) -> Chart:
    axis, cost_of = _COSTS[kind]
    costs = {id: cost for id, one in found.evaluated.items() if (cost := cost_of(one, device)) is not None}
    values = {id: cost.value if isinstance(cost, Estimate) else cost for id, cost in costs.items()}
    ordered = sorted(values, key=lambda id: (values[id], -found.evaluated[id].accuracy))
    accuracies = np.array([found.evaluated[id].accuracy for id in ordered])
    front = [ordered[index] for index in pareto(np.array([values[id] for id in ordered]), accuracies)]
    predicted = {id for id, cost in costs.items() if isinstance(cost, Estimate) and cost.measured is None}
    about = [one for one in found.results.values() if (kind, device) in _asked(one)]
    drawn = [one.random.architecture.id for one in about if one.random is not None]
    best = [one.best.architecture.id for one in about]
    scale = 1e6 if axis.unit == "M" else 1.0
    rules = {
        (limit["value"] / scale, show_cost(limit["value"], limit["unit"], digits=6))
        for one in about
        for limit in one.limits
        if (limit["kind"], limit["device"]) == (kind, device)
    }

    def series(name: str, ids: Sequence[str], **options: Any) -> list[Series]:
        x, y = tuple(values[id] for id in ids), tuple(100 * found.evaluated[id].accuracy for id in ids)
        return [Series(name=name, x=x, y=y, children=tuple(ids), **options)] if ids else []

    return Chart(
        name=file_name("front", *([] if kind == "latency" else [kind]), *([] if device is None else [device])),
        title=f"By {axis.label}" + (f" on {device}" if device else ""),
        x=axis,
        y=Axis(label="validation accuracy", unit="%"),
        series=(
            *series("predicted", _thinned([id for id in ordered if id in predicted]), mark="ring"),
            *series(
                "measured" if device else "evaluated",
                _thinned([id for id in ordered if id not in predicted]),
                mark="dot",
            ),
            *series("front", front, mark="step", strong=True),
            *series("best of random search", drawn, mark="cross"),
            *series("answer", best, mark="diamond", strong=True),
        ),
        rules=tuple(sorted(rules)),
    )


def _thinned(children: Sequence[str]) -> Sequence[str]:
    """At most `MAX_CHILDREN`, evenly over their order."""
    return children[:: max(1, -(-len(children) // MAX_CHILDREN))]


def _searches(found: Findings) -> Section:
    plots = []
    for name, result in found.results.items():
        y = Axis(label="best validation accuracy", unit="%")
        best = {strategy: list(accumulate(values, max)) for strategy, values in result.history.items()}
        plots.append(_history(file_name("history", name), _title(result), y, best, result.strategy))
        if _is_front(result):
            y = Axis(label="hypervolume of the front", unit="%")
            title = f"{_title(result)}: hypervolume"
            plots.append(_history(file_name("hypervolume", name), title, y, result.hypervolume, result.strategy))
    return Section(
        id="history",
        title="Search history",
        text="The best accuracy found so far, beside random search under the same limits.",
        plots=tuple(plots),
    )


def _history(name: str, title: str, y: Axis, values: Mapping[str, Sequence[float]], strategy: str) -> Chart:
    lines = [
        Series(
            name=other,
            mark="step",
            x=tuple(range(1, len(shares) + 1)),
            y=tuple(100 * share for share in shares),
            strong=other == strategy,
        )
        for other, shares in values.items()
        if len(shares)
    ]
    lines.sort(key=lambda line: line.strong)  # what the chart is about in front
    return Chart(name=name, title=title, x=Axis(label="children evaluated"), y=y, series=tuple(lines))


def _milliseconds(found: Findings) -> Section:
    plots = []
    for name, result in found.results.items():
        for device in result.best.latency:
            try:
                layers = found.predictors[device].breakdown_ms(result.best.architecture)
            except (KeyError, InputError):  # no predictor, or one that does not know single layers
                continue
            title = _title(result) if len(result.best.latency) == 1 else f"{_title(result)}: on {device}"
            plots.append(stage_bars(file_name("layers", name, device), title, layers))
    return Section(
        id="layers",
        title="Where the milliseconds go",
        text="Predicted latency of each answer, stage by stage. What a network costs as a whole is spread over its "
        "layers.",
        plots=tuple(plots),
    )


def stage_bars(name: str, title: str, layers: Sequence[tuple[Layer, float]]) -> Bars:
    """The milliseconds of a child's layers: a bar a stage, a part a kind of layer."""
    parts = ("convolution", "depthwise", "squeeze-excite", "pooling, adding")
    stages: dict[str, list[float]] = {}
    for layer, ms in layers:
        stage = layer.name.partition(".")[0]
        label = "head" if stage == "classifier" else stage.replace("stage", "stage ")
        kind = int(layer.depthwise) if layer.kind in ("conv", "linear") else 3
        part = 2 if ".se." in layer.name else kind
        stages.setdefault(label, [0.0] * len(parts))[part] += ms
    there = [index for index in range(len(parts)) if any(values[index] for values in stages.values())]
    return Bars(
        name=name,
        title=title,
        value=Axis(label="predicted latency", unit="ms"),
        parts=tuple(parts[index] for index in there),
        bars=tuple((label, tuple(values[index] for index in there)) for label, values in stages.items()),
    )


def _predictions(found: Findings) -> Section:
    missing = [device for device in found.predictors if device in found.measurements and not found.fits[device]]
    rows = []
    for device, predictor in found.predictors.items():
        errors = [abs(point.residual_pct) for point in found.fits[device]]
        samples = "" if predictor.statistics is None else str(predictor.statistics.num_samples)
        tested = ("", "", "")
        if errors:
            within = sum(error <= 10 for error in errors) / len(errors)
            tested = (str(len(errors)), f"{statistics.median(errors):.1f}%", f"{within:.0%}")
        rows.append((device, predictor.kind, samples, *tested))
    columns = ("device", "predictor", "fitted to", "tested on", "median error", "within 10%")
    return Section(
        id="predictors",
        title="Predicted against measured",
        text="Each child as predicted by a fit that had not seen it. The band is 10% to either side."
        + "".join(f" For {device}, run `hwnas fit --device {device}` first." for device in missing),
        plots=tuple(chart for device, points in found.fits.items() if points for chart in fit_charts(device, points)),
        tables=(Table(columns=columns, rows=tuple(rows)),) if rows else (),
    )


# -------------------------------------------------------------------- tables


def _portfolio(found: Findings) -> Section:
    tables = []
    for document in found.portfolios.values():
        rows, ids = [], []
        for member in document["members"]:
            candidate = Candidate.from_dict(member)
            for answer, lost in member["serves"].items():
                devices = [limit["device"] for limit in document["answers"][answer]["limits"] if limit["device"]]
                costs = [candidate.latency[device] for device in dict.fromkeys(devices) if device in candidate.latency]
                latency = ", ".join(
                    f"{words.digits(one.value)} ms {'predicted' if one.measured is None else 'measured'}"
                    for one in costs
                )
                ids.append(candidate.architecture.id)
                rows.append((ids[-1], f"{candidate.accuracy:.2%}", answer, f"{100 * lost:.2f}", latency))
        members, answers = len(document["members"]), len(document["answers"])
        title = (
            f"{members} child{'ren' * (members != 1)} for {answers} answers, within {100 * document['tolerance']:g} "
            f"points of each: {'no fewer will do' if document['exact'] else 'the fewest found'}"
        )
        columns = ("child", "accuracy", "answers", "points lost", "latency")
        tables.append(Table(title=title, columns=columns, rows=tuple(rows), children=tuple(ids)))
    return Section(
        id="portfolio",
        title="Portfolio",
        text="The fewest children that serve all devices.",
        tables=tuple(tables),
    )


def _training(found: Findings) -> Section:
    path = found.run.path / "training.json"
    by_child: dict[str, list[dict[str, Any]]] = {}
    for one in read_json(path)["evaluations"] if path.is_file() else []:
        by_child.setdefault(str(one["child"]), []).append(one)
    last = {child: some[-1] for child, some in by_child.items()}
    rows = [
        (child, f"{one['epoch']:.2f}", f"{one['accuracy']:.2%}", f"{one['loss']:.3f}", f"{one['num_images']:,}")
        for child, one in last.items()
    ]
    curves = [
        Series(
            name=child,
            mark="line",
            x=tuple(float(one["epoch"]) for one in some),
            y=tuple(100 * float(one["accuracy"]) for one in some),
            strong=child == "biggest",
        )
        for child, some in by_child.items()
    ]
    chart = Chart(
        name="training",
        title="Watched children",
        x=Axis(label="epoch"),
        y=Axis(label="validation accuracy", unit="%"),
        series=tuple(curves),
    )
    return Section(
        id="training",
        title="Training",
        plots=(chart,) if any(len(some) > 1 for some in by_child.values()) else (),
        tables=(Table(columns=("child", "epoch", "validation", "loss", "images"), rows=tuple(rows)),) if rows else (),
    )


def _exports(found: Findings) -> Section:
    rows, children, unreadable = [], [], []
    for name, bundle in exported(found.run.path / "exports"):
        if isinstance(bundle, str):
            unreadable.append((name, bundle))
            continue
        manifest, arch = bundle
        file, latency, measured = manifest.file, manifest.latency, ""
        if latency is not None and latency.measured_ms is not None:
            measured = f"{words.digits(latency.measured_ms)} ms on {latency.device}"
        kind, exact = f"{file.format}, {file.precision}", f"{manifest.parity.max_abs_diff:.1e}"
        rows.append((name, kind, words.size(file.size_bytes), f"{manifest.accuracy.value:.2%}", measured, exact))
        children.append(arch.id if arch.id in found.evaluated else "")
    columns = ("bundle", "format", "size", "test accuracy", "measured", "logits differ by")
    return Section(
        id="exports",
        title="Exports",
        tables=(Table(columns=columns, rows=tuple(rows), children=tuple(children)),) if rows else (),
        facts=(("Cannot be read", tuple(unreadable)),) if unreadable else (),
    )


# -------------------------------------------------------------------- provenance


def _provenance(found: Findings, command: str) -> Section:
    run, config = found.run, found.run.config
    facts = [("Folder", str(run.path.resolve())), ("Started by", f"hwnas {config.hwnas}")]
    facts.append(("Space", f"{run.space.name}, {run.space.size():.2g} children"))
    facts += [] if config.data is None else [("Data", config.data.name)]
    facts += [] if found.weights is None else [("Weights", found.weights)]
    if found.evaluations:
        last = found.evaluations[-1]
        facts.append(("Accuracies", f"{last.num_images:,} validation images; {last.protocol}"))
        facts.append(("Evaluated", words.dates([one.created for one in found.evaluations])))
    facts.append(("Report", f"{command}, by hwnas {__version__}"))
    groups = [("Run", tuple(facts))]
    versions = next((one.versions for one in reversed(found.results.values()) if one.versions), {})
    groups += [("Versions, last search", tuple(sorted(versions.items())))] if versions else []
    groups += [(device, about) for device in found.devices if (about := _device_facts(found, device))]
    return Section(id="provenance", title="Provenance", facts=tuple(groups))


def _device_facts(found: Findings, device: str) -> Facts:
    measured, facts = list(found.measurements.get(device, {}).values()), []
    if measured:
        last, timing = measured[-1], measured[-1].timing
        threads = f"{timing.threads} thread{'s' * (timing.threads != 1)}"
        rounds = f"{timing.rounds} to {timing.max_rounds} rounds of at least {timing.min_duration_s * 1e3:g} ms"
        facts += [
            ("Runtime", f"{last.runtime}, {last.precision}, {threads}"),
            ("Versions", ", ".join(f"{name} {version}" for name, version in last.versions.items())),
            ("Protocol", f"{rounds}, in turns with a reference network; {last.protocol}"),
            ("Measured", f"{len(measured)} children, {words.dates([m.created for m in measured])}"),
        ]
    predictor = found.predictors.get(device)
    if predictor is not None and predictor.statistics is not None:
        error = predictor.statistics.left_out_pct
        choice = getattr(predictor, "choice", "")  # auto tells, error and all
        typical = "" if error is None or choice else f", typical error {error:.1f}% when left out"
        fitted = f"{choice or predictor.kind}, fitted to {predictor.statistics.num_samples} measurements{typical}"
        facts.append(("Predictor", fitted))
    sources = [one.devices[device].source for one in found.results.values() if device in one.devices]
    facts += [("Source", source) for source in dict.fromkeys(sources) if source]
    return tuple(facts)
