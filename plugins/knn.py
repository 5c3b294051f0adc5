"""knn: a memory of keys and values in one layer, of which each query attends to the nearest (Memorizing Transformers, arXiv 2203.08913).

At one layer near the top, with queries and stored keys of length 1 and a trained scale for each head (section 3.1 and 3.2):

    A_mem = softmax(scale q . k_j) v_j, over the `top_k` rows j of largest q . k_j
    out = sigmoid(gate) A_mem + (1 - sigmoid(gate)) attention to the segment

The newest `size` rows stay, and a query sees no row of its own segment. In training the gradient goes into the rows found, and through
them into the segments that made them, as far as the trainer's `bptt_segments` lets it; with `gradient=none` it stops at a row, as in the
paper. The search is exact, where the paper's is approximate. Query heads that share keys search the same rows.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Memory, MemorySpec, New, Param, Query, SideOutput, State, hookimpl, search, softmax, unit, value_of


class Knn(Memory):
    """Long-term memory: keys and values of one layer; each query sees its `top_k` nearest, mixed in by a trained gate.

    layer: counted from the top if negative. site: "encoder" or "decoder"; None is the encoder if there is one.
    """

    def __init__(self, *, top_k: int = 32, size: int = 65536, layer: int = -1, site: str | None = None, gradient: str = "rows"):
        if site not in (None, "encoder", "decoder"):
            raise InvalidValue(f"site: expected encoder or decoder (at cross a row has keys of every layer), got {shown(site)}")
        for name, value in (("top_k", top_k), ("size", size)):
            if not isinstance(value, int) or value < 1:
                raise InvalidValue(f"{name}: expected a number of rows of at least 1, got {shown(value)}")
        if gradient not in ("none", "rows"):
            raise InvalidValue(f"gradient: expected none or rows, got {shown(gradient)}")
        self.top_k, self.size, self.site = top_k, size, site
        sites = frozenset({"encoder", "decoder"} if site is None else {site})
        self.spec = MemorySpec(sites=sites, layers=(layer,), needs=frozenset({"query"}), gradient=gradient, capacity=size)

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or ("encoder" if dims.layers["encoder"] else "decoder")}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        # At the model's learning rate and decay they stay where they start (arXiv 2404.07143, section 3).
        scale = Param((dims.n_heads,), np.full(dims.n_heads, 8.0), lr_factor=10.0, weight_decay=False)
        return {"gate": Param((dims.n_heads,), init=0.0, lr_factor=10.0, weight_decay=False), "scale": scale}

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """valid (B, N), and of each key head its own keys and values, (B, N, D), which the search reads where they lie."""
        rows = np.zeros((batch, 0, dims.d_head), dims.dtype)
        heads = range(dims.n_kv_heads)
        return {"valid": np.zeros((batch, 0), bool), **{f"{name}{head}": rows for name in ("keys", "values") for head in heads}}

    def read(self, state: State, site: str, layer: int, query: Query) -> SideOutput | None:
        if not state["valid"].any():
            return None
        q, groups = unit(query.heads), state.dims.n_kv_heads
        group = q.shape[1] // groups  # query heads of a key head
        found = [self._found(state, g, q, slice(g * group, (g + 1) * group)) for g in range(groups)]
        return SideOutput(np.concatenate(found, axis=1), "gate", state.params["gate"], state["valid"].any(axis=1))

    def _found(self, state: State, g: int, q: np.ndarray, heads: slice) -> np.ndarray:
        """A_mem of the query heads of key head g, (B, group, T, D), given all queries (B, H, T, D)."""
        keys, values, valid = state[f"keys{g}"], state[f"values{g}"], state["valid"]
        batch, group, length, d = q[:, heads].shape
        queries = np.reshape(q[:, heads], (batch, group * length, d))
        _, index = search(np.ascontiguousarray(value_of(queries)), value_of(keys), min(self.top_k, keys.shape[1]), valid)
        stream = np.arange(batch)[:, None, None]
        scores = np.einsum("bnd,bnkd->bnk", queries, keys[stream, index])
        scores = np.reshape(scores, (batch, group, length, -1)) * state.params["scale"][heads][:, None, None]
        index = np.reshape(index, (batch, group, length, -1))
        weights = softmax(np.where(index >= 0, scores, -1e9))
        return np.einsum("bgtk,bgtkd->bgtd", weights, values[stream[..., None], index])

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        assert new.project is not None
        keys, values = new.project(new.hidden)
        rows = {"valid": new.valid}
        for g in range(state.dims.n_kv_heads):
            rows |= {f"keys{g}": unit(keys[:, g]), f"values{g}": values[:, g]}
        rows = {name: np.concatenate([state[name], value], axis=1) for name, value in rows.items()}
        if rows["valid"].shape[1] > self.size:  # places without a row go first, then the oldest
            newest = np.argsort(rows["valid"], axis=1, kind="stable")[:, -self.size :]
            rows = {name: value[np.arange(len(value))[:, None], newest] for name, value in rows.items()}
        state.update(rows)


@hookimpl
def register_memories(register):
    register("knn", Knn)
