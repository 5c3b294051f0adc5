"""recurrent: memory tokens carried through segments (RMT, arXiv 2207.06881).

`tokens` trained rows join each segment's sequence; what the last layer makes of them is the next segment's memory.

Differences from the paper: rows to be written are causal among themselves. `residual=true` adds the outputs to the
rows instead, M' = M + outputs, so that what is remembered survives segments that have nothing to add.
"""

import numpy as np

from mini_tfm.memory import RecurrentMemory, State, hookimpl


class Recurrent(RecurrentMemory):
    """Recurrent memory: `tokens` rows read and rewritten by every segment."""

    def __init__(self, *, tokens: int = 16, site: str | None = None, residual: bool = False):
        super().__init__(tokens=tokens, site=site)
        self.residual = residual

    def update(self, state: State, outputs: np.ndarray) -> np.ndarray:
        return state["tokens"] + outputs if self.residual else outputs


@hookimpl
def register_memories(register):
    register("recurrent", Recurrent)
