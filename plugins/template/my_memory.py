"""my_memory: a dense near past and a sparse far one.

A working memory of `size` rows, in which every `every`-th row of the stream ages `every` times more slowly. Change `keep`
to make it your own. To do more than choose rows, see the contract, `mini_tfm.memory.base`.
"""

import numpy as np

from mini_tfm.errors import InvalidValue
from mini_tfm.memory import RowMemory, hookimpl


class MyMemory(RowMemory):
    """The newest rows, and every `every`-th of the older ones."""

    def __init__(self, *, size: int = 64, every: int = 4, site: str | None = None):
        super().__init__(size=size, site=site)
        if not isinstance(every, int) or every < 1:
            raise InvalidValue(f"every: expected a number of rows of at least 1, got {every!r}")
        self.every = every

    def keep(self, scores: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
        """(B, N) priorities: the `size` highest stay. positions (B, N) count tokens since the start of the stream."""
        age = positions.max(axis=1, keepdims=True) - positions
        return -age / np.where(positions % self.every == 0, self.every, 1)


@hookimpl
def register_memories(register):
    register("my_memory", MyMemory)
