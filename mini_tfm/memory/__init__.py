"""Memory: what a model remembers beyond its segment. Start with hookspecs.py, then base.py.

hookspecs.py   how a plugin announces a strategy
base.py        the contract: Memory, and the shapes it speaks in
manager.py     loading, making from text, blame
stack.py       several memories as one
run.py         a memory at work on a batch of streams: the only caller of strategies
"""

import sys
from types import ModuleType

from .base import Dims, Evicted, Memory, MemorySpec, New, Param, Query, Rows, Segment, Side, State, View
from .hookspecs import hookimpl
from .registry import describe_memory, list_memories, memory, register_memory
from .short import RowMemory, bank_key
from .stack import Stack

__all__ = [
    "Dims",
    "Evicted",
    "Memory",
    "MemorySpec",
    "New",
    "Param",
    "Query",
    "RowMemory",
    "Rows",
    "Segment",
    "Side",
    "Stack",
    "State",
    "View",
    "bank_key",
    "describe_memory",
    "hookimpl",
    "list_memories",
    "memory",
    "register_memory",
]


class _CallableModule(ModuleType):
    """`mini_tfm.memory` is this package and, in `mt.memory("window", size=512)`, a function: it has to be both."""

    __call__ = staticmethod(memory)


sys.modules[__name__].__class__ = _CallableModule
