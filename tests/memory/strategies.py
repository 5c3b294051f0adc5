"""Published memories, written against the contract alone: they show that it can say them.

Each is here to be tested, and as short as it can be said; the built-in ones are in `plugins/`.
"""

import dataclasses

import numpy as np

from mini_tfm.autodiff import value_of
from mini_tfm.memory import Memory, MemorySpec, Param, RetrievalMemory, SideOutput, State, View, bank_key


class Memorizing(Memory):
    """Memorizing Transformers (arXiv 2203.08913): every key and value of one layer, the k best a query, a gate a head."""

    def __init__(self, *, k=4, site="decoder"):
        self.k = k
        self.spec = MemorySpec(sites=frozenset({site}), layers=(-1,), needs=frozenset({"query"}))

    def parameters(self, dims):
        plain = {"lr_factor": 10.0, "weight_decay": False}
        return {"gate": Param((dims.n_heads,), 0.0, **plain), "scale": Param((dims.n_heads,), np.full(dims.n_heads, 4.0), **plain)}

    def start(self, batch, dims):
        rows = np.zeros((batch, 0, dims.n_kv_heads, dims.d_head), dims.dtype)
        return {"k": rows, "v": rows, "valid": np.zeros((batch, 0), bool)}

    def read(self, state, site, layer, query):
        if not state["valid"].shape[1]:
            return None
        q = _unit(query.heads)
        scores = np.einsum("bhtd,bshd->bhts", q, state["k"]) * state.params["scale"][:, None, None]
        scores = np.where(state["valid"][:, None, None], scores, -1e9)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., : self.k]
        weights = np.exp(np.take_along_axis(scores, best, -1) - np.max(scores, axis=-1, keepdims=True))
        b, h = np.ogrid[: len(best), : best.shape[1]]
        found = np.einsum("bhtk,bhtkd->bhtd", weights, state["v"][b[..., None, None], best, h[..., None, None]])
        return SideOutput(found / np.sum(weights, axis=-1, keepdims=True), "gate", state.params["gate"], state["valid"].any(axis=1))

    def write(self, state, site, layer, new):
        k, v = (np.swapaxes(x, 1, 2) for x in new.project(new.hidden))
        for name, rows in (("k", _unit(k)), ("v", v), ("valid", new.valid)):
            state[name] = np.concatenate([state[name], rows], axis=1)


def _unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class NearestTokens(Memory):
    """kNN-LM (arXiv 1911.00172): what followed where the decoder's output was most like this one."""

    def __init__(self, *, k=8, share=0.25, temperature=1.0):
        self.k, self.share, self.temperature = k, share, temperature
        self.spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"hidden", "tokens"}))

    def start(self, batch, dims):
        return {
            "keys": np.zeros((batch, 0, dims.d_model), dims.dtype),
            "tokens": np.zeros((batch, 0), np.int64),
            "valid": np.zeros((batch, 0), bool),
        }

    def write(self, state, site, layer, new):
        if layer == state.dims.layers["decoder"] and new.targets is not None:
            for name, rows in (("keys", new.hidden), ("tokens", new.targets), ("valid", new.valid)):
                state[name] = np.concatenate([state[name], rows], axis=1)

    def logits(self, state, hidden, log_probs):
        if not state["valid"].shape[1]:
            return None
        distance = ((hidden[:, :, None] - state["keys"][:, None]) ** 2).sum(axis=-1)
        distance = np.where(state["valid"][:, None], distance, 1e30)
        nearest = np.argsort(distance, axis=-1, kind="stable")[..., : self.k]
        distance = np.take_along_axis(distance, nearest, -1)
        some = state["valid"].any(axis=1)[:, None, None]
        weights = np.exp((distance.min(axis=-1, keepdims=True) - distance) / self.temperature)
        found, (b, t) = np.zeros_like(log_probs), np.ogrid[: len(hidden), : hidden.shape[1]]
        np.add.at(
            found, (b[..., None], t[..., None], state["tokens"][b[..., None], nearest]), weights / weights.sum(axis=-1, keepdims=True)
        )
        mixed = np.log((1 - self.share) * np.exp(log_probs) + self.share * found)
        return np.where(some, mixed, log_probs)


class Unlimiformer(Memory):
    """Unlimiformer (arXiv 2305.01625): the decoder's cross-attention sees the k best encoder outputs of all that was read,
    each query and head its own; a first segment is seen as it is."""

    def __init__(self, *, k=4):
        self.k = k
        self.spec = MemorySpec(sites=frozenset({"cross"}), needs=frozenset({"query"}), merge="replace")

    def start(self, batch, dims):
        return {"hidden": np.zeros((batch, 0, dims.d_model), dims.dtype), "valid": np.zeros((batch, 0), bool)}

    def read(self, state, site, layer, query):
        if not state["valid"].shape[1]:
            return None
        scores = np.einsum("bhtd,bsd->bhts", query.hidden(), state["hidden"])
        scores = np.where(state["valid"][:, None, None], scores, -np.inf)
        return View(("hidden", state["hidden"]), state["valid"], index=np.argsort(-scores, axis=-1, kind="stable")[..., : self.k])

    def write(self, state, site, layer, new):
        for name, rows in (("hidden", new.hidden), ("valid", new.valid)):
            state[name] = np.concatenate([state[name], rows], axis=1)


class Ceiling(RetrievalMemory):
    """LM-Infinite's ceiling of distances (arXiv 2308.16137, section 3): rows further back than `reach` are read at `reach`."""

    def __init__(self, *, top_k=3, reach=6, site=None):
        super().__init__(top_k=top_k, site=site, gradient="rows")
        self.reach = reach

    def read(self, state, site, layer, query):
        view = super().read(state, site, layer, query)
        if view is None:
            return None
        stood_at = view.positions[np.arange(len(view.index))[:, None, None, None], np.maximum(view.index, 0)]
        return dataclasses.replace(view, places=np.maximum(stood_at, query.positions[:, None, :, None] - self.reach))


class Prompted(RetrievalMemory):
    """The rows that the first query of a segment finds, the same for all heads, stay for the rest of it, `reach` before it."""

    def __init__(self, *, top_k=3, reach=6, site=None):
        super().__init__(top_k=top_k, site=site, gradient="rows")
        self.reach = reach

    def read(self, state, site, layer, query):
        bank, kept = bank_key(site, layer), State.OF_SEGMENT + bank_key(site, layer)
        if not self.count(state, bank):
            return None
        hidden, positions, valid = (np.concatenate(parts, axis=1) for parts in zip(*self.held(state, bank), strict=True))
        if kept + "index" not in state:
            score = np.einsum("bhd,bmd->bm", query.hidden()[:, :, 0], value_of(hidden))
            state[kept + "index"] = np.argsort(np.where(valid, -score, np.inf), axis=1, kind="stable")[:, : self.top_k]
        index = state[kept + "index"]
        place = np.broadcast_to(query.segment.start[:, None] - self.reach, index.shape)
        return View(("hidden", hidden), valid, index, positions, places=place)


PUBLISHED = {
    "memorizing": Memorizing,
    "nearest_tokens": NearestTokens,
    "unlimiformer": Unlimiformer,
    "ceiling": Ceiling,
    "prompted": Prompted,
}
