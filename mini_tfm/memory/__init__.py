"""Memory: what a model remembers beyond its segment. Start with hookspecs.py, then base.py.

    hookspecs.py   how a plugin announces a strategy
    base.py        the contract: Memory, and the types it uses
    short/         three short bases: a strategy in one method
    maths.py       functions of arrays and Vars that many strategies need
    nearest.py     the best rows for a query, over one bank or several
    row_store.py   the contract of a place where rows outlive the process
    registry.py    loading plugins, making strategies by name
    text.py        memories as text, read and written
    stack.py       several memories as one
    run.py         a memory at work on a batch of streams: the only caller of strategies
    validate.py    checks of what strategies return, and errors that name the strategy

A plugin imports from here and from `mini_tfm.errors`, and nothing else of the library.
"""

import sys
from types import ModuleType

from .base import Array, Dims, Evicted, Memory, MemorySpec, New, Param, Passage, Query, Rows, Segment, SideOutput, State, View, bank_key
from .hookspecs import hookimpl
from .maths import sigmoid, silu, softmax, unit, value_of
from .nearest import BestRows, search
from .registry import describe_memory, list_memories, memory, register_memory
from .row_store import Claim, RowStore, Written
from .short import RecurrentMemory, RetrievalMemory, RowMemory
from .stack import Stack

Side = SideOutput  # its name in 0.1.0

__all__ = [
    "Array",
    "BestRows",
    "Claim",
    "Dims",
    "Evicted",
    "Memory",
    "MemorySpec",
    "New",
    "Param",
    "Passage",
    "Query",
    "RecurrentMemory",
    "RetrievalMemory",
    "RowMemory",
    "RowStore",
    "Rows",
    "Segment",
    "Side",
    "SideOutput",
    "Stack",
    "State",
    "View",
    "Written",
    "bank_key",
    "describe_memory",
    "hookimpl",
    "list_memories",
    "memory",
    "register_memory",
    "search",
    "sigmoid",
    "silu",
    "softmax",
    "unit",
    "value_of",
]


class _CallableModule(ModuleType):
    """`mini_tfm.memory` is this package and, in `mt.memory("window", size=512)`, a function: it has to be both."""

    __call__ = staticmethod(memory)


sys.modules[__name__].__class__ = _CallableModule
