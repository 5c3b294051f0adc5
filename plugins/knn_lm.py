"""knn_lm: what followed the last time (kNN-LM, arXiv 1911.00172): the nearest of all earlier outputs vote for the next token.

Stored are the decoder's outputs h_j, each with the token y_j that followed it. For an output h, over the `top_k` nearest j (equations 2
and 3):

    p_knn(y) is proportional to the sum of exp(-|h - h_j|^2 / temperature) over the j with y_j = y
    p <- share p_knn + (1 - share) p

It has no parameters, and takes part in scoring and generating, not in the training loss. The one difference: the paper's h is the
input of the last feed-forward layer.
"""

from __future__ import annotations

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Memory, MemorySpec, New, State, hookimpl, search


class KnnLM(Memory):
    """Long-term memory: the decoder's outputs and what followed them; the `top_k` nearest change the next token's distribution.

    share: of p_knn in the mixture. temperature: in squared distance. For models with a decoder.
    """

    def __init__(self, *, top_k: int = 1024, share: float = 0.25, temperature: float = 1.0):
        if not isinstance(top_k, int) or top_k < 1:
            raise InvalidValue(f"top_k: expected a number of rows of at least 1, got {shown(top_k)}")
        if not (isinstance(share, int | float) and 0 < share < 1):
            raise InvalidValue(f"share: expected a number between 0 and 1, got {shown(share)}")
        if not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
            raise InvalidValue(f"temperature: expected a number above 0, got {shown(temperature)}")
        self.top_k, self.share, self.temperature = top_k, share, temperature
        # No layer but the one more that "hidden" asks for: rows of the others are for the memories beside it.
        self.spec = MemorySpec(sites=frozenset({"decoder"}), layers=(), needs=frozenset({"hidden", "tokens"}))

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """keys (B, N, d + 1): h_j and -|h_j|^2 / 2, so that the largest product with (h, 1) is the nearest; tokens, valid (B, N)."""
        keys = np.zeros((batch, 0, dims.d_model + 1), dims.dtype)
        return {"keys": keys, "tokens": np.zeros((batch, 0), np.int64), "valid": np.zeros((batch, 0), bool)}

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        if new.targets is None:  # not known what follows
            return
        keys = np.concatenate([new.hidden, -0.5 * np.sum(new.hidden**2, axis=-1, keepdims=True)], axis=-1)
        for name, rows in (("keys", keys), ("tokens", new.targets), ("valid", new.valid & (new.targets >= 0))):
            state[name] = np.concatenate([state[name], rows], axis=1)

    def logits(self, state: State, hidden: np.ndarray, log_probs: np.ndarray) -> np.ndarray | None:
        valid = state["valid"]
        if not valid.any():
            return None
        queries = np.concatenate([hidden, np.ones_like(hidden[..., :1])], axis=-1)
        scores, index = search(queries, state["keys"], min(self.top_k, valid.shape[1]), valid)  # (|h|^2 - |h - h_j|^2) / 2, best first
        best = np.where(index[..., :1] >= 0, scores[..., :1], 0)
        votes = np.exp(2 / self.temperature * (scores - best))  # 0 where there is no row
        stream, at = np.arange(len(valid))[:, None, None], np.arange(hidden.shape[1])[None, :, None]
        found = np.zeros_like(log_probs)
        np.add.at(found, (stream, at, state["tokens"][stream, index]), votes)
        p_knn = found / np.maximum(found.sum(axis=-1, keepdims=True), np.finfo(found.dtype).tiny)
        mixed = log_probs + np.log1p(-self.share)
        voted = np.log(self.share * np.where(p_knn > 0, p_knn, 1))
        mixed = np.where(p_knn > 0, np.logaddexp(mixed, voted), mixed)
        return np.where(valid.any(axis=1)[:, None, None], mixed, log_probs)


@hookimpl
def register_memories(register):
    register("knn_lm", KnnLM)
