"""The best rows for a query: exact search by inner product, over one bank or several."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _core
from ..autodiff import Var, value_of
from .base import Array, View


def search(queries: np.ndarray, bank: np.ndarray, k: int, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of bank (B, M, d) of largest inner product with each of queries (B, N, d): scores and index, (B, N, k).

    Best first; of equal scores the lower index first. valid (B, M) hides rows. Where fewer than k are left, index is -1
    and score -infinity. The bank is read where it lies, in a mapped file too.
    """
    return _core.search(queries, bank, k, valid)


PENDING = 1 << 14  # places that are filled before results are merged
FEW = 1 << 10  # places for which a row each is quicker than to look for those that share one


class BestRows:
    """The k best rows for each of queries (B, H, T, d), over any number of banks. Holds copies of the best rows alone.

    Rows that are equal to the bit are copies, whatever their positions: all but the newest give way to rows that are none, so that
    a text read many times does not take every place. The newest is the last one in the order of the banks.
    """

    def __init__(self, queries: np.ndarray, k: int):
        self.k, self.shape = k, queries.shape
        batch, heads, length, width = queries.shape
        self._queries = np.ascontiguousarray(queries.reshape(batch, heads * length, width))
        n = heads * length
        self._searched, self._seen = False, 0
        self._pending: list[tuple[Any, ...]] = []
        self._found = _Found(np.zeros((batch, n, 0), queries.dtype), np.zeros((batch, n, 0), np.int64))
        self._copy = np.zeros((batch, n, 0), bool)
        self._hidden, self._valid = np.zeros((batch, 0, width), queries.dtype), np.zeros((batch, 0), bool)
        self._positions, self._numbers = np.zeros((batch, 0), np.int64), np.zeros((batch, 0), np.int64)

    def search(self, hidden: Array, positions: np.ndarray, valid: np.ndarray | None = None, *, key: Hashable = None) -> None:
        """Looks through a bank: hidden (B, M, d), positions (B, M), and valid (B, M), None for all.

        Or hidden (M, d), rows that all streams share, with positions (M,) or (B, M). Where hidden (B, M, d) is a Var, so is the view's
        bank. key: names the rows, the same for the same:
        what is known of copies among them is kept for the next search.
        """
        self._searched = True
        if not hidden.shape[-2]:
            return
        if not isinstance(hidden, Var):
            hidden = hidden.astype(self._queries.dtype, copy=False)  # a float64 model is for checks: it may pay for a copy
        self._search(hidden, positions, valid, key)
        self._seen += hidden.shape[-2]

    def _search(self, hidden: Array, positions: np.ndarray, valid: np.ndarray | None, key: Hashable) -> None:
        newest = _newest_among(key)
        if newest is None:
            found = self._best(hidden, valid, self.k + 1)  # one more, which may be a copy of the last
            if not found.ties().any():
                return self._keep(found.first(self.k), hidden, positions)
            newest = _newest(value_of(hidden), valid, key)
        shown = newest if valid is None else newest & valid
        self._keep(self._best(hidden, shown, self.k), hidden, positions)
        if not newest.all() and (shown.sum(axis=-1) < self.k).any():
            self._keep(self._best(hidden, ~newest if valid is None else ~newest & valid, self.k), hidden, positions)

    def view(self) -> View | None:
        """The best rows, with an index of four axes; None if no bank was searched."""
        if not self._searched:
            return None
        self._merge()
        index = np.ascontiguousarray(self._found.index.reshape(*self.shape[:3], -1))
        return View(("hidden", self._hidden), self._valid, index=index, positions=self._positions)

    def _best(self, hidden: np.ndarray, valid: np.ndarray | None, k: int) -> _Found:
        batch, n_queries, width = self._queries.shape
        k = min(k, hidden.shape[-2])
        if hidden.ndim == 3:
            return _Found(*search(self._queries, value_of(hidden), k, valid))
        if valid is not None and valid.ndim == 2 and batch > 1:
            return _Found(*search(self._queries, np.broadcast_to(hidden, (batch, *hidden.shape)), k, valid))
        # All queries of the batch are searched together, which reads the bank once.
        scores, index = search(self._queries.reshape(1, -1, width), hidden[None], k, None if valid is None else valid.reshape(1, -1))
        return _Found(scores.reshape(batch, n_queries, k), index.reshape(batch, n_queries, k))

    def _keep(self, found: _Found, hidden: Array, positions: np.ndarray) -> None:
        """Takes what was found among hidden, (B, M, d) or (M, d); index -1 is none. It is merged when there is enough of it."""
        if self._found.scores.shape[2] == self.k:
            # Most rows are not as good as the worst so far, if that is no copy.
            worst = np.where(self._copy[:, :, -1], -np.inf, self._found.scores[:, :, -1])
            good = (found.scores >= worst[:, :, None]) & (found.index >= 0)
            found = found.first(int(good.sum(axis=2).max(initial=0)))
        if not found.index.size:
            return
        few = found.index[0].size <= FEW
        index, *rows = _compact(found.index, hidden, positions, self._seen + np.arange(hidden.shape[-2]), shared=not few)
        self._pending.append((_Found(found.scores, index), *rows))
        if sum(each.index[0].size for each, *_ in self._pending) > PENDING:
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        founds, *rows = zip((self._found, self._hidden, self._valid, self._positions, self._numbers), *self._pending, strict=True)
        self._pending = []
        ends = np.cumsum([0, *(each.shape[1] for each in rows[0])])
        index = np.concatenate([np.where(each.index < 0, -1, each.index + end) for each, end in zip(founds, ends, strict=False)], axis=2)
        merged = _Found(np.concatenate([each.scores for each in founds], axis=2), index)
        hidden, _, positions, numbers = (np.concatenate(each, axis=1) for each in rows)
        merged = merged.ordered(np.argsort(-merged.scores, axis=2, kind="stable"))
        copy = np.zeros(merged.index.shape, bool)
        if (ties := merged.ties()).any():
            order = np.take_along_axis(numbers[:, None], np.maximum(merged.index, 0), 2)
            merged = merged.ordered(np.lexsort((order, -merged.scores), axis=2))
            copy[ties] = _copies(_content(value_of(hidden)), merged.index, ties)
            order = np.argsort(np.where(merged.index < 0, 2, copy), axis=2, kind="stable")
            merged, copy = merged.ordered(order), np.take_along_axis(copy, order, 2)
        merged, self._copy = merged.first(self.k), copy[:, :, : self.k]
        index = np.full(merged.index.shape, -1)
        for b, number in enumerate(numbers):  # a row that has several places is held at one
            _, first, which = np.unique(number, return_index=True, return_inverse=True)
            index[b] = np.where(merged.index[b] < 0, -1, first[which][np.maximum(merged.index[b], 0)])
        index, self._hidden, self._valid, self._positions, self._numbers = _compact(index, hidden, positions, numbers)
        self._found = _Found(merged.scores, index)


@dataclass(frozen=True)
class _Found:
    """Scores and index, (B, N, K) each, best first; index -1 is none."""

    scores: np.ndarray
    index: np.ndarray

    def ties(self) -> np.ndarray:
        """(B, N) bool: the queries that score two rows the same, as they do copies."""
        return ((self.scores[:, :, 1:] == self.scores[:, :, :-1]) & (self.index[:, :, 1:] >= 0)).any(axis=2)

    def ordered(self, order: np.ndarray) -> _Found:
        return _Found(np.take_along_axis(self.scores, order, 2), np.take_along_axis(self.index, order, 2))

    def first(self, k: int) -> _Found:
        return self if k >= self.scores.shape[2] else _Found(self.scores[:, :, :k], self.index[:, :, :k])


# Copies

_MOST_KEYS = 4096
_known: dict[Hashable, np.ndarray] = {}  # by key: which rows of a bank are the newest with their content
_FACTORS = np.random.default_rng(0).integers(1 << 63, size=1 << 16, dtype=np.uint64) | np.uint64(1)


def _content(hidden: np.ndarray) -> np.ndarray:
    """(..., d) -> (...) 64 bits of the content of each row: rows that have the same are equal."""
    words = np.ascontiguousarray(hidden).view(np.uint32).astype(np.uint64)
    words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    return (words * np.resize(_FACTORS, words.shape[-1])).sum(axis=-1, dtype=np.uint64)


def _newest_among(key: Hashable) -> np.ndarray | None:
    return None if key is None else _known.get(key)


def _newest(hidden: np.ndarray, valid: np.ndarray | None, key: Hashable) -> np.ndarray:
    """(M,) or (B, M) bool: which rows are valid and have no copy behind them that is."""
    content = _content(hidden)
    if valid is not None:
        content = np.broadcast_to(content, valid.shape)
    rows = content.reshape(-1, content.shape[-1])
    newest: np.ndarray = np.zeros(rows.shape, bool)
    for b, row in enumerate(rows):
        among = np.arange(len(row)) if valid is None else np.flatnonzero(valid[b])
        newest[b, among[::-1][np.unique(row[among][::-1], return_index=True)[1]]] = True
    newest = newest.reshape(content.shape)
    if key is not None and valid is None:
        while len(_known) >= _MOST_KEYS:
            _known.pop(next(iter(_known)), None)
        _known[key] = newest
    return newest


def _copies(content: np.ndarray, index: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(n, K) bool, of the queries chosen (B, N): which of index (B, N, K) have a copy behind them in their order."""
    stream, _ = np.nonzero(chosen)
    index = index[chosen]
    same = content[stream[:, None], index]
    order = np.lexsort((np.broadcast_to(np.arange(index.shape[1]), index.shape), same, index >= 0), axis=1)
    same, there = np.take_along_axis(same, order, 1), np.take_along_axis(index, order, 1) >= 0
    behind = np.zeros(index.shape, bool)
    behind[:, :-1] = (same[:, 1:] == same[:, :-1]) & there[:, 1:] & there[:, :-1]
    copy = np.zeros(index.shape, bool)
    np.put_along_axis(copy, order, behind, 1)
    return copy


def _compact(index: np.ndarray, hidden: Array, *more: np.ndarray, shared: bool = True) -> tuple[np.ndarray, ...]:
    """A small bank of only the rows that index (B, N, k) names, of hidden (B, M, d) or (M, d), and what else is known of these, (B, M)
    or (M,): the index into it, its hidden rows, which are valid, and the rest. shared: each row once; else one for each place."""
    batch, n_queries, k = index.shape
    if not shared:
        chosen = np.maximum(index, 0).reshape(batch, -1)
        small, valid = np.where(index < 0, -1, np.arange(n_queries * k).reshape(1, n_queries, k)), index.reshape(batch, -1) >= 0
    else:
        rows = [np.unique(one[one >= 0]) for one in index]
        counts = np.array([len(row) for row in rows])
        chosen = np.zeros((batch, counts.max(initial=0)), np.int64)  # shorter banks are filled up with row 0
        small, valid = np.full(index.shape, -1), np.arange(chosen.shape[1]) < counts[:, None]
        for b, row in enumerate(rows):
            chosen[b, : len(row)] = row
            small[b] = np.where(index[b] < 0, -1, np.searchsorted(row, index[b]))
    pick = np.arange(batch)[:, None]
    picked = [each[pick, chosen] if each.ndim == dims else each[chosen] for each, dims in zip((hidden, *more), (3, 2, 2), strict=True)]
    return small, picked[0], valid, *picked[1:]
