from collections.abc import Sequence

import numpy as np
import pytest

from hwnas.errors import InputError
from hwnas.layers import LayerSums
from hwnas.searching.fronts import by_rank, gains, running_hypervolume
from hwnas.searching.strategies import Scored, Strategy, strategy_class, strategy_names
from hwnas.searching.strategies.accuracy_model import AccuracyModel, Features, Posterior
from hwnas.searching.strategies.sampling import FeasibleSampler
from hwnas.space import Architecture, SearchSpace

SPACE = SearchSpace.load("tiny", resolution=[16, 20, 24, 28])
MACS = LayerSums(SPACE, lambda layer: (layer.macs,))
LIMIT = 1e6


def size(genes, limit=LIMIT):
    return MACS(genes)[:, 0] / limit


def accuracies(genes):
    """A surface with diminishing returns and an interaction between resolution, depth and kernels."""
    depth = sum((genes[:, i] >= 0) for i, gene in enumerate(SPACE.genes) if gene.name.endswith("kernel"))
    kernels = (genes == 1).mean(axis=1)
    detail = genes[:, 0] / 3
    return np.log(MACS(genes)[:, 0]) / 20 + 0.02 * detail * depth / 10 - 0.05 * (kernels - 0.3 * detail) ** 2


def hypervolume(accuracies, sizes):
    return running_hypervolume(sizes, accuracies)[-1]


def accuracy(arch: Architecture) -> float:
    return float(accuracies(SPACE.encode([arch]))[0])


def make(
    name: str, budget: int, seed: int = 0, limit: float = LIMIT, front: bool = False, known: Sequence[Scored] = ()
) -> Strategy:
    return strategy_class(name)(
        SPACE,
        feasible=lambda genes: size(genes, limit) <= 1,
        size=lambda genes: size(genes, limit),
        budget=budget,
        rng=np.random.default_rng(seed),
        front=front,
        known=known,
    )


def search(strategy: Strategy, batch: int = 8) -> list[Scored]:
    history: list[Scored] = []
    while len(history) < strategy.budget:
        archs = strategy.propose(history, min(batch, strategy.budget - len(history)))
        if not archs:
            break
        history += [Scored(arch, accuracy(arch)) for arch in archs]
    return history


def best(name: str, budget: int) -> float:
    return float(np.mean([max(s.accuracy for s in search(make(name, budget, seed))) for seed in range(3)]))


@pytest.fixture(params=strategy_names())
def name(request) -> str:
    return request.param


# ---------------------------------------------------------------- every strategy


@pytest.mark.parametrize("front", [False, True])
def test_proposals_are_new_feasible_and_reproducible(name, front):
    history = search(make(name, 40, front=front))
    archs = [scored.arch for scored in history]
    assert len(set(archs)) == len(archs) == 40
    assert (size(SPACE.encode(archs)) <= 1).all()
    assert [s.arch for s in search(make(name, 40, front=front))] == archs
    if name != "coarse-to-fine":
        assert [s.arch for s in search(make(name, 40, seed=1, front=front))] != archs


def test_goes_on_from_any_point_of_its_history(name):
    """What a worker proposes that joins late is what the one proposes that was there from the start."""
    whole = [scored.arch for scored in search(make(name, 40))]
    for done in (8, 24, 32):
        late = make(name, 40)
        assert late.propose([Scored(arch, accuracy(arch)) for arch in whole[:done]], 8) == whole[done : done + 8]


def test_knows_what_other_searches_evaluated(name):
    """Known children, some of them beyond the limit, are not proposed again, and more of them than the budget do."""
    rng = np.random.default_rng(5)
    known = tuple(Scored(arch, accuracy(arch)) for arch in map(SPACE.decode, SPACE.sample_genes(60, rng)))
    found = [scored.arch for scored in search(make(name, 16, known=known))]
    assert len(set(found)) == 16
    assert not set(found) & {scored.arch for scored in known}
    assert (size(SPACE.encode(found)) <= 1).all()


def test_nothing_feasible_ends_the_search(name):
    assert search(make(name, 5, limit=1.0)) == []


def test_only_the_smallest_feasible(name):
    smallest = MACS(SPACE.encode([SPACE.smallest()]))[0, 0]
    assert [s.arch for s in search(make(name, 5, limit=smallest))] == [SPACE.smallest()]


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_any_number_at_a_time(name, batch):
    assert len({scored.arch for scored in search(make(name, 20), batch=batch)}) == 20


def test_unknown_name():
    with pytest.raises(InputError, match="unknown strategy 'anneal': not one of guided, coarse-to-fine"):
        make("anneal", 5)


# ---------------------------------------------------------------- what each is for


def test_guided_beats_the_others_on_average():
    guided = best("guided", 40)
    assert guided > max(best("coarse-to-fine", 40), best("random", 200))


def test_known_children_make_guided_faster():
    """A second device: 8 evaluations beside the 40 for the first one find what takes 40 without those."""
    known = tuple(search(make("guided", 40, limit=1.2 * LIMIT)))
    without = search(make("guided", 40, seed=3))
    few = search(make("guided", 8, seed=3, known=known))
    kept = [scored for scored in (*known, *few) if size(SPACE.encode([scored.arch]))[0] <= 1]
    assert max(s.accuracy for s in kept) >= max(s.accuracy for s in without) - 0.001


def test_coarse_part_is_skeletons_and_the_fine_part_improves_them():
    history = search(make("coarse-to-fine", 60))
    skeletons = set(SPACE.skeletons())
    coarse = [scored for scored in history[:24] if scored.arch in skeletons]
    assert len(coarse) == 24
    assert coarse[0].arch == SPACE.smallest()
    assert len({scored.arch.resolution for scored in coarse}) == 4
    assert max(scored.accuracy for scored in history) > max(scored.accuracy for scored in coarse)


def test_front_covers_the_sizes():
    """Looking for a front finds a greater one than looking for the best child or drawing at random."""

    def volume(strategy):
        archs = [scored.arch for scored in search(strategy)]
        return hypervolume(accuracies(SPACE.encode(archs)), size(SPACE.encode(archs)))

    front = volume(make("guided", 40, front=True))
    assert front > max(volume(make("guided", 40)), volume(make("random", 40, front=True)))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("space", [SPACE, SearchSpace.load("ofa-mbv3"), SearchSpace.load("attentivenas")])
def test_mutated_genes_are_what_mutation_gives(space):
    """The genes of a child of the space, in which choices are the parent's or, with the probability, any."""
    rng = np.random.default_rng(0)
    parents = space.sample_genes(300, rng)
    assert np.array_equal(space.mutate_genes(parents, rng, 0.0), parents)
    mutants = space.mutate_genes(parents, rng, 0.1)
    assert np.array_equal(space.encode(map(space.decode, mutants)), mutants)
    both = (parents >= 0) & (mutants >= 0)
    counts = np.array([len(gene.choices) for gene in space.genes])
    changed = (parents != mutants) & both
    assert changed.sum() / (both * 0.1 * (1 - 1 / counts)).sum() == pytest.approx(1, abs=0.1)
    one_by_one = space.encode([space.mutate(space.decode(row), rng, 0.1) for row in parents])
    assert (mutants != parents).mean() == pytest.approx((one_by_one != parents).mean(), abs=0.02)


def test_mutation_with_a_probability_for_each_child():
    parents = SPACE.sample_genes(100, np.random.default_rng(0))
    rates = np.repeat([[0.0], [1.0]], 50, axis=0)
    mutants = SPACE.mutate_genes(parents, np.random.default_rng(1), rates)
    assert np.array_equal(mutants[:50], parents[:50])
    assert (mutants[50:] != parents[50:]).any(axis=1).all()


@pytest.mark.parametrize("space", [SPACE, SearchSpace.load("ofa-mbv3"), SearchSpace.load("attentivenas")])
def test_crossed_genes_are_what_crossover_gives(space):
    """The genes of a child of the space in which each choice is one of its parents', half of them each."""
    rng = np.random.default_rng(0)
    a, b = space.sample_genes(300, rng), space.sample_genes(300, rng)
    children = space.crossover_genes(a, b, rng)
    assert np.array_equal(space.encode(map(space.decode, children)), children)
    assert ((children == a) | (children == b) | (children < 0)).all()
    differ = (a >= 0) & (b >= 0) & (a != b) & (children >= 0)
    assert (children == a)[differ].mean() == pytest.approx(0.5, abs=0.05)


def test_sampler_draws_uniformly_given_the_limit():
    """Walks under a limit that few children keep have the distribution of uniform draws that keep it."""
    drawn = SPACE.sample_genes(200_000, np.random.default_rng(0))
    limit = float(np.quantile(MACS(drawn)[:, 0], 0.01))
    kept = drawn[size(drawn, limit) <= 1]
    sampler = FeasibleSampler(SPACE, lambda genes: size(genes, limit) <= 1, lambda genes: size(genes, limit))
    assert sampler.share < 1 / 64
    draws = sampler.draws(np.random.default_rng(1))
    walked = np.concatenate([next(draws) for _ in range(8)])
    assert (size(walked, limit) <= 1).all()
    for index, gene in enumerate(SPACE.genes):
        for choice in range(-1, len(gene.choices)):
            wanted, found = (kept[:, index] == choice).mean(), (walked[:, index] == choice).mean()
            assert found == pytest.approx(wanted, abs=0.06), (gene.name, choice)


def test_sampler_reaches_limits_that_uniform_draws_never_keep():
    """AttentiveNAS's space under 250 MFLOPs: none of 4,096 uniform draws keeps that."""
    space = SearchSpace.load("attentivenas")
    macs = LayerSums(space, lambda layer: (layer.macs,))
    sampler = FeasibleSampler(space, lambda genes: macs(genes)[:, 0] <= 250e6, lambda genes: macs(genes)[:, 0] / 250e6)
    assert not (macs(space.sample_genes(4096, np.random.default_rng(0)))[:, 0] <= 250e6).any()
    genes = next(sampler.draws(np.random.default_rng(0)))
    assert (macs(genes)[:, 0] <= 250e6).all()
    assert len(np.unique(genes, axis=0)) > 200


def test_by_rank_peels_fronts():
    found, sizes = np.array([0.5, 0.6, 0.4, 0.6, 0.3]), np.array([0.2, 0.5, 0.1, 0.6, 0.3])
    assert by_rank(found, None, 9).tolist() == [1, 3, 0, 2, 4]
    ranks = by_rank(found, sizes, 9).tolist()
    assert set(ranks[:3]) == {0, 1, 2}
    assert set(ranks) == set(range(5))
    assert by_rank(found, sizes, 2).tolist() == ranks[:2]


def test_gains_are_differences_of_hypervolumes():
    rng = np.random.default_rng(0)
    found, sizes = rng.random(30), rng.random(30) * 1.2
    added = [
        hypervolume(np.append(found[:20], a), np.append(sizes[:20], s)) - hypervolume(found[:20], sizes[:20])
        for a, s in zip(found[20:], sizes[20:], strict=True)
    ]
    assert gains(found[20:], sizes[20:], found[:20], sizes[:20]) == pytest.approx(np.array(added))
    assert hypervolume(np.array([0.5, 0.8]), np.array([0.2, 0.6])) == pytest.approx(0.5 * 0.4 + 0.8 * 0.4)


@pytest.fixture(scope="module")
def model() -> AccuracyModel:
    genes = SPACE.sample_genes(120, np.random.default_rng(0))
    return AccuracyModel(
        Features(SPACE, size, SPACE.sample_genes(500, np.random.default_rng(1))), genes, accuracies(genes)
    )


def test_model_predicts_and_knows_how_well(model):
    genes = SPACE.sample_genes(400, np.random.default_rng(2))
    mean, std = model.predict(genes)
    errors = mean - accuracies(genes)
    assert np.sqrt((errors**2).mean()) < 0.25 * accuracies(genes).std()
    assert (np.abs(errors) < 2 * std).mean() > 0.85
    assert std.max() < 2 * accuracies(genes).std()


def test_observing_makes_what_is_alike_more_certain(model):
    """As a model does that was fitted with the child, with the same hyperparameters."""
    genes = SPACE.sample_genes(50, np.random.default_rng(3))
    genes[1] = SPACE.mutate_genes(genes[:1], np.random.default_rng(0), 0.05)[0]
    posterior = Posterior(model, genes)
    assert posterior.std == pytest.approx(model.predict(genes)[1])
    before = posterior.std.copy()
    posterior.observe(0)
    assert (posterior.std <= before + 1e-12).all()
    assert posterior.std[0] < 0.8 * before[0]
    assert posterior.std[1] / before[1] < np.median(posterior.std / before)


def test_gradient_of_the_model_is_right(model, monkeypatch):
    """Analytic against finite differences, through the objective that the model hands to the optimizer."""
    from scipy.optimize import approx_fprime

    from hwnas.searching.strategies import accuracy_model

    caught = {}

    def keep(objective, start, **options):
        caught["at"] = (objective, start)
        return type("Found", (), {"x": start})

    monkeypatch.setattr(accuracy_model, "minimize", keep)
    genes = SPACE.sample_genes(30, np.random.default_rng(4))
    AccuracyModel(model.features, genes, accuracies(genes))
    objective, start = caught["at"]
    start = start + np.random.default_rng(0).normal(0, 0.3, size=len(start))
    numeric = approx_fprime(start, lambda logs: objective(logs)[0], 1e-6)
    assert objective(start)[1] == pytest.approx(numeric, rel=1e-3, abs=1e-3)


def test_equal_accuracies_are_no_trouble():
    strategy = make("guided", 40)
    history = []
    for _ in range(4):
        history += [Scored(arch, 0.5) for arch in strategy.propose(history, 8)]
    assert len({scored.arch for scored in history}) == 32


def test_guided_learns_from_children_beyond_the_limits():
    rng = np.random.default_rng(1)
    genes = SPACE.sample_genes(200, rng)
    within, beyond = genes[size(genes) <= 1][:20], genes[size(genes) > 1][:40]
    known = [Scored(SPACE.decode(row), float(rng.uniform())) for row in within]
    more = [*known, *(Scored(SPACE.decode(row), float(rng.uniform())) for row in beyond)]
    assert make("guided", 8, known=known).propose([], 8) != make("guided", 8, known=more).propose([], 8)
