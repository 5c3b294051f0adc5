"""The cache of a decoder: keys and values, and the states of recurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..autodiff import value_of
from ..weights import Array

FIRST_CAPACITY = 32  # keys


class KVCache:
    """Keys and values of what was decoded so far, a pair of arrays (B, H, capacity, D) a layer, doubled when full.

    Every stream's keys stand from the left on: rows of memories first, then its tokens. n_keys: the most that a stream has.
    lengths: (B,) how many each has, where they differ; None: all have n_keys. So a stream's bits are those it has alone.
    A layer with a recurrence in place of self-attention has no keys, but a state (B, d).
    """

    def __init__(self) -> None:
        self.n_keys = self.n_front = 0
        self.lengths: np.ndarray | None = None
        self.positions = np.zeros(0, np.int64)
        self._kept: dict[int, list[np.ndarray]] = {}
        self._cross: dict[int, list[np.ndarray]] = {}
        self._states: dict[int, np.ndarray] = {}

    @property
    def is_empty(self) -> bool:
        return self.n_keys == 0

    @property
    def key_positions(self) -> np.ndarray | None:
        return None if self.lengths is None else np.broadcast_to(np.arange(self.n_keys) - self.n_front, (len(self.lengths), self.n_keys))

    def extend(self, n_front: int, n_tokens: int) -> None:
        """Announces new keys: `n_front` rows of memories, which come first of all, and `n_tokens` tokens behind what there is."""
        self.n_front += n_front
        if self.lengths is None:
            done = self.n_keys + n_front - self.n_front
            self.positions = np.arange(done, done + n_tokens)
        else:
            self.positions = (self.lengths - self.n_front)[:, None] + np.arange(n_tokens)
            self.lengths = self.lengths + n_tokens
        self.n_keys += n_front + n_tokens

    def append(self, layer: int, k: Array, v: Array) -> tuple[np.ndarray, np.ndarray]:
        """Adds k, v (B, H, T, D) of what was announced to a layer; gives all its keys and values, (B, H, n_keys, D)."""
        kept = self._with_room(layer, value_of(k), value_of(v))
        for store, new in zip(kept, (value_of(k), value_of(v)), strict=True):
            if self.lengths is None:
                store[:, :, self.n_keys - new.shape[2] : self.n_keys] = new
            else:
                rows = np.arange(len(new))[:, None]
                store[rows, :, self.positions + self.n_front] = new.swapaxes(1, 2)
        return kept[0][:, :, : self.n_keys], kept[1][:, :, : self.n_keys]

    def _with_room(self, layer: int, *news: np.ndarray) -> list[np.ndarray]:
        kept = self._kept.get(layer)
        if kept is None or self.n_keys > kept[0].shape[2]:
            b, h, _, d = news[0].shape
            capacity = max(2 * kept[0].shape[2] if kept else FIRST_CAPACITY, self.n_keys)
            grown = [np.zeros((b, h, capacity, d), new.dtype) for new in news]
            for wide, old in zip(grown, kept or (), strict=False):
                wide[:, :, : old.shape[2]] = old
            self._kept[layer] = kept = grown
        return kept

    def cross(self, layer: int, project: Callable[[], tuple[Array, Array]]) -> tuple[np.ndarray, np.ndarray]:
        """The projected encoder outputs, computed once, and laid out head by head: every step reads them in that order."""
        if layer not in self._cross:
            self._cross[layer] = [np.ascontiguousarray(x) for x in project()]
        k, v = self._cross[layer]
        return k, v

    def state(self, layer: int) -> np.ndarray | None:
        """What the recurrence of a layer has come to, (B, d); None where nothing was decoded."""
        return self._states.get(layer)

    def keep_state(self, layer: int, state: Array) -> None:
        """Takes what the recurrence has come to now."""
        self._states[layer] = value_of(state)

    # Rows of the batch

    def reorder(self, index: np.ndarray, *, same_sources: bool = False) -> None:
        """Row i becomes what row index[i] was. same_sources: the encoder has read the same for both."""
        self._kept = {layer: [x[index] for x in kept] for layer, kept in self._kept.items()}
        self._states = {layer: state[index] for layer, state in self._states.items()}
        if not same_sources:
            self._cross = {layer: [x[index] for x in kept] for layer, kept in self._cross.items()}
        self.lengths = None if self.lengths is None else self.lengths[index]

    def join(self, other: KVCache, sizes: tuple[int, int]) -> None:
        """Takes in the rows of `other`, behind its own; `sizes` are the numbers of rows of the two."""
        lengths = [
            np.full(size, cache.n_keys) if cache.lengths is None else cache.lengths
            for cache, size in zip((self, other), sizes, strict=True)
        ]
        self._kept = {layer: _stacked(zip(kept, other._kept[layer], strict=True)) for layer, kept in self._kept.items()}
        self._cross = {layer: _stacked(zip(kept, other._cross[layer], strict=True)) for layer, kept in self._cross.items()}
        self._states = {layer: np.concatenate([state, other._states[layer]]) for layer, state in self._states.items()}
        self.lengths, self.n_keys = np.concatenate(lengths), max(self.n_keys, other.n_keys)
        if (self.lengths == self.n_keys).all():
            self.lengths = None


def _stacked(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Arrays (B, H, S, D) behind each other; the one with fewer keys is filled up with zeros."""
    found = []
    for pair in pairs:
        most = max(x.shape[2] for x in pair)
        found.append(np.concatenate([np.pad(x, [(0, 0), (0, 0), (0, most - x.shape[2]), (0, 0)]) for x in pair]))
    return found
