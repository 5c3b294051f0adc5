"""passages: text memory. What was read is kept as tokens, and the passages that fit stand in front of the text again, as text.

In-Context RALM (arXiv 2302.00083): nothing of the model changes; before each segment the `top_k` passages of `size` tokens are looked
up that share most with the query, and stand in front of it, the older first. The score of a passage p for the tokens t of a query
is that of Okapi BM25, with N passages of equal length of which n_t hold t, f times in p:

    score(p) = sum over t of ln(1 + (N - n_t + 1/2) / (n_t + 1/2)) f (k + 1) / (f + k),   k = 1.5

A decoder's query is the last `query` tokens before the segment (section 4.1 of the paper), so that no token sees a later one; passages
begin behind it. An encoder sees its whole segment, and asks with it (as in arXiv 2005.11401). A token takes 8 bytes, and no layer.

Differences from the paper: passages are of the text that is read, not of a library; they stand at the places before the segment
that a window's rows have, too; a segment is the paper's stride.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Memory, MemorySpec, New, Rows, Segment, State, hookimpl

K = 1.5  # how soon a token that is there again and again counts no more


class Passages(Memory):
    """Long-term memory of tokens: the `top_k` passages of `size` tokens that share most with the last `query` tokens are read again.

    site: encoder or decoder; None: the encoder if there is one.
    """

    def __init__(self, *, size: int = 64, top_k: int = 1, query: int = 32, site: str | None = None):
        for name, value in (("size", size), ("top_k", top_k), ("query", query)):
            if not isinstance(value, int) or value < 1:
                raise InvalidValue(f"{name}: expected a number of at least 1, got {shown(value)}")
        if site not in (None, "encoder", "decoder"):
            raise InvalidValue(f"site: expected encoder or decoder, which read text, got {shown(site)}")
        self.size, self.top_k, self.query, self.site = size, top_k, query, site
        sites = frozenset({"encoder", "decoder"} if site is None else {site})
        self.spec = MemorySpec(sites=sites, layers=(0,), needs=frozenset({"tokens"}), taps=True)

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or ("encoder" if dims.layers["encoder"] else "decoder")}

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """tokens, valid (B, N): what was read, from the left on."""
        return {"tokens": np.zeros((batch, 0), np.int64), "valid": np.zeros((batch, 0), bool)}

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        if new.tokens is None:  # rows of a memory before it that did not keep them
            return
        tokens = np.concatenate([state["tokens"], new.tokens], axis=1)
        valid = np.concatenate([state["valid"], new.valid & (new.tokens >= 0)], axis=1)
        order = np.argsort(~valid, axis=1, kind="stable")[:, : valid.sum(axis=1).max(initial=0)]
        state["valid"] = np.take_along_axis(valid, order, 1)
        state["tokens"] = np.where(state["valid"], np.take_along_axis(tokens, order, 1), 0)

    def begin(self, state: State, segment: Segment) -> Rows:
        """Always so many rows; those of passages that were not found are not valid."""
        shape = len(segment.length), self.top_k, self.size
        found, valid = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for stream, held in enumerate(state["valid"].sum(axis=1)):
            text = state["tokens"][stream, :held]
            asked = text[-self.query :]
            if segment.site == "encoder":
                assert segment.tokens is not None
                asked = segment.tokens[stream, : segment.length[stream]][-self.query :]
            else:
                text = text[: -self.query]
            passages = text[: len(text) // self.size * self.size].reshape(-1, self.size)
            best = self.best(passages, asked)
            if len(best):  # next to the segment, if there are fewer
                found[stream, -len(best) :], valid[stream, -len(best) :] = passages[best], True
        rows = shape[0], self.top_k * self.size
        return Rows(tokens=found.reshape(rows), valid=valid.reshape(rows))

    def best(self, passages: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """The numbers of the best of passages (N, size), in order; of those that share a token with what is asked."""
        terms = np.unique(asked)
        if not (len(passages) and len(terms)):
            return np.zeros(0, np.int64)
        term = np.minimum(np.searchsorted(terms, passages), len(terms) - 1)
        row, column = np.nonzero(terms[term] == passages)
        f = np.bincount(row * len(terms) + term[row, column], minlength=len(passages) * len(terms)).reshape(len(passages), -1)
        n = (f > 0).sum(axis=0)
        scores = (np.log1p((len(passages) - n + 0.5) / (n + 0.5)) * f * (K + 1) / (f + K)).sum(axis=1)
        best = np.argsort(-scores, kind="stable")[: self.top_k]
        return np.sort(best[scores[best] > 0])


@hookimpl
def register_memories(register):
    register("passages", Passages)
