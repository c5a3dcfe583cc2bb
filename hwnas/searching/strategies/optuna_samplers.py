"""Optuna's samplers as strategies: NSGA-II (Deb et al. 2002) and TPE (Bergstra et al. 2011)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from hwnas.searching.strategies.base import Scored, Strategy
from hwnas.space import Architecture, FloatArray, Genes

if TYPE_CHECKING:
    import optuna

TRIES = 16  # asked of the sampler for each child that is wanted; random children fill what is still missing


class OptunaStrategy(Strategy):
    """Asks a sampler of Optuna, and throws away what does not keep the limits before it is evaluated.

    Optuna sees a choice for every gene, also for those of absent blocks (drawn at random for children that have none),
    so that all trials have the same parameters. The first children are random ones that keep the limits, as uniform
    draws under a tight limit may never. With `front`, the objectives are accuracy and size.

    Args:
        space, feasible, size, budget, rng, front, known: see `Strategy`.
    """

    _recorded = 0

    @property
    @abstractmethod
    def startup(self) -> int:
        """Random children before the sampler is asked."""

    @abstractmethod
    def optuna_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """The sampler."""

    def attributes(self, index: int) -> dict[str, Any]:
        """What the sampler keeps with the child at a place in the history."""
        return {}

    @cached_property
    def _study(self) -> optuna.Study:
        import optuna

        accuracy, size = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(
            directions=[accuracy, size] if self.front else [accuracy], storage=optuna.storages.InMemoryStorage()
        )

    @cached_property
    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        from optuna.distributions import IntDistribution

        return {gene.name: IntDistribution(0, len(gene.choices) - 1) for gene in self.space.genes}

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        from optuna.trial import TrialState

        rng = self.rng(history)
        known, accuracies = self.arrays(history)
        self._record(known, accuracies)
        if len(known) < self.startup:
            return self.fill(self.random(rng), known, count)
        self._study.sampler = self.optuna_sampler(int(rng.integers(2**31)))
        asked, found = [], np.empty((0, len(self.space.genes)), dtype=np.int8)
        for _ in range(TRIES * count):
            trial = self._study.ask(self._distributions)
            genes = self.space.mask_absent(np.array([list(trial.params.values())], dtype=np.int8))
            if self.feasible(genes)[0] and not (np.concatenate([known, found]) == genes).all(axis=1).any():
                found = np.concatenate([found, genes])
                asked.append(trial)  # its accuracy comes with the history; until then the sampler knows it as running
            else:
                self._study.tell(trial, state=TrialState.FAIL)
            if len(found) == count:
                break
        for trial in asked:
            self._study.tell(trial, state=TrialState.FAIL)
        return self.fill(chain([found], self.random(rng)), known, count)

    def _record(self, genes: Genes, accuracies: FloatArray) -> None:
        """Add to the study what it does not hold yet."""
        from optuna.trial import create_trial

        new = range(self._recorded, len(genes))
        sizes = self.size(genes[new.start :]) if self.front and len(new) else np.zeros(len(new))
        for index, size in zip(new, sizes, strict=True):
            drawn = self.space.draw_genes(1, np.random.default_rng([self.seed, index]))[0]
            choices = np.where(genes[index] < 0, drawn, genes[index])
            values = [float(accuracies[index]), float(size)] if self.front else [float(accuracies[index])]
            trial = create_trial(
                values=values,
                params={gene.name: int(choice) for gene, choice in zip(self.space.genes, choices, strict=True)},
                distributions=self._distributions,
                system_attrs=self.attributes(index),
            )
            self._study.add_trial(trial)
        self._recorded = len(genes)


class Nsga2(OptunaStrategy):
    """Optuna's `NSGAIISampler`, with a population that leaves room for at least five generations.

    Args:
        space, feasible, size, budget, rng, front, known: see `Strategy`.
    """

    @property
    def startup(self) -> int:
        """The population: 50 as Optuna's default, less for a small budget."""
        return min(50, max(10, self.budget // 5))

    def optuna_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """See `OptunaStrategy`."""
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(population_size=self.startup, seed=seed)

    def attributes(self, index: int) -> dict[str, Any]:
        """See `OptunaStrategy`; a trial without its generation is never a parent."""
        from optuna.samplers import NSGAIISampler

        return {NSGAIISampler._get_generation_key(): index // self.startup}


class Tpe(OptunaStrategy):
    """Optuna's multivariate `TPESampler`.

    Args:
        space, feasible, size, budget, rng, front, known: see `Strategy`.
    """

    @property
    def startup(self) -> int:
        """Optuna's default."""
        return 10

    def optuna_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """See `OptunaStrategy`."""
        from optuna.samplers import TPESampler

        return TPESampler(multivariate=True, n_startup_trials=self.startup, seed=seed)
