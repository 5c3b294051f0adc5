"""recurrent: memory tokens carried through segments (RMT, arXiv 2207.06881).

`tokens` trained rows join each segment's sequence; what the last layer makes of them is the next segment's memory.

Differences from the paper: rows to be written are causal among themselves. The paper has no `residual`; `residual=true` carries
M' = (M + outputs) / rms(M + outputs), so that a part of what is remembered survives segments that have nothing to add. Each row
keeps the size that trained rows begin with (a root mean square of 1): a sum without it grows with the stream, until a new segment
changes nothing any more.
"""

import numpy as np

from mini_tfm.memory import RecurrentMemory, State, hookimpl


class Recurrent(RecurrentMemory):
    """Recurrent memory: `tokens` rows read and rewritten by every segment."""

    def __init__(self, *, tokens: int = 16, site: str | None = None, residual: bool = False):
        super().__init__(tokens=tokens, site=site)
        self.residual = residual

    def update(self, state: State, outputs: np.ndarray) -> np.ndarray:
        if not self.residual:
            return outputs
        total = state["tokens"] + outputs
        return total / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + 1e-6)


@hookimpl
def register_memories(register):
    register("recurrent", Recurrent)
