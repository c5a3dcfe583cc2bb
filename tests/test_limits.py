import json
import math

import numpy as np
import pytest

import hwnas.searching.bounds
from hwnas.errors import InputError, LimitError
from hwnas.layers import lower, total_macs, total_params
from hwnas.predictors import make_predictor
from hwnas.searching.bounds import Bounds, extreme
from hwnas.searching.costs import REPEATABILITY, DeviceCost, LayerCost
from hwnas.searching.limits import (
    EnergyLimit,
    LatencyLimit,
    Limit,
    MacsLimit,
    MemoryLimit,
    ParamsLimit,
    SizeLimit,
)
from hwnas.space import Architecture, SearchSpace

SPACE = SearchSpace.load("tiny", resolution=[16, 20, 24, 28])
LIMITS = [
    LatencyLimit("cpu", 12),
    EnergyLimit("jetson", mj=3.5),
    MacsLimit(600e6),
    ParamsLimit(5e6),
    SizeLimit(20),
    MemoryLimit(4.5),
]


# -------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limit", "text"),
    list(
        zip(
            LIMITS,
            [
                "12 ms on cpu",
                "3.5 mJ on jetson",
                "600M MACs",
                "5M parameters",
                "20 MB of file",
                "4.5 MB of activations",
            ],
            strict=True,
        )
    ),
)
def test_limits_describe_themselves_and_round_trip(limit, text):
    assert limit.describe() == text
    assert Limit.from_dict(json.loads(json.dumps(limit.to_dict()))) == limit


def test_a_limit_as_plain_values():
    assert LatencyLimit("cpu", 12).to_dict() == {"kind": "latency", "device": "cpu", "value": 12, "unit": "ms"}
    assert MacsLimit(6e8).to_dict() == {"kind": "macs", "device": None, "value": 6e8, "unit": "MACs"}


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "12", None, True])
@pytest.mark.parametrize("make", [lambda value: LatencyLimit("cpu", value), MacsLimit])
def test_bounds_that_make_no_sense(make, value):
    with pytest.raises(InputError, match="must be a finite number over 0"):
        make(value)


def test_a_limit_needs_a_device_with_a_name():
    with pytest.raises(InputError, match="name a device"):
        LatencyLimit("", 12)


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "weight", "device": None, "value": 1},
        {"kind": "macs", "device": "cpu", "value": 1},
        {"kind": "latency", "device": None, "value": 1},
        {"kind": "macs"},
        {},
    ],
)
def test_what_is_no_limit(value):
    with pytest.raises(InputError, match="is no limit"):
        Limit.from_dict(value)


# -------------------------------------------------------------------- costs


def genes(count: int, seed: int = 0):
    return SPACE.sample_genes(count, np.random.default_rng(seed))


@pytest.mark.parametrize(("kind", "total"), [("macs", total_macs), ("params", total_params)])
def test_costs_of_layers_are_exact(kind, total):
    cost = LayerCost(SPACE, kind)
    rows = genes(20)
    expected = [total(lower(SPACE, SPACE.decode(row))) for row in rows]
    assert np.array_equal(cost.expected(rows), expected)
    assert np.array_equal(cost.upper(rows, 0.99), expected)


def latency(arch: Architecture) -> float:
    layers = lower(SPACE, arch)
    return total_macs(layers) * 1e-7 + 0.002 * len(layers)


@pytest.fixture(scope="module")
def predictor():
    archs = [SPACE.smallest(), SPACE.largest(), *map(SPACE.decode, genes(30))]
    noise = np.random.default_rng(0).normal(1, 0.02, len(archs))
    return make_predictor("prior", SPACE).fit(archs, noise * [latency(arch) for arch in archs])


def test_a_margin_grows_with_the_confidence(predictor):
    cost, rows = DeviceCost(predictor), genes(20)
    mean, std = predictor.predict_genes(rows)
    assert np.array_equal(cost.expected(rows), mean)
    assert np.allclose(cost.upper(rows, 0.5), mean)
    assert np.allclose(cost.upper(rows, 0.95), mean + 1.6449 * std, rtol=1e-4)
    assert (cost.upper(rows, 0.99) > cost.upper(rows, 0.95)).all()


def test_a_measured_value_goes_before_a_predicted_one(predictor):
    rows = genes(3)
    cost = DeviceCost(predictor, {rows[1].tobytes(): 7.0}, "mJ")
    plain = DeviceCost(predictor)
    assert cost.expected(rows)[1] == 7
    assert cost.upper(rows, 0.95)[1] == pytest.approx(7 * (1 + REPEATABILITY))
    assert np.array_equal(cost.expected(rows)[[0, 2]], plain.expected(rows)[[0, 2]])
    assert cost.unit == "mJ"


# -------------------------------------------------------------------- bounds


@pytest.fixture(scope="module")
def macs():
    return LayerCost(SPACE, "macs")


@pytest.fixture(scope="module")
def params():
    return LayerCost(SPACE, "params")


def test_a_child_keeps_all_limits_or_none_counts(predictor, macs):
    rows = genes(500)
    ms = DeviceCost(predictor)
    limits = (
        LatencyLimit("cpu", float(np.median(ms.upper(rows, 0.9)))),
        MacsLimit(float(np.median(macs.expected(rows)))),
    )
    bounds = Bounds(SPACE, list(zip(limits, (ms, macs), strict=True)), 0.9)
    over = bounds.over(rows)
    assert over.shape == (500, 2)
    assert np.allclose(over[:, 1], macs.expected(rows) - limits[1].value)
    assert np.array_equal(bounds.feasible(rows), (over[:, 0] <= 0) & (over[:, 1] <= 0))
    shares = np.stack([ms.expected(rows) / limits[0].value, macs.expected(rows) / limits[1].value])
    assert np.allclose(bounds.share(rows), shares.max(axis=0))
    assert 0 < bounds.feasible(rows).sum() < 250
    assert bounds.describe() == f"{limits[0].describe()} and {limits[1].describe()}"


def test_without_limits_every_child_will_do():
    bounds = Bounds(SPACE, [])
    assert bounds.feasible(genes(5)).all()
    assert not bounds.share(genes(5)).any()
    assert bounds.check() == []
    assert bounds.describe() == "no limit"


@pytest.mark.parametrize("confidence", [0.4, 1.0, 2.0])
def test_confidence_that_makes_no_sense(confidence):
    with pytest.raises(InputError, match=r"at least 0\.5 and under 1"):
        Bounds(SPACE, [], confidence)


def test_one_limit_of_each_kind(macs):
    with pytest.raises(InputError, match="1M MACs and 2M MACs: give one limit of each kind"):
        Bounds(SPACE, [(MacsLimit(1e6), macs), (MacsLimit(2e6), macs)])


def test_the_least_possible_is_the_least(monkeypatch):
    """Against all children of a space small enough to list, under a cost that the smallest child does not win."""
    monkeypatch.setattr(hwnas.searching.bounds, "DRAWS", 64)  # few beside the size of the space
    space = SearchSpace.load("tiny", resolution=[16], stages=[
        {"width": [8, 16], "depth": [1, 2], "kernel": [3, 5], "expand": [1, 3, 6]},
        {"width": [16, 24], "depth": [1, 2], "kernel": [3, 5], "expand": [3, 6], "stride": 2},
    ])  # fmt: skip
    every = np.unique(space.sample_genes(200_000, np.random.default_rng(0)), axis=0)
    assert len(every) == space.size()
    for seed in range(20):
        weight = np.random.default_rng(seed).normal(size=(len(space.genes), 8))

        def rough(rows, weight=weight):  # a random cost a choice, and of neighbouring choices
            alone = np.take_along_axis(weight.T, np.maximum(rows, 0).astype(int), axis=0)
            alone = np.where(rows >= 0, alone, 0)
            return alone.sum(axis=1) + 0.5 * (alone[:, 1:] * alone[:, :-1]).sum(axis=1)

        row, value = extreme(space, rough)
        assert value == rough(row[None])[0] == pytest.approx(rough(every).min())


def test_a_limit_below_the_least_says_the_least_and_the_child(macs, predictor):
    smallest = SPACE.smallest()
    least = total_macs(lower(SPACE, smallest))
    with pytest.raises(
        LimitError, match=r"no child of space 'tiny' keeps 0\.001M MACs: the least possible is"
    ) as error:
        Bounds(SPACE, [(MacsLimit(1000), macs)]).check()
    assert f"{least / 1e6:.4g}M MACs ({smallest.describe()})" in str(error.value)
    bounds = Bounds(SPACE, [(LatencyLimit("cpu", 1e-3), DeviceCost(predictor)), (MacsLimit(1e9), macs)])
    with pytest.raises(LimitError, match=r"with 95% confidence: the least possible is .* ms on cpu") as error:
        bounds.check()
    value, arch = bounds.least(bounds.limits[0])
    assert arch.describe() in str(error.value)
    assert (bounds.terms[0][1].upper(genes(5000, 1), 0.95) >= value).all()


def test_the_least_possible_can_just_be_kept(macs):
    value, arch = Bounds(SPACE, [(MacsLimit(1), macs)]).least(MacsLimit(1))
    assert Bounds(SPACE, [(MacsLimit(value), macs)]).check() == []
    with pytest.raises(LimitError):
        Bounds(SPACE, [(MacsLimit(value - 1), macs)]).check()
    assert total_macs(lower(SPACE, arch)) == value


class Opposed(LayerCost):
    """Grows as the first choice gets smaller."""

    unit = "ms"

    def __init__(self) -> None:
        self._values = lambda rows: 10.0 - rows[:, 0]


def test_limits_that_exclude_each_other(macs):
    least = total_macs(lower(SPACE, SPACE.smallest()))
    bounds = Bounds(SPACE, [(LatencyLimit("odd", 7.5), Opposed()), (MacsLimit(1.01 * least), macs)])
    with pytest.raises(LimitError, match=r"each can be kept alone; nearest to all is .* ms on odd, .*M MACs"):
        bounds.check()


def test_limits_above_the_biggest_child_are_said_one_by_one(macs, params):
    most = total_macs(lower(SPACE, SPACE.largest()))
    loose, tight = MacsLimit(most), ParamsLimit(total_params(lower(SPACE, SPACE.largest())) - 1)
    (said,) = Bounds(SPACE, [(loose, macs), (tight, params)]).check()
    assert f"above the biggest child ({most / 1e6:.4g}M MACs)" in said
    assert "all keep it" in said
