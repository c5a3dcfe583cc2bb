"""Search under a latency limit: explore, measure the finalists, refit, re-rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution

from hwnas.errors import InputError, LimitError
from hwnas.layers import lower, total_macs, total_params
from hwnas.measurement import Measurement
from hwnas.predictors import LatencyPredictor
from hwnas.progress import Report, silent
from hwnas.searching.limits import LatencyLimit
from hwnas.searching.strategies import CoarseToFine, RandomSearch, Scored, Strategy
from hwnas.space import Architecture, SearchSpace

FINALISTS = 4  # measured at a time
GENERATION = 2  # children proposed, and evaluated, at a time; on every machine, so that all find the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A child with all that is known of it.

    Attributes:
        architecture: the child.
        accuracy: on the validation images, 0 to 1.
        predicted_ms, std_ms: what the device's predictor says, milliseconds.
        measured_ms: median latency measured on the device, milliseconds; None if it was not measured.
        macs, params: multiply-adds and parameters.
    """

    architecture: Architecture
    accuracy: float
    predicted_ms: float
    std_ms: float
    measured_ms: float | None
    macs: int
    params: int

    @property
    def latency_ms(self) -> float:
        """Measured where it was, else predicted."""
        return self.predicted_ms if self.measured_ms is None else self.measured_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = [name for name in self.__slots__ if name != "architecture"]
        return {"architecture": self.architecture.to_dict(), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{**value, "architecture": Architecture.from_dict(value["architecture"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search found.

    Attributes:
        device: its name.
        limit_ms: the latency limit, milliseconds.
        confidence: with which an unmeasured child had to keep it.
        best: the most accurate child that keeps the limit as measured.
        front: children that no other evaluated one beats in both accuracy and latency, fastest first.
        random: the best child of random search with as many evaluations under the same rules, where it was run.
        num_evaluations: children evaluated by each of the two.
        seed: of the search.
    """

    device: str
    limit_ms: float
    confidence: float
    best: Candidate
    front: tuple[Candidate, ...]
    random: Candidate | None
    num_evaluations: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        value: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        value["best"] = self.best.to_dict()
        value["front"] = [candidate.to_dict() for candidate in self.front]
        value["random"] = self.random and self.random.to_dict()
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: something is missing.
        """
        try:
            known = {name: value[name] for name in cls.__slots__}
            known["best"] = Candidate.from_dict(value["best"])
            known["front"] = tuple(Candidate.from_dict(item) for item in value["front"])
            known["random"] = value["random"] and Candidate.from_dict(value["random"])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise InputError(f"not a search result of hwnas ({error})") from None


class Searcher:
    """Finds the most accurate child under a latency limit on one device.

    Children are rejected by predicted latency before they are evaluated. The best ones are measured, the predictor
    is fitted anew with what was measured, and the ranking is repeated until its best child has been measured and
    keeps the limit. All evaluations are recorded as trials of an Optuna study, and an interrupted search goes on.

    Args:
        space: the search space.
        predictor: of the device; fitted anew in place.
        limit_ms: milliseconds.
        confidence: with which an unmeasured child has to keep the limit.
        evaluate: validation accuracies of children; it remembers each that it has worked out.
        measure: puts children on the device.
        measurements: what was measured on the device so far.
        storage_url: of Optuna's storage.
        known: children that other searches have evaluated on the same weights; those that keep the limit are
            candidates for the answer, so that a looser limit never gets a worse one than a tighter limit got.
        seed: of all chance.
        notice: told what a user should know.

    Raises:
        InputError: a limit or confidence that makes no sense.
    """

    def __init__(
        self,
        space: SearchSpace,
        predictor: LatencyPredictor,
        *,
        device: str,
        limit_ms: float,
        confidence: float,
        evaluate: Callable[[Sequence[Architecture]], Sequence[float]],
        measure: Callable[[Sequence[Architecture]], Sequence[Measurement]],
        measurements: Sequence[Measurement],
        storage_url: str,
        known: Callable[[], Sequence[Scored]] = tuple,
        seed: int = 0,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.space, self.predictor = space, predictor
        self.evaluate, self.measure, self.known = evaluate, measure, known
        self.storage_url, self.seed, self.notice = storage_url, seed, notice
        self._measured = {m.arch: m for m in measurements if m.trusted}
        # Exploring goes by predictions alone: a measured latency changes a little with every further measurement,
        # and the same search must propose the same children when it goes on after an interruption.
        self.limit = LatencyLimit(device, limit_ms, predictor, {}, confidence)

    def run(self, num_evaluations: int, *, baseline: bool = True, report: Report = silent) -> Result:
        """Search.

        Args:
            num_evaluations: children to evaluate; the baseline takes as many again.
            baseline: whether to run random search beside it.
            report: told children evaluated and the best accuracy.

        Raises:
            LimitError: no child keeps the limit; the message says the least possible latency.
        """
        if num_evaluations < 1:
            raise InputError(f"evaluations={num_evaluations}: must be at least 1")
        self._check_limit()
        total = num_evaluations * (2 if baseline else 1)
        # Children are chosen before any finalist is measured, so that both strategies see the same limit.
        rng = np.random.default_rng([self.seed, 0])
        coarse = CoarseToFine(self.space, self.limit.feasible, num_evaluations, rng, size=self.limit.cost)
        found = self.explore(coarse, "coarse-to-fine", lambda done, note: report(done, total, note))
        drawn: list[Scored] = []
        if baseline:
            rng = np.random.default_rng([self.seed, 1])
            uniform = RandomSearch(self.space, self.limit.feasible, len(found), rng)
            drawn = self.explore(uniform, "random", lambda done, note: report(len(found) + done, total, note))
        pool = [*found, *self._from_elsewhere(found, drawn)]
        self.limit = replace(self.limit, measured=self._latencies())
        best = self.confirm(pool)
        random = self.confirm(drawn) if drawn else None
        return Result(
            device=self.limit.device,
            limit_ms=self.limit.ms,
            confidence=self.limit.confidence,
            best=best,
            front=pareto_front([self.candidate(scored) for scored in pool if self._keeps_limit(scored.arch)]),
            random=random,
            num_evaluations=len(found),
            seed=self.seed,
        )

    def _from_elsewhere(self, found: Sequence[Scored], drawn: Sequence[Scored]) -> list[Scored]:
        """Known children that keep the limit, without those of this search and its baseline."""
        own = {scored.arch for scored in (*found, *drawn)}
        others = [scored for scored in self.known() if scored.arch not in own]
        if not others:
            return []
        keeps = self.limit.feasible(self.space.encode([scored.arch for scored in others]))
        return [scored for scored, fits in zip(others, keeps, strict=True) if fits]

    # ------------------------------------------------------------ exploring

    def explore(
        self, strategy: Strategy, name: str, report: Callable[[int, str], None] = lambda done, note: None
    ) -> list[Scored]:
        """Evaluate what a strategy proposes, and record it as a study named `<device> <limit> <name> ...`."""
        study = self._study(name, strategy.budget)
        recorded = {trial.user_attrs.get("id") for trial in study.get_trials(deepcopy=False)}
        history: list[Scored] = []
        while len(history) < strategy.budget:
            archs = strategy.propose(history, min(GENERATION, strategy.budget - len(history)))
            if not archs:
                self.notice(f"{name}: no further child keeps the limit after {len(history)} evaluations")
                break
            for arch, accuracy in zip(archs, self.evaluate(archs), strict=True):
                history.append(Scored(arch, accuracy))
                if arch.id not in recorded:
                    study.add_trial(self._trial(history[-1]))
            best = max(scored.accuracy for scored in history)
            report(len(history), f"{name}: best accuracy {best:.4f}")
        return history

    def _study(self, name: str, budget: int) -> optuna.Study:
        # A study belongs to one question: predictor, limit, space and seed decide what may be proposed.
        question = [self.predictor.to_dict(), self.limit.ms, self.limit.confidence, self.seed, budget]
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        arguments = {"connect_args": {"timeout": 60}} if self.storage_url.startswith("sqlite") else {}
        return optuna.create_study(
            storage=optuna.storages.RDBStorage(self.storage_url, engine_kwargs=arguments),
            study_name=f"{self.limit.describe()}, {name} {digest}",
            sampler=optuna.samplers.RandomSampler(seed=self.seed),  # never asked: we propose
            direction="maximize",
            load_if_exists=True,
        )

    def _trial(self, scored: Scored) -> optuna.trial.FrozenTrial:
        """The child as a finished trial; each parameter is the index of its choice in the space."""
        genes = self.space.encode([scored.arch])
        present = [(gene, int(index)) for gene, index in zip(self.space.genes, genes[0], strict=True) if index >= 0]
        distributions: dict[str, BaseDistribution] = {
            gene.name: IntDistribution(0, len(gene.choices) - 1) for gene, _ in present
        }
        candidate = self.candidate(scored)
        return optuna.trial.create_trial(
            value=scored.accuracy,
            params={gene.name: index for gene, index in present},
            distributions=distributions,
            user_attrs={
                "id": scored.arch.id,
                "architecture": scored.arch.describe(),
                "predicted_ms": candidate.predicted_ms,
                "std_ms": candidate.std_ms,
                "macs": candidate.macs,
                "params": candidate.params,
            },
            constraints={self.limit.describe(): float(self.limit.upper(genes)[0] - self.limit.ms)},
        )

    # ------------------------------------------------------------ confirming

    def confirm(self, found: Sequence[Scored]) -> Candidate:
        """The most accurate child that keeps the limit as measured.

        Measures the best few that have no measurement, refits, re-ranks, until the first in the ranking is a
        measured one.

        Raises:
            LimitError: none of the children keeps the limit as measured.
        """
        ranking = sorted(found, key=lambda scored: -scored.accuracy)
        while True:
            ranking = [scored for scored in ranking if self._keeps_limit(scored.arch)]
            if not ranking:
                raise LimitError(
                    f"{self.limit.describe()}: no evaluated child kept the limit as measured; "
                    "evaluate more with --evaluations, or measure more with `hwnas profile`"
                )
            if ranking[0].arch in self._measured:
                return self.candidate(ranking[0])
            unmeasured = [scored.arch for scored in ranking if scored.arch not in self._measured]
            self._measure(unmeasured[:FINALISTS])
            failed = [arch for arch in unmeasured[:FINALISTS] if arch not in self._measured]
            ranking = [scored for scored in ranking if scored.arch not in failed]

    def _measure(self, archs: Sequence[Architecture]) -> None:
        for measurement in self.measure(archs):
            if measurement.trusted:
                self._measured[measurement.arch] = measurement
            else:
                why = measurement.error or measurement.rejection
                self.notice(f"{measurement.arch.describe()}: not measured: {why}")
        known = list(self._measured)
        self.predictor.fit(known, [self._measured[arch].latency_ms for arch in known])
        self.limit = replace(self.limit, measured=self._latencies())

    def _keeps_limit(self, arch: Architecture) -> bool:
        return bool(self.limit.feasible(self.space.encode([arch]))[0])

    def _latencies(self) -> dict[bytes, float]:
        archs = list(self._measured)
        return {
            genes.tobytes(): self._measured[arch].latency_ms
            for arch, genes in zip(archs, self.space.encode(archs), strict=True)
        }

    def candidate(self, scored: Scored) -> Candidate:
        """All that is known of an evaluated child."""
        mean, std = self.predictor.predict([scored.arch])
        layers = lower(self.space, scored.arch)
        measured = self._measured.get(scored.arch)
        return Candidate(
            architecture=scored.arch,
            accuracy=scored.accuracy,
            predicted_ms=float(mean[0]),
            std_ms=float(std[0]),
            measured_ms=None if measured is None else measured.latency_ms,
            macs=total_macs(layers),
            params=total_params(layers),
        )

    def _check_limit(self) -> None:
        """Say so where no child, or every child, keeps the limit."""
        smallest, largest = self.space.encode([self.space.smallest(), self.space.largest()])
        rng = np.random.default_rng([self.seed, 2])
        near = self.space.encode([self.space.mutate(self.space.smallest(), rng, 0.05) for _ in range(200)])
        pool = np.concatenate([smallest[None], near, self.space.sample_genes(10_000, rng)])
        upper = self.limit.upper(pool)
        if not (upper <= self.limit.ms).any():
            least = int(np.argmin(upper))
            arch = self.space.decode(pool[least])
            raise LimitError(
                f"no child of space {self.space.name!r} keeps {self.limit.describe()} with {self.limit.confidence:.0%} "
                f"confidence: the least possible is {upper[least]:.4g} ms ({arch.describe()})"
            )
        cost = float(self.limit.cost(largest[None])[0])
        if self.limit.feasible(largest[None])[0]:
            self.notice(f"the limit of {self.limit.describe()} is above the biggest child ({cost:.4g} ms): all keep it")


def pareto_front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in both latency and accuracy, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.latency_ms, -c.accuracy)):
        if not front or candidate.accuracy > front[-1].accuracy:
            front.append(candidate)
    return tuple(front)
