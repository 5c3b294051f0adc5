"""store: long-term memory. Every row ever read, searched exactly; with a `path` it outlives the process.

Each query attends to the `top_k` rows of largest score (Memorizing Transformers, arXiv 2203.08913), found among hidden
rows, so that one bank serves all layers and heads (Unlimiformer, arXiv 2305.01625, section 2.3; with `merge=replace`
they stand in place of the segment, as there). In training the gradient flows into the rows found, unlike theirs
(`gradient=none`): what made them is otherwise not trained to be found.

One path holds many documents, each under a name; a memory reads and writes the one it was given. Without a path,
and while training, rows stay in RAM.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Hashable, Iterator, Mapping

import numpy as np

from mini_tfm.errors import InvalidValue
from mini_tfm.memory import (
    BestRows,
    Claim,
    Dims,
    Evicted,
    New,
    RetrievalMemory,
    RowStore,
    State,
    View,
    Written,
    bank_key,
    hookimpl,
)
from mini_tfm_plugins.rows_lmdb import LmdbRows


def backend_of(path: str, read_only: bool = False, searched: bool = True) -> RowStore:
    """The backend of a path: a file is LMDB's. The one place to choose another by what the path looks like.

    searched: whether all rows of a bank are looked through, as a search does, and not a few of them by their numbers.
    """
    return LmdbRows(path, read_only, join=searched)


class Store(RetrievalMemory):
    """Long-term memory: all rows, each query sees its `top_k` best; durable with a `path`, left as it is with `read_only`."""

    searched = True  # all rows are looked through, for each query

    def __init__(
        self,
        *,
        path: str | None = None,
        top_k: int = 32,
        document: str = "default",
        read_only: bool = False,
        site: str | None = None,
        layer: int | None = None,
        merge: str = "joint",
        gradient: str = "rows",
    ):
        super().__init__(top_k=top_k, site=site, layer=layer, merge=merge, gradient=gradient)
        self.document = _checked_document(document)
        if not isinstance(read_only, bool) or (read_only and path is None):
            raise InvalidValue(f"read_only: expected true or false, and true only with a path, got {read_only!r}")
        self.disk = backend_of(str(path), read_only, self.searched) if path is not None else None
        self.durable = path is not None and not read_only

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """on_disk (B, banks): rows that a stream sees of the store; without a store there is nothing.

        next_position (B,): the store's position of a stream's first token. end (B,): behind the document's last row, as the
        stream knows it. store, deletions (B,): which store it is, and how often the document was deleted so far. writer, number
        (B,): its name in the store, drawn when it first writes, and how often it wrote. `<bank>ahead`, `<bank>ahead_at` (B, n):
        1 + the positions and row numbers of rows that are in the store already, and are shown only when the working memory
        drops them; 0 for none. `<bank>held.` what the working memory had when it was last asked.
        """
        if self.disk is None or dims.training:
            return {}
        self.disk.open(dims.d_model, self._models(dims), dims.fingerprint)
        end = self.disk.next_position(self.document)
        return {
            "next_position": np.full(batch, end, np.int64),
            "end": np.full(batch, end, np.int64),
            "store": np.full(batch, self.disk.identity(), np.int64),
            "deletions": np.full(batch, self.disk.deletions(self.document), np.int64),
            "writer": np.zeros(batch, np.int64),
            "number": np.zeros(batch, np.int64),
            "on_disk": np.tile(self._counts(self.disk.counts(self.document), dims), (batch, 1)),
        }

    def _models(self, dims: Dims) -> dict[str, str]:
        """What the rows of each bank are made of."""
        (site,) = self.sites(dims)
        layers = range(1 if site == "cross" else dims.layers[site])
        only = self.spec.layers if site != "cross" else None
        return {
            bank: dims.fingerprint() if dims.row_fingerprint is None else dims.row_fingerprint(site, layer)
            for layer, bank in zip(layers, super().banks(dims), strict=True)
            if only is None or layer in only or layer - len(layers) in only
        }

    def _claim(self, state: State, banks: Collection[str]) -> Claim:
        models = {bank: name for bank, name in self._models(state.dims).items() if bank in banks}
        return Claim(int(state["store"][0]), int(state["deletions"][0]), models)

    def _counts(self, counts: Mapping[str, int], dims: Dims) -> np.ndarray:
        return np.array([[counts.get(bank, 0) for bank in self.banks(dims)]], np.int64)

    def _stored(self, state: State, bank: str) -> np.ndarray:
        """(B,) rows of a bank that each stream sees of the store."""
        return state["on_disk"][:, self.banks(state.dims).index(bank)]

    def count(self, state: State, bank: str) -> int:
        return super().count(state, bank) + (int(self._stored(state, bank).max(initial=0)) if "on_disk" in state else 0)

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        valid, bank = new.valid, bank_key(site, layer)
        state.pop(bank + "held.valid", None)  # what was held has changed
        ahead = state.get(bank + "ahead")
        if ahead is not None:  # of rows that are in the store there is nothing to keep, but they are shown from now on
            known = _among(ahead, np.where(new.valid, new.positions + 1, -1))
            valid = valid & ~_among(new.positions + 1, ahead)
            state.update(self._ahead(bank, np.where(known, 0, ahead), state[bank + "ahead_at"]))
        if ahead is None or valid.any():
            super().write(state, site, layer, dataclasses.replace(new, valid=valid))

    @staticmethod
    def _ahead(bank: str, ahead: np.ndarray, ahead_at: np.ndarray) -> dict[str, np.ndarray]:
        left = ahead.any(axis=0)
        return {bank + "ahead": ahead[:, left], bank + "ahead_at": np.where(ahead, ahead_at, 0)[:, left]}

    def search(self, state: State, bank: str, queries: np.ndarray, k: int) -> View | None:
        best = BestRows(queries, k)
        for hidden, positions, valid, key in self.shown(state, bank):
            best.search(hidden, positions, valid, key=key)
        return best.view()

    def shown(self, state: State, bank: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None, Hashable]]:
        """All rows of a bank, on disk and in RAM, in the order in which they came, as `BestRows.search` takes them.

        Rows on disk may be looked at until the next ones are asked for.
        """
        if "on_disk" in state and (stored := self._stored(state, bank)).any():
            assert self.disk is not None
            seen, ahead_at, offset = 0, state.get(bank + "ahead_at"), state["next_position"]
            name = (int(state["store"][0]), int(state["deletions"][0]), self.document, bank)
            with self.disk.reading(self.document, bank, int(stored.max()), self._claim(state, [bank])) as chunks:
                for hidden, positions in chunks:
                    valid = _shown(len(hidden), seen, stored, ahead_at)
                    since = positions - (offset[0] if (offset == offset[0]).all() else offset[:, None])
                    yield hidden, since, valid, (*name, seen, len(hidden)) if name[0] else None
                    seen += len(hidden)
        for hidden, positions, valid in self.held(state, bank):
            yield hidden, positions, valid, None

    def write_ahead(self, state: State, held: Evicted) -> None:
        if "on_disk" not in state:
            return
        prefix = bank_key(held.site, held.layer) + "held."
        rows = {prefix + name: getattr(held, name) for name in ("hidden", "valid", "positions")}
        if prefix + "valid" in state:  # of another member before it
            rows = {name: np.concatenate([state[name], value], axis=1) for name, value in rows.items()}
        state.update(rows)

    def flush(self, state: State) -> None:
        """Moves the rows in RAM to the document in the store, and copies those that are held before it: durable when this returns.

        All in one transaction, for a row has the same position in every bank.
        """
        if "on_disk" not in state:
            return
        batch, banks = len(state["on_disk"]), self.banks(state.dims)
        if batch != 1 and any(valid.any() for bank in banks for _, _, valid in self.held(state, bank)):
            raise InvalidValue(f"path: a store on disk is written by one stream at a time, got a batch of {batch}")
        while rows := _Unwritten(self, state):
            done = self._write(state)
            if done is None:
                return
            changes = self._after(state, done) if not done.again else self._recovered(state, done, rows)
            if not done.again:
                for bank in rows:
                    for _, positions in self._held_before(state, bank):
                        first = done.counts[bank] - len(positions)
                        changes |= self._more_ahead(state, bank, positions, first + np.arange(len(positions)))
                changes |= self._without(state, dict.fromkeys(rows))
            state.update(changes)  # at once: an interrupt falls before or behind it
            if not done.again:
                break
        for name in [name for name in state if name.startswith(tuple(banks)) and "ahead" not in name]:
            del state[name]

    def _in_ram(self, state: State, bank: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of a bank in RAM, in parts: hidden (n, d), positions (n,)."""
        parts = []
        for hidden, positions, valid in self.held(state, bank):
            if valid.any():
                parts.append((hidden[0], positions[0]) if valid.all() else (hidden[valid], positions[valid]))
        return parts

    def _held_before(self, state: State, bank: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of a bank that a memory before this one holds, and that are not in the store yet; in at most one part."""
        if bank + "held.valid" not in state:
            return []
        hidden, valid, positions = (state[bank + "held." + name] for name in ("hidden", "valid", "positions"))
        new = valid & ~_among(positions + 1, state.get(bank + "ahead", np.zeros((len(valid), 0), np.int64)))
        at, first = np.unique(positions[new], return_index=True)
        return [(hidden[new][first], at)] if len(at) else []

    def _write(self, state: State) -> Written | None:
        """Durable when it returns. What it gives is not yet in the state: an interrupt in between loses nothing and doubles nothing."""
        assert self.disk is not None
        if not state["writer"][0]:
            state["writer"] = np.array([secrets.randbits(62) + 1])
        offset, writer, number, end = (int(state[name][0]) for name in ("next_position", "writer", "number", "end"))
        rows = _Unwritten(self, state, offset)
        return self.disk.write(self.document, rows, self._claim(state, rows), writer, number + 1, end)

    def _after(self, state: State, done: Written) -> dict[str, np.ndarray]:
        """What a write changes in the state, but for its rows."""
        return {
            "on_disk": np.maximum(state["on_disk"], self._counts(done.counts, state.dims)),
            "next_position": state["next_position"] + done.moved,
            "end": np.full_like(state["end"], done.end),
            "number": state["number"] + 1,
        }

    def _recovered(self, state: State, done: Written, rows: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """What an earlier write, interrupted after it was durable, changes in the state. rows: what was to be written now.

        Its rows are in RAM still, or held before. Where they are not what is in the store, that was the write of a copy of this
        stream, which now takes a name of its own.
        """
        changes = self._after(state, done)
        offset = int(changes["next_position"][0])
        for bank, first in done.first.items():
            hidden, positions, at = self._rows_from(state, bank, first, done.counts[bank])
            there, where = rows.get(bank, (hidden[:0], positions[:0]))
            _, theirs, mine = np.intersect1d(positions - offset, where, return_indices=True)
            if not np.array_equal(hidden[theirs].astype(there.dtype), there[mine]):
                return {"writer": np.zeros(1, np.int64), "number": np.zeros(1, np.int64)}
            here = np.isin(positions - offset, np.concatenate([where[:0], *(at for _, at in self._in_ram(state, bank))]))
            changes |= self._more_ahead(state, bank, positions[~here] - offset, at[~here])
            changes |= self._without(state, {bank: positions - offset})
        return changes

    def _rows_from(self, state: State, bank: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of rows first to last - 1 of the document: hidden, positions, numbers."""
        assert self.disk is not None
        numbers = np.arange(first, last)
        hidden, positions = self.disk.gather(self.document, bank, numbers, self._claim(state, [bank]))
        return hidden, positions, numbers[: len(positions)]

    def _more_ahead(self, state: State, bank: str, positions: np.ndarray, at: np.ndarray) -> dict[str, np.ndarray]:
        """The state's rows ahead, and more at these positions, with these numbers in the store."""
        ahead, ahead_at = (state.get(bank + name, np.zeros((1, 0), np.int64)) for name in ("ahead", "ahead_at"))
        return self._ahead(bank, np.append(ahead, positions[None] + 1, axis=1), np.append(ahead_at, at[None] + 1, axis=1))

    def _without(self, state: State, gone: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        """The masks of the rows in RAM without those at the positions `gone`, None for all: rows that are in the store now."""
        masks = {}
        for bank, positions in gone.items():
            for number, (_, at, valid) in enumerate(self.held(state, bank)):
                masks[f"{bank}{number}.valid"] = np.zeros_like(valid) if positions is None else valid & ~np.isin(at, positions)
        return masks

    def deleted(self, state: State) -> bool:
        if self.disk is None or "deletions" not in state:
            return False
        if state["on_disk"].any() and self.disk.identity() != state["store"][0]:
            return True
        return bool(self.disk.deletions(self.document) != state["deletions"][0])

    def documents(self) -> dict[str, int]:
        return self.disk.documents() if self.disk is not None else {}

    def compact(self) -> tuple[int, int]:
        return self.disk.compact() if self.disk is not None else (0, 0)

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


class _Unwritten(Mapping[str, tuple[np.ndarray, np.ndarray]]):
    """The rows of each bank that are not in the store yet, with `offset` added to their positions.

    They are copied when a bank is asked for: those of all banks would take as much RAM again as they do.
    """

    def __init__(self, store: Store, state: State, offset: int = 0):
        self._store, self._state, self._offset = store, state, offset
        self._banks = [bank for bank in store.banks(state.dims) if store._in_ram(state, bank) + store._held_before(state, bank)]

    def __getitem__(self, bank: str) -> tuple[np.ndarray, np.ndarray]:
        if bank not in self._banks:
            raise KeyError(bank)
        parts = self._store._in_ram(self._state, bank) + self._store._held_before(self._state, bank)
        return np.concatenate([hidden for hidden, _ in parts]), np.concatenate([at for _, at in parts]) + self._offset

    def __iter__(self) -> Iterator[str]:
        return iter(self._banks)

    def __len__(self) -> int:
        return len(self._banks)


def _among(positions: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(B, N) bool: which of positions (B, N), or (1, N), are among known (B, n)."""
    found = np.zeros((len(known), positions.shape[1]), bool)
    if known.size and positions.size and known.max() >= positions.min():
        for b, row in enumerate(known):
            found[b] = np.isin(positions[min(b, len(positions) - 1)], row)
    return found


def _shown(n: int, seen: int, stored: np.ndarray, ahead_at: np.ndarray | None) -> np.ndarray | None:
    """(B, n) bool: which of the n rows from number `seen` on each stream sees; None for all."""
    hidden = [] if ahead_at is None else [(b, at - 1 - seen) for b, at in enumerate(ahead_at)]
    hidden = [(b, at[(at >= 0) & (at < n)]) for b, at in hidden]
    if (stored >= seen + n).all() and not any(at.size for _, at in hidden):
        return None
    valid = np.arange(seen, seen + n) < stored[:, None]
    for b, at in hidden:
        valid[b, at] = False
    return valid


@hookimpl
def register_memories(register):
    register("store", Store)
