"""The best rows for a query: exact search by inner product, over one bank or several."""

from __future__ import annotations

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


class BestRows:
    """The k best rows for each of queries (B, H, T, d), over any number of banks. Holds copies of the best rows alone."""

    def __init__(self, queries: np.ndarray, k: int):
        self.k, self.shape = k, queries.shape
        batch, heads, length, width = queries.shape
        self._queries = np.ascontiguousarray(queries.reshape(batch, heads * length, width))
        self._scores: np.ndarray | None = None

    def search(self, hidden: Array, positions: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Looks through a bank: hidden (B, M, d), positions (B, M), and valid (B, M), None for all.

        Or hidden (M, d) and positions (M,), rows that all streams share. Where hidden (B, M, d) is a Var, so is the view's bank.
        """
        batch, n_queries, width = self._queries.shape
        k = min(self.k, hidden.shape[-2])
        # A float64 model is for checks: it may pay for a copy.
        plain = value_of(hidden).astype(self._queries.dtype, copy=False)
        if hidden.ndim == 3:
            self._keep(*search(self._queries, plain, k, valid), hidden if isinstance(hidden, Var) else plain, positions)
            return
        hidden = plain
        everyone = np.broadcast_to(hidden, (batch, *hidden.shape)), np.broadcast_to(positions, (batch, len(positions)))
        if valid is not None:
            self._keep(*search(self._queries, everyone[0], k, valid), *everyone)
            return
        # All queries of the batch are searched together, which reads the bank once.
        scores, index = search(self._queries.reshape(1, -1, width), hidden[None], k)
        self._keep(scores.reshape(batch, n_queries, k), index.reshape(batch, n_queries, k), *everyone)

    def view(self) -> View | None:
        """The best rows, with an index of four axes; None if no bank was searched."""
        if self._scores is None:
            return None
        index = np.ascontiguousarray(self._index.reshape(*self.shape[:3], -1))
        return View(("hidden", self._hidden), self._valid, index=index, positions=self._positions)

    def _keep(self, scores: np.ndarray, index: np.ndarray, hidden: Array, positions: np.ndarray) -> None:
        """Merges results (B, N, k) from hidden (B, M, d) with positions (B, M) into those so far; index -1 is none."""
        index, hidden, positions, valid = _compact(index, hidden, positions)
        if self._scores is None:
            self._scores, self._index, self._hidden, self._positions, self._valid = scores, index, hidden, positions, valid
            return
        index = np.where(index < 0, -1, index + self._hidden.shape[1])
        self._hidden = np.concatenate([self._hidden, hidden], axis=1)
        self._positions = np.concatenate([self._positions, positions], axis=1)
        self._valid = np.concatenate([self._valid, valid], axis=1)
        scores, index = np.concatenate([self._scores, scores], axis=2), np.concatenate([self._index, index], axis=2)
        best = np.argsort(-scores, axis=2, kind="stable")[:, :, : self.k]
        self._scores, self._index = np.take_along_axis(scores, best, 2), np.take_along_axis(index, best, 2)


def _compact(index: np.ndarray, hidden: Array, positions: np.ndarray) -> tuple[np.ndarray, Array, np.ndarray, np.ndarray]:
    """A small bank of only the rows that index (B, N, k) names: the index into it, hidden, positions and valid."""
    batch = len(index)
    used = np.zeros((batch, hidden.shape[1] + 1), bool)  # the last column takes the -1s
    used[np.arange(batch)[:, None, None], index] = True
    used = used[:, :-1]
    # Row r of the small bank of stream b is its r-th used row; shorter banks are filled up with row 0.
    place, counts = np.cumsum(used, axis=1) - 1, used.sum(axis=1)
    rows = np.zeros((batch, counts.max(initial=0)), np.int64)
    for b in range(batch):
        rows[b, : counts[b]] = np.flatnonzero(used[b])
    pick = np.arange(batch)[:, None]
    index = np.where(index < 0, -1, place[pick[:, :, None], np.maximum(index, 0)])
    return index, hidden[pick, rows], positions[pick, rows], np.arange(rows.shape[1]) < counts[:, None]
