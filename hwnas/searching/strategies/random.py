"""Random search: the neutral baseline beside every other strategy."""

from __future__ import annotations

from collections.abc import Sequence

from hwnas.searching.strategies.base import Scored, Strategy
from hwnas.space import Architecture

DRAWS = 4096
ROUNDS = 50


class RandomSearch(Strategy):
    """Feasible children drawn uniformly: each choice uniform, children beyond the limits thrown away.

    Gives up where 200,000 draws hold no feasible child that is new.
    """

    def propose(self, history: Sequence[Scored], count: int) -> list[Architecture]:
        """See `Strategy`."""
        known = {scored.arch for scored in history}
        found: dict[Architecture, None] = {}  # in order
        for _ in range(ROUNDS):
            genes = self.space.sample_genes(DRAWS, self.rng)
            for row in genes[self.feasible(genes)]:
                arch = self.space.decode(row)
                if arch not in known:
                    found[arch] = None
                if len(found) == count:
                    return list(found)
        return list(found)
