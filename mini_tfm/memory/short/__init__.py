"""Short ways to write a memory: three bases that leave one method to a subclass. The full way is base.py.

RowMemory        rows kept by priority: `keep(scores, positions)`
RecurrentMemory  rows carried from segment to segment and rewritten: `update(state, outputs)`
RetrievalMemory  all rows, of which each query sees the best: `search(state, bank, queries, k)`
"""

from .recurrent import RecurrentMemory
from .retrieval import RetrievalMemory
from .rows import RowMemory

__all__ = ["RecurrentMemory", "RetrievalMemory", "RowMemory"]
