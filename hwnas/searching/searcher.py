"""Search under a latency limit: explore, measure the finalists, refit, re-rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hwnas.errors import InputError, LimitError
from hwnas.layers import lower, total_macs, total_params
from hwnas.measurement import Measurement
from hwnas.predictors import LatencyPredictor
from hwnas.progress import Report, silent
from hwnas.searching.limits import LatencyLimit
from hwnas.searching.result import Candidate, Estimate, Result
from hwnas.searching.strategies import CoarseToFine, RandomSearch, Scored, Strategy
from hwnas.searching.study import Study
from hwnas.space import Architecture, SearchSpace

FINALISTS = 4  # measured at a time


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
        history = {"coarse-to-fine": [scored.accuracy for scored in found]}
        if drawn:
            history["random"] = [scored.accuracy for scored in drawn]
        return Result(
            limits=({"kind": "latency", "device": self.limit.device, "value": self.limit.ms, "unit": "ms"},),
            confidence=self.limit.confidence,
            strategy="coarse-to-fine",
            seed=self.seed,
            best=best,
            front=pareto_front(
                [self.candidate(scored) for scored in pool if self._keeps_limit(scored.arch)], self.limit.device
            ),
            random=random,
            history=history,
        )

    def _from_elsewhere(self, found: Sequence[Scored], drawn: Sequence[Scored]) -> list[Scored]:
        """Known children that keep the limit, without those of this search and its baseline."""
        own = {scored.arch for scored in (*found, *drawn)}
        others = [scored for scored in self.known() if scored.arch not in own]
        if not others:
            return []
        keeps = self.limit.feasible(self.space.encode([scored.arch for scored in others]))
        return [scored for scored, fits in zip(others, keeps, strict=True) if fits]

    def explore(
        self, strategy: Strategy, name: str, report: Callable[[int, str], None] = lambda done, note: None
    ) -> list[Scored]:
        """Evaluate what a strategy proposes, as a study named `<limit>, <name> ...`."""
        question = [self.predictor.to_dict(), self.limit.ms, self.limit.confidence, self.seed, strategy.budget]
        study = Study(
            self.space,
            self.storage_url,
            f"{self.limit.describe()}, {name}",
            question,
            evaluate=self.evaluate,
            about=self._about,
            notice=self.notice,
        )
        return study.explore(strategy, lambda done, note: report(done, f"{name}: {note}"))

    def _about(self, arch: Architecture) -> tuple[dict[str, Any], dict[str, float]]:
        mean, std = self.predictor.predict([arch])
        layers = lower(self.space, arch)
        over = float(self.limit.upper(self.space.encode([arch]))[0] - self.limit.ms)
        costs = {"predicted_ms": float(mean[0]), "std_ms": float(std[0])}
        return {**costs, "macs": total_macs(layers), "params": total_params(layers)}, {self.limit.describe(): over}

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
            macs=total_macs(layers),
            params=total_params(layers),
            latency={
                self.limit.device: Estimate(
                    predicted=float(mean[0]),
                    std=float(std[0]),
                    measured=None if measured is None else measured.latency_ms,
                )
            },
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


def pareto_front(candidates: Sequence[Candidate], device: str) -> tuple[Candidate, ...]:
    """Those that no other beats in both latency on a device and accuracy, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.latency[device].value, -c.accuracy)):
        if not front or candidate.accuracy > front[-1].accuracy:
            front.append(candidate)
    return tuple(front)
