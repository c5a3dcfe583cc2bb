"""How the random children of a training step are drawn."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from hwnas.layers import LayerSums
from hwnas.space import Architecture, SearchSpace

POOL = 1 << 14  # children from which those of wanted multiply-adds are taken


class ChildSampler(ABC):
    """Draws random children of a space.

    A new way to draw them implements `candidates`, and gets its name in `SAMPLERS`.

    Args:
        space: the search space.
        num_candidates: for samplers that let the batch choose.
    """

    def __init__(self, space: SearchSpace, num_candidates: int = 1) -> None:
        self.space, self.num_candidates = space, num_candidates

    @abstractmethod
    def candidates(self, rng: np.random.Generator) -> Sequence[Architecture]:
        """Children for one random place in a step; of several, the one with the least loss on the batch is trained.

        Whatever is random comes from `rng`, so that all processes draw the same.
        """


class PerLayer(ChildSampler):
    """Every choice of the space uniform and by itself: per layer where the space chooses per layer (BigNAS)."""

    def candidates(self, rng: np.random.Generator) -> list[Architecture]:
        """See `ChildSampler`."""
        return [self.space.sample(rng)]


class PerStage(ChildSampler):
    """As `PerLayer`, but all blocks of a stage have the same kernel and expand ratio (AttentiveNAS, OFA's stages)."""

    def candidates(self, rng: np.random.Generator) -> list[Architecture]:
        """See `ChildSampler`."""
        drawn: dict[str, Any] = {}

        def pick(name: str, choices: tuple[Any, ...]) -> Any:
            key = re.sub(r"\.block\d+", "", name)
            if key not in drawn:
                drawn[key] = choices[rng.integers(len(choices))]
            return drawn[key]

        return [self.space.walk(pick)]


class UniformMacs(ChildSampler):
    """Children whose multiply-adds are spread evenly between the smallest and the biggest child's.

    Drawn choice by choice, a child is nearly always of middling size: 300 MFLOPs are 0.08% of the draws in
    AttentiveNAS's space. So a pool is drawn in which every child has its own inclination to small or large choices,
    a cost is drawn uniformly, and the children of the pool next to that cost are taken.
    """

    def __init__(self, space: SearchSpace, num_candidates: int = 1) -> None:
        super().__init__(space, num_candidates)
        # The pool is part of the method, not of the run: the same in every process and after every resume.
        rng = np.random.default_rng(0)
        sizes = np.array([len(gene.choices) for gene in space.genes])
        inclination = rng.random((POOL, 1))
        # Beta with mean `inclination`; the factor sets how closely a child's choices follow it.
        positions = rng.beta(1e-3 + 3 * inclination, 1e-3 + 3 * (1 - inclination), (POOL, len(sizes)))
        genes = np.minimum((positions * sizes).astype(np.int8), sizes.astype(np.int8) - 1)
        genes = np.unique(space.mask_absent(genes), axis=0)
        macs = LayerSums(space, lambda layer: (layer.macs,))(genes)[:, 0]
        order = np.argsort(macs, kind="stable")
        self._genes, self._macs = genes[order], macs[order]

    def candidates(self, rng: np.random.Generator) -> list[Architecture]:
        """See `ChildSampler`."""
        wanted = rng.uniform(self._macs[0], self._macs[-1])
        count = min(self.num_candidates, len(self._macs))
        middle = int(np.searchsorted(self._macs, wanted))
        # Out of four times as many neighbours, so that a cost drawn twice does not give the same children twice.
        reach = min(4 * count, len(self._macs))
        first = int(np.clip(middle - reach // 2, 0, len(self._macs) - reach))
        taken = first + rng.choice(reach, count, replace=False)
        return [self.space.decode(self._genes[index]) for index in taken]


SAMPLERS: dict[str, type[ChildSampler]] = {
    "layer": PerLayer,
    "stage": PerStage,
    "macs": UniformMacs,
    "attentive": UniformMacs,  # AttentiveNAS's BestUp (arXiv 2011.09011): several candidates, the batch chooses
}


def make_sampler(name: str, space: SearchSpace, num_candidates: int) -> ChildSampler:
    """The sampler called `name` in a recipe; only `attentive` has more than one candidate."""
    return SAMPLERS[name](space, num_candidates if name == "attentive" else 1)
