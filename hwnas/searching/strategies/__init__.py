"""Search strategies: which child to evaluate next."""

from hwnas.searching.strategies.base import Scored, Strategy
from hwnas.searching.strategies.coarse_to_fine import CoarseToFine
from hwnas.searching.strategies.random import RandomSearch

__all__ = ["CoarseToFine", "RandomSearch", "Scored", "Strategy"]
