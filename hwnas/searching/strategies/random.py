"""Random search: the neutral baseline beside every other strategy."""

from __future__ import annotations

from collections.abc import Sequence

from hwnas.searching.strategies.base import Scored, Strategy
from hwnas.space import Architecture


class RandomSearch(Strategy):
    """Children drawn with each choice uniform, given that they keep the limits (see `FeasibleSampler`).

    With `front` as well: such children cover the sizes as the space does.
    """

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        genes, _ = self.arrays(history)
        return self.fill(self.random(self.rng(history)), genes, count)
