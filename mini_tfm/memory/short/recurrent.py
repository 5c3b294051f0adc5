"""RecurrentMemory: rows that each segment reads and rewrites."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ...errors import InvalidValue, shown
from ..base import Array, Dims, Memory, MemorySpec, Param, Rows, Segment, State


class RecurrentMemory(Memory):
    """Short way for recurrent memories: `tokens` trained rows join the sequence of the first segment.

    A subclass says what the next segment gets in their place: `update`. In an encoder the rows stand in front of the
    text, and the decoder cross-attends to them. In a decoder they stand before the text, to be read, and again behind
    it, to be written. The gradient flows through all segments. Options: `tokens` rows, `site` ("encoder" or "decoder";
    None: the encoder if there is one).
    """

    def __init__(self, *, tokens: int, site: str | None = None):
        if not isinstance(tokens, int) or tokens < 1:
            raise InvalidValue(f"tokens: expected a number of rows of at least 1, got {shown(tokens)}")
        if site not in (None, "encoder", "decoder"):
            raise InvalidValue(f"site: expected encoder or decoder (cross-attention sees the encoder's rows), got {shown(site)}")
        self.tokens, self.site = tokens, site
        sites = frozenset({"encoder", "decoder"} if site is None else {site})
        self.spec = MemorySpec(sites=sites, gradient="state", capacity=tokens)

    def update(self, state: State, outputs: Array) -> Array:
        """The next rows (B, tokens, d), from `state["tokens"]` of the same shape and what the last layer made of them."""
        raise NotImplementedError(f"{type(self).__name__}: write update(state, outputs), which says what the next segment gets")

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or ("encoder" if dims.layers["encoder"] else "decoder")}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        return {"tokens": Param((self.tokens, dims.d_model), init=1.0, weight_decay=False)}

    def start(self, batch: int, dims: Dims) -> dict[str, Array]:
        return {"tokens": np.broadcast_to(dims.params["tokens"], (batch, self.tokens, dims.d_model))}

    def begin(self, state: State, segment: Segment) -> Rows | None:
        return Rows(state["tokens"], where="front" if segment.site == "encoder" else "around")

    def end(self, state: State, rows: Array) -> None:
        state["tokens"] = self.update(state, rows)
