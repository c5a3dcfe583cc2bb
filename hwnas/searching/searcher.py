"""Search under limits: explore, measure the finalists, refit, re-rank."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import InputError, LimitError
from hwnas.progress import Notice, Report, silent, unheard
from hwnas.searching.bounds import Bounds, extreme
from hwnas.searching.costs import LAYER_COSTS, Cost, LayerCosts
from hwnas.searching.fronts import front_slope, pareto, running_hypervolume
from hwnas.searching.limits import LatencyLimit, Limit
from hwnas.searching.result import Candidate, Result, Slope
from hwnas.searching.strategies import Scored, strategy_class
from hwnas.searching.study import Study
from hwnas.searching.targets import Target
from hwnas.space import Architecture, Genes, SearchSpace

FINALISTS = 4  # measured at a time
KNOWN = 1000  # children of other searches that a search starts from, at most: strategies learn from them all each time


class Searcher:
    """Finds the most accurate child under all of some limits, perhaps on several devices.

    Children are rejected by predicted cost before they are evaluated. The best ones are measured on every device that
    can be reached, the predictors are fitted anew with what was measured, and the ranking is repeated until its best
    child has been measured and keeps the limits. All evaluations are recorded as trials of an Optuna study, and an
    interrupted search goes on.

    Args:
        space: the search space.
        limits: what the child has to keep.
        targets: the devices of the limits and of the front, by name.
        evaluate: validation accuracies of children; it remembers each that it has worked out.
        storage_url: of Optuna's storage.
        confidence: with which an unmeasured child has to keep the limits.
        strategy: a name that `strategy_class` knows.
        front: a device, or a kind of limit without one (`macs`): look for the best children of every latency on it
            (of every cost of that kind), up to the limit on it where there is one.
        known: children that other searches have evaluated on the same weights. Those that keep the limits are what
            the strategy starts from, and candidates for the answer: a looser limit never gets a worse one than a
            tighter limit got.
        weights: what identifies the supernet's weights.
        study: a name by which workers meet; None: by all that is asked.
        at_once: children to give to `evaluate` at a time.
        seed: of all chance.
        notice: told what a user should know.

    Raises:
        InputError: limits or a confidence that make no sense, an unknown strategy.
    """

    def __init__(
        self,
        space: SearchSpace,
        limits: Sequence[Limit],
        targets: Mapping[str, Target],
        *,
        evaluate: Callable[[Sequence[Architecture]], Sequence[float]],
        storage_url: str,
        confidence: float = 0.95,
        strategy: str = "guided",
        front: str | None = None,
        known: Callable[[], Sequence[Scored]] = tuple,
        weights: str = "",
        study: str | None = None,
        at_once: int = 2,
        seed: int = 0,
        notice: Notice = unheard,
    ) -> None:
        strategy_class(strategy)  # refuses an unknown name before anything is done
        self.space, self.limits, self.targets = space, tuple(limits), dict(targets)
        self.confidence, self.strategy, self.weights, self.seed = confidence, strategy, weights, seed
        self.evaluate, self.known, self.storage_url, self.notice = evaluate, known, storage_url, notice
        self.study, self.at_once = study, at_once
        self._layers = LayerCosts(space)
        self.whole_front = front is not None
        self._axis = self._find_axis(front)
        # Exploring goes by predictions alone: a measured latency changes a little with every further measurement,
        # and the same search must propose the same children when it goes on after an interruption.
        self.explored = self._bounds(measured=False)
        self.pool: list[Scored] = []  # all that may be the answer
        self._rows: dict[Architecture, Genes] = {}

    def _find_axis(self, front: str | None) -> tuple[str, str | None]:
        if front is None:
            if not self.limits:
                raise InputError("a search needs a limit, or a front to look for")
            latencies = [limit for limit in self.limits if isinstance(limit, LatencyLimit)]
            first = (latencies or self.limits)[0]
            return first.kind, first.device
        return (front, None) if front in LAYER_COSTS else ("latency", front)

    def _encode(self, archs: Sequence[Architecture]) -> Genes:
        """`SearchSpace.encode`, each child once: thousands of known ones are ranked again after every measurement."""
        new = list(dict.fromkeys(arch for arch in archs if arch not in self._rows))
        self._rows.update(zip(new, self.space.encode(new), strict=True))
        return np.stack([self._rows[arch] for arch in archs]) if archs else self.space.encode(())

    # ------------------------------------------------------------ costs

    def _cost(self, kind: str, device: str | None, *, measured: bool = True) -> Cost:
        return self._layers.by_kind[kind] if device is None else self.targets[device].cost(kind, measured=measured)

    def _bounds(self, *, measured: bool = True) -> Bounds:
        terms = [(limit, self._cost(limit.kind, limit.device, measured=measured)) for limit in self.limits]
        return Bounds(self.space, terms, self.confidence)

    def keeps(self, archs: Sequence[Architecture]) -> NDArray[np.bool_]:
        """Which children keep the limits, (num_archs,), as measured where they were, and did not fail anywhere."""
        failed = [any(arch in target.failed for target in self.targets.values()) for arch in archs]
        return np.asarray(self._bounds().feasible(self._encode(archs)) & ~np.asarray(failed, dtype=bool))

    # ------------------------------------------------------------ the search

    def run(self, num_evaluations: int, *, baseline: bool = True, report: Report = silent) -> Result:
        """Search.

        Args:
            num_evaluations: children to evaluate that were not known; the baseline takes as many again.
            baseline: whether to run random search beside it.
            report: told children evaluated and the best accuracy.

        Raises:
            InputError: fewer than one evaluation.
            LimitError: no child keeps the limits; the message says the least possible value.
            DeviceError: a device is there, but children fail on it.
        """
        if num_evaluations < 1:
            raise InputError(f"evaluations={num_evaluations}: must be at least 1")
        for text in self.explored.check() if self.limits else []:
            self.notice(text)
        baseline = baseline and self.strategy != "random"
        total = num_evaluations * (2 if baseline else 1)
        # Children are chosen before any finalist is measured, so that both strategies see the same limits.
        study = self._study(self.strategy, num_evaluations)
        before = study.begin(self._known())
        keeps = self.explored.feasible(self._encode([scored.arch for scored in before]))
        known = [scored for scored, kept in zip(before, keeps, strict=True) if kept]
        found = self._explore(
            study, self.strategy, num_evaluations, before, lambda done, note: report(done, total, note)
        )
        drawn: list[Scored] = []
        if baseline:
            study = self._study("random", len(found))
            drawn = self._explore(
                study, "random", len(found), (), lambda done, note: report(len(found) + done, total, note)
            )
        explored = {self.strategy: found} | ({"random": drawn} if drawn else {})
        hypervolume = {name: self._hypervolume(scored) for name, scored in explored.items()}
        question = self._question(self.strategy, num_evaluations) | {
            "known": hashlib.sha256("".join(scored.arch.id for scored in before).encode()).hexdigest()[:12],
            "baseline": baseline,
        }
        self.pool = [*found, *known]
        random = None
        if drawn:
            try:
                random = self.confirm(drawn)
            except LimitError:
                self.notice("random search found no child that keeps the limits as measured")
        best = self.confirm(self.pool)  # last: whatever is measured may change the ranking
        while self.whole_front and self._settle_front():
            best = self.confirm(self.pool)
        kind, device = self._axis
        return Result(
            limits=tuple(limit.to_dict() for limit in self.limits),
            confidence=self.confidence,
            strategy=self.strategy,
            seed=self.seed,
            best=self.candidate(best),
            front=tuple(self.candidate(scored) for scored in self.front()),
            random=None if random is None else self.candidate(random),
            history={name: [one.accuracy for one in scored] for name, scored in explored.items()},
            axis={"kind": kind, "device": device, "unit": self._cost(kind, device).unit},
            num_known=len(known),
            devices={name: target.source(best.arch) for name, target in self.targets.items()},
            hypervolume=hypervolume,
            slope=self._slopes([*known, *found, *drawn]),
            weights=self.weights,
            question=question,
        )

    def _known(self) -> list[Scored]:
        """Known children, in order of their ids: what a strategy starts from, and learns from.

        Of more than `KNOWN`: of those that keep the limits the front, the most accurate, and as many others, to whom
        chance gave the first ids; then those beyond the limits, the nearest first.
        """
        found = sorted(self.known(), key=lambda scored: scored.arch.id)
        genes = self._encode([scored.arch for scored in found])
        keeps = self.explored.feasible(genes)
        kept, beyond = np.flatnonzero(keeps), np.flatnonzero(~keeps)
        accuracies = np.array([scored.accuracy for scored in found])[kept]
        front = pareto(self._cost(*self._axis, measured=False).expected(genes[kept]), accuracies)
        best = np.argsort(-accuracies, kind="stable")[: KNOWN // 2]
        nearest = beyond[np.argsort(self.explored.share(genes[beyond]), kind="stable")]
        order = dict.fromkeys(np.concatenate([kept[front], kept[best], kept, nearest]).tolist())
        return [found[index] for index in sorted(list(order)[:KNOWN])]

    # ------------------------------------------------------------ exploring

    def _question(self, strategy: str, budget: int) -> dict[str, Any]:
        """All that decides what a strategy proposes, but for what was known before."""
        predictors = {
            f"{kind} on {name}": _digest(predictor.to_dict())
            for name, target in self.targets.items()
            for kind, predictor in (("latency", target.predictor), ("energy", target.energy))
            if predictor is not None
        }
        return {
            "space": self.space.name,
            "limits": [limit.to_dict() for limit in self.limits],
            "confidence": self.confidence,
            "front": list(self._axis) if self.whole_front else None,
            "strategy": strategy,
            "seed": self.seed,
            "evaluations": budget,
            "weights": self.weights,
            "predictors": predictors,
        }

    def _study(self, strategy: str, budget: int) -> Study:
        asked = self.explored.describe()
        if self.whole_front:
            asked += f", front over {' on '.join(part for part in self._axis if part)}"
        name = f"{asked}, {strategy}"
        if self.study is not None:
            name = self.study if strategy == self.strategy else f"{self.study}, {strategy}"
        return Study(
            self.space,
            self.storage_url,
            name,
            self._question(strategy, budget),
            evaluate=self.evaluate,
            about=self._about,
            notice=self.notice,
            named=self.study is not None,
            at_once=self.at_once,
        )

    def _explore(
        self,
        study: Study,
        strategy: str,
        budget: int,
        known: Sequence[Scored],
        report: Callable[[int, str], None],
    ) -> list[Scored]:
        proposer = strategy_class(strategy)(
            self.space,
            feasible=self.explored.feasible,
            size=self._size,
            budget=budget,
            rng=np.random.default_rng([self.seed, int(strategy == "random")]),
            front=self.whole_front,
            known=known,
        )
        started, before = time.monotonic(), -1  # what an interrupted search or another worker evaluated

        def tell(found: Sequence[Scored]) -> None:
            nonlocal before
            before = len(found) if before < 0 else before
            if found:
                best, num_front = max(one.accuracy for one in found), len(pareto(*self._points(found)))
                rate = (len(found) - before) / (time.monotonic() - started)
                report(len(found), f"{strategy}: best {best:.2%}, front of {num_front}, {rate:.2g} evaluations/s")

        return study.explore(proposer, tell)

    def _size(self, genes: Genes) -> NDArray[np.float64]:
        """The share of the limits that children are expected to use; of a front, of what it ranges over."""
        if not self.whole_front:
            return self.explored.share(genes)
        kind, device = self._axis
        return self._cost(kind, device, measured=False).expected(genes) / self._range

    @property
    def _range(self) -> float:
        """What the front ranges up to: the limit on its axis, or the costliest child."""
        given = [limit.value for limit in self.limits if (limit.kind, limit.device) == self._axis]
        if given:
            return given[0]
        if not hasattr(self, "_costliest"):
            cost = self._cost(*self._axis, measured=False)
            self._costliest = -extreme(self.space, lambda genes: -cost.expected(genes))[1]
        return self._costliest

    def _hypervolume(self, scored: Sequence[Scored]) -> list[float]:
        costs, accuracies = self._points(scored)
        return running_hypervolume(costs / self._range, accuracies)

    def _points(self, scored: Sequence[Scored]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Predicted costs on the front's axis, and accuracies, (num_scored,) both."""
        costs = self._cost(*self._axis, measured=False).expected(self._encode([one.arch for one in scored]))
        return costs, np.array([one.accuracy for one in scored])

    def _about(self, arch: Architecture) -> tuple[dict[str, Any], dict[str, float]]:
        genes = self._encode([arch])
        (costs,) = self._layers.told(genes)
        told: dict[str, Any] = {name: costs[name] for name in ("macs", "params")}
        for name, target in self.targets.items():
            mean, std = target.predictor.predict_genes(genes)
            told |= {f"predicted ms on {name}": float(mean[0]), f"std ms on {name}": float(std[0])}
        over = self.explored.over(genes)[0].tolist()
        return told, {limit.describe(): value for limit, value in zip(self.limits, over, strict=True)}

    # ------------------------------------------------------------ confirming

    def confirm(self, found: Sequence[Scored]) -> Scored:
        """The most accurate child that keeps the limits as measured, wherever measuring is possible.

        Measures the best few that were not measured, refits, re-ranks, until the first in the ranking is measured. Of
        equally accurate children the cheapest is first.

        Raises:
            LimitError: none of the children keeps the limits as measured.
        """
        archs = [scored.arch for scored in found]
        genes = self._encode(archs)
        accuracies = np.array([scored.accuracy for scored in found])
        while True:
            kept = self.keeps(archs)
            ranking: list[int] = np.lexsort((self._cost(*self._axis).expected(genes), -accuracies)).tolist()
            finalists = [found[index] for index in ranking if kept[index]]
            if not finalists:
                raise LimitError(
                    f"{self.explored.describe()}: no evaluated child kept the limits as measured; "
                    "evaluate more with --evaluations, or measure more with `hwnas profile`"
                )
            if not self.settle([scored.arch for scored in finalists[:1]], ahead=finalists):
                return finalists[0]

    def settle(self, archs: Sequence[Architecture], ahead: Sequence[Scored] = ()) -> bool:
        """Measure the first few of some children wherever that is possible and was not done; whether anything was.

        Args:
            archs: the children.
            ahead: a ranking; where a child has to be measured, the best few of these are, too: most likely they will
                be wanted next.
        """
        targets = self.targets.values()
        if all(target.settled(arch) for arch in archs for target in targets):
            return False
        wanted = list(dict.fromkeys([*archs, *(scored.arch for scored in ahead)]))
        wanted = [arch for arch in wanted if not all(target.settled(arch) for target in targets)][:FINALISTS]
        for target in targets:
            target.measure(wanted)
            # What failed on one device, or turned out too slow, is not carried to the next.
            wanted = [arch for arch, kept in zip(wanted, self.keeps(wanted), strict=True) if kept]
        return True

    def _settle_front(self) -> bool:
        """Measure the next few members of the front; whether any had to be."""
        return self.settle([scored.arch for scored in self.front()])

    # ------------------------------------------------------------ telling

    def front(self) -> list[Scored]:
        """Children of the pool that keep the limits, and that no other beats in accuracy and cost, cheapest first."""
        archs = [scored.arch for scored in self.pool]
        kept = [scored for scored, keeps in zip(self.pool, self.keeps(archs), strict=True) if keeps]
        costs = self._cost(*self._axis).expected(self._encode([scored.arch for scored in kept]))
        return [kept[index] for index in pareto(costs, np.array([scored.accuracy for scored in kept]))]

    def candidate(self, scored: Scored) -> Candidate:
        """All that is known of an evaluated child."""
        (costs,) = self._layers.told(self._encode([scored.arch]))
        return Candidate(
            architecture=scored.arch,
            accuracy=scored.accuracy,
            **costs,
            latency={name: target.estimate("latency", scored.arch) for name, target in self.targets.items()},
            energy={
                name: target.estimate("energy", scored.arch)
                for name, target in self.targets.items()
                if target.energy is not None
            },
        )

    def _slopes(self, scored: Sequence[Scored]) -> dict[str, Slope]:
        """What one more millisecond buys on each device with a latency limit, the others being kept."""
        found = {}
        genes = self._encode([one.arch for one in scored])
        accuracies = np.array([one.accuracy for one in scored])
        over = self._bounds().over(genes)
        for column, limit in enumerate(self.limits):
            if isinstance(limit, LatencyLimit):
                others = (np.delete(over, column, axis=1) <= 0).all(axis=1)
                costs = self._cost(limit.kind, limit.device).expected(genes[others])
                slope = front_slope(costs, accuracies[others], limit.value, np.random.default_rng([self.seed, 2]))
                if slope is not None:
                    found[limit.device] = slope
        return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
