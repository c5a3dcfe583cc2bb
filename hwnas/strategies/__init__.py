"""Search strategies: which child to evaluate next."""

from hwnas.strategies.base import Scored, Strategy
from hwnas.strategies.coarse_to_fine import CoarseToFine
from hwnas.strategies.random import RandomSearch

__all__ = ["CoarseToFine", "RandomSearch", "Scored", "Strategy"]
