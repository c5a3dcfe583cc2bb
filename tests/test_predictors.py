import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import check_grad

from hwnas import predictors
from hwnas.errors import InputError
from hwnas.layers import Layer, lower, total_macs
from hwnas.predictors import (
    LatencyPredictor,
    NotFittedError,
    cross_validate,
    load_predictor,
    make_predictor,
    predictor_kinds,
    report,
)
from hwnas.predictors import process as process_module
from hwnas.predictors.features import (
    FEATURE_NAMES,
    FeatureSums,
    by_name,
    feature_sums,
    from_names,
    layer_features,
)
from hwnas.predictors.gp import GpPredictor
from hwnas.predictors.metrics import Z_90
from hwnas.predictors.prior import DEFAULT_MACHINES, honest_factor
from hwnas.predictors.process import Hyperparameters, KnownMachine, LayerProcess
from hwnas.predictors.xgboost import evaluate, plain_tree
from hwnas.searching.targets import typical_error_pct
from hwnas.space import SearchSpace

TINY = SearchSpace.load("tiny", in_channels=1, num_classes=10)


@cache
def features_of_one(space, arch):
    return np.sum([layer_features(layer) for layer in lower(space, arch)], axis=0)


def features_of(space, archs):
    return np.array([features_of_one(space, arch) for arch in archs])


# A made-up machine: ns a unit of each feature that costs it anything.
RATES = {
    "dense_macs": 0.2, "pointwise_macs": 0.15, "padding_macs": 0.1, "depthwise3_macs": 0.5, "depthwise5_macs": 0.3,
    "depthwise5_stride2_macs": 0.4, "linear_macs": 0.6, "elementwise_moved": 0.8, "weights": 0.05, "convs": 1500,
    "depthwise_convs": 4000, "pools": 900, "swish_elements": 1.2, "networks": 9000,
}  # fmt: skip


def machine_ms(archs, noise=0.0, seed=0):
    clean = features_of(TINY, archs) @ from_names(RATES) * 1e-6
    return clean * np.exp(noise * np.random.default_rng(seed).standard_normal(len(clean)))


def cached_ms(archs):
    """The made-up machine, up to 60% slower where the widest feature map does not stay in its cache."""
    widest = np.array([max(layer.out_channels * layer.out_size**2 for layer in lower(TINY, arch)) for arch in archs])
    return machine_ms(archs, noise=0.01) * (1 + 0.6 / (1 + np.exp(-(np.log(widest) - np.log(9000)) * 4)))


def sample(count, seed):
    rng = np.random.default_rng(seed)
    return [TINY.sample(rng) for _ in range(count)]


TRAIN, TEST = sample(40, 1), sample(60, 2)


def odd_ms(archs):
    """The made-up machine with a slow depthwise kernel for some numbers of channels."""
    slow = [
        sum(layer.macs for layer in lower(TINY, arch) if layer.depthwise and layer.out_channels % 48 == 0)
        for arch in archs
    ]
    return machine_ms(archs) + 5e-7 * np.array(slow)


def waiting_ms(archs):
    """Another made-up machine, which waits for launches."""
    return 0.01 * np.array([len(lower(TINY, arch)) for arch in archs])


@pytest.fixture(scope="session")
def other_devices():
    train = sample(100, 7)
    return [
        make_predictor("gp", TINY).fit(train, waiting_ms(train)),
        make_predictor("gp", TINY).fit(train, odd_ms(train)),
        make_predictor("prior", TINY).fit(train, 3 * machine_ms(train)),
    ]


# -------------------------------------------------------------------- the contract of every kind


class PredictorContract:
    """What every kind must do. Fill it in with a fixture `make` that makes an unfitted predictor of a space."""

    @pytest.fixture(scope="class")
    @classmethod
    def fitted(cls, make):
        return make(TINY).fit(TRAIN, machine_ms(TRAIN, 0.02))

    def test_predicts_a_mean_and_a_deviation_for_each(self, fitted):
        mean_ms, std_ms = fitted.predict(TEST)
        assert mean_ms.shape == std_ms.shape == (len(TEST),)
        assert mean_ms.dtype == std_ms.dtype == np.float64
        assert np.all(mean_ms > 0)
        assert np.all(std_ms > 0)

    def test_genes_are_the_fast_road_to_the_same(self, fitted):
        for got, want in zip(fitted.predict_genes(TINY.encode(TEST)), fitted.predict(TEST), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_nothing_to_predict(self, fitted):
        mean_ms, std_ms = fitted.predict([])
        assert mean_ms.shape == std_ms.shape == (0,)

    def test_a_prediction_does_not_depend_on_the_others(self, fitted):
        (one, one_std), (all_, all_std) = fitted.predict(TEST[7:8]), fitted.predict(TEST)
        np.testing.assert_allclose([one[0], one_std[0]], [all_[7], all_std[7]], rtol=1e-9)

    def test_is_better_than_the_mean(self, fitted):
        latency_ms = machine_ms(TEST)
        mean_ms, _ = fitted.predict(TEST)
        error = np.abs(np.log(latency_ms / mean_ms)).mean()
        assert error < np.abs(np.log(latency_ms / np.median(machine_ms(TRAIN)))).mean()

    def test_save_and_load_predict_bit_equal(self, fitted, make, tmp_path):
        path = tmp_path / "device.json"
        fitted.save(path)
        for loaded in (type(fitted).load(path), fitted.from_file(predictors.PredictorFile.read(path), "x")):
            assert loaded.space == TINY
            assert loaded.statistics == fitted.statistics
            assert loaded.to_dict() == fitted.to_dict()
            for got, want in zip(loaded.predict(TEST), fitted.predict(TEST), strict=True):
                np.testing.assert_array_equal(got, want)

    def test_file_is_plain_json(self, fitted, tmp_path):
        fitted.save(tmp_path / "device.json", created=datetime(2026, 5, 4, 12, tzinfo=UTC))
        content = json.loads((tmp_path / "device.json").read_text(), parse_constant=pytest.fail)
        assert content["schema"] == 1
        assert content["kind"] == fitted.kind
        assert content["created"] == "2026-05-04T12:00:00+00:00"
        assert content["statistics"]["num_samples"] == len(TRAIN)
        assert SearchSpace.from_dict(content["space"]) == TINY

    def test_order_of_measurements_does_not_matter(self, fitted, make):
        order = np.random.default_rng(0).permutation(len(TRAIN))
        latency_ms = machine_ms(TRAIN, 0.02)
        shuffled = make(TINY).fit([TRAIN[i] for i in order], latency_ms[order])
        for got, want in zip(shuffled.predict(TEST), fitted.predict(TEST), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_a_device_half_as_fast(self, fitted, make):
        slow = make(TINY).fit(TRAIN, 2 * machine_ms(TRAIN, 0.02))
        for got, want in zip(slow.predict(TEST), fitted.predict(TEST), strict=True):
            np.testing.assert_allclose(got, 2 * want, rtol=0.01)

    def test_equal_weights_are_the_default(self, fitted, make):
        weighted = make(TINY).fit(TRAIN, machine_ms(TRAIN, 0.02), weights=[3.0] * len(TRAIN))
        np.testing.assert_allclose(weighted.predict(TEST)[0], fitted.predict(TEST)[0], rtol=1e-9)

    def test_fit_forgets(self, fitted, make):
        again = make(TINY).fit(TEST[:20], 7 * machine_ms(TEST[:20])).fit(TRAIN, machine_ms(TRAIN, 0.02))
        np.testing.assert_array_equal(again.predict(TEST)[0], fitted.predict(TEST)[0])

    def test_learns_from_as_few_as_it_says(self, make):
        predictor = make(TINY)
        few = TRAIN[: predictor.min_samples]
        mean_ms, std_ms = predictor.fit(few, machine_ms(few)).predict(TEST)
        assert np.all(np.isfinite(mean_ms) & (mean_ms > 0) & np.isfinite(std_ms) & (std_ms >= 0))

    def test_the_same_child_measured_again_and_again(self, make):
        mean_ms, _ = make(TINY).fit([TRAIN[0]] * 25, [2.0, 2.1, 1.9, 2.05, 1.95] * 5).predict([TRAIN[0]])
        assert mean_ms[0] == pytest.approx(2, rel=0.03)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -1.0])
    def test_refuses_what_is_no_latency(self, make, wrong):
        latency_ms = machine_ms(TRAIN)
        latency_ms[3] = wrong
        with pytest.raises(InputError, match=r"latency_ms\[3\]=.*: must be a finite number over 0; leave failed"):
            make(TINY).fit(TRAIN, latency_ms)
        with pytest.raises(InputError, match=r"weights\[3\]=.*: must be a finite number over 0"):
            make(TINY).fit(TRAIN, machine_ms(TRAIN), weights=latency_ms)

    def test_refuses_other_lengths(self, make):
        with pytest.raises(InputError, match=r"latency_ms has shape \(39,\), but there are 40 architectures"):
            make(TINY).fit(TRAIN, machine_ms(TRAIN)[:-1])
        with pytest.raises(InputError, match=r"weights has shape \(2,\), but there are 40 architectures"):
            make(TINY).fit(TRAIN, machine_ms(TRAIN), weights=[1, 2])

    def test_refuses_what_is_no_number(self, make):
        with pytest.raises(InputError, match="latency_ms: must be numbers, not"):
            make(TINY).fit(TRAIN[:2], ["fast", "slow"])

    def test_refuses_too_few(self, make):
        predictor = make(TINY)
        few = TRAIN[: predictor.min_samples - 1]
        with pytest.raises(InputError, match=f"{len(few)} measurements are too few .* measure at least"):
            predictor.fit(few, machine_ms(few))

    def test_refuses_children_of_another_space(self, make, fitted):
        other = SearchSpace.load("bignas").smallest()
        with pytest.raises(InputError, match="is not one of"):
            make(TINY).fit([other] * len(TRAIN), machine_ms(TRAIN))
        with pytest.raises(InputError, match="is not one of"):
            fitted.predict([other])

    def test_before_fit(self, make, tmp_path):
        predictor = make(TINY)
        for call in (
            lambda: predictor.predict(TEST),
            lambda: predictor.predict_genes(TINY.encode(TEST)),
            lambda: predictor.save(tmp_path / "device.json"),
            predictor.to_dict,
        ):
            with pytest.raises(NotFittedError, match="has learned nothing yet: call fit or load first"):
                call()
        assert predictor.statistics is None

    def test_damaged_files(self, fitted, tmp_path):
        path = tmp_path / "device.json"
        fitted.save(path)
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"device\.json: not a predictor, or damaged"):
            type(fitted).load(path)
        for key in json.loads(whole)["learned"]:
            content = json.loads(whole)
            if key == "choice":
                continue
            del content["learned"][key]
            path.write_text(json.dumps(content))
            with pytest.raises(InputError, match=r"device\.json: .*damaged, fit the predictor anew"):
                type(fitted).load(path)


@pytest.mark.parametrize("kind", ["macs", "lookup", "prior", "gp", "xgboost", "auto"], scope="class")
class TestKinds(PredictorContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make(cls, kind):
        return lambda space: make_predictor(kind, space)

    def test_load_predictor_finds_the_kind(self, fitted, tmp_path):
        fitted.save(tmp_path / "device.json")
        assert type(load_predictor(tmp_path / "device.json")) is type(fitted)


class TestTransfer(PredictorContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make(cls, other_devices):
        return lambda space: make_predictor("transfer", space, other_devices if space == TINY else ())

    def test_load_predictor_needs_no_sources(self, fitted, tmp_path):
        fitted.save(tmp_path / "device.json")
        np.testing.assert_array_equal(load_predictor(tmp_path / "device.json").predict(TEST), fitted.predict(TEST))


class PerResolution(LatencyPredictor):
    """A kind written from base.py alone: the mean by resolution."""

    kind = "per-resolution"

    def _learn(self, genes, latency_ms, weights):
        rows = [latency_ms[genes[:, 0] == index] for index in range(len(TINY.resolution))]
        return {"mean_ms": [float(row.mean()) if len(row) else float(latency_ms.mean()) for row in rows]}

    def _model(self, learned):
        mean_ms = np.array(learned["mean_ms"], dtype=np.float64)
        return lambda genes: (mean_ms[genes[:, 0]], 0.3 * mean_ms[genes[:, 0]])


class TestOwnKind(PredictorContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make(cls):
        return PerResolution


def test_kinds():
    assert predictor_kinds() == ("auto", "gp", "lookup", "macs", "prior", "transfer", "xgboost")
    with pytest.raises(InputError, match="unknown kind of predictor 'magic': not one of auto, gp, lookup, macs"):
        make_predictor("magic", TINY)


def test_heavy_packages_load_only_with_the_kind_that_needs_them():
    script = "import hwnas.predictors, sys; print(sorted({'scipy', 'sklearn', 'torch', 'xgboost'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------- files of others


def saved(tmp_path, **changes):
    content = make_predictor("prior", TINY).fit(TRAIN, machine_ms(TRAIN)).to_dict() | {"created": "2026-01-01"}
    path = tmp_path / "device.json"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, r"device\.json: unknown kind of predictor 'magic'"),
        ({"schema": 2}, r"device\.json: schema: input should be 1, not 2"),
        ({"space": {"name": "x"}}, r"device\.json: space: .* is missing"),
        ({"more": 1}, "more: is not a known key here"),
        ({"learned": []}, "learned: input should be a valid dictionary"),
        ({"learned": {}}, "damaged, fit the predictor anew"),
        ({"learned": {"coefficients_ms": {"warp_macs": 1}, "relative_std": 0.1}}, "unknown feature 'warp_macs'"),
        (
            {"learned": {"coefficients_ms": {"convs": -1.0}, "relative_std": 0.1}},
            r"damaged, fit the predictor anew \(it predicts",
        ),
        ({"learned": {"coefficients_ms": {"convs": float("nan")}, "relative_std": 0.1}}, "NaN is not JSON"),
        ({"statistics": {"num_samples": "many"}}, "statistics.num_samples"),
    ],
)
def test_foreign_content(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_predictor(saved(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b"\x80\x04pickle", b"[" * 100_000, b"kind: gp"])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "device.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"device\.json: "):
        load_predictor(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        load_predictor(tmp_path / "none.json")


def test_file_of_another_kind(tmp_path):
    with pytest.raises(InputError, match="holds a predictor of kind 'prior', not 'gp'"):
        GpPredictor.load(saved(tmp_path))


# -------------------------------------------------------------------- features


def layer(**changes):
    plain = {"name": "x", "kind": "conv", "inputs": ("image",), "in_channels": 24, "out_channels": 40, "in_size": 10}
    return Layer(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 24 x 40 weights on 100 pixels; padded to 32 x 48; reads 2400, writes 4000.
        (
            {"activation": "h-swish"},
            {"pointwise_macs": 96_000, "padding_macs": 57_600, "pointwise_moved": 6_400, "weights": 960, "convs": 1,
             "h_swish_elements": 4_000},
        ),
        (
            {"kernel": 3, "stride": 2, "in_channels": 3, "out_channels": 32},
            {"dense_macs": 21_600, "dense_moved": 1_100, "weights": 864, "convs": 1},
        ),
        (
            {"kernel": 5, "stride": 2, "in_channels": 24, "out_channels": 24, "groups": 24},
            {"depthwise5_stride2_macs": 15_000, "depthwise_padding_macs": 5_000, "depthwise_moved": 3_000,
             "weights": 600, "depthwise_convs": 1},
        ),
        (
            {"kernel": 9, "in_channels": 16, "out_channels": 16, "groups": 16},
            {"depthwise7_macs": 129_600, "depthwise_moved": 3_200, "weights": 1_296, "depthwise_convs": 1},
        ),
        ({"kind": "linear", "in_size": 1}, {"linear_macs": 960, "weights": 960, "networks": 1}),
        ({"kind": "global_pool", "out_channels": 24}, {"pool_moved": 2_424, "pools": 1}),
        (
            {"kind": "scale", "out_channels": 24},
            {"elementwise_moved": 4_800, "elementwise_ops": 1, "squeeze_excites": 1},
        ),
        ({"kind": "add", "out_channels": 24}, {"elementwise_moved": 7_200, "elementwise_ops": 1}),
    ],
)  # fmt: skip
def test_features_worked_out_by_hand(changes, expected):
    found = by_name(np.array(layer_features(layer(**changes))))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("num_sizes", [1, 2])
@pytest.mark.parametrize("name", SearchSpace.names())
def test_sums_agree_with_the_lowering(name, num_sizes):
    space = SearchSpace.load(name, resolution=SearchSpace.load(name).resolution[:num_sizes])
    rng = np.random.default_rng(3)
    archs = [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(5))]
    sums, direct = FeatureSums(space), features_of(space, archs)
    np.testing.assert_allclose(sums(space.encode(archs)), direct, rtol=1e-12)
    matrix = rng.random((len(FEATURE_NAMES), 3))
    np.testing.assert_allclose(sums.weighted(matrix)(space.encode(archs)), direct @ matrix, rtol=1e-12)
    macs = [i for i, n in enumerate(FEATURE_NAMES) if n.endswith("_macs") and "padding" not in n]
    assert [total_macs(lower(space, arch)) for arch in archs] == direct[:, macs].sum(axis=1).tolist()
    assert np.all(direct[:, FEATURE_NAMES.index("networks")] == 1)


def test_coefficients_by_name():
    values = np.zeros(len(FEATURE_NAMES))
    values[[0, 5]] = 0.1, 1 / 3
    assert list(by_name(values)) == [FEATURE_NAMES[0], FEATURE_NAMES[5]]
    np.testing.assert_array_equal(from_names(by_name(values)), values)


def test_grouped_convolutions_are_their_own():
    found = by_name(np.array(layer_features(layer(groups=2))))
    assert found == {"grouped_macs": 48_000, "grouped_moved": 6_400, "weights": 480, "grouped_convs": 1}


def test_counts_tell_which_layers_a_network_has():
    sums = feature_sums(TINY)
    counts = sums.counts(TINY.encode(TEST))
    np.testing.assert_allclose(counts @ sums.layer_features, features_of(TINY, TEST), rtol=1e-12)
    assert counts.sum(axis=1).tolist() == [len(lower(TINY, arch)) for arch in TEST]


# -------------------------------------------------------------------- the prior


def test_prior_recovers_a_machine():
    predictor = make_predictor("prior", TINY).fit(TRAIN[:30], machine_ms(TRAIN[:30]))
    mean_ms, std_ms = predictor.predict(TEST)
    np.testing.assert_allclose(mean_ms, machine_ms(TEST), rtol=0.01)
    assert np.all(std_ms < 0.01 * mean_ms)


def depthwise_machine_ms(archs):
    """Of a machine on which nothing but depthwise convolutions takes time: 1 ns a multiply-add."""
    return np.array([sum(layer.macs for layer in lower(TINY, arch) if layer.depthwise) * 1e-6 for arch in archs])


@pytest.mark.parametrize(
    ("kind", "least"), [("gp", 0.95), ("auto", 0.95), ("prior", 0.7), ("lookup", 0.7), ("xgboost", 0.7)]
)
def test_where_the_milliseconds_go(kind, least):
    """The prior's ridge leaves some of the time where a middling machine spends it."""
    predictor = make_predictor(kind, TINY).fit(TRAIN, depthwise_machine_ms(TRAIN))
    for arch in TEST[:5]:
        costs = predictor.breakdown_ms(arch)
        assert [layer for layer, _ in costs] == list(lower(TINY, arch))
        assert sum(ms for _, ms in costs) == pytest.approx(predictor.predict([arch])[0][0])
        found = sum(ms for layer, ms in costs if layer.depthwise)
        assert least < found / depthwise_machine_ms([arch])[0] < 1.05


def test_breakdown_refuses():
    with pytest.raises(NotFittedError):
        make_predictor("gp", TINY).breakdown_ms(TEST[0])
    own = PerResolution(TINY).fit(TRAIN[:30], machine_ms(TRAIN[:30]))
    with pytest.raises(
        InputError, match=f"kind '{own.kind}' does not know what single layers cost: fit one of kind gp"
    ):
        own.breakdown_ms(TEST[0])


def test_prior_is_useful_after_ten():
    few, latency_ms = TRAIN[:10], machine_ms(TRAIN[:10], 0.02)
    prior, macs = (
        report(machine_ms(TEST), *make_predictor(kind, TINY).fit(few, latency_ms).predict(TEST))
        for kind in ("prior", "macs")
    )
    assert prior.within_10_pct > 90
    assert prior.mape_pct < macs.mape_pct / 2


def test_prior_knows_a_device_that_waits_for_launches():
    def latency(archs):
        return 0.01 * np.array([len(lower(TINY, arch)) for arch in archs])

    mean_ms, _ = make_predictor("prior", TINY).fit(TRAIN[:10], latency(TRAIN[:10])).predict(TEST)
    np.testing.assert_allclose(mean_ms, latency(TEST), rtol=0.02)


def test_prior_shrugs_off_disturbed_measurements():
    latency_ms = machine_ms(TRAIN, 0.01)
    latency_ms[::10] *= 3
    mean_ms, _ = make_predictor("prior", TINY).fit(TRAIN, latency_ms).predict(TEST)
    assert np.abs(mean_ms / machine_ms(TEST) - 1).max() < 0.05


def test_prior_heeds_weights():
    both = [*TRAIN[:20], *TRAIN[:20]]
    latency_ms = np.concatenate([machine_ms(TRAIN[:20]), 1.02 * machine_ms(TRAIN[:20])])
    mean_ms, _ = make_predictor("prior", TINY).fit(both, latency_ms, [1000.0] * 20 + [1.0] * 20).predict(TEST)
    assert np.median(mean_ms / machine_ms(TEST)) == pytest.approx(1, abs=0.002)


def test_prior_costs_what_it_never_saw_by_the_default():
    small = [arch for arch in sample(200, 4) if all(b.kernel == 3 for s in arch.stages for b in s.blocks)]
    predictor = make_predictor("prior", TINY).fit(small, machine_ms(small))
    assert predictor.to_dict()["learned"]["coefficients_ms"]["depthwise5_macs"] > 0


# -------------------------------------------------------------------- what learns the prior's errors


@pytest.mark.parametrize(("kind", "count", "least"), [("gp", 100, 0.8), ("xgboost", 150, 0.75), ("auto", 150, 0.75)])
def test_beats_the_prior_where_layers_interact(kind, count, least):
    train = sample(count, 5)
    prior, learned = (
        report(cached_ms(TEST), *make_predictor(k, TINY).fit(train, cached_ms(train)).predict(TEST))
        for k in ("prior", kind)
    )
    assert learned.mape_pct < least * prior.mape_pct


@pytest.mark.parametrize("kind", ["prior", "gp"])
def test_intervals_are_honest(kind):
    coverages = []
    for seed in range(3):
        train, test = sample(50, 10 + seed), sample(200, 20 + seed)
        predictor = make_predictor(kind, TINY).fit(train, machine_ms(train, 0.05, seed))
        coverages.append(report(machine_ms(test, 0.05, 100 + seed), *predictor.predict(test)).coverage_90)
    assert 83 < np.mean(coverages) < 97


@pytest.mark.parametrize("num", [3, 5, 8, 9, 20, 60])
def test_intervals_of_normal_errors_cover_nine_in_ten_however_few(num):
    rng = np.random.default_rng(0)
    scores, new = np.abs(rng.standard_normal((4000, num))), np.abs(rng.standard_normal(4000))
    factors = np.array([honest_factor(row, num_tuned=0) for row in scores])
    assert np.mean(new <= Z_90 * factors) == pytest.approx(
        np.ceil(0.9 * (num + 1)) / (num + 1) if num > 8 else 0.9, abs=0.02
    )


def test_intervals_are_wider_the_more_was_tuned():
    scores = np.ones(10)
    assert honest_factor(scores, num_tuned=5) == pytest.approx(np.sqrt(1.5) * honest_factor(scores, num_tuned=0))


def test_gp_is_less_sure_far_from_what_it_saw():
    everything = sample(300, 6)
    near = [arch for arch in everything if arch.resolution == TINY.resolution[0]]
    far = [arch for arch in everything if arch.resolution == TINY.resolution[-1]]
    predictor = make_predictor("gp", TINY).fit(near[:60], cached_ms(near[:60]))
    (near_ms, near_std), (far_ms, far_std) = predictor.predict(near[60:]), predictor.predict(far)
    assert np.median(far_std / far_ms) > 1.5 * np.median(near_std / near_ms)


MACHINE = KnownMachine(
    feature_sums(TINY).layer_features * DEFAULT_MACHINES[0], 1.5, np.empty((len(feature_sums(TINY).layers), 0))
)


@cache
def process_problem():
    sums = feature_sums(TINY)
    rates = 0.2 * np.random.default_rng(0).standard_normal(len(FEATURE_NAMES))
    process = LayerProcess(sums, MACHINE, sums.counts(TINY.encode(TRAIN[:12])), machine_ms(TRAIN[:12], 0.02), rates)
    return process, np.random.default_rng(1).uniform(0.5, 2, 12)


FOUND = Hyperparameters(rate_std=0.4, smooth_std=0.1, shape_std=0.2, network_std=0.05, noise_std=0.04)


def test_process_likelihood_gradient(monkeypatch):
    caught = []
    monkeypatch.setattr(process_module, "minimize", lambda objective, start, **_: caught.append(objective) or Fake())
    process, noise = process_problem()
    process.search(FOUND, noise)
    for logs in np.log([(0.4, 0.1, 0.2, 0.05, 0.04), (0.2, 0.3, 0.05, 0.02, 0.1)]):
        error = check_grad(lambda x: caught[0](x)[0], lambda x: caught[0](x)[1], logs)
        assert error < 1e-3


class Fake:
    fun, x = 0.0, np.zeros(5)


def test_process_leaves_out_as_leaving_out_does():
    process, noise = process_problem()
    covariance = process.covariance(FOUND, noise)
    errors, variances = process.left_out(FOUND, noise)
    for i in range(len(noise)):
        rest = np.arange(len(noise)) != i
        solved = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[rest, i])
        assert errors[i] == pytest.approx(process.targets[i] - solved @ process.targets[rest])
        clean = covariance[i, i] - FOUND.noise_std**2 * noise[i] + FOUND.noise_std**2
        assert variances[i] == pytest.approx(clean - solved @ covariance[rest, i])


def test_process_predicts_by_table_what_the_covariances_say():
    process, noise = process_problem()
    sums, new = feature_sums(TINY), TEST[:8]
    found = replace(FOUND, network_std=1e-6)  # that part is standardised by the measured networks
    both = LayerProcess(
        sums, MACHINE, sums.counts(TINY.encode([*TRAIN[:12], *new])), np.ones(20), process.log_rates
    )  # fmt: skip
    joint = both.covariance(found, np.zeros(20))
    solved = np.linalg.solve(process.covariance(found, noise), joint[:12, 12:]).T
    variance = np.diag(joint)[12:] - (solved * joint[12:, :12]).sum(axis=1) + found.noise_std**2
    mean_ms, std = process.model(sums, found, noise)(TINY.encode(new))
    np.testing.assert_allclose(mean_ms, np.exp(solved @ process.targets - both.targets[12:]), rtol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=0.15)  # of the covariance a part is approximated


def test_process_knows_how_networks_vary_together():
    process, noise = process_problem()
    sums, new = feature_sums(TINY), TEST[:8]
    found = replace(FOUND, network_std=1e-6)  # that part is standardised by the measured networks
    both = LayerProcess(
        sums, MACHINE, sums.counts(TINY.encode([*TRAIN[:12], *new])), np.ones(20), process.log_rates
    )  # fmt: skip
    joint = both.covariance(found, np.zeros(20))
    explained = joint[12:, :12] @ np.linalg.solve(process.covariance(found, noise), joint[:12, 12:])
    covariance = process.posterior(sums.counts(TINY.encode(new)), found, noise)
    np.testing.assert_allclose(covariance, joint[12:, 12:] - explained, atol=1e-6)


def test_process_knows_the_variance_of_what_networks_have_in_common():
    process, noise = process_problem()
    found = replace(FOUND, network_std=0.1)
    prior, covariance = process.covariance(found, 0 * noise), process.covariance(found, noise)
    left = prior - prior @ np.linalg.solve(covariance, prior)
    counts = feature_sums(TINY).counts(TINY.encode(TRAIN[:12]))
    np.testing.assert_allclose(process.posterior(counts, found, noise), left, atol=1e-6)


@pytest.mark.parametrize("kind", ["gp", "auto", "transfer"])
def test_measuring_one_network_tells_of_others(kind, other_devices):
    sources = other_devices if kind == "transfer" else ()
    predictor = make_predictor(kind, TINY, sources).fit(TRAIN[:20], machine_ms(TRAIN[:20], 0.02))
    covariance, noise_var = predictor.covariance_genes(TINY.encode(TEST))
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-9)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    assert noise_var > 0
    with pytest.raises(NotFittedError):
        make_predictor(kind, TINY, sources).covariance_genes(TINY.encode(TEST))
    with pytest.raises(InputError, match="kind 'macs' does not know how networks vary together: fit one of kind gp"):
        make_predictor("macs", TINY).fit(TRAIN, machine_ms(TRAIN)).covariance_genes(TINY.encode(TEST))


def test_process_counts_what_networks_have_in_common_once():
    process, noise = process_problem()
    found = replace(FOUND, network_std=0.1)
    prior, covariance = process.covariance(found, 0 * noise), process.covariance(found, noise)
    left = np.diag(prior - prior @ np.linalg.solve(covariance, prior))
    _, std = process.model(feature_sums(TINY), found, noise)(TINY.encode(TRAIN[:12]))
    exact = np.sqrt(left + found.noise_std**2)
    assert np.all(std > 0.97 * exact)
    assert np.all(std < 1.35 * exact)


def test_a_table_knows_the_layers_it_saw():
    train = sample(150, 8)
    prior, lookup, gp = (
        report(odd_ms(TEST), *make_predictor(kind, TINY).fit(train, odd_ms(train)).predict(TEST)).mape_pct
        for kind in ("prior", "lookup", "gp")
    )
    assert lookup < 0.8 * prior
    assert gp < 0.6 * prior


# -------------------------------------------------------------------- transfer


def test_transfer_knows_the_device_it_resembles(other_devices):
    """A fifth faster, with dearer launches, and slow where one source is."""

    def like_ms(archs):
        return 0.8 * odd_ms(archs) + 0.3 * waiting_ms(archs)

    few = TRAIN[:10]
    alone, helped = (
        report(like_ms(TEST), *make_predictor(kind, TINY, sources).fit(few, like_ms(few)).predict(TEST)).mape_pct
        for kind, sources in (("gp", ()), ("transfer", other_devices))
    )
    assert helped < 0.5 * alone


def test_transfer_needs_sources(other_devices):
    with pytest.raises(InputError, match="a transfer needs fitted predictors of other devices: give it sources"):
        make_predictor("transfer", TINY).fit(TRAIN, machine_ms(TRAIN))
    with pytest.raises(InputError, match="predictor 'gp' takes no sources: kind 'transfer' does"):
        make_predictor("gp", TINY, other_devices)
    with pytest.raises(InputError, match="a source's space is 'tiny', not 'bignas': fit it for this space"):
        make_predictor("transfer", SearchSpace.load("bignas"), other_devices)
    with pytest.raises(NotFittedError):
        make_predictor("transfer", TINY, [make_predictor("gp", TINY)])
    with pytest.raises(InputError, match="kind 'per-resolution' does not know what single layers cost: fit"):
        PerResolution(TINY)._costs_ms({})


def test_plain_trees_agree_with_xgboost():
    import xgboost

    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((300, 4)).astype(np.float32)
    inputs[:, 3] = rng.integers(0, 5, 300)
    names = ["a", "b.kernel", "c", "d"]
    data = xgboost.DMatrix(inputs, label=np.sin(3 * inputs[:, 0]) * inputs[:, 3], feature_names=names)
    booster = xgboost.train({"max_depth": 3, "base_score": 0.0, "nthread": 1}, data, 50)
    trees = [plain_tree(json.loads(tree)) for tree in booster.get_dump(dump_format="json")]
    found = sum(evaluate(tree, dict(zip(names, inputs.T, strict=True))) for tree in trees)
    np.testing.assert_allclose(found, booster.predict(data), atol=1e-5)
    assert evaluate(0.5, {}) == 0.5


def test_auto_says_what_it_chose(tmp_path):
    predictor = make_predictor("auto", TINY)
    assert predictor.choice == ""
    predictor.fit(TRAIN, machine_ms(TRAIN, 0.02))
    chosen = predictor.choice.split(":")[0]
    assert chosen in ("gp", "prior")
    assert "macs" in predictor.choice
    assert "40 measurements, left out in turn" in predictor.choice
    np.testing.assert_array_equal(
        predictor.predict(TEST)[0], make_predictor(chosen, TINY).fit(TRAIN, machine_ms(TRAIN, 0.02)).predict(TEST)[0]
    )
    predictor.save(tmp_path / "device.json")
    assert load_predictor(tmp_path / "device.json").choice == predictor.choice


@pytest.mark.parametrize("count", [10, 40])
def test_auto_keeps_the_error_that_its_choice_left_out(tmp_path, count):
    archs, latency_ms = TRAIN[:count], machine_ms(TRAIN[:count], 0.02)
    predictor = make_predictor("auto", TINY).fit(archs, latency_ms)
    chosen = make_predictor(predictor.choice.split(":")[0], TINY).fit(archs, latency_ms)
    assert predictor.statistics == chosen.statistics
    assert f"mean error {predictor.statistics.left_out_pct:.1f}%" in predictor.choice
    file = tmp_path / "device.json"
    predictor.save(file)
    assert typical_error_pct(load_predictor(file)) == chosen.statistics.left_out_pct
    document = json.loads(file.read_text())
    del document["statistics"]["left_out_pct"]  # as older hwnas wrote it: the error is that of the spread
    file.write_text(json.dumps(document))
    older = load_predictor(file)
    assert older.statistics.left_out_pct is None
    assert 0 < typical_error_pct(older) != chosen.statistics.left_out_pct


@pytest.mark.parametrize("count", [3, 10, 29])
def test_auto_compares_nothing_by_few_measurements(count):
    few, latency_ms = TRAIN[:count], machine_ms(TRAIN[:count], 0.02)
    predictor = make_predictor("auto", TINY).fit(few, latency_ms)
    assert predictor.choice.startswith("gp: mean error ")
    assert f"({count} measurements; other kinds are compared from 30 on)" in predictor.choice
    gp = make_predictor("gp", TINY).fit(few, latency_ms)
    np.testing.assert_array_equal(predictor.predict(TEST), gp.predict(TEST))


# -------------------------------------------------------------------- reports


def test_report_worked_out_by_hand():
    found = report([1, 2, 4, 8], np.array([1.05, 2.2, 4.1, 6.0]), np.array([0.05, 0.1, 0.02, 2.0]))
    assert found.num == 4
    assert found.mape_pct == pytest.approx((5 + 10 + 2.5 + 25) / 4)
    assert found.within_5_pct == 50
    assert found.within_10_pct == 75
    assert found.coverage_90 == 50  # 0.05 <= 1.64 * 0.05 and 2 <= 1.64 * 2
    assert found.spearman == pytest.approx(1)


def test_spearman_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 6, 50) * 1.0, rng.integers(1, 9, 50) * 1.0
    assert report(a, b, b).spearman == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert report(a, np.ones(50), b).spearman == 0


def test_report_refuses():
    with pytest.raises(InputError, match=r"shapes differ: latencies \(2,\), means \(3,\)"):
        report([1, 2], np.ones(3), np.ones(3))
    with pytest.raises(InputError, match="at least one measurement"):
        report([], np.ones(0), np.ones(0))


def test_cross_validation_leaves_out_what_it_predicts():
    latency_ms = machine_ms(TRAIN)
    rows = {row.tobytes(): latency for row, latency in zip(TINY.encode(TRAIN), latency_ms, strict=True)}

    class Memory(PerResolution):
        def _learn(self, genes, latency_ms, weights):
            return {"seen": [row.tobytes().hex() for row in genes]}

        def _model(self, learned):
            def predict(genes):
                new = [row.tobytes().hex() not in learned["seen"] for row in genes]
                mean_ms = np.array([rows[row.tobytes()] for row in genes]) * np.where(new, 1.0, 100.0)
                return mean_ms, mean_ms

            return predict

    found = cross_validate(lambda: Memory(TINY), TRAIN, latency_ms.tolist(), 5, np.random.default_rng(0))
    assert found.num == len(TRAIN)
    assert found.mape_pct == pytest.approx(0)


@pytest.mark.parametrize("folds", [1, 41])
def test_cross_validation_refuses(folds):
    with pytest.raises(InputError, match=f"folds={folds}: must be from 2 to the number of measurements, 40"):
        cross_validate(lambda: PerResolution(TINY), TRAIN, machine_ms(TRAIN).tolist(), folds, np.random.default_rng(0))


def test_whole_populations_are_fast():
    """200,000 a second are wanted, and 7,000,000 usual: a tenth is allowed for a busy machine."""
    space = SearchSpace.load("bignas", resolution=[224])
    rng = np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(20)]
    latency_ms = feature_sums(space)(space.encode(archs)) @ from_names(RATES) * 1e-6
    predictor = make_predictor("prior", space).fit(archs, latency_ms)
    genes = space.sample_genes(20_000, rng)
    start = time.perf_counter()
    predictor.predict_genes(genes)
    assert time.perf_counter() - start < 1.0
