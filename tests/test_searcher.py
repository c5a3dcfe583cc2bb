from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest

from hwnas.devices.base import RunTimes, Timing
from hwnas.errors import InputError, LimitError
from hwnas.layers import lower, total_macs
from hwnas.measurement import Measurement
from hwnas.predictors import make_predictor
from hwnas.searching.limits import REPEATABILITY, LatencyLimit
from hwnas.searching.result import Candidate, Estimate, Result
from hwnas.searching.searcher import Searcher, pareto_front
from hwnas.searching.strategies import Scored
from hwnas.space import Architecture, SearchSpace

SPACE = SearchSpace.load("tiny", resolution=[16, 20, 24, 28])


def latency(arch: Architecture) -> float:
    """A device on which time is work and a little for every layer."""
    layers = lower(SPACE, arch)
    return total_macs(layers) * 1e-7 + 0.002 * len(layers)


def accuracy(arch: Architecture) -> float:
    return 0.5 + 0.03 * float(np.log(total_macs(lower(SPACE, arch)) / 1e5)) + 0.001 * arch.stages[2].blocks[0].kernel


def measurement(arch: Architecture, ms: float | None = None, **fields) -> Measurement:
    ms = latency(arch) if ms is None else ms
    common = {"device": "fake", "runtime": "fake", "versions": {}, "precision": "fp32", "timing": Timing()}
    if "error" not in fields:
        fields["rounds"] = (RunTimes((ms,) * 5, (False,) * 5),)
    return Measurement(arch=arch, **common, **fields)


class World:
    """The outside of a search: counts what is asked of it."""

    def __init__(self, folder: Path, measure=measurement) -> None:
        rng = np.random.default_rng(0)
        self.archs = [SPACE.smallest(), SPACE.largest(), *(SPACE.sample(rng) for _ in range(30))]
        self.predictor = make_predictor("prior", SPACE).fit(self.archs, [latency(arch) for arch in self.archs])
        self.evaluated: list[Architecture] = []
        self.measured: list[Architecture] = []
        self.known: dict[Architecture, float] = {}
        self.url = f"sqlite:///{folder / 'run.db'}"
        self._measure = measure
        self.told: list[str] = []

    def evaluate(self, archs: Sequence[Architecture]) -> list[float]:
        for arch in archs:
            if arch not in self.known:
                self.evaluated.append(arch)
                self.known[arch] = accuracy(arch)
        return [self.known[arch] for arch in archs]

    def measure(self, archs) -> list[Measurement]:
        self.measured += archs
        return [self._measure(arch) for arch in archs]

    def searcher(self, limit_ms: float, **options) -> Searcher:
        return Searcher(
            SPACE,
            self.predictor,
            device="fake",
            limit_ms=limit_ms,
            confidence=0.95,
            evaluate=self.evaluate,
            measure=self.measure,
            measurements=[measurement(arch) for arch in self.archs],
            storage_url=self.url,
            notice=self.told.append,
            **options,
        )


LIMIT = 0.25


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def test_the_best_is_measured_and_keeps_the_limit(world):
    result = world.searcher(LIMIT).run(20)
    assert result.best.latency["fake"].measured == pytest.approx(latency(result.best.architecture))
    assert latency(result.best.architecture) <= LIMIT
    assert result.random is not None
    assert latency(result.random.architecture) <= LIMIT
    assert result.best.accuracy >= result.random.accuracy
    assert result.num_evaluations == 20
    assert result.best.macs == total_macs(lower(SPACE, result.best.architecture))


def test_a_looser_limit_never_gets_a_worse_answer(world):
    """A child that an earlier search evaluated is a candidate, if it keeps the limit; it costs no evaluation."""
    good, slow = SPACE.sample(np.random.default_rng(8)), SPACE.largest()
    limit = 1.2 * latency(good)
    assert limit < latency(slow)
    known = [Scored(good, 0.99), Scored(slow, 1.0)]
    result = world.searcher(limit, known=lambda: known).run(6, baseline=True)
    assert result.best.architecture == good
    assert result.best.latency["fake"].measured == pytest.approx(latency(good))
    assert result.num_evaluations == 6
    assert good not in world.evaluated
    assert result.random.architecture != good


def test_infeasible_children_are_never_evaluated(world):
    searcher = world.searcher(LIMIT)
    genes = SPACE.encode
    limit = searcher.limit
    searcher.run(20)
    assert len(world.evaluated) >= 20
    assert limit.feasible(genes(world.evaluated)).all()


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
    whole = world.searcher(LIMIT).run(20)
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    honest = other.evaluate

    def dies(archs):
        if len(other.evaluated) > 8:
            honest(archs[:5])  # in the middle of a generation
            raise KeyboardInterrupt
        return honest(archs)

    other.evaluate = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        other.searcher(LIMIT).run(20)
    other.evaluate = honest  # type: ignore[method-assign]
    again = other.searcher(LIMIT).run(20)
    assert again.best.architecture == whole.best.architecture
    assert len(other.evaluated) == len(set(other.evaluated)) == len(set(world.evaluated))
    for name in optuna.get_all_study_names(other.url):
        assert len(optuna.load_study(study_name=name, storage=other.url).get_trials()) == 20


def test_an_optimistic_predictor_is_put_right_by_measuring(tmp_path):
    """The device turns out 30% slower than it was: what was believed to keep the limit does not, and is passed over."""
    world = World(tmp_path, measure=lambda arch: measurement(arch, 1.3 * latency(arch)))
    result = world.searcher(LIMIT).run(30, baseline=False)
    assert result.best.latency["fake"].measured is not None
    assert result.best.latency["fake"].measured * (1 + REPEATABILITY) <= LIMIT
    assert len(world.measured) >= 1


def test_a_failed_finalist_is_passed_over_and_said(tmp_path):
    failed: list[Architecture] = []

    def measure(arch: Architecture) -> Measurement:
        if not failed:
            failed.append(arch)
            return measurement(arch, error="out of memory")
        return measurement(arch)

    world = World(tmp_path, measure)
    result = world.searcher(LIMIT).run(20, baseline=False)
    assert result.best.architecture not in failed
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
    world.searcher(100).run(3, baseline=False)
    assert any("above the biggest child" in text for text in world.told)


def test_same_seed_same_answer(tmp_path):
    answers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name)
        world.searcher(LIMIT, seed=seed).run(15)
        answers.append(world.evaluated)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("limit_ms", "count", "message"),
    [
        (0, 5, r"latency limit 0 ms: must be a number over 0"),
        (float("inf"), 5, r"latency limit inf ms"),
        (1, 0, r"evaluations=0: must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense(world, limit_ms, count, message):
    with pytest.raises(InputError, match=message):
        world.searcher(limit_ms).run(count)


def test_measured_overrides_predicted(world):
    row = SPACE.encode([SPACE.largest()])
    predicted = world.predictor.predict_genes(row)[0]
    limit = LatencyLimit("fake", 1.0, world.predictor, {row[0].tobytes(): 7.0})
    assert limit.cost(row) == 7.0
    assert limit.upper(row) == pytest.approx(7.0 * (1 + REPEATABILITY))
    other = SPACE.encode([SPACE.smallest()])
    assert LatencyLimit("fake", 1.0, world.predictor).cost(row) == predicted
    assert limit.upper(other) > limit.cost(other)


def test_a_margin_grows_with_the_confidence(world):
    genes = SPACE.sample_genes(20, np.random.default_rng(0))
    margins = [LatencyLimit("fake", 1.0, world.predictor, {}, c).upper(genes) for c in (0.5, 0.9, 0.99)]
    assert np.allclose(margins[0], world.predictor.predict_genes(genes)[0])
    assert (margins[0] < margins[1]).all()
    assert (margins[1] < margins[2]).all()


def candidate(ms: float, accuracy: float) -> Candidate:
    return Candidate(
        architecture=SPACE.smallest(),
        accuracy=accuracy,
        macs=1,
        params=1,
        latency={"fake": Estimate(predicted=ms, std=0.1)},
    )


def test_pareto_front():
    points = [candidate(3, 0.8), candidate(1, 0.5), candidate(2, 0.7), candidate(2.5, 0.6), candidate(3, 0.9)]
    front = [(c.latency["fake"].value, c.accuracy) for c in pareto_front(points, "fake")]
    assert front == [(1, 0.5), (2, 0.7), (3, 0.9)]
    assert pareto_front([], "fake") == ()


def test_result_round_trips(world):
    result = world.searcher(LIMIT).run(4)
    assert Result.from_dict({**result.to_dict(), "created": "now"}) == result
    with pytest.raises(InputError, match="not a search result"):
        Result.from_dict({"best": {}})
