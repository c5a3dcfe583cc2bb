import numpy as np
import pytest

from hwnas.layers import LayerSums
from hwnas.measuring.active import most_telling, next_children
from hwnas.measuring.children import choose_children
from hwnas.predictors import make_predictor
from hwnas.space import SearchSpace

TINY = SearchSpace.load("tiny", in_channels=1, num_classes=10)
MACS = LayerSums(TINY, lambda layer: (layer.macs, layer.out_channels * layer.out_size**2))


def machine_ms(archs):
    return MACS(TINY.encode(archs)) @ [2e-6, 5e-6] + 0.02


def fitted(archs):
    return make_predictor("gp", TINY).fit(archs, machine_ms(archs))


FIRST = choose_children(TINY, 10, np.random.default_rng(0), num_candidates=500)


def more(count, seed=1, measured=FIRST):
    return next_children(TINY, measured, fitted(FIRST).covariance_genes, count, np.random.default_rng(seed), 300)


def conditioned(covariance, noise_var, rows):
    """The covariance once `rows` are measured, by the textbook: Rasmussen and Williams 2006, equation 2.24."""
    seen = covariance[np.ix_(rows, rows)] + noise_var * np.eye(len(rows))
    return covariance - covariance[:, rows] @ np.linalg.solve(seen, covariance[rows])


@pytest.fixture(scope="module")
def candidates():
    root = np.random.default_rng(0).standard_normal((40, 6)) * [3, 1, 1, 0.5, 0.2, 0.1]
    return root @ root.T, 0.3


def test_each_pick_lowers_the_mean_variance_most_after_those_before(candidates):
    covariance, noise_var = candidates
    picked = most_telling(covariance, noise_var, 5)
    for number in range(5):
        left = [
            np.trace(conditioned(covariance, noise_var, [*picked[:number], row]))
            if row not in picked[:number]
            else np.inf
            for row in range(40)
        ]
        assert picked[number] == np.argmin(left)


def test_picks_do_not_come_twice(candidates):
    assert sorted(most_telling(*candidates, 100)) == list(range(40))
    assert most_telling(*candidates, 0) == []


def test_near_copies_are_not_picked_together():
    root = np.repeat(np.eye(3), 10, axis=0)  # three groups of ten that tell all of each other
    picked = most_telling(root @ root.T, 0.01, 3)
    assert {row // 10 for row in picked} == {0, 1, 2}


def test_next_children_are_new_ones_of_the_space():
    chosen = more(8)
    assert len({*chosen, *FIRST}) == 18
    for arch in chosen:
        TINY.check(arch)


def test_the_same_arguments_give_the_same_children():
    """A profile that was killed and goes on measures what it had chosen."""
    assert more(6) == more(6)
    assert more(6)[:3] == more(3)
    assert more(6) != more(6, seed=2)


def test_a_small_space_runs_out():
    space = SearchSpace.load("tiny", in_channels=1, num_classes=10)
    everything = [space.sample(np.random.default_rng(seed)) for seed in range(40)]
    assert not set(more(300, measured=everything)) & set(everything)


def test_tell_more_than_as_many_at_random():
    chosen = more(8)
    rng = np.random.default_rng(5)
    test = TINY.encode([TINY.sample(rng) for _ in range(200)])

    def variance(added):
        covariance, noise_var = fitted(FIRST).covariance_genes(np.concatenate([TINY.encode(added), test]))
        return np.trace(conditioned(covariance, noise_var, list(range(8)))[8:, 8:])

    by_chance = [variance([TINY.sample(rng) for _ in range(8)]) for _ in range(10)]
    assert variance(chosen) < min(by_chance)
