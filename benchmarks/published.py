"""Fits the device models that ship with hwnas to published measurements: makes `hwnas/predictors/catalog/*.json`.

    python benchmarks/published.py --output benchmarks/results/published.md

A model is a cost for each feature of a layer (`hwnas.predictors.features`), over 0. The tables are small and leave most
costs open, so devices of one class are fitted together: the logarithms of a device's costs are normally distributed
about the mean of the other devices of its class, those of one kind (arithmetic, memory, launches, activations) move
together, and its speed as a whole is free. How far costs may go is chosen for a class as a whole, by the error on
families of networks that were left out of the fit of every device in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from environment import heading
from numpy.typing import NDArray
from published_tables import (
    CPU_SUBMISSIONS,
    GPU_SUBMISSIONS,
    MOBILE,
    SHUFFLING,
    Sample,
    blocks,
    macs_differences,
    ncnn,
    pixel,
)
from scipy.optimize import least_squares

from hwnas.files import write_text
from hwnas.predictors.base import FitStatistics
from hwnas.predictors.features import FEATURE_NAMES, by_name
from hwnas.predictors.prior import DEFAULT_MACHINES, relative_std
from hwnas.predictors.published import CATALOG, UNMEASURED_STD, PublishedModel, Source, read_published

Array = NDArray[np.float64]

# -------------------------------------------------------------------- what is fitted

_GITHUB = "https://github.com"
MNASNET = Source(
    table="MnasNet-A1", licence="Apache-2.0",
    url=f"{_GITHUB}/tensorflow/tpu/blob/7dc921f/models/official/mnasnet/README.md",
)  # fmt: skip
MOBILENET = Source(
    table="MobileNetV2", licence="Apache-2.0",
    url=f"{_GITHUB}/tensorflow/models/blob/0ba83cf/research/slim/nets/mobilenet/README.md",
)  # fmt: skip
HOSTED = Source(
    table="TensorFlow Lite hosted models", licence="Apache-2.0",
    url=f"{_GITHUB}/tensorflow/tensorflow/blob/0406598/tensorflow/lite/g3doc/guide/hosted_models.md",
)  # fmt: skip
LITE = Source(
    table="EfficientNet-Lite", licence="Apache-2.0",
    url=f"{_GITHUB}/tensorflow/tpu/blob/7dc921f/models/official/efficientnet/lite/README.md",
)  # fmt: skip
OFA = Source(table="Once-for-All's latency table of Note10", url=f"{_GITHUB}/mit-han-lab/once-for-all", licence="MIT")
NCNN = Source(table="ncnn benchmark", url=f"{_GITHUB}/Tencent/ncnn/tree/master/benchmark", licence="BSD-3-Clause")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """What a model's file says beside what is fitted; `samples` is the name of what it is fitted to, in its class."""

    samples: str
    machine: str
    devices: tuple[str, ...]
    runtime_version: str
    threads: int | None
    sources: tuple[Source, ...]
    runtime: str = "litert"
    precision: str = "fp32"
    stands_in_for: tuple[str, ...] = ()
    note: str = ""


TFLITE = "TensorFlow Lite on the processor"
_JETSON: dict[str, Any] = {
    "runtime": "ncnn", "runtime_version": "ncnn on the GPU (Vulkan)", "precision": "fp16", "threads": None,
    "sources": (NCNN,),
}  # fmt: skip
SHIPPED = {
    "pixel-1": Shipped(
        samples="Pixel 1", machine="Google Pixel 1", devices=("pixel-1",), threads=1,
        runtime_version=f"{TFLITE}, 2018-2019", sources=(MOBILENET, MNASNET),
        note="before XNNPACK, which is the default since 2020: XNNPACK's own table has MobileNetV2 in 49 ms, not 73.8",
    ),
    "pixel-3-4-threads": Shipped(
        samples="Pixel 3, 4 threads", machine="Google Pixel 3", devices=("pixel-3-4-threads", "pixel-3"), threads=4,
        runtime_version=f"{TFLITE}, 2020", sources=(HOSTED,),
    ),
    "pixel-3-gpu": Shipped(
        samples="Pixel 3, GPU", machine="Google Pixel 3", devices=("pixel-3-gpu",), threads=None, precision="fp16",
        runtime_version="TensorFlow Lite on the GPU, 2020", sources=(HOSTED,),
    ),
    "pixel-4-4-threads": Shipped(
        samples="Pixel 4, 4 threads", machine="Google Pixel 4", devices=("pixel-4-4-threads", "pixel-4"), threads=4,
        runtime_version=f"{TFLITE}, 2020", sources=(LITE,), stands_in_for=("pixel",),
        note="five sizes of one network; their costs by layer are mostly those of the other phones",
    ),
    "pixel-4-gpu": Shipped(
        samples="Pixel 4, GPU, fp16", machine="Google Pixel 4", devices=("pixel-4-gpu",), threads=None,
        precision="fp16", runtime_version="TensorFlow Lite on the GPU, 2020", sources=(LITE,),
        note="five sizes of one network; their costs by layer are mostly those of the other phone",
    ),
    "galaxy-note10": Shipped(
        samples="Note10", machine="Samsung Galaxy Note10", devices=("galaxy-note10",), threads=1,
        runtime_version=f"{TFLITE}, 2019-2020", sources=(OFA,),
        note="the threads are not published: 12 billion multiply-adds a second are those of one big core",
    ),
    "raspberry-pi-4-ncnn": Shipped(
        samples="Raspberry Pi 4, 1 thread", machine="Raspberry Pi 4", devices=("raspberry-pi-4-ncnn",), threads=1,
        runtime="ncnn", runtime_version="ncnn", sources=(NCNN,),
    ),
    "raspberry-pi-4-ncnn-4-threads": Shipped(
        samples="Raspberry Pi 4, 4 threads", machine="Raspberry Pi 4", threads=4, runtime="ncnn",
        devices=("raspberry-pi-4-ncnn-4-threads", "raspberry-pi-4-ncnn"), runtime_version="ncnn", sources=(NCNN,),
    ),
    "jetson-nano-ncnn": Shipped(
        samples="Jetson Nano", machine="Jetson Nano", devices=("jetson-nano-ncnn", "jetson-nano"), **_JETSON
    ),
    "jetson-xavier-ncnn": Shipped(
        samples="Jetson AGX Xavier", machine="Jetson AGX Xavier", devices=("jetson-xavier-ncnn", "jetson-xavier"),
        **_JETSON,
    ),
    "jetson-orin-nano-ncnn": Shipped(
        samples="Jetson Orin Nano", machine="Jetson Orin Nano",
        devices=("jetson-orin-nano-ncnn", "jetson-orin-nano", "jetson"), **_JETSON,
    ),
    "jetson-agx-orin-ncnn": Shipped(
        samples="Jetson AGX Orin", machine="Jetson AGX Orin", devices=("jetson-agx-orin-ncnn", "jetson-agx-orin"),
        **_JETSON,
    ),
}  # fmt: skip

# Class -> what is fitted to, and which of the default machines it starts from (mobile CPU, GPU at a large batch).
CLASSES: dict[str, tuple[int, Callable[[], dict[str, list[Sample]]]]] = {
    "TensorFlow Lite, processors": (
        0,
        lambda: {
            "Pixel 1": pixel("pixel1", "tflite", "1", "fp32"),
            "Pixel 3, 4 threads": pixel("pixel3", "tflite cpu", "4", "fp32"),
            "Pixel 4, 4 threads": pixel("pixel4", "tflite cpu", "4", "fp32"),
            "Note10": blocks("ofa_note10"),
            "Pixel 1 (ProxylessNAS's blocks)": blocks("proxyless_pixel1"),
        },
    ),
    "TensorFlow Lite, GPUs": (
        1,
        lambda: {
            "Pixel 3, GPU": pixel("pixel3", "tflite gpu", "", "fp16/32"),
            "Pixel 4, GPU, fp16": pixel("pixel4", "tflite gpu", "", "fp16"),
            "Pixel 4, GPU, fp32": pixel("pixel4", "tflite gpu", "", "fp32"),
        },
    ),
    "ncnn, processors": (0, lambda: {name: ncnn(*key, gpu=False) for name, key in CPU_SUBMISSIONS.items()}),
    "ncnn, GPUs": (1, lambda: {name: ncnn(*key, gpu=True) for name, key in GPU_SUBMISSIONS.items()}),
}
# Goals of the project: mean absolute error on families left out, percent.
GOALS = {"pixel-1": 6, "pixel-3-4-threads": 6, "pixel-4-4-threads": 6, "galaxy-note10": 5, "raspberry-pi-4-ncnn": 10,
         "raspberry-pi-4-ncnn-4-threads": 10, "jetson-nano-ncnn": 12, "jetson-xavier-ncnn": 12,
         "jetson-orin-nano-ncnn": 12, "jetson-agx-orin-ncnn": 12}  # fmt: skip
# `shared/anchors.md`, "Latency prediction": leave-one-out error of priors fitted before, percent.
ANCHORS = {
    "pixel-1": "4.3",
    "pixel-3-4-threads": "2.7",
    "galaxy-note10": "3.3 (blocks)",
    "jetson-nano-ncnn": "13",
    "raspberry-pi-4-ncnn": "12.5 (other blocks)",
    "jetson-xavier-ncnn": "22-26",
    "jetson-orin-nano-ncnn": "22-26",
}

# -------------------------------------------------------------------- the fit

_SPEED_STD = 5.0  # of a machine as a whole: anything
# Standard deviations of logarithms that cross-validation chooses among: of single costs, of those of a kind together,
# and of the measurements.
_GRID = tuple(product((0.1, 0.2, 0.4), (0.3, 1.0), (0.03, 0.1)))
_FREEDOM = 3  # of the Student-t distribution of errors: measurements far off count little
_ROUNDS = 2  # of fitting all devices, each about the mean of the others
_KINDS = np.array(
    [next((end for end in ("_macs", "_moved", "_elements") if name.endswith(end)), "launch") for name in FEATURE_NAMES]
)
_KINDS[FEATURE_NAMES.index("weights")] = "_moved"
_SAME_KIND = np.equal.outer(_KINDS, _KINDS).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Spread:
    """See `_GRID`."""

    cost: float
    kind: float
    noise: float


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Samples as arrays: features (num, num_features), latencies (num,), names and families (num,)."""

    features: Array
    latency_ms: Array
    names: NDArray[np.str_]
    families: NDArray[np.str_]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Measured:
        return cls(
            np.array([sample.features for sample in samples]),
            np.array([sample.latency_ms for sample in samples]),
            np.array([sample.name for sample in samples]),
            np.array([sample.family for sample in samples]),
        )

    def take(self, keep: NDArray[np.bool_]) -> Measured:
        return Measured(self.features[keep], self.latency_ms[keep], self.names[keep], self.families[keep])


def fit(data: Measured, mean: Array, spread: Spread) -> Array:
    """The most probable logarithms of the costs, ms, (num_features,), about `mean` but for the speed as a whole."""
    num = len(FEATURE_NAMES)
    covariance = spread.cost**2 * np.eye(num) + spread.kind**2 * _SAME_KIND + _SPEED_STD**2
    root = np.linalg.cholesky(covariance)
    logs = np.log(data.latency_ms)
    start = mean - np.median(np.log(data.features @ np.exp(mean)) - logs)
    weights = np.ones(len(logs))

    def errors(z: Array) -> Array:
        return (np.log(data.features @ np.exp(start + root @ z)) - logs) / spread.noise

    def residuals(z: Array) -> Array:
        return np.concatenate([np.sqrt(weights) * errors(z), z])

    def jacobian(z: Array) -> Array:
        costs = data.features * np.exp(start + root @ z)
        shares = costs / costs.sum(axis=1, keepdims=True)
        return np.vstack([(np.sqrt(weights) / spread.noise)[:, None] * (shares @ root), np.eye(num)])

    z = np.zeros(num)
    for _ in range(3):  # iteratively reweighted, as `hwnas.predictors.prior.fit_prior`
        z = least_squares(residuals, z, jac=jacobian, method="lm", max_nfev=60).x
        found = errors(z)
        scale = max(1.4826 * float(np.median(np.abs(found))), 0.3)
        weights = (_FREEDOM + 1) / (_FREEDOM + (found / scale) ** 2)
    return np.asarray(start + root @ z)


def fit_class(data: dict[str, Measured], mean: Array, spread: Spread, only: str | None = None) -> dict[str, Array]:
    """Each device of a class, fitted about the mean of the others; `only` one in the end."""
    means = dict.fromkeys(data, mean)
    found: dict[str, Array] = {}
    for turn in range(_ROUNDS):
        last = turn == _ROUNDS - 1
        found |= {name: fit(one, means[name], spread) for name, one in data.items() if not last or only in (None, name)}
        centred = {name: costs - costs.mean() for name, costs in found.items()}
        means = {name: np.mean([centred[other] for other in data if other != name], axis=0) for name in data}
    return found


def left_out(data: dict[str, Measured], mean: Array, spread: Spread) -> dict[str, Array]:
    """log(measured / predicted) where a sample's family is left out of the fit of all devices, by device."""
    errors = {name: np.full(len(one.names), np.nan) for name, one in data.items()}
    for family in sorted(set().union(*(set(one.families) for one in data.values()))):
        train = {name: one.take(one.families != family) for name, one in data.items()}
        train = {name: one for name, one in train.items() if len(one.names)}
        if all(len(train.get(name, one).names) == len(one.names) for name, one in data.items()):
            continue
        found = fit_class(train, mean, spread)
        for name, one in data.items():
            test = one.families == family
            if name in found and test.any():
                errors[name][test] = np.log(one.latency_ms[test] / (one.features[test] @ np.exp(found[name])))
    return errors


def left_out_alone(data: dict[str, Measured], name: str, mean: Array, spread: Spread) -> Array:
    """log(measured / predicted) of a device's samples, each network left out of the fit of this device in turn."""
    one = data[name]
    others = fit_class({other: them for other, them in data.items() if other != name}, mean, spread)
    about = np.mean([costs - costs.mean() for costs in others.values()], axis=0)
    errors = np.empty(len(one.names))
    for network in sorted(set(one.names)):
        test = one.names == network
        costs = fit(one.take(~test), about, spread)
        errors[test] = np.log(one.latency_ms[test] / (one.features[test] @ np.exp(costs)))
    return errors


def mape(log_errors: Array) -> float:
    """Mean |predicted / measured - 1|, percent."""
    return 100 * float(np.abs(np.expm1(-log_errors)).mean())


# -------------------------------------------------------------------- the models


def ofa_networks(note10: Measured, log_errors: Array, num: int = 300) -> Array:
    """log(sum / predicted sum) of random networks of Once-for-All's space, from their blocks' errors, (num,)."""
    rng = np.random.default_rng(0)
    resolutions = np.array([name.partition(" ")[0] for name in note10.names])
    predicted = note10.latency_ms / np.exp(log_errors)
    found = []
    for _ in range(num):
        resolution = rng.choice(np.unique(resolutions))
        chosen = []
        for family in np.unique(note10.families):
            rows = np.flatnonzero((note10.families == family) & (resolutions == resolution))
            into, _, out = family.partition(">")
            again = into == out and len(rows) > 1  # blocks after the first of a stage: one to three
            chosen += rng.choice(rows, rng.integers(1, 4) if again else 1).tolist()
        found.append(np.log(note10.latency_ms[chosen].sum() / predicted[chosen].sum()))
    return np.array(found)


def model(
    shipped: Shipped, data: dict[str, Measured], costs: Array, family: Array, alone: Array, relatives: Array
) -> PublishedModel:
    """A file's content; where there is but one family, errors of the class's `relatives` stand for its own."""
    one = data[shipped.samples]
    fitted = np.log(one.latency_ms / (one.features @ np.exp(costs)))
    several = not np.isnan(family).any()
    strict = family if several else relatives
    fields = {key: value for key, value in asdict(shipped).items() if key not in ("samples", "sources")}
    return PublishedModel(
        schema=1,
        what="blocks" if shipped.samples == "Note10" else "networks",
        num_networks=len(set(one.names)),
        families=tuple(sorted(set(one.families.tolist()))),
        coefficients_ms={name: float(f"{value:.4g}") for name, value in by_name(np.exp(costs)).items()},
        unmeasured=tuple(np.array(FEATURE_NAMES)[(one.features == 0).all(axis=0)].tolist()),
        relative_std=round(relative_std(strict, num_tuned=0), 4),
        leave_one_out_pct=round(mape(alone), 2),
        leave_family_out_pct=round(mape(family), 2) if several else None,
        statistics=FitStatistics(
            num_samples=len(one.names),
            least_ms=round(float(one.latency_ms.min()), 3),
            greatest_ms=round(float(one.latency_ms.max()), 3),
            mape_pct=round(mape(fitted), 2),
            left_out_pct=round(100 * float(np.abs(strict).mean()), 2),
        ),
        sources=shipped.sources,
        created=f"{datetime.now(UTC):%Y-%m-%d}",
        script="benchmarks/published.py",
        **fields,
    )


@dataclass(frozen=True, slots=True, eq=False)
class FittedClass:
    """Models of a class by name, how they were chosen, and each one's log errors on families left out."""

    spread: Spread
    models: dict[str, PublishedModel]
    errors: dict[str, Array]
    data: dict[str, Measured]


def best_spread(data: dict[str, Measured], mean: Array) -> Spread:
    """The one with the least error on families left out, mean over the devices."""

    def error(spread: Spread) -> float:
        found = left_out(data, mean, spread)
        return float(np.mean([np.nanmean(np.abs(one)) for one in found.values() if not np.isnan(one).all()]))

    return min((Spread(*values) for values in _GRID), key=error)


def fitted_class(name: str) -> FittedClass:
    """Fit all of a class, and try what was left out."""
    start, samples = CLASSES[name]
    data = {device: Measured.of(found) for device, found in samples().items()}
    mean = np.log(DEFAULT_MACHINES[start])
    spread = best_spread(data, mean)
    errors, costs = left_out(data, mean, spread), fit_class(data, mean, spread)
    chosen = {key: one for key, one in SHIPPED.items() if one.samples in data}
    whole = [errors[device] for device, found in samples().items() if found[0].whole]
    relatives = max((one for one in whole if not np.isnan(one).any()), key=mape)
    models = {}
    for key, one in chosen.items():
        alone = left_out_alone(data, one.samples, mean, spread)
        models[key] = model(one, data, costs[one.samples], errors[one.samples], alone, relatives)
    return FittedClass(spread, models, {key: errors[one.samples] for key, one in chosen.items()}, data)


def write(models: dict[str, PublishedModel], folder: Path) -> None:
    """Files of models; one that says the same but for its date stays as it is."""
    for key, made in models.items():
        path = folder / f"{key}.json"
        if path.is_file() and read_published(path) == replace(made, created=read_published(path).created):
            continue
        write_text(path, json.dumps(asdict(made), indent=1) + "\n")


# -------------------------------------------------------------------- the report


def same_network_elsewhere(data: dict[str, Measured], device: str) -> Array:
    """log(measured / predicted) from nothing but the same network's latency on the other Jetsons.

    By regression of logarithms on their mean, each network left out. What a submission does to one network shows here,
    whatever a model makes of layers.
    """
    tables = {
        name: {n: one.latency_ms[one.names == n].mean() for n in np.unique(one.names)}
        for name, one in data.items()
        if name.startswith("Jetson")
    }
    networks = sorted(set.intersection(*(set(table) for table in tables.values())))
    target = np.log([tables[device][network] for network in networks])
    elsewhere = np.mean(
        [np.log([table[network] for network in networks]) for name, table in tables.items() if name != device], axis=0
    )
    inputs = np.column_stack([np.ones(len(networks)), elsewhere])
    errors = np.empty(len(networks))
    for index in range(len(networks)):
        keep = np.arange(len(networks)) != index
        solved = np.linalg.lstsq(inputs[keep], target[keep], rcond=None)[0]
        errors[index] = target[index] - inputs[index] @ solved
    return errors


def _yes(error: float, goal: float) -> str:
    return f"{'yes' if error < goal else 'no'} ({error:.1f})"


def prose(text: str) -> str:
    """A paragraph or an item on one line, as the other results have it."""
    return " ".join(text.split())


def swish_never_seen(group: FittedClass, start: int) -> dict[str, float]:
    """By device of ncnn: what EfficientNet-B0's swish cost, over what was predicted where no network with it was known.

    All that is wrong with the prediction counts as swish; a ratio under 0.1 as 0.1.
    """
    swish = np.array(FEATURE_NAMES) == "swish_elements"
    train = {name: one.take(one.names != "efficientnet_b0") for name, one in group.data.items()}
    found = {}
    for name, costs in fit_class(train, np.log(DEFAULT_MACHINES[start]), group.spread).items():
        test = group.data[name].names == "efficientnet_b0"
        if test.any():
            ms = group.data[name].features[test] * np.exp(costs)
            left = (group.data[name].latency_ms[test] - ms[:, ~swish].sum(axis=1)).sum()
            found[name] = max(0.1, float(left / ms[:, swish].sum()))
    return found


def report(fitted: dict[str, FittedClass]) -> list[str]:
    note10 = fitted["TensorFlow Lite, processors"]
    ofa = mape(ofa_networks(note10.data["Note10"], note10.errors["galaxy-note10"]))
    lines = [
        "## Models",
        "",
        prose("""Mean absolute error, %, on networks left out: `one` at a time, or a whole `family` of networks, left
            out of
            all devices of the class, so that nothing knew it. `typical` is the mean |log error| that commands print,
            `std`
            the relative standard deviation of predictions: 90% of the stricter errors lie within its 90% interval."""),
        "",
        "| model | setting | fitted to | families | one | family | typical | std | goal | reached | anchors, one |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in fitted.values():
        for key, one in group.models.items():
            family = one.leave_family_out_pct
            goal = GOALS.get(key)
            if goal is None:
                reached = ""
            elif family is None:
                reached = f"{_yes(one.leave_one_out_pct, goal)}, but `one` only"
            elif key == "galaxy-note10":
                reached = f"blocks {_yes(family, goal)}, networks {_yes(ofa, goal)}"
            else:
                reached = _yes(family, goal)
            lines.append(
                f"| {key} | {one.setting} | {one.num_networks} {one.what} | {len(one.families)} | "
                f"{one.leave_one_out_pct:.1f} | {'-' if family is None else f'{family:.1f}'} | "
                f"{one.statistics.left_out_pct:.1f} | {100 * one.relative_std:.0f}% | {goal or ''} | "
                f"{reached} | {ANCHORS.get(key, '')} |"
            )
    spreads = "; ".join(f"{k} {v.spread.cost:g} / {v.spread.kind:g} / {v.spread.noise:g}" for k, v in fitted.items())
    unseen = [swish_never_seen(fitted[name], CLASSES[name][0]) for name in ("ncnn, processors", "ncnn, GPUs")]
    ratios = np.array([ratio for one in unseen for ratio in one.values()])
    differences = -100 * np.array(list(macs_differences().values()))
    return [
        *lines,
        "",
        prose(f"""- Note10's table holds blocks. Its families are their places in the network. `networks` are 300
            random ones of Once-for-All's space, as sums of blocks that were each predicted from blocks at other places,
            whose errors partly cancel: {ofa:.1f}%. The model's std is the one of single blocks, for nobody has
            published how well the sums agree with whole networks."""),
        prose("""- Pixel 4's tables hold five sizes of one network: no family can be left out. `typical` and `std` are
            the worst of its class's, for five sizes of one network say little of others."""),
        prose(f"""- What a space has and a table had not (swish, squeeze-excite) widens `typical` and `std` of its
            predictions: the logarithm of such a cost is taken to have a standard deviation of {UNMEASURED_STD}.
            Swish, where no
            network with it was in the fit of any device, cost {np.median(ratios):.1f} times (median over {len(ratios)}
            devices of ncnn, {ratios.min():.1f} to {ratios.max():.1f}) what was predicted, root mean square of the
            logarithm
            {np.sqrt((np.log(ratios) ** 2).mean()):.2f}; all other errors of that network are in these figures."""),
        prose(f"""- Spread of single costs / of kinds / noise (log std), as chosen by the error on families left out,
            mean
            over a class: {spreads}. They were chosen from 12 by the errors of `family`, which are a little too good
            by that."""),
        "",
        *jetsons(fitted["ncnn, GPUs"]),
        "## Networks as layers",
        "",
        prose(f"""Our multiply-adds are {differences.min():.1f}% to {differences.max():.1f}% below the tables' where
            these have
            them (MnasNet-A1, EfficientNet-Lite): they count more than convolutions and linear layers. ncnn's layers are
            those of its own table."""),
        "",
        "## Not shipped",
        "",
        prose("""- Raspberry Pi 4 in LiteRT: FBNet's blocks are sums of a table whose threads and version are not
            published,
            and XNNPACK's table has two networks."""),
        prose("""- Pixel 1's blocks of ProxylessNAS: another runtime than that of the whole networks, version not
            published;
            they only help the class. Pixel 1, 2, 3a in XNNPACK: two networks each."""),
        prose("""- ncnn's int8 networks, detectors (their ends run on the processor), ShuffleNets, and networks without
            depthwise convolutions (AlexNet, VGG, ResNet, GoogLeNet, SqueezeNet): not what hwnas's spaces hold, and
            another kind of work."""),
        "",
    ]


def jetsons(group: FittedClass) -> list[str]:
    lines = [
        "## What the Jetsons' tables allow",
        "",
        prose("""`same elsewhere`: error where a network is predicted from nothing but its own latency on the other
            Jetsons.
            Errors by network are log(measured / predicted), %, its family left out."""),
        "",
        "| model | family | same elsewhere | by network |",
        "|---|---|---|---|",
    ]
    for key, one in group.models.items():
        if not key.startswith("jetson"):
            continue
        device = SHIPPED[key].samples
        names = group.data[device].names
        by_network = ", ".join(
            f"{name} {100 * group.errors[key][names == name].mean():+.0f}" for name in dict.fromkeys(names)
        )
        elsewhere = mape(same_network_elsewhere(group.data, device))
        lines.append(f"| {key} | {one.leave_family_out_pct:.1f} | {elsewhere:.0f} | {by_network} |")
    orin = group.data["Jetson Orin Nano"]
    pairs = {name: orin.latency_ms[orin.names == name] for name in np.unique(orin.names)}
    ratios = {name: float(both.max() / both.min()) for name, both in pairs.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    apart = 100 * float(np.mean([ratio - 1 for ratio in ratios.values()]))
    between = mape(np.log(np.concatenate([both / np.sqrt(both.prod()) for both in pairs.values()])))
    everything = {
        name: Measured.of(ncnn(*key, gpu=True, names=MOBILE + SHUFFLING)) for name, key in GPU_SUBMISSIONS.items()
    }
    mean = np.log(DEFAULT_MACHINES[CLASSES["ncnn, GPUs"][0]])
    errors = left_out(everything, mean, best_spread(everything, mean))
    with_shuffles = ", ".join(f"{name} {mape(errors[name]):.1f}%" for name in errors if name.startswith("Jetson"))
    return [
        *lines,
        "",
        prose(f"""- Orin Nano was submitted twice, with the same GPU: the two differ by {apart:.0f}% in the mean,
            {worst} by a
            factor of {ratios[worst]:.2f} (8 runs each). Even the geometric mean of a network's own two measurements is
            off by {between:.0f}%."""),
        prose(f"""- ShuffleNets were left out: hwnas's spaces have no channel shuffles. That was decided when both had
            been
            tried: with them the errors are {with_shuffles}, their own spread of costs chosen likewise."""),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--catalog", type=Path, default=CATALOG)
    args = parser.parse_args()
    fitted = {name: fitted_class(name) for name in CLASSES}
    args.catalog.mkdir(parents=True, exist_ok=True)
    for group in fitted.values():
        write(group.models, args.catalog)
    lines = heading("Device models from published measurements", "tables: ../shared/data/latency, see its README")
    text = "\n".join(lines + report(fitted))
    print(text)
    if args.output:
        write_text(args.output, text)


if __name__ == "__main__":
    main()
