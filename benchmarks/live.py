"""Latency predictors on this processor, live: every runtime at hand, one and two threads, fp32 and int8.

    python benchmarks/live.py --cache /tmp/live --output benchmarks/results/live.md

The same children of `bignas` are measured by each runtime: spread ones to fit predictors to, fresh random ones to test
them on, and some of these a second time into a database of their own, which says what a measurement is worth. Then a
predictor of each runtime is adapted to every other one by ten measurements. What is measured stays in the cache: an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from environment import heading

from hwnas import __version__
from hwnas.devices import load_spec
from hwnas.measurement import Measurement
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.predictors import LatencyPredictor, PredictionReport, make_predictor
from hwnas.predictors import report as prediction_report
from hwnas.progress import reporting
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store

SPACE = SearchSpace.load("bignas")
SIZES, HELD_OUT, AGAIN, FEW = (30, 60, 100), 60, 20, 10
# A measurement with half the usual rounds: on this machine most go on to the last one.
ROUNDS, MAX_ROUNDS = 4, 8
CHILDREN = choose_children(SPACE, max(SIZES), np.random.default_rng(0))


def fresh() -> list[Architecture]:
    rng = np.random.default_rng(1)
    return [SPACE.sample(rng) for _ in range(HELD_OUT)]


@dataclass(frozen=True)
class Setting:
    """A runtime, how it computes, and on how many threads."""

    device: str
    precision: str = "fp32"
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.device} {self.precision}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def measure(self, cache: Path) -> None:
        _, spec = load_spec(self.device)
        timing = replace(spec.timing, rounds=ROUNDS, max_rounds=MAX_ROUNDS, threads=self.threads)
        device = replace(spec, precision=self.precision, timing=timing).open(self.device)  # type: ignore[arg-type]
        parts = (("fit", CHILDREN), ("fresh", fresh()), ("again", fresh()[:AGAIN]))
        with device, reporting(self.name) as (report,):
            for part, archs in parts:
                with Store(cache / f"{self._file}-{'again' if part == 'again' else 'once'}.db") as store:
                    measure(archs, SPACE, device, timing, store, report=report)

    @property
    def _file(self) -> str:
        return f"{self.device}-{self.precision}-{self.threads}"

    def load(self, cache: Path) -> Measured | None:
        """What is measured; None if that is not all."""
        found, tried = [], 0
        for part in ("once", "again"):
            path = cache / f"{self._file}-{part}.db"
            if not path.is_file():
                return None
            with Store(path) as store:
                made = store.measurements()
            tried += len({m.arch for m in made})
            found.append({m.arch: m for m in made if m.trusted})
        return Measured(self, *found) if tried == max(SIZES) + HELD_OUT + AGAIN else None


@dataclass(frozen=True)
class Measured:
    """The children of a setting that can be trusted."""

    setting: Setting
    once: dict[Architecture, Measurement]
    again: dict[Architecture, Measurement]

    def fitted(self, size: int) -> LatencyPredictor:
        return make_predictor("auto", SPACE).fit(*self._some(size))

    def adapted(self, sources: list[LatencyPredictor]) -> LatencyPredictor:
        return make_predictor("transfer", SPACE, sources).fit(*self._some(FEW))

    def _some(self, size: int) -> tuple[list[Architecture], list[float]]:
        archs = [arch for arch in CHILDREN if arch in self.once][:size]
        return archs, [self.once[arch].latency_ms for arch in archs]

    @cached_property
    def differences(self) -> dict[Architecture, float]:
        """Of a second measurement from the first, relative."""
        both = [arch for arch in self.again if arch in self.once]
        return {arch: abs(self.again[arch].latency_ms / self.once[arch].latency_ms - 1) for arch in both}

    @property
    def tells(self) -> bool:
        """Whether any child can be trusted twice: without one nothing says what a measurement is worth."""
        return bool(self.differences)

    @property
    def rejected(self) -> str:
        every = max(SIZES) + HELD_OUT
        return f"{every - len(self.once)} of {every}"

    def test(self, predictor: LatencyPredictor) -> PredictionReport:
        archs = [arch for arch in fresh() if arch in self.once]
        mean_ms, std_ms = predictor.predict(archs)
        return prediction_report([self.once[arch].latency_ms for arch in archs], mean_ms, std_ms)


def settings(devices: list[str], threads: list[int], precisions: list[str]) -> list[Setting]:
    without = ("cpu-executorch", "cpu-pytorch")  # int8
    return [
        Setting(device, precision, count)
        for count in threads
        for precision in precisions
        for device in devices
        if precision == "fp32" or device not in without
    ]


def fits(measured: list[Measured]) -> list[str]:
    lines = [
        "| setting | ms | rejected | two measurements differ by, median / 90% | fitted to | Spearman | mean error "
        "| within 5% | within 10% | in 90% interval | kind |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measured:
        ms = [m.latency_ms for m in one.once.values()]
        differences = list(one.differences.values())
        for size in SIZES:
            predictor = one.fitted(size)
            r = one.test(predictor)
            first = size == SIZES[0]
            cells = [
                one.setting.name if first else "",
                f"{min(ms):.1f} to {max(ms):.1f}" if first else "",
                one.rejected if first else "",
                f"{statistics.median(differences):.1%} / {np.quantile(differences, 0.9):.1%}" if first else "",
                f"{len(one._some(size)[0])}",
                f"{r.spearman:.3f}",
                f"{r.mape_pct:.1f}%",
                f"{r.within_5_pct:.0f}%",
                f"{r.within_10_pct:.0f}%",
                f"{r.coverage_90:.0f}%",
                getattr(predictor, "choice", "").partition(":")[0],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def transfers(measured: list[Measured]) -> list[str]:
    lines = [
        "| to | sources | Spearman | mean error | within 5% | within 10% | in 90% interval |",
        "|---|---|---|---|---|---|---|",
    ]
    predictors = {one.setting: make_predictor("gp", SPACE).fit(*one._some(max(SIZES))) for one in measured}
    reports = []
    for one in measured:
        others = [predictors[other.setting] for other in measured if other.setting.device != one.setting.device]
        if not others:
            continue
        r = one.test(one.adapted(others))
        reports.append(r)
        cells = [one.setting.name, f"{len(others)}", f"{r.spearman:.3f}", f"{r.mape_pct:.1f}%"]
        cells += [f"{r.within_5_pct:.0f}%", f"{r.within_10_pct:.0f}%", f"{r.coverage_90:.0f}%"]
        lines.append(f"| {' | '.join(cells)} |")
    if reports:
        names = ("spearman", "mape_pct", "within_5_pct", "within_10_pct", "coverage_90")
        means = [statistics.mean(getattr(r, name) for r in reports) for name in names]
        lines.append(
            f"| mean | | {means[0]:.3f} | {means[1]:.1f}% | {means[2]:.0f}% | {means[3]:.0f}% | {means[4]:.0f}% |"
        )
    return lines


def goals(measured: list[Measured]) -> list[str]:
    """The share of predictions near enough, over all settings, with 60 children."""
    middle = SIZES[1]
    agreeing = [one for one in measured if statistics.median(one.differences.values()) <= 0.03]
    lines = ["| settings | fitted to | within 5% | within 10% |", "|---|---|---|---|"]
    for name, some in (("all", measured), ("where two measurements agree to 3% (median)", agreeing)):
        if some:
            reports = [one.test(one.fitted(middle)) for one in some]
            within = [statistics.mean(getattr(r, key) for r in reports) for key in ("within_5_pct", "within_10_pct")]
            lines.append(f"| {name}: {len(some)} | {middle} | {within[0]:.1f}% | {within[1]:.1f}% |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--devices", nargs="+", default=["cpu", "cpu-openvino", "cpu-litert", "cpu-ncnn"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--report-only", action="store_true", help="measure nothing further")
    parser.add_argument("--output", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    wanted = settings(arguments.devices, arguments.threads, arguments.precisions)
    if not arguments.report_only:
        for setting in wanted:
            setting.measure(arguments.cache)
    measured = [found for setting in wanted if (found := setting.load(arguments.cache)) is not None]
    missing = [setting.name for setting in wanted if setting not in [one.setting for one in measured]]
    disturbed = [f"{one.setting.name} (rejected: {one.rejected})" for one in measured if not one.tells]
    measured = [one for one in measured if one.tells]
    how = f"hwnas {__version__}; {HELD_OUT} fresh random children of bignas for testing, {AGAIN} of them measured twice"
    lines = heading("Latency predictors on this processor, live", how)
    lines += ["## Goals (with 60: 95% within 5%, 99% within 10%)", "", *goals(measured), ""]
    lines += ["## Fitted to its own measurements", "", *fits(measured), ""]
    lines += [f"## Adapted from other runtimes by {FEW} measurements (goal: 95% within 10%)", "", *transfers(measured)]
    if disturbed:
        lines += ["", f"Not one child could be trusted twice: {'; '.join(disturbed)}."]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
