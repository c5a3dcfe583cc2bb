"""A study: what one strategy evaluates, recorded as trials that Optuna's tools can show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution

from hwnas.searching.strategies import Scored, Strategy
from hwnas.space import Architecture, SearchSpace

GENERATION = 2  # children proposed, and evaluated, at a time; on every machine, so that all find the same


class Study:
    """Lets a strategy propose children, evaluates them, and records each.

    Args:
        space: of the children.
        storage_url: of Optuna's storage.
        name: for people, such as `12 ms on cpu, random`.
        question: all that decides what may be proposed, as plain values: a study belongs to one question, and an
            interrupted search goes on in its own.
        evaluate: validation accuracies of children; it remembers each that it has worked out.
        about: what else to record of a child: plain values, and by how much it is over each limit (below 0: within).
        notice: told what a user should know.
    """

    def __init__(
        self,
        space: SearchSpace,
        storage_url: str,
        name: str,
        question: Any,
        *,
        evaluate: Callable[[Sequence[Architecture]], Sequence[float]],
        about: Callable[[Architecture], tuple[Mapping[str, Any], Mapping[str, float]]],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.space, self.name = space, name
        self._evaluate, self._about, self._notice = evaluate, about, notice
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        arguments = {"connect_args": {"timeout": 60}} if storage_url.startswith("sqlite") else {}
        self._study = optuna.create_study(
            storage=optuna.storages.RDBStorage(storage_url, engine_kwargs=arguments),
            study_name=f"{name} {digest}",
            sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: we propose
            direction="maximize",
            load_if_exists=True,
        )

    def known(self, find: Callable[[], Sequence[Scored]]) -> list[Scored]:
        """What was known of other searches' children when this study began, in order of their ids.

        What a strategy proposes depends on it. So it is recorded at the first call: an interrupted search, and every
        further worker, goes on from the same, whatever has become known since.

        Args:
            find: what is known now.
        """
        scored = {one.arch.id: one for one in find()}
        if "known" not in self._study.user_attrs:
            self._study.set_user_attr("known", sorted(scored))
        return [scored[name] for name in self._study.user_attrs["known"] if name in scored]

    def explore(
        self,
        strategy: Strategy,
        report: Callable[[int, str], None] = lambda done, note: None,
        known: Sequence[Scored] = (),
    ) -> list[Scored]:
        """Evaluate what a strategy proposes until its budget is spent.

        Args:
            strategy: proposes.
            report: told how many are evaluated, and the best accuracy.
            known: what the strategy's history starts with; none of it counts as evaluated.
        """
        recorded = {trial.user_attrs.get("id") for trial in self._study.get_trials(deepcopy=False)}
        history: list[Scored] = []
        while len(history) < strategy.budget:
            archs = strategy.propose([*known, *history], min(GENERATION, strategy.budget - len(history)))
            if not archs:
                self._notice(f"{self.name}: no further child keeps the limit after {len(history)} evaluations")
                break
            for arch, accuracy in zip(archs, self._evaluate(archs), strict=True):
                history.append(Scored(arch, accuracy))
                if arch.id not in recorded:
                    self._study.add_trial(self._trial(history[-1]))
            report(len(history), f"best accuracy {max(scored.accuracy for scored in history):.4f}")
        return history

    def _trial(self, scored: Scored) -> optuna.trial.FrozenTrial:
        """The child as a finished trial; each parameter is the index of its choice in the space."""
        genes = self.space.encode([scored.arch])
        present = [(gene, int(index)) for gene, index in zip(self.space.genes, genes[0], strict=True) if index >= 0]
        distributions: dict[str, BaseDistribution] = {
            gene.name: IntDistribution(0, len(gene.choices) - 1) for gene, _ in present
        }
        attributes, constraints = self._about(scored.arch)
        return optuna.trial.create_trial(
            value=scored.accuracy,
            params={gene.name: index for gene, index in present},
            distributions=distributions,
            user_attrs={"id": scored.arch.id, "architecture": scored.arch.describe(), **attributes},
            constraints=dict(constraints),
        )
