"""Device models fitted to published measurements: an answer where no device is at hand.

`catalog/*.json` are made by `benchmarks/published.py`; `benchmarks/results/published.md` tells how good they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict, with_config

from hwnas.config import check, read_json
from hwnas.layers import lower
from hwnas.predictors.base import FitStatistics, LatencyPredictor, PredictorFile
from hwnas.space import SearchSpace

# The standard deviation of the logarithm of a cost that was not measured: root mean square for swish over 24 devices of
# ncnn where no network with it was known (benchmarks/results/published.md).
UNMEASURED_STD = 1.16
CATALOG = Path(str(resources.files("hwnas.predictors").joinpath("catalog")))


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where measurements were published, and under which licence."""

    table: str
    url: str
    licence: str


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """What each feature costs on a machine, in one runtime.

    Attributes:
        machine: for people, `Google Pixel 4`.
        devices: names in the catalogue of devices of this machine. The model serves those that agree in runtime,
            precision and threads.
        stands_in_for: names of another or no particular machine, of which nothing is published: the model serves them
            where runtime and precision agree, and says what it is.
        runtime, precision, threads: as a device has them; threads are None where they do not matter.
        runtime_version: as far as it is known, for people.
        what: was measured: whole networks, or single blocks.
        num_networks: so many of them.
        families: kinds of networks, each of which was predicted from the others for `leave_family_out_pct`.
        coefficients_ms: by feature, see `features.FEATURE_NAMES`.
        unmeasured: features that none of the networks had: their costs are those of similar devices, or usual ones.
        relative_std: with which 90% of the errors of `leave_family_out_pct` lie within a normal's 90% interval.
        leave_one_out_pct: mean absolute error for a network that the fit did not see, percent.
        leave_family_out_pct: the same for a whole family; None where there is but one.
        statistics: for the predictor; `left_out_pct` is of the stricter of the two.
        sources: of the measurements.
        note: what else a user should know.
        created: date.
        script: that made the file.
    """

    schema: Literal[1]
    machine: str
    devices: tuple[str, ...]
    stands_in_for: tuple[str, ...]
    runtime: str
    runtime_version: str
    precision: str
    threads: int | None
    what: Literal["networks", "blocks"]
    num_networks: int
    families: tuple[str, ...]
    coefficients_ms: dict[str, float]
    unmeasured: tuple[str, ...]
    relative_std: float
    leave_one_out_pct: float
    leave_family_out_pct: float | None
    statistics: FitStatistics
    sources: tuple[Source, ...]
    note: str
    created: str
    script: str

    @property
    def setting(self) -> str:
        """What it was measured in: `TensorFlow Lite 2020, fp32, 4 threads`."""
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.runtime_version}, {self.precision}{threads}"

    def fits(self, device: str, runtime: str, precision: str, threads: int) -> bool:
        """Whether a device of this name and setting is what was measured, or one that it stands in for."""
        if (runtime, precision) != (self.runtime, self.precision):
            return False
        return device in self.stands_in_for or (device in self.devices and self.threads in (None, threads))

    def predictor(self, space: SearchSpace, device: str) -> LatencyPredictor:
        """The predictor for any space, as what layers cost does not depend on it; `device` is the user's name for it.

        What the space has and the published networks had not widens the errors.
        """
        from hwnas.predictors.prior import PriorPredictor  # imports scipy

        share = self.unmeasured_share(space)
        assert self.statistics.left_out_pct is not None
        unmeasured_pct = 100 * share * UNMEASURED_STD * np.sqrt(2 / np.pi)  # the mean of |x| for a normal x
        typical_pct = float(np.hypot(self.statistics.left_out_pct, unmeasured_pct))
        std = float(np.hypot(self.relative_std, share * UNMEASURED_STD))
        file = PredictorFile(
            schema=1,
            kind=PriorPredictor.kind,
            space=space.to_dict(),
            learned={"coefficients_ms": self.coefficients_ms, "relative_std": std},
            statistics=replace(self.statistics, left_out_pct=typical_pct),
            created=self.created,
            source=self._sentence(device, typical_pct, share),
        )
        return PriorPredictor.from_file(file, source=f"published model of {self.machine}")

    def unmeasured_share(self, space: SearchSpace) -> float:
        """The part of the latency that is for `unmeasured` features, for the smallest and largest child, mean."""
        from hwnas.predictors.features import FEATURE_NAMES, from_names, layer_features  # imports scipy

        costs = from_names(self.coefficients_ms)
        unmeasured = np.isin(FEATURE_NAMES, self.unmeasured)
        shares = []
        for arch in (space.smallest(), space.largest()):
            ms = np.sum([layer_features(layer) for layer in lower(space, arch)], axis=0) * costs
            shares.append(ms[unmeasured].sum() / ms.sum())
        return float(np.mean(shares))

    def _sentence(self, device: str, typical_pct: float, share: float) -> str:
        for_want = ""
        if device in self.stands_in_for:
            others = ", ".join(one.devices[0] for one in candidates(device) if one is not self)
            for_want = f", for want of any of {device!r} (others are of {others})"
        unlike = f"{share:.0%} of it for kinds of work that these had not, " if share >= 0.05 else ""
        return (
            f"estimated from published measurements of {self.machine} ({self.setting}; {self.num_networks} "
            f"{self.what}){for_want}: {unlike}typical error {typical_pct:.0f}%: "
            f"run `hwnas profile --device {device}` to make it exact"
        )


@cache
def published_models() -> dict[str, PublishedModel]:
    """The models that ship with hwnas, by the names of their files.

    Raises:
        InputError: a file is damaged.
    """
    return {file.stem: read_published(file) for file in sorted(CATALOG.glob("*.json"))}


def read_published(path: Path) -> PublishedModel:
    """One model from its file.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    return check(PublishedModel, read_json(path), source=str(path))


def find_published(device: str, *, runtime: str, precision: str, threads: int) -> PublishedModel | None:
    """The model that serves a device, by its name and setting; None where there is none."""
    fitting = (model for model in published_models().values() if model.fits(device, runtime, precision, threads))
    return next(fitting, None)


def candidates(device: str) -> list[PublishedModel]:
    """Models of what a name may mean: of the same machine in another setting, or named alike."""

    def bare(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    return [
        model
        for model in published_models().values()
        if device in model.devices or bare(device) in bare(model.devices[0])
    ]


def describe(models: Iterable[PublishedModel]) -> str:
    """`pixel-1 (TensorFlow Lite, 2018-2019, fp32, 1 thread), ...`: the devices that models are made for."""
    return ", ".join(f"{model.devices[0]} ({model.setting})" for model in models)
