"""window: working memory. The last `size` rows, and the first `sinks` of the stream for ever.

StreamingLLM (arXiv 2309.17453): the first few tokens draw attention whatever they say; keeping them keeps the
softmax as it was trained. Sinks count within `size`.
"""

import numpy as np

from mini_tfm.errors import InvalidValue
from mini_tfm.memory import RowMemory, hookimpl


class Window(RowMemory):
    """Working memory: the last `size` rows; the stream's first `sinks` rows stay."""

    def __init__(self, *, size: int = 512, sinks: int = 0, site: str | None = None):
        super().__init__(size=size, site=site)
        if not isinstance(sinks, int) or not 0 <= sinks < size:
            raise InvalidValue(f"sinks: expected 0 to size - 1 = {size - 1}, got {sinks!r}")
        self.sinks = sinks

    def keep(self, scores: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
        return np.where(positions < self.sinks, np.inf, positions)


@hookimpl
def register_memories(register):
    register("window", Window)
