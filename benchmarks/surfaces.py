"""Surfaces to search on: accuracies of the children of a space that cost next to nothing to look up."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwnas.layers import LayerSums
from hwnas.run import Run
from hwnas.searching.strategies.sampling import FeasibleSampler
from hwnas.space import Genes, SearchSpace

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """A space, a limit in MACs, and an accuracy for each child.

    Attributes:
        name: of the surface.
        space: of the children.
        limit: multiply-adds that a child may have.
        value: the accuracies that count, 0 to 1, (num_archs,) for genes (num_archs, num_genes).
        noise: standard deviation of what a strategy is told beside that; always the same for the same child.
        optimum: the greatest value of a feasible child; None to look for it.
    """

    name: str
    space: SearchSpace
    limit: float
    value: Callable[[Genes], Floats]
    noise: float = 0.0
    optimum: float | None = None

    @cached_property
    def macs(self) -> LayerSums:
        return LayerSums(self.space, lambda layer: (layer.macs,))

    def size(self, genes: Genes) -> Floats:
        return self.macs(genes)[:, 0] / self.limit

    def feasible(self, genes: Genes) -> NDArray[np.bool_]:
        return self.size(genes) <= 1

    def told(self, genes: Genes) -> Floats:
        """What an evaluation gives: the value, and the noise that belongs to each child."""
        if not self.noise:
            return self.value(genes)
        seeds = [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little") for row in genes]
        return self.value(genes) + self.noise * np.array([np.random.default_rng(s).standard_normal() for s in seeds])

    @cached_property
    def best(self) -> float:
        """The optimum: known, or the best of three evolutions, of 300,000 children each, on the values themselves."""
        if self.optimum is not None:
            return self.optimum
        return max(float(self.value(climb(self, np.random.default_rng(seed)))[0]) for seed in range(3))


def climb(surface: Surface, rng: np.random.Generator, generations: int = 80, population: int = 2000) -> Genes:
    """The best of a large evolution, (1, num_genes)."""
    genes = next(FeasibleSampler(surface.space, surface.feasible, surface.size).draws(rng))
    for _ in range(generations):
        parents = genes[rng.integers(len(genes), size=(2, population))]
        crossed = surface.space.crossover_genes(parents[0], parents[1], rng)
        rate = rng.choice([0.01, 0.03, 0.1], size=(population, 1))
        children = surface.space.mutate_genes(np.concatenate([crossed, parents[0]]), rng, np.tile(rate, (2, 1)))
        genes = np.unique(np.concatenate([genes, children[surface.feasible(children)]]), axis=0)
        genes = genes[np.argsort(-surface.value(genes), kind="stable")[:300]]
    return genes[:1]


# ---------------------------------------------------------------- synthetic


def settings(space: SearchSpace) -> Callable[[Genes], Floats]:
    """What the synthetic surfaces know of a child, each from 0 to 1: (num_archs, num_settings).

    Resolution, stem, head, and of each stage the width, depth, and mean kernel and expand ratio of its blocks.
    """
    groups: dict[str, list[int]] = {}
    for column, gene in enumerate(space.genes):
        stage, _, attribute = gene.name.rpartition(".")
        if len(gene.choices) > 1:
            groups.setdefault(f"{stage.partition('.')[0]}.{attribute}", []).append(column)
    scale = np.array([max(1, len(gene.choices) - 1) for gene in space.genes])

    def of(genes: Genes) -> Floats:
        relative = genes / scale
        columns = []
        for group in groups.values():
            present = genes[:, group] >= 0
            columns.append(np.where(present, relative[:, group], 0).sum(axis=1) / np.maximum(present.sum(axis=1), 1))
        return np.stack(columns, axis=1)

    return of


def planted(name: str, seed: int, share: float) -> Surface:
    """A child is declared the best; everything else loses accuracy by how it differs from it.

    All terms are 0 at that child and nowhere below: it is the optimum by construction. They are differences in one
    setting; ridges of two settings that make up for each other (compound scaling); tables of three settings, without
    any order (rugged); and the part of the limit that is not used, with diminishing returns. Told with noise.

    Args:
        name: of a space.
        seed: of the instance.
        share: limit, from the smallest child's MACs (0) to the biggest one's (1).
    """
    space = SearchSpace.load(name)
    rng = np.random.default_rng([seed, 0])
    surface = Surface(f"planted-{name}-{seed}", space, 1.0, lambda genes: np.zeros(len(genes)), 0.001)
    small, big = surface.macs(space.encode([space.smallest(), space.largest()]))[:, 0]
    surface = replace(surface, limit=float(small * (big / small) ** share))
    draws = FeasibleSampler(space, surface.feasible, surface.size).draws(rng)
    pool = np.concatenate([next(draws) for _ in range(8)])
    best = pool[np.argsort(-surface.size(pool))[:5]][rng.integers(5)][None]
    of = settings(space)
    target, used = of(best)[0], float(surface.size(best)[0])
    count = len(target)
    weights = rng.lognormal(sigma=1.0, size=count)
    pairs = rng.integers(count, size=(2 * count, 2))
    signs, ridge = rng.choice([-1.0, 1.0], size=2 * count), rng.lognormal(sigma=1.0, size=2 * count)
    triples = rng.integers(count, size=(count, 3))
    tables = rng.random((count, 27))

    def classes(found: Floats) -> NDArray[np.int64]:
        return np.minimum((found * 3).astype(int), 2)

    def entries(found: Floats) -> NDArray[np.int64]:
        thirds = classes(found)[:, triples]
        return thirds[..., 0] * 9 + thirds[..., 1] * 3 + thirds[..., 2]

    tables[np.arange(count), entries(target[None])[0]] = 0

    def terms(genes: Genes) -> Floats:
        found = of(genes)
        off = found - target
        first = np.abs(off) @ weights
        second = (off[:, pairs[:, 0]] + signs * off[:, pairs[:, 1]]) ** 2 @ ridge
        third = tables[np.arange(count), entries(found)].sum(axis=1)
        unused = np.log(np.maximum(used / surface.size(genes), 1))
        return np.stack([first, second, third, unused], axis=1)

    strengths = np.sqrt([0.25, 0.35, 0.2, 0.2]) / terms(pool).std(axis=0)
    strengths *= 0.01 / (terms(pool) @ strengths).std()
    return replace(surface, value=lambda genes: 0.8 - terms(genes) @ strengths, optimum=0.8)


def bottleneck(name: str, seed: int, share: float) -> Surface:
    """A child is about as good as its weakest stage, for its resolution.

    A stage's capacity grows with the logarithm of width, expand ratio and depth; what it needs grows with the
    resolution; errors add up so that the greatest shortage counts most. The receptive field (kernels, depths, strides)
    should fit the resolution, which itself adds detail. Nothing of this is a sum over genes.

    Args:
        name, seed, share: see `planted`.
    """
    space = SearchSpace.load(name)
    rng = np.random.default_rng([seed, 1])
    needs, rates = rng.normal(0, 0.25, size=len(space.stages)), rng.uniform(2, 6, size=len(space.stages))
    grows, detail, field = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.1)
    columns = {gene.name: index for index, gene in enumerate(space.genes)}

    def values(genes: Genes, name: str) -> Floats:
        choices = np.asarray(space.genes[columns[name]].choices, dtype=float)
        return np.where(genes[:, columns[name]] >= 0, choices[genes[:, columns[name]]], 0)

    def of_blocks(genes: Genes, stage: int, attribute: str) -> Floats:
        names = [n for n in columns if n.startswith(f"stage{stage}.") and n.endswith(f".{attribute}")]
        depth = values(genes, f"stage{stage}.depth")
        if names == [f"stage{stage}.{attribute}"]:
            return np.repeat(values(genes, names[0])[:, None], 1, axis=1) * depth[:, None]
        return np.stack([values(genes, n) for n in names], axis=1)

    def value(genes: Genes) -> Floats:
        resolution = values(genes, "resolution") / space.resolution[-1]
        errors, reach, stride = np.zeros(len(genes)), np.zeros(len(genes)), space.stem.stride
        for number, stage in enumerate(space.stages, 1):
            stride *= stage.stride
            depth = values(genes, f"stage{number}.depth")
            work = of_blocks(genes, number, "expand").sum(axis=1)
            width = values(genes, f"stage{number}.width") / stage.width[0]
            capacity = np.log(width) + 0.7 * np.log(work / (stage.expand[-1] * stage.depth[0]))
            need = needs[number - 1] + grows * np.log(resolution)
            errors += np.exp(rates[number - 1] * (need - capacity))
            kernels = of_blocks(genes, number, "kernel").sum(axis=1)
            reach += stride * (kernels - depth) / 4
        fit = np.log(np.maximum(reach, 1) / (field * resolution * space.resolution[-1]))
        return 0.8 - 0.03 * np.log(1 + errors) - 0.02 * fit**2 + 0.05 * detail * np.log(resolution)

    surface = Surface(f"bottleneck-{name}-{seed}", space, 1.0, value, 0.001)
    small, big = surface.macs(space.encode([space.smallest(), space.largest()]))[:, 0]
    return replace(surface, limit=float(small * (big / small) ** share))


# ---------------------------------------------------------------- a trained supernet


def corner(space: SearchSpace) -> SearchSpace:
    """A part of the demo's space that is small enough to evaluate every child of: 576 of them."""
    first, second, third, fourth = space.stages
    return replace(
        space,
        name=f"{space.name}-corner",
        kernel_per="stage",
        stem=replace(space.stem, width=space.stem.width[-1:]),
        stages=(
            replace(first, width=first.width[-1:]),
            replace(second, width=second.width[-1:], expand=second.expand[-1:], kernel=second.kernel[-1:]),
            replace(third, width=(third.width[0], third.width[-1]), expand=third.expand[-1:]),
            replace(fourth, width=fourth.width[-1:], expand=fourth.expand[-1:], kernel=fourth.kernel[-1:]),
        ),
        head=replace(space.head, width=space.head.width[-1:]),
    )


def all_genes(space: SearchSpace) -> Genes:
    """Every child of a small space."""
    rows = itertools.product(*(range(len(gene.choices)) for gene in space.genes))
    return np.unique(space.mask_absent(np.array(list(rows), dtype=np.int8)), axis=0)


def evaluated(run: Run, num_others: int) -> tuple[Genes, Floats]:
    """Genes and accuracies, by the trained supernet, of all the corner's children and of at least so many others.

    All that the run has evaluated counts; random children make up the number. Kept in the run's database: an
    interruption loses nothing, and a second call costs nothing.
    """
    from hwnas.api.evaluating import open_evaluator

    part = corner(run.space)
    archs = [part.decode(row) for row in all_genes(part)]
    with run.store() as store:
        evaluator = open_evaluator(run)
        others = {arch for arch, _ in evaluator.known(store)} - set(archs)
        missing = max(0, num_others - len(others))
        archs += [run.space.decode(row) for row in run.space.sample_genes(missing, np.random.default_rng(0))]
        evaluator.accuracies(archs, store, report=lambda done, total, note="": print(f"{done}/{total} {note}"))
        known = {arch: found for arch, found in evaluator.known(store) if arch.resolution in run.space.resolution}
    return run.space.encode(known), np.array(list(known.values()))


def supernet(folder: str) -> list[Surface]:
    """Surfaces of a run of `examples/demo.py`: a corner with every child evaluated, and a model of the whole, twice.

    The corner's answers are evaluations. The model is a tree ensemble on the evaluations of the corner and of at least
    500 other children, as NAS-Bench-301's (Zela et al., ICLR 2022).
    """
    from xgboost import XGBRegressor

    run = Run(folder)
    genes, accuracies = evaluated(run, 500)
    part = corner(run.space)
    inside = all_genes(part)
    rows = run.space.encode([part.decode(row) for row in inside])
    by_row = {row.tobytes(): accuracy for row, accuracy in zip(genes, accuracies, strict=True)}
    known = {row.tobytes(): by_row[whole.tobytes()] for row, whole in zip(inside, rows, strict=True)}
    cornered = Surface("supernet-corner", part, 1.0, lambda genes: np.array([known[row.tobytes()] for row in genes]))
    of = settings(run.space)
    model: Any = XGBRegressor(
        n_estimators=600, max_depth=5, learning_rate=0.03, subsample=0.7, colsample_bytree=0.5, n_jobs=1, seed=0
    )
    model.fit(np.hstack([of(genes), genes]), accuracies)
    whole = Surface(
        "supernet-model",
        run.space,
        1.0,
        lambda genes: np.asarray(model.predict(np.hstack([of(genes), genes])), dtype=np.float64),
        0.001,
    )
    surfaces = []
    for surface, share in ((cornered, 0.6), (whole, 0.6), (replace(whole, name="supernet-model-loose"), 0.85)):
        small, big = surface.macs(surface.space.encode([surface.space.smallest(), surface.space.largest()]))[:, 0]
        surface = replace(surface, limit=float(small * (big / small) ** share))
        surfaces.append(surface)
    fits = cornered.value(inside[surfaces[0].feasible(inside)])
    return [replace(surfaces[0], optimum=float(fits.max())), *surfaces[1:]]


def synthetic() -> list[Surface]:
    """Those that need no run."""
    return [
        planted("bignas", 0, 0.4),
        planted("bignas", 1, 0.6),
        planted("ofa-mbv3", 0, 0.35),
        planted("attentivenas", 0, 0.25),
        bottleneck("bignas", 0, 0.5),
        bottleneck("ofa-mbv3", 0, 0.5),
        bottleneck("attentivenas", 0, 0.15),
    ]


def surfaces(run: Path | None) -> list[Surface]:
    """All of them; without a trained run, the synthetic ones."""
    return [*synthetic(), *(supernet(str(run)) if run else [])]
