"""store: long-term memory. Every row ever read, searched exactly; with a `path` it outlives the process.

Each query attends to the `top_k` rows of largest score (Memorizing Transformers, arXiv 2203.08913), found among
hidden rows, so that one bank serves all layers and heads (Unlimiformer, arXiv 2305.01625, section 2.3). In training the
gradient flows into the rows found, unlike theirs (`gradient=none`): what made them is otherwise not trained to be found.

One path holds many documents, each under a name; a memory reads and writes the one it was given. Without a path,
and while training, rows stay in RAM.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mini_tfm.errors import InvalidValue
from mini_tfm.memory import BestRows, Dims, Evicted, New, RetrievalMemory, RowStore, State, View, bank_key, hookimpl
from mini_tfm_plugins.rows_lmdb import LmdbRows


def backend_of(path: str) -> RowStore:
    """The backend of a path: a file is LMDB's. The one place to choose another by what the path looks like."""
    return LmdbRows(path)


class Store(RetrievalMemory):
    """Long-term memory: all rows, each query sees its `top_k` best; durable with a `path`."""

    def __init__(
        self,
        *,
        path: str | None = None,
        top_k: int = 32,
        document: str = "default",
        site: str | None = None,
        layer: int | None = None,
        merge: str = "joint",
        gradient: str = "rows",
    ):
        super().__init__(top_k=top_k, site=site, layer=layer, merge=merge, gradient=gradient)
        self.document = _checked_document(document)
        self.disk = backend_of(str(path)) if path is not None else None
        self.durable = path is not None

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """on_disk (B, banks): rows that a stream sees of the store, no banks without one. next_position (B,): its own first.

        store, deletions (B,): which store it is, and how often the document was deleted so far. `<bank>ahead` (B, n): 1 + the positions
        of rows that are in the store already, and are shown only when the working memory drops them; 0 for none.
        """
        if self.disk is None or dims.training:
            return {"next_position": np.zeros(batch, np.int64), "on_disk": np.zeros((batch, 0), np.int64)}
        self.disk.open(dims.d_model, dims.fingerprint())
        return {
            "next_position": np.full(batch, self.disk.next_position(self.document), np.int64),
            "store": np.full(batch, self.disk.identity(), np.int64),
            "deletions": np.full(batch, self.disk.deletions(self.document), np.int64),
            "on_disk": np.tile(self._counts(self.disk.counts(self.document), dims), (batch, 1)),
        }

    def _counts(self, counts: dict[str, int], dims: Dims) -> np.ndarray:
        return np.array([[counts.get(bank, 0) for bank in self.banks(dims)]], np.int64)

    def _stored(self, state: State, bank: str) -> np.ndarray:
        """(B,) rows of a bank that each stream sees of the store."""
        counts = state["on_disk"]
        return counts[:, self.banks(state.dims).index(bank)] if counts.shape[1] else np.zeros(len(counts), np.int64)

    def count(self, state: State, bank: str) -> int:
        return super().count(state, bank) + int(self._stored(state, bank).max(initial=0))

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        positions = new.positions + state["next_position"][:, None]  # on from where an earlier process stopped
        valid, ahead = new.valid, state.get(key := bank_key(site, layer) + "ahead")
        if ahead is not None:  # of rows that are in the store there is nothing to keep, but they are shown from now on
            valid = valid & ~_among(positions + 1, ahead)
            ahead = np.where(_among(ahead, np.where(new.valid, positions + 1, -1)), 0, ahead)
            state[key] = ahead[:, ahead.any(axis=0)]
        if ahead is None or valid.any():
            super().write(state, site, layer, dataclasses.replace(new, positions=positions, valid=valid))

    def write_ahead(self, state: State, held: Evicted) -> None:
        if self.disk is None or not state["on_disk"].shape[1]:
            return
        bank = bank_key(held.site, held.layer)
        ahead = state.get(bank + "ahead", np.zeros((1, 0), np.int64))
        positions = held.positions + state["next_position"][:, None]
        fresh = held.valid & ~_among(positions + 1, ahead)
        if fresh.any():
            self._append(state, {bank: (held.hidden[fresh], positions[fresh])})
            state[bank + "ahead"] = np.concatenate([ahead, positions[fresh][None] + 1], axis=1)

    def search(self, state: State, bank: str, queries: np.ndarray, k: int) -> View | None:
        best, stored, seen, ahead = BestRows(queries, k), self._stored(state, bank), 0, state.get(bank + "ahead")
        for hidden, positions, valid in self.held(state, bank):
            best.search(hidden, positions, valid)
        if self.disk is not None and stored.any():
            with self.disk.reading(self.document, bank, int(stored.max())) as chunks:
                for hidden, positions in chunks:
                    valid = np.arange(seen, seen + len(hidden)) < stored[:, None]
                    if ahead is not None:
                        valid = valid & ~_among(positions[None] + 1, ahead)
                    best.search(hidden, positions, None if valid.all() else valid)
                    seen += len(hidden)
        view = best.view()
        return None if view is None else dataclasses.replace(view, positions=view.positions - state["next_position"][:, None])

    def flush(self, state: State) -> None:
        """Moves the rows in RAM to the document in the store: durable when this returns."""
        if self.disk is None or not state["on_disk"].shape[1]:
            return
        fresh = {}
        for bank in self.banks(state.dims):
            if chunks := list(self.held(state, bank)):
                hidden, positions, valid = (np.concatenate([part[0] for part in parts]) for parts in zip(*chunks, strict=True))
                if valid.any():
                    fresh[bank] = hidden[valid], positions[valid]
        if fresh:
            self._append(state, fresh)
        held = tuple(self.banks(state.dims))
        for name in [name for name in state if name.startswith(held) and not name.endswith("ahead")]:
            del state[name]

    def _append(self, state: State, rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        assert self.disk is not None
        if len(state["on_disk"]) != 1:
            raise InvalidValue(f"path: a store on disk is written by one stream at a time, got a batch of {len(state['on_disk'])}")
        state["on_disk"] = self._counts(self.disk.append(self.document, rows), state.dims)

    def deleted(self, state: State) -> bool:
        if self.disk is None or "deletions" not in state:
            return False
        if state["on_disk"].any() and self.disk.identity() != state["store"][0]:
            return True
        return bool(self.disk.deletions(self.document) != state["deletions"][0])

    def documents(self) -> dict[str, int]:
        return self.disk.documents() if self.disk is not None else {}

    def reset(self, document: str) -> None:
        if self.disk is not None:
            self.disk.delete(_checked_document(document))


def _checked_document(document: object) -> str:
    try:
        if 0 < len(str(document).encode()) <= 200:
            return str(document)
    except UnicodeEncodeError:  # a lone surrogate
        pass
    raise InvalidValue("document: expected a name of 1 to 200 bytes of UTF-8")


def _among(positions: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(B, N) bool: which of positions (B, N), or (1, N), are among known (B, n)."""
    found = np.zeros((len(known), positions.shape[1]), bool)
    if known.size and positions.size and known.max() >= positions.min():
        for b, row in enumerate(known):
            found[b] = np.isin(positions[min(b, len(positions) - 1)], row)
    return found


@hookimpl
def register_memories(register):
    register("store", Store)
