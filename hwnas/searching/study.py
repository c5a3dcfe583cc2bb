"""A study: what one strategy evaluates, by any number of workers, recorded as trials that Optuna's tools can show.

All workers of a study hold the same strategy, and a strategy proposes by the history alone. Whoever is first proposes
the next `GENERATION` children; each worker evaluates those of them that no other has claimed; when all of them have an
accuracy, the next generation is due. So the answer does not depend on the number of workers, and one may join, leave or
be killed at any time.

Optuna gets each child once, when it is finished. As a queue of work it would cost more than it gives (measured: see
`benchmarks/results/scale.md`): a trial in state WAITING takes `add_trial`, `ask` and `tell`; two workers that add the
same generation double it; its heartbeats are for `Study.optimize` alone; and reading 10,000 trials takes it far longer
than a user waits. So what the workers agree on is a table of ours, and a claim is a lock of the database, which ends
with its holder: see `hwnas.database.Database.claim`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from textwrap import shorten
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from sqlalchemy.orm import Session

from hwnas.database import connect_arguments, database_url
from hwnas.errors import InputError
from hwnas.searching.strategies import Scored, Strategy
from hwnas.space import Architecture, SearchSpace
from hwnas.store import Store, StudyChild

GENERATION = 8  # children proposed at a time, by whatever number of workers: so all find the same, and 8 have work
LONGEST_NAME = 512  # of Optuna's table
POLL_S = (0.05, 1.0)  # of children that other workers have: at first, and at most


class Study:
    """Lets a strategy propose children, evaluates them together with other workers, and records each once.

    Args:
        space: of the children.
        storage_url: of the database; Optuna's studies are in the same.
        name: for people, such as `12 ms on cpu, random`.
        question: all that decides what may be proposed and what accuracy a child has, as plain values: a study belongs
            to one question, and an interrupted search goes on in its own.
        evaluate: validation accuracies of children; it remembers each that it has worked out.
        about: what else to record of a child: plain values, and by how much it is over each limit (below 0: within).
        notice: told what a user should know.
        named: whether workers meet by the name alone, else by name and question.
        at_once: how many children a worker claims, and gives to `evaluate`, at a time.

    Raises:
        InputError: the name is not one that can be stored and shown.
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
        named: bool = False,
        at_once: int = 2,
    ) -> None:
        self.space, self.name, self.at_once = space, name, at_once
        self._url, self._evaluate, self._about, self._notice = storage_url, evaluate, about, notice
        self._question = json.loads(json.dumps(question))  # as the database will return it
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
        self._key = name if named else f"{name[:400]} {digest}"
        if not (name.strip() and name.isprintable() and len(self._key) <= LONGEST_NAME):
            raise InputError(f"study name {shorten(name, 60)!r}: must have 1 to {LONGEST_NAME} printable characters")

    def begin(self, known: Sequence[Scored]) -> list[Scored]:
        """Begin the study, or open it.

        Args:
            known: children that were evaluated before this study, for its strategy to know.

        Returns:
            Those that the first worker gave: they hold for all, and for a search that goes on.

        Raises:
            InputError: the study of this name is about another question, or the database cannot be used.
        """
        with Store(self._url) as store:
            return self._join(store, known)

    def explore(
        self, strategy: Strategy, report: Callable[[Sequence[Scored]], None] = lambda found: None
    ) -> list[Scored]:
        """Evaluate what a strategy proposes until its budget is spent.

        Args:
            strategy: the same in every worker.
            report: told all that is evaluated, whenever that is more.

        Returns:
            What this study evaluated, in the order proposed: the same in every worker.

        Raises:
            InputError: the study of this name is about another question, or the database cannot be used.
        """
        with Store(self._url) as store, self._trials(store) as trials:
            self._join(store, ())
            history: list[Scored] = []
            pause_s, longest_s = POLL_S
            while len(history) < strategy.budget:
                children = store.children(self._key, first=len(history))
                if not children:
                    archs = strategy.propose(history, min(GENERATION, strategy.budget - len(history)))
                    if not archs:
                        self._notice(f"{self.name}: no further child keeps the limit after {len(history)} evaluations")
                        break
                    store.propose(self._key, len(history), archs)
                    continue
                finished = _leading(children)
                history += finished
                rest = children[len(finished) :]
                report(
                    [*history, *(Scored(child.arch, child.accuracy) for child in rest if child.accuracy is not None)]
                )
                if not rest or self._work(store, trials, rest):
                    pause_s = POLL_S[0]
                else:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
        return history

    def _join(self, store: Store, known: Sequence[Scored]) -> list[Scored]:
        """Begin the study, or open it; the children known before it."""
        question, before = store.open_study(self._key, self._question, [(s.arch, s.accuracy) for s in known])
        differences = list(_differences(question, self._question))
        if differences:
            raise InputError(
                f"study {self._key!r} asks something else ({'; '.join(differences[:3])}): "
                "ask the same as its other workers, or begin a study of another name"
            )
        return [Scored(arch, accuracy) for arch, accuracy in before]

    @contextmanager
    def _trials(self, store: Store) -> Iterator[optuna.Study]:
        """The study as Optuna's tools see it."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = database_url(self._url)
        template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        with store.claimed("optuna"):  # it fails where two processes make its tables at once
            storage = _Storage(template, engine_kwargs={"connect_args": connect_arguments(url)})
            study = optuna.create_study(
                storage=storage,
                study_name=self._key,
                sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: we propose
                direction="maximize",
                load_if_exists=True,
            )
        try:
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def _work(self, store: Store, trials: optuna.Study, children: Sequence[StudyChild]) -> bool:
        """Evaluate and record some of the children; False where other workers have all that are left."""
        with ExitStack() as claims:
            mine: set[int] = set()
            for child in children:
                if child.accuracy is None and claims.enter_context(store.claim(f"{self._key} {child.number}")):
                    mine.add(child.number)
                if len(mine) == self.at_once:
                    break
            # Read again: another worker may have finished one of them just before we claimed it.
            again = store.children(self._key, first=children[0].number)
            todo = [child for child in again if child.number in mine and child.accuracy is None]
            if not todo:
                return bool(mine)
            left_behind = [child for child in todo if not store.begin_child(self._key, child.number)]
            # A worker that was killed may have recorded its trial already. Reading all trials takes long.
            recorded = {t.user_attrs.get("id") for t in trials.get_trials(deepcopy=False)} if left_behind else set()
            for child, accuracy in zip(todo, self._evaluate([child.arch for child in todo]), strict=True):
                if child.arch.id not in recorded:
                    trials.add_trial(self._trial(Scored(child.arch, accuracy)))
                store.finish_child(self._key, child.number, accuracy)
        return True

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


class _Storage(RDBStorage):
    """Optuna's storage, which writes a new trial in one go.

    Optuna reads the trial and an earlier one before it writes each parameter and attribute: some hundred statements
    for 45 parameters, and four times as long as this takes.
    """

    def _set_trial_param_without_commit(
        self,
        session: Session,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None = None,
    ) -> None:
        session.add(
            models.TrialParamModel(
                trial_id=trial_id,
                param_name=param_name,
                param_value=param_value_internal,
                distribution_json=distribution_to_json(distribution),
            )
        )

    def _set_trial_attr_without_commit(
        self,
        session: Session,
        model_cls: type[models.TrialUserAttributeModel | models.TrialSystemAttributeModel],
        trial_id: int,
        key: str,
        value: Any,
    ) -> None:
        session.add(model_cls(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def _leading(children: Sequence[StudyChild]) -> list[Scored]:
    """The finished children before the first one that is not."""
    found = []
    for child in children:
        if child.accuracy is None:
            break
        found.append(Scored(child.arch, child.accuracy))
    return found


def _differences(there: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two plain values differ, in words."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            yield from _differences(there.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        for number, pair in enumerate(zip(there, now, strict=True)):
            yield from _differences(*pair, f"{where}[{number}]")
    elif there != now:
        yield f"{where}={shorten(json.dumps(there), 60)} there, {shorten(json.dumps(now), 60)} now"
