"""The key/value cache of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ..autodiff import value_of

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first


class KVCache:
    """Keys and values of the tokens decoded so far, a pair of arrays a layer, doubled when full."""

    def __init__(self) -> None:
        self.length = 0  # text tokens
        self._rows = 0  # memory rows in front of them
        self._valid: np.ndarray | None = None
        self._kept: dict[int, list[np.ndarray]] = {}
        self._filled: dict[int, int] = {}
        self._cross: dict[int, tuple[Any, Any]] = {}

    def extend(self, rows: int, valid: np.ndarray) -> tuple[int, np.ndarray]:
        """Announces new keys, `rows` of them memory rows; the rows in front and the (B, keys) mask of all keys."""
        self._valid = valid if self._valid is None else np.concatenate([self._valid, valid], axis=1)
        self._rows += rows
        self.length = self._valid.shape[1] - self._rows
        return self._rows, self._valid

    def append(self, layer: int, k: Array, v: Array) -> tuple[np.ndarray, np.ndarray]:
        """Adds k, v (B, H, T, D) to a layer; all keys and values so far."""
        news = [value_of(k), value_of(v)]
        start = self._filled.get(layer, 0)
        end = start + news[0].shape[2]
        kept = self._kept.get(layer)
        if kept is None or end > kept[0].shape[2]:
            b, h, _, d = news[0].shape
            grown = [np.zeros((b, h, max(2 * start, end, 32), d), news[0].dtype) for _ in news]
            for new, old in zip(grown, kept or (), strict=False):
                new[:, :, :start] = old[:, :, :start]
            self._kept[layer] = kept = grown
        for store, new in zip(kept, news, strict=True):
            store[:, :, start:end] = new
        self._filled[layer] = end
        return kept[0][:, :, :end], kept[1][:, :, :end]

    def cross(self, layer: int, project: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The projected encoder outputs, computed once, and laid out head by head: every step reads them in that order."""
        if layer not in self._cross:
            k, v = project()
            self._cross[layer] = np.ascontiguousarray(k), np.ascontiguousarray(v)
        return self._cross[layer]
