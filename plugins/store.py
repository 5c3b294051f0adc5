"""store: long-term memory. Every row ever read, searched exactly; in LMDB at `path` it outlives the process.

Each query attends to the `top_k` rows of largest score (Memorizing Transformers, arXiv 2203.08913), found among
hidden rows, so that one bank serves all layers and heads (Unlimiformer, arXiv 2305.01625, section 2.3). Rows carry
no gradient, their scores do. `merge="joint"` puts them in one softmax with the segment, "gate" mixes them in with
a trained gate a head.

One path holds many documents, each under a name; a memory reads and writes the one it was given. Without a path,
and while training, rows stay in RAM.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mini_tfm import _core
from mini_tfm.errors import InvalidValue
from mini_tfm.memory import Dims, Memory, MemorySpec, New, Param, Query, State, View, bank_key, hookimpl
from mini_tfm_plugins._rows_on_disk import RowsOnDisk

CHUNK = 1024  # rows sealed together: appending to a long memory copies at most so many

SITES = ("encoder", "decoder", "cross")


class Store(Memory):
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
    ):
        if not isinstance(top_k, int) or top_k < 1:
            raise InvalidValue(f"top_k: expected a number of rows of at least 1, got {top_k!r}")
        if site not in (None, *SITES):
            raise InvalidValue(f"site: expected one of {', '.join(SITES)}, got {site!r}")
        if merge not in ("joint", "gate"):
            raise InvalidValue(f"merge: expected joint or gate, got {merge!r}")
        if not str(document) or len(str(document).encode()) > 200:
            raise InvalidValue("document: expected a name of 1 to 200 bytes")
        self.top_k, self.document, self.site = top_k, str(document), site
        self.disk = RowsOnDisk(str(path)) if path is not None else None
        self.durable = path is not None
        self.spec = MemorySpec(
            sites=frozenset(SITES if site is None else [site]),
            layers=None if layer is None else (layer,),
            needs=frozenset({"query"}),
            merge=merge,
        )

    def sites(self, dims: Dims) -> set[str]:
        return {self.site or dims.reading_site}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        # A gate at the model's learning rate and decay stays where it starts (arXiv 2404.07143, section 3).
        gate = Param((dims.n_heads,), init=0.0, lr_factor=10.0, weight_decay=False)
        return {"gate": gate} if self.spec.merge == "gate" else {}

    def start(self, batch: int, dims: Dims) -> dict:
        """Rows in RAM, in chunks of a bank: `<bank>.<number>.hidden|valid|positions`; `on_disk` counts those on disk."""
        disk = self.disk if not dims.training else None
        state = {"next_position": np.zeros(batch, np.int64), "on_disk": np.zeros((batch, 0), np.int64)}
        if disk is not None:
            disk.open(dims.d_model, dims.fingerprint())
            banks = disk.banks(self.document)
            state["on_disk"] = np.tile(np.array([banks.get(name, 0) for name in self._banks(dims)], np.int64), (batch, 1))
            state["next_position"] += disk.next_position(self.document)
        return state

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        if not new.valid.size:
            return
        key, rows = bank_key(site, layer), {"hidden": new.hidden, "valid": new.valid}
        # Positions go on where an earlier process stopped.
        rows["positions"] = new.positions + state["next_position"][:, None] if self._durable(state) else new.positions
        last = len(self._chunks(state, key)) - 1
        if last >= 0 and state[f"{key}{last}.valid"].shape[1] < CHUNK:
            rows = {name: np.concatenate([state[f"{key}{last}.{name}"], value], axis=1) for name, value in rows.items()}
        else:
            last += 1
        for name, value in rows.items():
            state[f"{key}{last}.{name}"] = value

    def read(self, state: State, site: str, layer: int, query: Query) -> View | None:
        key = bank_key(site, layer)
        parts = [(state[f"{key}{i}.hidden"], state[f"{key}{i}.valid"], state[f"{key}{i}.positions"]) for i in self._chunks(state, key)]
        batch, heads, length = query.heads.shape[:3]
        on_disk = self._rows_on_disk(state, key)
        if not parts and not on_disk:
            return None
        asked = np.ascontiguousarray(query.hidden().reshape(batch, heads * length, -1))
        found = _Best(self.top_k)
        for hidden, valid, positions in parts:
            found.offer(*_core.search(asked, hidden, min(self.top_k, hidden.shape[1]), valid), hidden, positions)
        if on_disk:
            assert self.disk is not None
            with self.disk.reading(self.document, key, on_disk) as chunks:
                for stored, positions in chunks:
                    hidden = stored.astype(asked.dtype, copy=False)  # a float64 model is for checks: it may pay for a copy
                    everyone = np.broadcast_to(hidden, (batch, *hidden.shape))
                    k = min(self.top_k, len(hidden))
                    # One bank for the whole batch: its queries are searched as one row of the batch.
                    scores, index = _core.search(asked.reshape(1, -1, asked.shape[-1]), hidden[None], k, None)
                    shape = (batch, heads * length, k)
                    found.offer(scores.reshape(shape), index.reshape(shape), everyone, np.broadcast_to(positions, (batch, len(positions))))
        if found.scores is None:  # the document was deleted by someone else
            return None
        view = found.view(heads, length, state["next_position"] if self._durable(state) else None)
        return dataclasses.replace(view, gate=state.params.get("gate"))

    def flush(self, state: State) -> None:
        """Appends the rows held in RAM to the document on disk: durable when this returns."""
        if not self._durable(state):
            return
        assert self.disk is not None
        if len(state["on_disk"]) != 1:
            raise InvalidValue(f"path: a store on disk is written by one stream at a time, got a batch of {len(state['on_disk'])}")
        fresh = {}
        for bank in self._banks(state.dims):
            for i in self._chunks(state, bank):
                arrays = [state.pop(f"{bank}{i}.{name}")[0] for name in ("hidden", "valid", "positions")]
                hidden, valid, positions = arrays
                fresh.setdefault(bank, []).append((hidden[valid], positions[valid]))
        if not fresh:
            return
        joined = {bank: [np.concatenate(x) for x in zip(*rows, strict=True)] for bank, rows in fresh.items()}
        counts = self.disk.append(self.document, joined)
        state["on_disk"] = np.array([[counts.get(name, 0) for name in self._banks(state.dims)]], np.int64)

    def documents(self) -> dict[str, int]:
        return self.disk.documents() if self.disk is not None else {}

    def reset(self, document: str) -> None:
        if self.disk is not None:
            self.disk.delete(document)

    # Inside

    def _banks(self, dims: Dims) -> list[str]:
        site = self.site or dims.reading_site
        return [bank_key(site, layer) for layer in range(1 if site == "cross" else dims.layers[site])]

    def _chunks(self, state: State, key: str) -> list[int]:
        count = 0
        while f"{key}{count}.valid" in state:
            count += 1
        return list(range(count))

    def _durable(self, state: State) -> bool:
        return self.disk is not None and not state.dims.training

    def _rows_on_disk(self, state: State, key: str) -> int:
        counts = state["on_disk"]
        return int(counts[0, self._banks(state.dims).index(key)]) if counts.shape[1] and len(counts) else 0


class _Best:
    """The best k rows of each query over several banks, and a small bank of just those rows."""

    def __init__(self, k: int):
        self.k = k
        self.scores: np.ndarray | None = None

    def offer(self, scores: np.ndarray, index: np.ndarray, hidden: np.ndarray, positions: np.ndarray) -> None:
        """scores, index (B, N, k) into hidden (B, M, d) with positions (B, M); index -1 is none."""
        batch = len(scores)
        used = np.zeros((batch, hidden.shape[1] + 1), bool)  # the last column takes the -1s
        used[np.arange(batch)[:, None, None], index] = True
        used = used[:, :-1]
        # Row r of the small bank of stream b is its r-th used row; shorter banks are filled up with row 0.
        place = np.cumsum(used, axis=1) - 1
        counts = used.sum(axis=1)
        rows = np.zeros((batch, counts.max(initial=0)), np.int64)
        for b in range(batch):
            rows[b, : counts[b]] = np.flatnonzero(used[b])
        pick = np.arange(batch)[:, None]
        index = np.where(index < 0, -1, place[pick[:, :, None], np.maximum(index, 0)])
        small, at, valid = hidden[pick, rows], positions[pick, rows], np.arange(rows.shape[1]) < counts[:, None]
        if self.scores is None:
            self.scores, self.index, self.hidden, self.positions, self.valid = scores, index, small, at, valid
            return
        index = np.where(index < 0, -1, index + self.hidden.shape[1])
        self.hidden = np.concatenate([self.hidden, small], axis=1)
        self.positions = np.concatenate([self.positions, at], axis=1)
        self.valid = np.concatenate([self.valid, valid], axis=1)
        scores, index = np.concatenate([self.scores, scores], axis=2), np.concatenate([self.index, index], axis=2)
        best = np.argsort(-scores, axis=2, kind="stable")[:, :, : self.k]
        self.scores, self.index = np.take_along_axis(scores, best, 2), np.take_along_axis(index, best, 2)

    def view(self, heads: int, length: int, base: np.ndarray | None) -> View:
        assert self.scores is not None
        index = self.index.reshape(len(self.index), heads, length, -1)
        positions = self.positions if base is None else self.positions - base[:, None]
        return View(("hidden", self.hidden), self.valid, index=np.ascontiguousarray(index), positions=positions)


@hookimpl
def register_memories(register):
    register("store", Store)
