"""How well a predictor fits: predicted against measured latency, as charts and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from hwnas.config import read_json
from hwnas.errors import InputError
from hwnas.files import write_text
from hwnas.predictors.base import FloatArray
from hwnas.report.charts import Axis, Chart, Mark, Series, file_name, table_csv
from hwnas.report.png import can_draw, write_png
from hwnas.space import Architecture

Tested: TypeAlias = Literal["cross-validation", "held out", "finalist"]

# What each kind of point is called in a legend, and its mark.
SERIES: Mapping[Tested, tuple[str, Mark]] = {
    "cross-validation": ("left out of the fit in turn", "ring"),
    "held out": ("fresh children, never fitted to", "dot"),
    "finalist": ("finalists of searches since", "diamond"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPoint:
    """A child's measured latency, and what a predictor that had not seen it said.

    Attributes:
        arch: the child.
        tested: why the predictor had not seen it.
        measured_ms: median measured.
        predicted_ms, std_ms: mean and standard deviation predicted.
    """

    arch: Architecture
    tested: Tested
    measured_ms: float
    predicted_ms: float
    std_ms: float

    @property
    def residual_pct(self) -> float:
        """By how much the prediction is over the measurement, percent of the measurement."""
        return 100 * (self.predicted_ms / self.measured_ms - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "architecture": self.arch.to_dict(),
            "architecture_text": self.arch.describe(),
            "tested": self.tested,
            "measured_ms": self.measured_ms,
            "predicted_ms": self.predicted_ms,
            "std_ms": self.std_ms,
            "residual_pct": self.residual_pct,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        numbers = {name: float(value[name]) for name in ("measured_ms", "predicted_ms", "std_ms")}
        tested = next(name for name in SERIES if name == value["tested"])
        return cls(arch=Architecture.from_dict(value["architecture"]), tested=tested, **numbers)


def fit_points(
    tested: Tested,
    archs: Sequence[Architecture],
    measured_ms: Sequence[float] | FloatArray,
    mean_ms: FloatArray,
    std_ms: FloatArray,
) -> list[FitPoint]:
    """The points of children that a predictor was tested on; all arguments have the shape (num_archs,)."""
    columns = (np.asarray(column).tolist() for column in (measured_ms, mean_ms, std_ms))
    return [
        FitPoint(arch=arch, tested=tested, measured_ms=measured, predicted_ms=mean, std_ms=std)
        for arch, measured, mean, std in zip(archs, *columns, strict=True)
    ]


def fit_charts(device: str, points: Iterable[FitPoint]) -> tuple[Chart, Chart]:
    """Predicted against measured latency on a device, and the residual by size."""
    by_test: dict[Tested, list[FitPoint]] = {tested: [] for tested in SERIES}
    for point in points:
        by_test[point.tested].append(point)
    predicted, residual = [], []
    for tested, some in by_test.items():
        if not some:
            continue
        name, mark = SERIES[tested]
        measured = tuple(point.measured_ms for point in some)
        common: dict[str, Any] = {
            "name": name,
            "mark": mark,
            "x": measured,
            "children": tuple(point.arch.id for point in some),
            "strong": tested != "cross-validation",
        }
        std = tuple(point.std_ms for point in some)
        predicted.append(Series(y=tuple(point.predicted_ms for point in some), std=std, **common))
        relative = tuple(100 * s / ms for s, ms in zip(std, measured, strict=True))
        residual.append(Series(y=tuple(point.residual_pct for point in some), std=relative, **common))
    x = Axis(label="measured latency", unit="ms")
    return (
        Chart(
            name=file_name("predicted", device),
            title=f"Predicted against measured on {device}",
            x=x,
            y=Axis(label="predicted latency", unit="ms"),
            series=tuple(predicted),
            band="ratio",
        ),
        Chart(
            name=file_name("residual", device),
            title=f"Residual by size on {device}",
            x=x,
            y=Axis(label="predicted over measured", unit="%"),
            series=tuple(residual),
            band="level",
        ),
    )


def save_fit(device: str, points: Sequence[FitPoint], folder: Path) -> list[Path]:
    """Write a device's points as JSON and CSV, and their two charts as one PNG where matplotlib is installed.

    Returns:
        The files, the one to look at first.

    Raises:
        OSError: they cannot be written.
    """
    columns = ["tested", "child", "architecture", "measured_ms", "predicted_ms", "std_ms", "residual_pct"]
    rows = [
        [p.tested, p.arch.id, p.arch.describe(), p.measured_ms, p.predicted_ms, p.std_ms, p.residual_pct]
        for p in points
    ]
    files = [folder / f"{device}.csv", folder / f"{device}.json"]
    write_text(files[0], table_csv(columns, rows))
    write_text(files[1], json.dumps({"device": device, "points": [p.to_dict() for p in points]}, indent=1) + "\n")
    if can_draw():
        png = folder / f"{device}.png"
        write_png(png, fit_charts(device, points))
        files.insert(0, png)
    return files


def load_fit(path: Path) -> list[FitPoint]:
    """What `save_fit` wrote as JSON; nothing if the file is missing.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        return [FitPoint.from_dict(point) for point in read_json(path)["points"]]
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise InputError(f"{path}: damaged ({error!r}): run `hwnas fit --device {path.stem}`") from None
