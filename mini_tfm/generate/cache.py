"""The cache of a decoder: keys and values, and the states of recurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..weights import Array

FIRST_CAPACITY, MOST_ROOM = 32, 256  # keys
ANY_NUMBER = np.iinfo(np.int64).max


class KVCache:
    """Keys and values of what was decoded so far, a pair of arrays (B, H, capacity, D) a layer, doubled when full.

    Every stream's keys stand from the left on: rows of memories first, then its tokens. n_keys: the most that a stream has.
    lengths: (B,) how many each has, where they differ; None: all have n_keys. So a stream's bits are those it has alone.
    Where all have as many, streams change places in a table, `owners`, and no key is moved: beams share what they have in common.
    A layer with a recurrence in place of self-attention has no keys, but a state (B, d).
    rows_per_source: streams that stand side by side and have the same source share what is kept of it.
    bfloat16: keys and values are kept in it, in half the room of float32. room: so many tokens are expected after the first ones.
    """

    def __init__(self, bfloat16: bool = False, room: int = 0) -> None:
        self.n_keys = self.n_front = 0
        self.bfloat16, self.room = bfloat16, min(room, MOST_ROOM)
        self.rows_per_source = 1
        self._front: np.ndarray | None = None  # (B, n_front) bool, the rows of memories that are there; None: all
        self.lengths: np.ndarray | None = None
        self._owners: np.ndarray | None = None  # (rows, capacity): in which row a stream's key stands; None: each in its own
        self.positions = np.zeros(0, np.int64)
        self._position = np.zeros(1, np.int64)  # of one token: a step that is run again finds it there
        self._program: tuple[Any, Any] = (None, None)  # and the capacity it was noted for
        self._kept: dict[int, list[np.ndarray]] = {}
        self._cross: dict[int, list[np.ndarray]] = {}
        self._states: dict[int, np.ndarray] = {}
        self._biases: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What is noted to be run again stays here: it points into these arrays."""
        return {**self.__dict__, "_program": (None, None)}

    @property
    def is_empty(self) -> bool:
        return self.n_keys == 0

    @property
    def key_positions(self) -> np.ndarray | None:
        return None if self.lengths is None else np.broadcast_to(np.arange(self.n_keys) - self.n_front, (len(self.lengths), self.n_keys))

    @property
    def valid(self) -> np.ndarray | None:
        """(B, n_keys) bool, the keys that are there; None: all."""
        if self._front is None:
            return None
        return np.pad(self._front, [(0, 0), (0, self.n_keys - self.n_front)], constant_values=True)

    def extend(self, front: Sequence[np.ndarray], n_tokens: int) -> None:
        """Announces new keys: rows of memories, which come first of all, and `n_tokens` tokens behind what there is.

        front: (B, m) bool of each memory, which of its rows are there.
        """
        n_front = sum(rows.shape[1] for rows in front)
        if not all(rows.all() for rows in front):
            self._front = np.concatenate(front, axis=1)
        self.n_front += n_front
        if self.lengths is None:
            done = self.n_keys + n_front - self.n_front
            self._position[0] = done
            self.positions = self._position if n_tokens == 1 else np.arange(done, done + n_tokens)
        else:
            self.positions = (self.lengths - self.n_front)[:, None] + np.arange(n_tokens)
            self.lengths = self.lengths + n_tokens
        self.n_keys += n_front + n_tokens
        if 0 < self._capacity < self.n_keys:
            self._grow(max(2 * self._capacity, self.n_keys))
        if self._owners is not None:
            self._owners[:, self.n_keys - n_front - n_tokens : self.n_keys] = np.arange(len(self._owners))[:, None]

    def drop(self, n: int) -> None:
        """Forgets the last n keys of every stream; there must be no recurrence."""
        self.n_keys -= n
        self.lengths = None if self.lengths is None else self.lengths - n

    def append(self, layer: int, k: Array, v: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Adds k, v (B, H, T, D) of what was announced to a layer.

        Gives all its keys and values (rows, H, n_keys, D), and the owners (B, n_keys) of each stream's (see `Block`), or None.
        """
        news = value_of(k), value_of(v)
        batch, h, _, d = news[0].shape
        if layer not in self._kept:
            capacity = max(FIRST_CAPACITY, self.n_keys + self.room)
            self._kept[layer] = [np.zeros((batch, h, capacity, d), self._dtype(new)) for new in news]
        for store, new in zip(self._kept[layer], news, strict=True):
            if self.lengths is None:
                _core.keep_rows(store[:batch], self.n_keys - new.shape[2], new)
            else:
                store[np.arange(batch)[:, None], :, self.positions + self.n_front] = self._narrowed(new).swapaxes(1, 2)
        rows = batch if self._owners is None else len(self._owners)
        owners = None if self._owners is None else self._owners[:batch, : self.n_keys]
        keys, values = (store[:rows, :, : self.n_keys] for store in self._kept[layer])
        return keys, values, owners

    def begin_with(self, layers: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Puts keys and values (H, n, D) of one stream's first tokens, as `first_rows` gave them of every layer, into an empty cache."""
        self.n_keys = layers[0][0].shape[1]
        for layer, pair in enumerate(layers):
            self._kept[layer] = [np.zeros((1, len(x), max(FIRST_CAPACITY, self.n_keys + self.room), x.shape[2]), x.dtype) for x in pair]
            for store, x in zip(self._kept[layer], pair, strict=True):
                store[0, :, : self.n_keys] = x

    def first_rows(self) -> list[tuple[np.ndarray, ...]]:
        """Keys and values (H, n_keys, D) of the only stream, a pair a layer."""
        return [tuple(store[0, :, : self.n_keys] for store in self._kept[layer]) for layer in sorted(self._kept)]

    def _dtype(self, x: np.ndarray) -> Any:
        return np.uint16 if self.bfloat16 else x.dtype

    def _narrowed(self, x: np.ndarray) -> np.ndarray:
        """x (B, H, T, D) as it is kept, head by head."""
        kept = np.empty(x.shape, self._dtype(x))
        _core.keep_rows(kept, 0, x)
        return kept

    def _grow(self, capacity: int, n_rows: int | None = None) -> None:
        """Makes room for `capacity` keys of each of `n_rows` streams (None: of those there are)."""
        for kept in self._kept.values():
            for i, old in enumerate(kept):
                kept[i] = np.zeros((n_rows or len(old), old.shape[1], capacity, old.shape[3]), old.dtype)
                kept[i][: len(old), :, : old.shape[2]] = old
        if self._owners is not None:
            rows, before = self._owners.shape
            grown = np.repeat(np.arange(n_rows or rows)[:, None], capacity, axis=1)
            grown[:rows, :before] = self._owners
            self._owners = grown

    def bias_of_last(self, name: str, table_of: Callable[[int], np.ndarray]) -> np.ndarray:
        """(1, H, 1, n_keys), what a bias by distance adds to the scores of the last query: the end of a table (H, n) that is made once.

        name: of the weight it is made of.
        """
        table = self._biases.get(name)
        if table is None or table.shape[1] < self.n_keys:
            table = self._biases[name] = np.ascontiguousarray(table_of(self._capacity))
        return table[None, :, None, table.shape[1] - self.n_keys :]

    @property
    def _capacity(self) -> int:
        """Keys that there is room for; where there are recurrences, for any number."""
        return max((kept[0].shape[2] for kept in self._kept.values()), default=ANY_NUMBER if self._states else 0)

    def step(self, layers: Callable[[Array], Array], x: Array) -> Array:
        """layers(x) of one token of each stream, x (B, 1, d): run again without Python where it can be.

        What the layers compute must depend on x, on positions and on keys alone.
        """
        capacity = self._capacity
        if self.lengths is not None or self._front is not None or self.n_keys > capacity:
            return layers(x)
        program, made_for = self._program
        if made_for != capacity or (program.ready and len(x) > program.batch):
            program = _core.Program()
            self._program = program, capacity
        return program.run(x, self.n_keys) if program.ready else program.note(layers, x)

    def forget_step(self) -> None:
        """What was noted of a step holds no longer."""
        self._program = None, None

    def cross(self, layer: int, project: Callable[[], tuple[Array, Array]], valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The projected encoder outputs of each source, computed once, and laid out head by head, as every step reads them; and `valid`."""
        if layer not in self._cross:
            self._cross[layer] = [*(self._narrowed(value_of(x)) for x in project()), valid.copy()]
        k, v, valid = self._cross[layer]
        return k, v, valid

    def state(self, layer: int, nothing: np.ndarray) -> np.ndarray:
        """What the recurrence of a layer has come to, (B, d), which it changes in place; `nothing` where nothing was decoded."""
        return self._states.setdefault(layer, nothing)

    # Rows of the batch

    def reorder(self, index: np.ndarray, rows_per_source: int = 1) -> None:
        """Row i becomes what row index[i] was. rows_per_source: so many rows, from the first on, now have one source together."""
        sources = index[::rows_per_source] // self.rows_per_source
        more = any(len(sources) > len(kept[0]) for kept in self._cross.values()) or any(len(index) > len(x) for x in self._states.values())
        if more or rows_per_source != self.rows_per_source:
            self.forget_step()  # which has the sources' rows in its calls; and more rows than there were are in other arrays
        if self.lengths is None:
            self._change_owners(index)
        else:
            self._kept = {layer: [_moved(x, index, self.n_keys) for x in kept] for layer, kept in self._kept.items()}
        self._states = {layer: _moved(state, index) for layer, state in self._states.items()}
        if any(len(kept[0]) != len(sources) for kept in self._cross.values()) or (sources != np.arange(len(sources))).any():
            self._cross = {layer: [_moved(x, sources) for x in kept] for layer, kept in self._cross.items()}
        self.rows_per_source = rows_per_source
        self.lengths = None if self.lengths is None else self.lengths[index]
        self._front = None if self._front is None else self._front[index]

    def _change_owners(self, index: np.ndarray) -> None:
        if not self._kept:
            return
        n_rows = len(next(iter(self._kept.values()))[0])
        if self._owners is None or len(index) > n_rows:
            self.forget_step()  # it has the keys' place, and their owners'
            self._owners = np.repeat(np.arange(n_rows)[:, None], self._capacity, axis=1) if self._owners is None else self._owners
            if len(index) > n_rows:
                self._grow(self._capacity, len(index))
        self._owners[: len(index), : self.n_keys] = self._owners[index, : self.n_keys]

    def _settle(self, n_streams: int) -> None:
        """Every stream's keys stand in its own row from now on, and there are no other rows."""
        self.reorder(np.arange(n_streams))
        if self.lengths is None and self._owners is not None:
            rows, places = self._owners[:n_streams, : self.n_keys], np.arange(self.n_keys)
            for kept in self._kept.values():
                for i, old in enumerate(kept):
                    kept[i] = np.zeros((n_streams, *old.shape[1:]), old.dtype)
                    kept[i][:, :, : self.n_keys] = old[rows, :, places].swapaxes(1, 2)
            self._owners = None
        self.forget_step()

    def join(self, other: KVCache, sizes: tuple[int, int]) -> None:
        """Takes in the rows of `other`, behind its own; `sizes` are the numbers of rows of the two."""
        for cache, size in zip((self, other), sizes, strict=True):
            cache._settle(size)
        lengths = [
            np.full(size, cache.n_keys) if cache.lengths is None else cache.lengths
            for cache, size in zip((self, other), sizes, strict=True)
        ]
        if self._front is not None or other._front is not None:
            pair = zip((self, other), sizes, strict=True)
            self._front = np.concatenate([np.ones((n, each.n_front), bool) if each._front is None else each._front for each, n in pair])
        self._kept = {layer: _stacked(zip(kept, other._kept[layer], strict=True)) for layer, kept in self._kept.items()}
        self._cross = {
            layer: [*_stacked(zip(kept[:2], other._cross[layer][:2], strict=True)), _masks(kept[2], other._cross[layer][2])]
            for layer, kept in self._cross.items()
        }
        self._states = {layer: np.concatenate([state, other._states[layer]]) for layer, state in self._states.items()}
        self.lengths, self.n_keys = np.concatenate(lengths), max(self.n_keys, other.n_keys)
        if (self.lengths == self.n_keys).all():
            self.lengths = None


def _moved(x: np.ndarray, index: np.ndarray, n_keys: int | None = None) -> np.ndarray:
    """x (B, ...), whose row i becomes what row index[i] was: in place, unless there are more rows. n_keys: the keys that count."""
    if len(index) > len(x):
        return x[index]
    rows = np.flatnonzero(index != np.arange(len(index)))
    if n_keys is None:
        x[rows] = x[index[rows]]
    else:
        x[rows, :, :n_keys] = x[index[rows], :, :n_keys]
    return x[: len(index)]


def _masks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Masks (B, S) behind each other; nothing is valid in what is filled up."""
    most = max(a.shape[1], b.shape[1])
    return np.concatenate([np.pad(x, [(0, 0), (0, most - x.shape[1])]) for x in (a, b)])


def _stacked(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Arrays (B, H, S, D) behind each other; the one with fewer keys is filled up with zeros."""
    found = []
    for pair in pairs:
        most = max(x.shape[2] for x in pair)
        found.append(np.concatenate([np.pad(x, [(0, 0), (0, 0), (0, most - x.shape[2]), (0, 0)]) for x in pair]))
    return found
