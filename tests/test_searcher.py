import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import optuna
import pytest

from hwnas.devices.base import DeviceGoneError, RunTimes, Timing
from hwnas.errors import DeviceError, InputError, LimitError
from hwnas.layers import lower, total_macs
from hwnas.measurement import Measurement
from hwnas.predictors import load_predictor, make_predictor
from hwnas.searching.costs import REPEATABILITY
from hwnas.searching.fronts import front_slope, pareto, running_hypervolume
from hwnas.searching.limits import LatencyLimit, MacsLimit, ParamsLimit
from hwnas.searching.portfolio import choose_members, fewest
from hwnas.searching.result import Result
from hwnas.searching.searcher import Searcher
from hwnas.searching.strategies import Scored
from hwnas.searching.targets import Target
from hwnas.space import Architecture, SearchSpace

SPACE = SearchSpace.load("tiny", resolution=[16, 20, 24, 28])


def latency(arch: Architecture, device: str = "fake") -> float:
    """Devices on which time is work and a little for every layer; on `other`, layers cost more and work less."""
    layers = lower(SPACE, arch)
    work, each = {"fake": (1e-7, 0.002), "other": (0.5e-7, 0.01)}[device]
    return total_macs(layers) * work + each * len(layers)


def accuracy(arch: Architecture) -> float:
    return 0.5 + 0.03 * float(np.log(total_macs(lower(SPACE, arch)) / 1e5)) + 0.001 * arch.stages[2].blocks[0].kernel


def measurement(arch: Architecture, ms: float | None = None, device: str = "fake", **fields) -> Measurement:
    ms = latency(arch, device) if ms is None else ms
    common = {"device": device, "runtime": "fake", "versions": {}, "precision": "fp32", "timing": Timing()}
    if "error" not in fields:
        fields["rounds"] = (RunTimes((ms,) * 5, (False,) * 5),)
    return Measurement(arch=arch, **common, **fields)


class World:
    """The outside of a search: counts what is asked of it."""

    def __init__(self, folder: Path, measure=measurement, devices: Sequence[str] = ("fake",)) -> None:
        rng = np.random.default_rng(0)
        self.archs = [SPACE.smallest(), SPACE.largest(), *(SPACE.sample(rng) for _ in range(30))]
        self.evaluated: list[Architecture] = []
        self.measured: list[tuple[str, Architecture]] = []
        self.accuracies: dict[Architecture, float] = {}
        self.url = f"sqlite:///{folder / 'run.db'}"
        self.told: list[str] = []
        self.devices = devices
        self._measure = measure

    def evaluate(self, archs: Sequence[Architecture]) -> list[float]:
        for arch in archs:
            if arch not in self.accuracies:
                self.evaluated.append(arch)
                self.accuracies[arch] = accuracy(arch)
        return [self.accuracies[arch] for arch in archs]

    def known(self) -> list[Scored]:
        return [Scored(arch, found) for arch, found in self.accuracies.items()]

    def target(self, device: str, **options) -> Target:
        def measure(archs: Sequence[Architecture]) -> list[Measurement]:
            self.measured += [(device, arch) for arch in archs]
            return [self._measure(arch, device=device) for arch in archs]

        options.setdefault("measure", measure)
        return Target(
            device,
            make_predictor("prior", SPACE).fit(self.archs, [latency(arch, device) for arch in self.archs]),
            measurements=[measurement(arch, device=device) for arch in self.archs],
            notice=self.told.append,
            **options,
        )

    def searcher(self, *limits, targets: Sequence[Target] | None = None, **options) -> Searcher:
        found = [self.target(device) for device in self.devices] if targets is None else targets
        return Searcher(
            SPACE,
            [LatencyLimit("fake", limit) if isinstance(limit, float) else limit for limit in limits],
            {target.name: target for target in found},
            evaluate=self.evaluate,
            storage_url=self.url,
            notice=self.told.append,
            **{"strategy": "coarse-to-fine", **options},
        )


LIMIT = 0.25


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


# ---------------------------------------------------------------- one device


def test_the_best_is_measured_and_keeps_the_limit(world):
    result = world.searcher(LIMIT).run(20)
    assert result.best.latency["fake"].measured == pytest.approx(latency(result.best.architecture))
    assert latency(result.best.architecture) <= LIMIT
    assert result.random is not None
    assert latency(result.random.architecture) <= LIMIT
    assert result.best.accuracy >= result.random.accuracy
    assert result.num_evaluations == 20
    assert result.best == result.front[-1]
    assert result.best.macs == total_macs(lower(SPACE, result.best.architecture))
    assert result.measured
    assert result.devices["fake"].measured


def test_a_looser_limit_never_gets_a_worse_answer(world):
    """A child that an earlier search evaluated is a candidate, if it keeps the limit; it costs no evaluation."""
    good, slow = SPACE.sample(np.random.default_rng(8)), SPACE.largest()
    limit = 1.2 * latency(good)
    assert limit < latency(slow)
    known = [Scored(good, 0.99), Scored(slow, 1.0)]
    result = world.searcher(limit, known=lambda: known).run(6)
    assert result.best.architecture == good
    assert result.best.latency["fake"].measured == pytest.approx(latency(good))
    assert result.num_evaluations == 6
    assert result.num_known == 1
    assert good not in world.evaluated
    assert result.random.architecture != good


def test_the_strategy_starts_from_what_is_known(world, tmp_path):
    """With a good child known, others are proposed than without."""
    good = SPACE.sample(np.random.default_rng(8))
    world.searcher(LIMIT, known=lambda: [Scored(good, 0.99)]).run(20, baseline=False)
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    other.searcher(LIMIT).run(20, baseline=False)
    assert good not in world.evaluated
    assert set(world.evaluated) != set(other.evaluated)


def test_of_very_many_known_children_the_best_are_kept(world, monkeypatch):
    monkeypatch.setattr("hwnas.searching.searcher.KNOWN", 20)
    rng = np.random.default_rng(0)
    known = [Scored(arch, float(rng.uniform())) for arch in dict.fromkeys(SPACE.sample(rng) for _ in range(200))]
    result = world.searcher(LIMIT, known=lambda: known).run(2, baseline=False)
    assert result.num_known == 20
    fitting = [scored for scored in known if latency(scored.arch) <= 0.95 * LIMIT]
    assert len(fitting) > 20
    assert result.best.accuracy == max(scored.accuracy for scored in fitting)
    everything = world.searcher(LIMIT, known=lambda: known[:5], seed=1).run(2, baseline=False)
    assert everything.num_known <= 5


def test_a_search_goes_on_from_what_it_knew_when_it_began(world):
    """What has become known since, also by its own evaluations, changes nothing: the same answer, nothing anew."""
    first = world.searcher(LIMIT, known=world.known).run(12)
    evaluated = list(world.evaluated)
    assert len(world.known()) >= 12
    again = world.searcher(LIMIT, known=world.known).run(12)
    assert again == first
    assert world.evaluated == evaluated
    assert world.searcher(LIMIT, known=world.known, weights="others").run(12).num_known > 0


def test_progress_tells_the_best_and_the_front(world):
    told: list[tuple[float, float, str]] = []
    result = world.searcher(LIMIT).run(20, report=lambda done, total, note="": told.append((done, total, note)))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {total for _, total, _ in told} == {40}
    at_half = next(note for done, _, note in told if done == 20)
    name, best = result.strategy, max(result.history[result.strategy])
    assert re.fullmatch(rf"{name}: best {best:.2%}, front of \d+, [\d.e+]+ evaluations/s", at_half)
    assert told[-1][2].startswith(f"random: best {max(result.history['random']):.2%}, front of ")


def test_infeasible_children_are_never_evaluated(world):
    searcher = world.searcher(LIMIT, MacsLimit(1.5e6))
    bounds = searcher.explored
    searcher.run(20)
    assert len(world.evaluated) >= 20
    assert bounds.feasible(SPACE.encode(world.evaluated)).all()
    assert max(total_macs(lower(SPACE, arch)) for arch in world.evaluated) <= 1.5e6


def test_every_evaluation_is_a_trial_with_what_was_known(world):
    world.searcher(LIMIT).run(10)
    names = optuna.get_all_study_names(world.url)
    assert sorted(name.split(", ")[1].split()[0] for name in names) == ["coarse-to-fine", "random"]
    for name in names:
        trials = optuna.load_study(study_name=name, storage=world.url).get_trials()
        assert len(trials) == 10
        for trial in trials:
            assert trial.value is not None
            assert all(value <= 0 for value in trial.constraints.values())
            row = np.array([[trial.params.get(gene.name, -1) for gene in SPACE.genes]], dtype=np.int8)
            assert SPACE.decode(row[0]).id == trial.user_attrs["id"]
            assert accuracy(SPACE.decode(row[0])) == pytest.approx(trial.value)


def test_an_interrupted_search_goes_on(world, tmp_path):
    whole = world.searcher(LIMIT, known=world.known).run(20)
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    honest = other.evaluate

    def dies(archs):
        if len(other.evaluated) > 8:
            honest(archs[:1])  # in the middle of a generation
            raise KeyboardInterrupt
        return honest(archs)

    other.evaluate = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        other.searcher(LIMIT, known=other.known).run(20)
    other.evaluate = honest  # type: ignore[method-assign]
    again = other.searcher(LIMIT, known=other.known).run(20)
    assert again.best.architecture == whole.best.architecture
    assert again.history == whole.history
    assert len(other.evaluated) == len(set(other.evaluated)) == len(set(world.evaluated))
    for name in optuna.get_all_study_names(other.url):
        assert len(optuna.load_study(study_name=name, storage=other.url).get_trials()) == 20


def test_an_optimistic_predictor_is_put_right_by_measuring(tmp_path):
    """The device turns out 30% slower than it was: what was believed to keep the limit does not, and is passed over."""
    world = World(tmp_path, measure=lambda arch, device: measurement(arch, 1.3 * latency(arch)))
    result = world.searcher(LIMIT).run(30, baseline=False)
    assert result.best.latency["fake"].measured is not None
    assert result.best.latency["fake"].measured * (1 + REPEATABILITY) <= LIMIT
    assert len(world.measured) >= 1


def test_a_failed_finalist_is_passed_over_and_said(tmp_path):
    failed: list[Architecture] = []

    def measure(arch: Architecture, device: str) -> Measurement:
        if not failed:
            failed.append(arch)
            return measurement(arch, error="out of memory")
        return measurement(arch)

    world = World(tmp_path, measure)
    result = world.searcher(LIMIT).run(20, baseline=False)
    assert result.best.architecture not in failed
    assert all(candidate.architecture not in failed for candidate in result.front)
    assert any("out of memory" in text for text in world.told)


def test_no_child_keeps_the_limit(world):
    least = min(latency(arch) for arch in world.archs)
    with pytest.raises(
        LimitError, match=r"no child of space 'tiny' keeps .* on fake with 95% confidence: the least possible"
    ) as error:
        world.searcher(least / 2).run(5)
    stated = float(str(error.value).partition("least possible is ")[2].split()[0])
    assert stated == pytest.approx(least, rel=0.03)
    assert world.evaluated == []


def test_every_child_keeps_the_limit(world):
    world.searcher(100.0).run(3, baseline=False)
    assert any("above the biggest child" in text for text in world.told)


def test_same_seed_same_answer(tmp_path):
    answers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name)
        result = world.searcher(LIMIT, seed=seed).run(15)
        answers.append((world.evaluated, result.to_dict()))
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[2][0]


def test_random_needs_no_baseline(world):
    result = world.searcher(LIMIT, strategy="random").run(5)
    assert result.random is None
    assert list(result.history) == ["random"]


@pytest.mark.parametrize(
    ("limit_ms", "count", "options", "message"),
    [
        (1.0, 0, {}, r"evaluations=0: must be at least 1"),
        (1.0, 5, {"confidence": 1.0}, r"confidence 1.0: must be at least 0.5 and under 1"),
    ],
)
def test_input_that_makes_no_sense(world, limit_ms, count, options, message):
    with pytest.raises(InputError, match=message):
        world.searcher(limit_ms, **options).run(count)
    assert world.evaluated == []


def test_unknown_strategy_is_refused_before_a_study_begins(world):
    with pytest.raises(InputError, match=r"unknown strategy 'oracle': not one of guided, "):
        world.searcher(1.0, strategy="oracle")


# ---------------------------------------------------------------- several limits, several devices


def test_one_child_for_several_devices(tmp_path):
    world = World(tmp_path, devices=("fake", "other"))
    limits = [LatencyLimit("fake", 0.25), LatencyLimit("other", 0.45), ParamsLimit(250e3)]
    result = world.searcher(*limits).run(30)
    for candidate in (result.best, result.random, *result.front):
        assert latency(candidate.architecture, "fake") <= 0.25
        assert latency(candidate.architecture, "other") <= 0.45
        assert candidate.params <= 250e3
    assert set(result.best.latency) == {"fake", "other"}
    assert all(estimate.measured is not None for estimate in result.best.latency.values())
    assert [limit["kind"] for limit in result.limits] == ["latency", "latency", "params"]


def test_no_device_at_all(tmp_path):
    world = World(tmp_path, devices=())
    result = world.searcher(MacsLimit(1e6)).run(20)
    assert result.best.macs <= 1e6
    assert result.device is None
    assert result.best.latency == {}
    assert world.measured == []
    costs = [candidate.macs for candidate in result.front]
    assert costs == sorted(costs)


def test_an_unreachable_device_is_predicted_and_said(world):
    target = world.target("fake", measure=None, reason="cable is out")
    result = world.searcher(LIMIT, targets=[target]).run(20)
    assert result.best.latency["fake"].measured is None or result.best.architecture in world.archs
    assert latency(result.best.architecture) <= LIMIT
    assert not result.devices["fake"].measured
    assert result.devices["fake"].error_pct == target.predictor.statistics.left_out_pct > 0
    assert result.devices["fake"].reason == "cable is out"
    assert not result.measured
    assert world.measured == []


def test_a_device_that_goes_away_leaves_predictions(world):
    """A reachable one is still measured on."""

    def gone(archs):
        raise DeviceGoneError("cable is out")

    targets = [world.target("fake"), world.target("other", measure=gone)]
    result = world.searcher(LIMIT, LatencyLimit("other", 0.45), targets=targets).run(20, baseline=False)
    assert result.best.latency["fake"].measured is not None
    assert result.best.latency["other"].measured is None
    assert (result.devices["fake"].measured, result.devices["other"].measured) == (True, False)
    assert result.devices["other"].reason == "cable is out"
    assert sum("other: not reachable, so its latencies are predicted" in text for text in world.told) == 1


def test_a_device_on_which_children_fail_is_an_error(world):
    def fails(archs):
        raise DeviceError("3 children in a row failed")

    with pytest.raises(DeviceError, match="3 children in a row"):
        world.searcher(LIMIT, targets=[world.target("fake", measure=fails)]).run(5)


def test_a_published_predictor_is_adapted_to_what_is_measured(world):
    """Not fitted anew: a handful of finalists says little about all other children."""
    published = make_predictor("prior", SPACE).fit(world.archs, [1.2 * latency(arch) for arch in world.archs])
    published.source = "estimated from published measurements"
    target = Target("fake", published, measure=lambda archs: [measurement(arch) for arch in archs])
    result = world.searcher(LIMIT, targets=[target]).run(20, baseline=False)
    assert result.best.latency["fake"].measured == pytest.approx(latency(result.best.architecture))
    assert result.devices["fake"].source == "estimated from published measurements"
    mean, _ = target.predictor.predict(world.archs)
    assert np.abs(mean / [latency(arch) for arch in world.archs] - 1).mean() < 0.1


def test_a_loaded_transfer_predictor_can_be_fitted_to_more(world, tmp_path):
    source = make_predictor("prior", SPACE).fit(world.archs, [latency(arch, "other") for arch in world.archs])
    fitted = make_predictor("transfer", SPACE, [source]).fit(world.archs[:10], [latency(a) for a in world.archs[:10]])
    fitted.save(tmp_path / "predictor.json")
    target = Target(
        "fake",
        load_predictor(tmp_path / "predictor.json"),
        measure=lambda archs: [measurement(arch) for arch in archs],
        measurements=[measurement(arch) for arch in world.archs[:10]],
    )
    assert world.searcher(LIMIT, targets=[target]).run(10, baseline=False).measured


# ---------------------------------------------------------------- the whole front


def test_a_front_over_the_whole_range(world):
    result = world.searcher(front="fake").run(40)
    costs = [candidate.latency["fake"].measured for candidate in result.front]
    assert None not in costs  # every member is measured
    assert costs == sorted(costs)
    accuracies = [candidate.accuracy for candidate in result.front]
    assert accuracies == sorted(accuracies)
    assert costs[-1] > 3 * costs[0]
    assert result.best == result.front[-1]
    assert result.limits == ()
    assert result.device == "fake"
    assert result.axis == {"kind": "latency", "device": "fake", "unit": "ms"}
    assert [len(values) for values in result.hypervolume.values()] == [40, 40]
    for values in result.hypervolume.values():
        assert values == sorted(values)
        assert 0 < values[-1] < max(accuracies)


def test_a_front_up_to_a_limit_and_over_macs(world):
    result = world.searcher(LatencyLimit("fake", 0.2), front="macs").run(20, baseline=False)
    costs = [candidate.macs for candidate in result.front]
    assert costs == sorted(costs)
    assert all(candidate.latency["fake"].value <= 0.2 for candidate in result.front)
    assert result.axis == {"kind": "macs", "device": None, "unit": "MACs"}


def test_pareto():
    costs, accuracies = np.array([3, 1, 2, 2.5, 3.0]), np.array([0.8, 0.5, 0.7, 0.6, 0.9])
    assert pareto(costs, accuracies).tolist() == [1, 2, 4]
    assert pareto(np.empty(0), np.empty(0)).tolist() == []
    assert pareto(np.ones(2), np.ones(2)).tolist() == [0]


def test_running_hypervolume_is_the_mean_over_all_limits():
    rng = np.random.default_rng(0)
    costs, accuracies = rng.uniform(0, 1.2, 60).round(2), rng.uniform(0, 1, 60).round(2)
    limits = (np.arange(20_000) + 0.5) / 20_000
    for count, area in enumerate(running_hypervolume(costs, accuracies), 1):
        best = [max((a for c, a in zip(costs[:count], accuracies[:count], strict=True) if c <= 1), default=0)]
        order = np.argsort(costs[:count], kind="stable")
        steps = np.concatenate([[0.0], np.maximum.accumulate(accuracies[:count][order])])
        best = steps[np.searchsorted(costs[:count][order], limits, side="right")]
        assert area == pytest.approx(best.mean(), abs=2e-4)


def test_the_slope_at_a_limit():
    """Of a front that is known: accuracy grows by 2 points a millisecond, minus what each child falls short."""
    rng = np.random.default_rng(0)
    ms = rng.uniform(5, 15, 2000)
    below = rng.exponential(0.01, 2000)
    slope = front_slope(ms, 0.5 + 0.02 * ms - below, 10.0, rng)
    assert slope.points_per_ms == pytest.approx(2, abs=0.15)
    assert 0 < slope.std < 0.3
    few = front_slope(ms[:60], (0.5 + 0.02 * ms - below)[:60], 10.0, rng)
    assert few.std > slope.std
    assert front_slope(ms, 0.5 + 0.02 * ms, 40.0, rng) is None


def test_the_slope_is_told(world):
    result = world.searcher(LIMIT).run(40)
    assert result.slope["fake"].points_per_ms > 0
    assert result.slope["fake"].std > 0


# ---------------------------------------------------------------- portfolios


@pytest.mark.parametrize("seed", range(10))
def test_fewest_is_fewest(seed):
    """Against trying all subsets; among the fewest, the most accurate in sum."""
    rng = np.random.default_rng(seed)
    serves = rng.random((9, 5)) < 0.35
    serves[0] |= ~serves.any(axis=0)
    accuracies = rng.uniform(0.5, 1, 9)
    chosen, exact = fewest(serves, accuracies)
    assert exact
    assert serves[chosen].any(axis=0).all()
    assert [accuracies[row] for row in chosen] == sorted((accuracies[row] for row in chosen), reverse=True)
    for size in range(1, len(chosen) + 1):
        covers = [rows for rows in combinations(range(9), size) if serves[list(rows)].any(axis=0).all()]
        assert bool(covers) == (size == len(chosen))
    assert sum(accuracies[chosen]) == pytest.approx(max(accuracies[list(rows)].sum() for rows in covers))


def test_a_portfolio_serves_every_question(tmp_path):
    world = World(tmp_path, devices=("fake", "other"))
    questions = {
        "a": LatencyLimit("fake", 0.25),
        "b": LatencyLimit("fake", 0.26),
        "c": LatencyLimit("other", 0.45),
        "d": LatencyLimit("fake", 0.12),
    }
    searchers = {
        name: world.searcher(limit, known=world.known, targets=[world.target(limit.device)])
        for name, limit in questions.items()
    }
    results = {name: searcher.run(20, baseline=False) for name, searcher in searchers.items()}
    for tolerance in (0.0, 0.01, 0.5):
        members, exact = choose_members(searchers, results, tolerance)
        assert exact
        assert sorted(name for member in members for name in member.serves) == list("abcd")
        for member in members:
            arch = member.candidate.architecture
            assert set(member.candidate.latency) == {"fake", "other"}
            for name, lost in member.serves.items():
                assert lost == pytest.approx(results[name].best.accuracy - accuracy(arch))
                assert lost <= tolerance
                limit = questions[name]
                assert member.candidate.latency[limit.device].measured == pytest.approx(latency(arch, limit.device))
                assert latency(arch, limit.device) <= limit.ms
    assert len(members) == 1  # half of all accuracy may be lost: the smallest will do for all
    assert len(choose_members(searchers, results, 0.0)[0]) > 1


def test_result_round_trips(world):
    result = world.searcher(LIMIT).run(8)
    assert Result.from_dict({**result.to_dict(), "created": "now"}) == result
    with pytest.raises(InputError, match="not a search result"):
        Result.from_dict({"best": {}})


def test_results_of_an_older_hwnas_are_read(world):
    document = world.searcher(LIMIT).run(4).to_dict()
    for name in ("axis", "devices", "hypervolume", "slope", "question", "versions", "weights", "num_known"):
        del document[name]
    for candidate in (document["best"], document["random"], *document["front"]):
        for name in ("energy", "file_bytes", "peak_bytes"):
            del candidate[name]
    old = Result.from_dict(document)
    assert old.device == "fake"
    assert old.devices == {}
