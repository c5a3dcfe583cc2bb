"""Profiling and the latency predictor on this machine's processor.

    python benchmarks/profiling.py

For the demo's space and for `bignas`: fits the predictor to spread children, tests it on fresh random ones, measures
some of the children a second time from nothing, and reports what writing and measuring a child takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from environment import heading

from hwnas import __version__
from hwnas.devices import load_device
from hwnas.measurement import Measurement
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.predictors import cross_validate, make_predictor, report
from hwnas.progress import reporting
from hwnas.space import SearchSpace
from hwnas.store import Store

KINDS = ("macs", "lookup", "prior", "gp", "xgboost", "auto")
DEMO = Path(__file__).parent.parent / "examples" / "fashion-mnist.yaml"


def profiled(space: SearchSpace, children: int, holdout: int, repeated: int) -> tuple[list[Measurement], ...]:
    """Measurements to fit to, to test on, and a second time in a database of its own."""
    rng = np.random.default_rng(1)
    chosen = choose_children(space, children, np.random.default_rng(0))
    fresh = [space.sample(rng) for _ in range(holdout)]
    made = []
    with load_device("cpu") as device, tempfile.TemporaryDirectory() as folder:
        for name, archs in (("fit", chosen), ("fresh", fresh), ("again", fresh[:repeated])):
            with (
                Store(Path(folder) / f"{name == 'again'}.db") as store,
                reporting(f"{space.name} {name}") as (progress,),
            ):
                made.append(measure(archs, space, device, device.timing, store, report=progress))
    return tuple(made)


def section(space: SearchSpace, children: int, holdout: int, repeated: int) -> list[str]:
    fit, fresh, again = profiled(space, children, holdout, repeated)
    latency = [m.latency_ms for m in fit]
    archs = [m.arch for m in fit]
    lines = [
        f"## {space.name}: {children} children fitted ({min(latency):.3f} to {max(latency):.3f} ms), "
        f"{holdout} fresh random ones",
        "",
        "| kind | Spearman | mean error | within 5% | within 10% | in 90% interval | cross-validated within 10% |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        predictor = make_predictor(kind, space).fit(archs, latency)
        mean, std = predictor.predict([m.arch for m in fresh])
        r = report([m.latency_ms for m in fresh], mean, std)
        cv = cross_validate(partial(make_predictor, kind, space), archs, latency, 5, np.random.default_rng(0))
        lines.append(
            f"| {kind} | {r.spearman:.3f} | {r.mape_pct:.1f}% | {r.within_5_pct:.0f}% | {r.within_10_pct:.0f}% "
            f"| {r.coverage_90:.0f}% | {cv.within_10_pct:.0f}% |"
        )
    differences = [abs(b.latency_ms / a.latency_ms - 1) for a, b in zip(fresh, again, strict=False)]
    everything = [*fit, *fresh]
    lines += [
        "",
        f"- measured twice ({len(differences)} children, databases of their own): median difference "
        f"{statistics.median(differences):.1%}, 90% within {np.quantile(differences, 0.9):.1%}, "
        f"largest {max(differences):.1%}",
        f"- a child: {statistics.median(m.write_s for m in everything) * 1e3:.1f} ms to write, "
        f"{statistics.median(m.run_s for m in everything):.2f} s to measure; "
        f"{sum(m.unstable for m in everything)} of {len(everything)} stayed noisy",
        "",
    ]
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results there too")
    output = parser.parse_args().output
    lines = heading("Latency prediction on this processor, onnxruntime, 1 thread", f"hwnas {__version__}, fp32")
    demo = SearchSpace.load(DEMO, in_channels=1, num_classes=10)
    lines += section(replace(demo, name="demo space (fashion-mnist.yaml)"), children=60, holdout=40, repeated=30)
    lines += section(SearchSpace.load("bignas"), children=30, holdout=15, repeated=5)
    text = "\n".join(lines)
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")
