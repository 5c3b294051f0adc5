"""The cache of a decoder: keys and values, and the states of recurrences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..reference.types import kept_width
from ..weights import Array

FIRST_CAPACITY, MOST_ROOM = 32, 256  # keys
_AS = {None: None, "float32": None, "bfloat16": np.dtype(np.uint16), "int8": np.dtype(np.int8)}
ANY_NUMBER = np.iinfo(np.int64).max


class KVCache:
    """Keys and values of what was decoded so far, a pair of arrays (B, H, capacity, D) a layer, doubled when full.

    Every stream's keys stand from the left on: rows of memories first, then its tokens. n_keys: the most that a stream has.
    lengths: (B,) how many each has, where they differ; None: all have n_keys. So a stream's bits are those it has alone.
    Where all have as many, streams change places in a table, `owners`, and no key is moved: beams share what they have in common.
    A layer with a recurrence in place of self-attention has no keys, but a state (B, d).
    rows_per_source: streams that stand side by side and have the same source share what is kept of it.
    dtype: what keys and values are kept in: "bfloat16", in half the room of float32, "int8", with a scale for each row of a head, in a
    little more than a quarter; None: what they are computed in. room: so many tokens are expected after the first ones.

    Arrays have room for more streams than there are: those that leave make room for those that join. A step that is run again finds
    all that changes from step to step where it was, so what is told of each stream is written into arrays that stay.
    """

    def __init__(self, n_rows: int, dtype: str | None = None, room: int = 0) -> None:
        self.n_rows, self.n_keys, self.n_front = n_rows, 0, 0
        self.dtype, self.room = dtype, min(room, MOST_ROOM)
        self.rows_per_source = 1
        self._front: np.ndarray | None = None  # (B, n_front) bool, the rows of memories that are there; None: all
        self._owners: np.ndarray | None = None  # (rows, capacity): in which row a stream's key stands; None: each in its own
        self.positions = np.zeros(0, np.int64)
        self._position = np.zeros(1, np.int64)  # of one token
        # Where streams have come differently far: keys of each, rows in front among them; of its new token the position, and the row
        self._lengths: np.ndarray | None = None
        self._fronts = np.zeros(0, np.int64)
        self._positions = np.zeros((0, 1), np.int64)
        self._at = np.zeros(0, np.int64)
        self._program: tuple[Any, Any] = (None, None)  # and the capacity it was noted for
        self._kept: dict[int, list[np.ndarray]] = {}
        self._cross: dict[int, list[np.ndarray]] = {}
        self._states: dict[int, np.ndarray] = {}
        self._tables: dict[str, np.ndarray] = {}
        self._biases: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What is noted to be run again stays here: it points into these arrays."""
        return {**self.__dict__, "_program": (None, None)}

    @property
    def lengths(self) -> np.ndarray | None:
        return None if self._lengths is None else self._lengths[: self.n_rows]

    @property
    def is_empty(self) -> bool:
        return self.n_keys == 0

    @property
    def moves_in_table(self) -> bool:
        """Whether all that streams have of their own changes places in a table."""
        return self._owners is not None and not self._states

    @property
    def key_positions(self) -> np.ndarray | None:
        return None if self.lengths is None else np.arange(self.n_keys) - self._fronts[: self.n_rows, None]

    @property
    def valid(self) -> np.ndarray | None:
        """(B, n_keys) bool, the keys that are there; None: all."""
        if self._front is None:
            return None
        return np.pad(self._front, [(0, 0), (0, self.n_keys - self._front.shape[1])], constant_values=True)

    def extend(self, front: Sequence[np.ndarray], n_tokens: int) -> None:
        """Announces new keys: rows of memories, which come first of all, and `n_tokens` tokens behind what there is.

        front: (B, m) bool of each memory, which of its rows are there.
        """
        n_front = sum(rows.shape[1] for rows in front)
        if not all(rows.all() for rows in front):
            self._front = np.concatenate(front, axis=1)
        self.n_front += n_front
        before = self.n_keys
        if (lengths := self.lengths) is None:
            done = self.n_keys + n_front - self.n_front
            self._position[0] = done
            self.positions = self._position if n_tokens == 1 else np.arange(done, done + n_tokens)
            self.n_keys += n_front + n_tokens
        else:  # one token of each
            self._at[: self.n_rows] = lengths
            self.positions = self._positions[: self.n_rows]
            np.subtract(lengths, self._fronts[: self.n_rows], out=self.positions[:, 0])
            lengths += 1
            self.n_keys = int(lengths.max(initial=0))
        if 0 < (capacity := self._capacity) < self.n_keys:
            self._grow(max(2 * capacity, self.n_keys))
        if self._owners is not None:
            self._owners[:, before : self.n_keys] = np.arange(len(self._owners))[:, None]

    def drop(self, n: int) -> None:
        """Forgets the last n keys of every stream; there must be no recurrence."""
        self.n_keys -= n
        if (lengths := self.lengths) is not None:
            lengths -= n

    def append(self, layer: int, k: Array, v: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Adds k, v (B, H, T, D) of what was announced to a layer.

        Gives all its keys and values (rows, H, n_keys, D), and the owners (B, n_keys) of each stream's (see `Block`), or None.
        """
        news = value_of(k), value_of(v)
        batch = len(news[0])
        if layer not in self._kept:
            capacity = max(FIRST_CAPACITY, self.n_keys + self.room)
            self._kept[layer] = [self._store(new, capacity) for new in news]
        for store, new in zip(self._kept[layer], news, strict=True):
            _core.keep_rows(store[:batch], self.n_keys - new.shape[2] if self.lengths is None else self._at[:batch], new)
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

    def _store(self, x: np.ndarray, capacity: int) -> np.ndarray:
        """Room for so many rows, each as those of x (B, H, T, D) are kept."""
        dtype = _AS[self.dtype] or x.dtype
        return np.zeros((*x.shape[:2], capacity, kept_width(dtype, x.shape[3])), dtype)

    def _narrowed(self, x: np.ndarray) -> np.ndarray:
        """x (B, H, T, D) as it is kept, head by head."""
        kept = self._store(x, x.shape[2])
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
        """(1 or B, H, 1, n_keys), what a bias by distance adds to the scores of the last query: the end of a table (H, n), made once.

        name: of the weight it is made of.
        """
        table = self._tables.get(name)
        if table is None or table.shape[1] < self.n_keys:
            table = self._tables[name] = np.ascontiguousarray(table_of(self._capacity))
        if self.lengths is None:
            return table[None, :, None, table.shape[1] - self.n_keys :]
        bias = self._biases.get(name)
        if bias is None or len(bias) < self.n_rows or bias.shape[3] < self.n_keys:
            bias = self._biases[name] = np.zeros((self.n_rows, len(table), 1, table.shape[1]), table.dtype)
        self._fill(name)
        return bias[: self.n_rows, :, :, : self.n_keys]

    def _fill(self, name: str) -> None:
        """Brings the bias of streams that have come differently far to now: each one's last key at distance 0."""
        table, bias, lengths = self._tables[name], self._biases[name], self.lengths
        assert lengths is not None
        for row, n in zip(bias, lengths.tolist(), strict=False):
            row[:, 0, :n] = table[:, table.shape[1] - n :]

    @property
    def _capacity(self) -> int:
        """Keys that there is room for, in every layer; where there are recurrences, for any number."""
        for kept in self._kept.values():
            return kept[0].shape[2]
        return ANY_NUMBER if self._states else 0

    def step(self, layers: Callable[[Array], Array], x: Array) -> Array:
        """layers(x) of one token of each stream, x (B, 1, d): run again without Python where it can be.

        What the layers compute must depend on x, on positions and on keys alone.
        """
        capacity = self._capacity
        if self._front is not None or self.n_keys > capacity:
            return layers(x)
        program, made_for = self._program
        if made_for != capacity or (program.ready and len(x) > program.batch):
            program = _core.Program()
            self._program = program, capacity
        if not program.ready:
            return program.note(layers, x)
        if self.lengths is not None:
            for name in self._biases:
                self._fill(name)
        return program.run(x, self.n_keys)

    def ahead(self, run: str, n_rows: int, n: int, feed_of: Callable[[int], _core.Feed | None]) -> Callable[..., Any] | None:
        """A method of the program, called with what it is given before `keys`, the ends and the choice: at most n steps without Python.

        None where the next one cannot be run so. feed_of: the feed of positions below a number.
        """
        program, made_for = self._program
        n, position = min(n, self._capacity - self.n_keys), self.n_keys - self.n_front
        if n < 1 or made_for != self._capacity or not program.ready or n_rows > program.batch:
            return None
        if self.lengths is not None or self._front is not None or (feed := feed_of(position + n)) is None:
            return None

        def steps(given: Sequence[Any], ends: np.ndarray, choice: _core.Choice) -> Any:
            self._position[0], self.positions = position, self._position
            try:
                return getattr(program, run)(*given, self.n_keys + 1, n, ends, feed, choice, self._position, self._owners)
            finally:
                self._position[0] -= 1
                self.n_keys = int(self._position[0]) + 1 + self.n_front

        return steps

    def forget_step(self) -> None:
        """What was noted of a step holds no longer."""
        self._program = None, None

    def cross(self, layer: int, project: Callable[[], tuple[Array, Array]], valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The projected encoder outputs of each source, computed once, and laid out head by head, as every step reads them; and `valid`."""
        if layer not in self._cross:
            self._cross[layer] = [*(self._narrowed(value_of(x)) for x in project()), valid.copy()]
        k, v, valid = (x[: self.n_rows // self.rows_per_source] for x in self._cross[layer])
        return k, v, valid

    def state(self, layer: int, nothing: np.ndarray) -> np.ndarray:
        """What the recurrence of a layer has come to, (B, d), which it changes in place; `nothing` where nothing was decoded."""
        return self._states.setdefault(layer, nothing)[: self.n_rows]

    # Rows of the batch

    def reorder(self, index: np.ndarray, rows_per_source: int = 1) -> None:
        """Row i becomes what row index[i] was. rows_per_source: so many rows, from the first on, now have one source together."""
        sources = index[::rows_per_source] // self.rows_per_source
        more = any(len(sources) > len(kept[0]) for kept in self._cross.values()) or any(len(index) > len(x) for x in self._states.values())
        if more or rows_per_source != self.rows_per_source:
            self.forget_step()  # which has the sources' rows in its calls; and more rows than there were are in other arrays
        if self._lengths is None:
            self._change_owners(index)
        else:
            if len(index) > len(self._lengths):
                self.forget_step()
            self._kept = {layer: [_moved(x, index, self.n_keys) for x in kept] for layer, kept in self._kept.items()}
            self._lengths, self._fronts = _moved(self._lengths, index), _moved(self._fronts, index)
            self._positions, self._at = _moved(self._positions, index), _moved(self._at, index)
        self._states = {layer: _moved(state, index) for layer, state in self._states.items()}
        if (sources != np.arange(len(sources))).any():  # beams stay with their source: nothing moves
            self._cross = {layer: [_moved(x, sources) for x in kept] for layer, kept in self._cross.items()}
        self.rows_per_source, self.n_rows = rows_per_source, len(index)
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

    def _settle(self) -> None:
        """Every stream's keys stand in its own row from now on."""
        if self._owners is None:
            return
        rows, places = self._owners[: self.n_rows, : self.n_keys], np.arange(self.n_keys)
        for kept in self._kept.values():
            for i, old in enumerate(kept):
                kept[i] = np.zeros_like(old)
                kept[i][: self.n_rows, :, : self.n_keys] = old[rows, :, places].swapaxes(1, 2)
        self._owners = None
        self.forget_step()

    def join(self, other: KVCache) -> None:
        """Takes in the rows of `other`, behind its own, in place where there is room."""
        sizes = self.n_rows, other.n_rows
        if self.rows_per_source != other.rows_per_source:
            self.reorder(np.arange(sizes[0]))
            other.reorder(np.arange(sizes[1]))
        self._settle()
        other._settle()
        before = self._arrays()
        are_even = self._lengths is None and other._lengths is None
        if not (are_even and (self.n_keys, self.n_front) == (other.n_keys, other.n_front)):
            if self._lengths is None:
                self.forget_step()  # which has all streams equally far
            self._lengths, self._fronts, self._positions, self._at = (
                _joined(mine, theirs, sizes) for mine, theirs in zip(self._told_of_each(), other._told_of_each(), strict=True)
            )
        if self._front is not None or other._front is not None:
            masks = [np.ones((each.n_rows, each.n_front), bool) if each._front is None else each._front for each in (self, other)]
            most = max(mask.shape[1] for mask in masks)
            self._front = np.concatenate([np.pad(x, [(0, 0), (0, most - x.shape[1])], constant_values=True) for x in masks])
        for layer, kept in self._kept.items():
            theirs = other._kept.get(layer, [x[:0, :, :0] for x in kept])  # none, before its first step
            self._kept[layer] = [_joined(x, y[:, :, : other.n_keys], sizes) for x, y in zip(kept, theirs, strict=True)]
        sources = sizes[0] // self.rows_per_source, sizes[1] // self.rows_per_source
        self._cross = {
            layer: [_joined(x, y, sources) for x, y in zip(kept, other._cross[layer], strict=True)] for layer, kept in self._cross.items()
        }
        self._states = {layer: _joined(state, other._states.get(layer, state[:0]), sizes) for layer, state in self._states.items()}
        self.n_keys, self.n_rows = max(self.n_keys, other.n_keys), sum(sizes)
        self.n_front = max(self.n_front, other.n_front)
        if any(x is not y for x, y in zip(before, self._arrays(), strict=True)):
            self.forget_step()

    def _arrays(self) -> list[np.ndarray | None]:
        """That a noted step has in its calls."""
        found = [x for kept in (*self._kept.values(), *self._cross.values()) for x in kept]
        return [*found, *self._states.values(), self._lengths, self._positions, self._at]

    def _told_of_each(self) -> list[np.ndarray]:
        """How many keys each stream has, how many rows in front, and room for the position and the row of its next token."""
        if self._lengths is not None:
            return [self._lengths, self._fronts, self._positions, self._at]
        n = self.n_rows
        return [np.full(n, self.n_keys), np.full(n, self.n_front), np.zeros((n, 1), np.int64), np.zeros(n, np.int64)]


def _moved(x: np.ndarray, index: np.ndarray, n_keys: int | None = None) -> np.ndarray:
    """x (B, ...), whose row i becomes what row index[i] was: in place, unless there is no room. n_keys: the keys that count."""
    if len(index) > len(x):
        return x[index]
    rows = np.flatnonzero(index != np.arange(len(index)))
    if n_keys is None:
        x[rows] = x[index[rows]]
    else:
        x[rows, :, :n_keys] = x[index[rows], :, :n_keys]
    return x


def _joined(x: np.ndarray, y: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    """The first rows of x (B, ...) and y (B, ...) behind each other, so many of each; filled up with zeros where there are fewer.

    In place where there is room in x; else in an array with room for twice as many rows as x has.
    """
    n, end = sizes[0], sum(sizes)
    shape = tuple(map(max, x.shape[1:], y.shape[1:]))
    if end > len(x) or shape != x.shape[1:]:
        wide = np.zeros((len(x) if end <= len(x) else max(end, 2 * len(x)), *shape), x.dtype)
        wide[(slice(n), *map(slice, x.shape[1:]))] = x[:n]
        x = wide
    x[n:end] = 0
    x[(slice(n, n + min(len(y), sizes[1])), *map(slice, y.shape[1:]))] = y[: sizes[1]]
    return x
