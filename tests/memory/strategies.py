"""Published memories, written against the contract alone: they show that it can say them.

Each is here to be tested, and as short as it can be said; the built-in ones are in `plugins/`.
"""

import dataclasses

import numpy as np

from mini_tfm.autodiff import value_of
from mini_tfm.memory import Memory, MemorySpec, RetrievalMemory, State, View, bank_key


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
    "unlimiformer": Unlimiformer,
    "ceiling": Ceiling,
    "prompted": Prompted,
}
