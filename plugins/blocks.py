"""blocks: long-term memory for questions. What was read is kept in blocks; a question looks up those that share its rarest words.

The rows that a window drops are kept as InfLLM keeps them (arXiv 2402.04617): contiguous blocks of `block_size` tokens, of which a
question sees the `top_k` best, at every layer and for the whole answer. Put it behind a window: `window:size=512,sinks=4+blocks`.

Differences from the paper. A block is found by its tokens (Okapi BM25, k1 = 1.2, b = 0: all blocks are as long), and not by keys of a
few of its tokens: in a small model a question's queries point at the right block in a third of the layers alone. The choice is made once
for a prompt, by all its tokens, and kept for the answer. So nothing is looked up while text is read, scored or trained on, where
a choice would have to be made for each token by those before it. The blocks are read right before the question, one behind the other
in the order of the text (`reach=1`), at positions that the window's rows have too: at the window's edge, where the paper puts
them, a small model finds half as much.

With a `path` rows and tokens outlive the process, as those of `store` do.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Evicted, New, Query, State, View, bank_key, hookimpl
from mini_tfm_plugins.store import Store

TOKENS = "tokens"  # stands for a layer in the name of a bank of its own, whose rows begin with the token's id


class Blocks(Store):
    """Long-term memory for questions: the `top_k` blocks of `block_size` rows that share most with the prompt; durable with a `path`."""

    def __init__(
        self,
        *,
        path: str | None = None,
        block_size: int = 128,
        top_k: int = 2,
        reach: int = 1,
        document: str = "default",
        read_only: bool = False,
    ):
        for name, value in (("block_size", block_size), ("reach", reach)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidValue(f"{name}: expected a number of tokens of at least 1, got {shown(value)}")
        super().__init__(path=path, top_k=top_k, document=document, read_only=read_only, site="decoder", gradient="none")
        self.block_size, self.reach = block_size, reach
        self.spec = dataclasses.replace(self.spec, sites=frozenset({"decoder"}), needs=frozenset({"query", "tokens"}))

    def banks(self, dims: Dims) -> list[str]:
        return [*super().banks(dims), bank_key("decoder", TOKENS)]

    def _models(self, dims: Dims) -> dict[str, str]:
        models = super()._models(dims)
        return {**models, bank_key("decoder", TOKENS): models[bank_key("decoder", 0)]}

    def write(self, state: State, site: str, layer: int | str, new: New) -> None:
        super().write(state, site, layer, new)
        if layer == 0:
            super().write(state, site, TOKENS, _of_tokens(new, state.dims))

    def write_ahead(self, state: State, held: Evicted) -> None:
        super().write_ahead(state, held)
        if held.layer == 0:
            super().write_ahead(state, _of_tokens(held, state.dims))

    def read(self, state: State, site: str, layer: int, query: Query) -> View | None:
        bank, rows = bank_key(site, layer), State.OF_SEGMENT + "rows"
        if not query.decoding or query.segment is None or not self.count(state, bank):
            return None
        if rows not in state:
            state[rows] = self.look_up(state, query.segment.tokens)
        kept = State.OF_SEGMENT + bank
        if kept + "hidden" not in state:
            hidden, valid = self._gathered(state, bank, state[rows])
            behind = np.cumsum(valid[:, ::-1], axis=1)[:, ::-1] - 1
            state.update({kept + "hidden": hidden, kept + "valid": valid})
            state[kept + "positions"] = query.segment.start[:, None] - self.reach - behind
        return View(("hidden", state[kept + "hidden"]), state[kept + "valid"], positions=state[kept + "positions"])

    def look_up(self, state: State, tokens: np.ndarray) -> np.ndarray:
        """Numbers of the rows of the blocks that are best for tokens (B, T), in their order: (B, top_k * block_size), -1 for none."""
        parts = [
            (np.broadcast_to(hidden[..., 0], np.broadcast_shapes(positions.shape, (len(tokens), 1))), valid)
            for hidden, positions, valid, _ in self.shown(state, bank_key("decoder", TOKENS))
        ]
        ids = np.concatenate([np.where(True if valid is None else valid, part, -1) for part, valid in parts], axis=1).astype(np.int64)
        found = np.full((len(tokens), self.top_k * self.block_size), -1)
        for b, (asked, there) in enumerate(zip(tokens, ids, strict=True)):
            best = best_blocks(asked, there, self.block_size, self.top_k)
            numbers = (best[:, None] * self.block_size + np.arange(self.block_size)).ravel()
            found[b, : len(numbers)] = np.where(numbers < len(there), numbers, -1)
        return found

    def _gathered(self, state: State, bank: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the rows of a bank with these numbers (B, N), and which of them there are."""
        hidden, there = np.zeros((*numbers.shape, state.dims.d_model), state.dims.dtype), np.zeros(numbers.shape, bool)
        seen = 0
        for rows, _, valid, _ in self.shown(state, bank):
            n = rows.shape[-2]
            for b, place in zip(*np.nonzero((numbers >= seen) & (numbers < seen + n)), strict=True):
                at = numbers[b, place] - seen
                there[b, place] = valid is None or valid[b, at]
                hidden[b, place] = rows[b, at] if rows.ndim == 3 else rows[at]
            seen += n
        return hidden, there


def best_blocks(asked: np.ndarray, tokens: np.ndarray, block_size: int, k: int) -> np.ndarray:
    """The numbers of the k blocks of tokens (M,) that share most with tokens `asked`, in order; fewer where others share nothing.

    Okapi BM25: a token that f of a block's are counts idf * f * (k1 + 1) / (f + k1), k1 = 1.2; idf = log(1 + (n - d + 0.5) / (d + 0.5))
    of n blocks, d of which have it. Token -1 is none.
    """
    n = -(-len(tokens) // block_size)
    score = np.zeros(n)
    for token in np.unique(asked[asked >= 0]):
        often = np.bincount(np.flatnonzero(tokens == token) // block_size, minlength=n)
        having = np.count_nonzero(often)
        score += np.log(1 + (n - having + 0.5) / (having + 0.5)) * often * 2.2 / (often + 1.2)
    best = np.argsort(-score, kind="stable")[:k]
    return np.sort(best[score[best] > 0])


def _of_tokens(new: New, dims: Dims) -> New:
    """The tokens of rows as rows of a bank: the id is the first number of each."""
    rows = np.zeros((*new.valid.shape, dims.d_model), dims.dtype)
    rows[..., 0] = -1 if new.tokens is None else new.tokens
    return dataclasses.replace(new, layer=TOKENS, hidden=rows)


@hookimpl
def register_memories(register):
    register("blocks", Blocks)
