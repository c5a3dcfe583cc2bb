import numpy as np
import pytest

from hwnas.errors import InputError
from hwnas.layers import LayerSums
from hwnas.searching.limits import MacsLimit
from hwnas.searching.strategies import CoarseToFine, RandomSearch, Scored, Strategy
from hwnas.space import Architecture, SearchSpace

SPACE = SearchSpace.load("tiny", resolution=[16, 20, 24, 28])
MACS = LayerSums(SPACE, lambda layer: (layer.macs,))
LIMIT = 1e6


def feasible(genes):
    return MACS(genes)[:, 0] <= LIMIT


def accuracy(arch: Architecture) -> float:
    """A surface with diminishing returns and an interaction between resolution and depth."""
    genes = SPACE.encode([arch])
    depth = sum(len(stage.blocks) for stage in arch.stages)
    kernels = np.mean([block.kernel for stage in arch.stages for block in stage.blocks])
    return float(np.log(MACS(genes)[0, 0]) / 20 + 0.02 * arch.resolution / 28 * depth / 10 + 0.01 * (kernels > 4))


def make(kind: type[Strategy], budget: int, seed: int = 0, fits=feasible) -> Strategy:
    rng = np.random.default_rng(seed)
    options = {"size": lambda genes: MACS(genes)[:, 0]} if kind is CoarseToFine else {}
    return kind(SPACE, fits, budget, rng, **options)


def search(strategy: Strategy) -> list[Scored]:
    history: list[Scored] = []
    while len(history) < strategy.budget:
        archs = strategy.propose(history, min(8, strategy.budget - len(history)))
        if not archs:
            break
        history += [Scored(arch, accuracy(arch)) for arch in archs]
    return history


@pytest.fixture(params=[CoarseToFine, RandomSearch])
def kind(request) -> type[Strategy]:
    return request.param


def test_proposals_are_new_feasible_and_reproducible(kind):
    history = search(make(kind, 40))
    archs = [scored.arch for scored in history]
    assert len(set(archs)) == len(archs) == 40
    assert feasible(SPACE.encode(archs)).all()
    assert [s.arch for s in search(make(kind, 40))] == archs
    if kind is RandomSearch:
        assert [s.arch for s in search(make(kind, 40, seed=1))] != archs


def test_nothing_feasible_ends_the_search(kind):
    assert search(make(kind, 5, fits=lambda genes: np.zeros(len(genes), dtype=bool))) == []


def test_only_the_smallest_feasible(kind):
    """A limit so tight that one child keeps it: coarse-to-fine finds it, random search gives up or finds it."""
    smallest = MACS(SPACE.encode([SPACE.smallest()]))[0, 0]
    history = search(make(kind, 5, fits=lambda genes: MACS(genes)[:, 0] <= smallest))
    assert [s.arch for s in history] in ([SPACE.smallest()], [])
    if kind is CoarseToFine:
        assert history


def test_coarse_part_is_skeletons_and_the_fine_part_improves_them():
    history = search(make(CoarseToFine, 60))
    skeletons = set(SPACE.skeletons())
    coarse = [scored for scored in history[:24] if scored.arch in skeletons]
    assert len(coarse) == 24
    assert len({scored.arch.resolution for scored in coarse}) > 1
    best_coarse = max(scored.accuracy for scored in coarse)
    assert max(scored.accuracy for scored in history) > best_coarse


def test_coarse_to_fine_beats_random_on_average():
    def best(kind):
        return np.mean([max(s.accuracy for s in search(make(kind, 60, seed))) for seed in range(5)])

    assert best(CoarseToFine) > best(RandomSearch)


def test_macs_limit():
    limit = MacsLimit(SPACE, 1e6)
    genes = SPACE.sample_genes(50, np.random.default_rng(0))
    assert np.array_equal(limit.feasible(genes), feasible(genes))
    assert limit.describe() == "1M MACs"
    with pytest.raises(InputError, match="MACs limit nan: must be a number over 0"):
        MacsLimit(SPACE, float("nan"))
