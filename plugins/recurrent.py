"""recurrent: memory tokens carried through segments (RMT, arXiv 2207.06881).

`tokens` trained rows join each segment's sequence; what the last layer makes of them is the next segment's
memory. In an encoder they stand in front, and the decoder cross-attends to them; in a decoder-only model they
stand before the text, to be read, and again behind it, to be written. The gradient flows through all segments.

Differences from the paper: rows to be written are causal among themselves; `M' = M + outputs` where the paper has
`M' = outputs`, so that what is remembered survives segments that have nothing to add (`residual=false` for the
paper's).
"""

import numpy as np

from mini_tfm.errors import InvalidValue
from mini_tfm.memory import Dims, Memory, MemorySpec, Param, Rows, Segment, State, hookimpl


class Recurrent(Memory):
    """Recurrent memory: `tokens` rows read and rewritten by every segment."""

    def __init__(self, *, tokens: int = 16, site: str | None = None, residual: bool = False):
        if not isinstance(tokens, int) or tokens < 1:
            raise InvalidValue(f"tokens: expected a number of rows of at least 1, got {tokens!r}")
        if site not in (None, "encoder", "decoder"):
            raise InvalidValue(f"site: expected encoder or decoder (cross-attention sees the encoder's rows), got {site!r}")
        self.tokens, self.site, self.residual = tokens, site, residual
        sites = frozenset({"encoder", "decoder"} if site is None else {site})
        self.spec = MemorySpec(sites=sites, gradient="state", capacity=tokens)

    def sites(self, dims: Dims) -> set[str]:
        return {self.site or ("encoder" if dims.layers["encoder"] else "decoder")}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        return {"tokens": Param((self.tokens, dims.d_model), init=1.0, weight_decay=False)}

    def start(self, batch: int, dims: Dims) -> dict:
        first = dims.params["tokens"]
        return {"tokens": np.broadcast_to(first, (batch, self.tokens, dims.d_model))}

    def begin(self, state: State, segment: Segment) -> Rows | None:
        return Rows(state["tokens"], where="front" if segment.site == "encoder" else "around")

    def end(self, state: State, rows: np.ndarray) -> None:
        state["tokens"] = state["tokens"] + rows if self.residual else rows


@hookimpl
def register_memories(register):
    register("recurrent", Recurrent)
