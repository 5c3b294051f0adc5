"""Exact nearest rows by inner product."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Integers, Mask, Real

__all__ = ["encode_rows", "search"]

ENCODED_AT_ONCE = 1 << 20  # numbers


def encode_rows(bank: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes of the rows of bank (..., M, d), float32 or float16: (..., M, C) uint8 with C = d rounded up to 64, plus 16.

    With `search(..., codes=codes)` up to 23 queries read these in place of the rows, and of the rows only those that can be
    among the best: a fourth of the memory's traffic of float32, for the same bits. A row's codes depend on that row alone, so
    codes grow as a bank does; they lie in the machine's order of bytes. They are of use, and otherwise left unread, with AVX2 or
    AVX-512, for rows of 32 to 8192 numbers, a multiple of 16, that lie one beside the other.

    A row is rounded to 255 levels of its own, round(x / step) + 128 with step = max|x| / 127, and three float32 follow: step,
    and bounds from above of |x| and of |x - step * rounded|, from which a bound of any query's score follows
    (Cauchy-Schwarz); then 4 bytes of 0. A row whose largest magnitude is neither 0 nor between 1e-10 and 1e15, or NaN, has
    error NaN and is always scored.
    """
    bank = _checks.encode_rows(bank)
    *leading, m, d = bank.shape
    codes = np.zeros((*leading, m, _checks.code_bytes(d)), np.uint8)
    some = max(ENCODED_AT_ONCE // max(d, 1), 1)
    for at in np.ndindex(*leading):
        for start in range(0, m, some):
            x = bank[at][start : start + some].astype(np.float64)
            top = np.abs(x).max(axis=1, initial=0)
            known = (top == 0) | ((top > 1e-10) & (top < 1e15))  # what C holds itself to; False for NaN
            step = np.where(known & (top > 0), top / 127, 1).astype(np.float32)
            x[~known] = 0
            whole = np.rint(x / step[:, None])
            above = 1 + 1e-6  # more than the rounding to float32
            tail = np.zeros((len(x), 4), np.float32)
            tail[:, 0] = step
            tail[:, 1] = np.sqrt((x * x).sum(1)) * above
            tail[:, 2] = np.where(known, np.sqrt(((x - whole * step[:, None]) ** 2).sum(1)) * above, np.nan)
            coded = codes[at][start : start + some]
            coded[:, :d] = whole + 128
            coded[:, -16:] = tail.view(np.uint8)
    return codes


def search(
    queries: Real,
    bank: NDArray[Any],
    k: int,
    valid: Mask | None = None,
    *,
    scales: Real | None = None,
    codes: NDArray[np.uint8] | None = None,
) -> tuple[Real, Integers]:
    """The k best rows of bank (Bq, M, d) for each of queries (Bq, N, d): scores (Bq, N, k), index (Bq, N, k) int64.

    Best first; of equal scores the lower index first. valid (Bq, M) hides rows. A row whose score is NaN is never
    returned. Where fewer than k rows are left, index is -1 and score -inf.

    Beside float32 queries the bank may be float16, or int8 with scales (Bq, M) float32: a score is then scales[row]
    times the product with the row as stored. The bank is read where it lies, whatever its strides and alignment: never
    copied, so it may be a file mapped into memory.

    codes: `encode_rows(bank)`, of just these rows, or None. The result is the same to the bit, sooner: codes of other rows
    make it miss some. They too are read where they lie, if a row's bytes lie together.
    """
    queries, bank, k, valid, scales, _, _ = _checks.search(queries, bank, k, valid, scales, codes)
    batch, n, _ = queries.shape
    scores = np.full((batch, n, k), -np.inf, queries.dtype)
    index = np.full((batch, n, k), -1, np.int64)
    for b in range(batch):
        with np.errstate(invalid="ignore", over="ignore"):
            products = queries[b].astype(np.float64) @ bank[b].astype(np.float64, order="C").T
            products = products if scales is None else products * scales[b].astype(np.float64)
        for i in range(n):
            rows = np.flatnonzero(~np.isnan(products[i]) if valid is None else valid[b] & ~np.isnan(products[i]))
            best = rows[np.argsort(-products[i, rows], kind="stable")[:k]]
            with np.errstate(over="ignore"):
                scores[b, i, : len(best)] = products[i, best]
            index[b, i, : len(best)] = best
    return scores, index
