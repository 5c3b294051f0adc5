"""Exact nearest rows by inner product."""

import numpy as np

from mini_tfm.reference import _checks


def search(queries, bank, k, valid=None, *, scales=None):
    """The k best rows of bank (Bq, M, d) for each of queries (Bq, N, d): scores (Bq, N, k), index (Bq, N, k) int64.

    Best first; of equal scores the lower index first. valid (Bq, M) hides rows. A row whose score is NaN is never
    returned. Where fewer than k rows are left, index is -1 and score -inf.

    Beside float32 queries the bank may be float16, or int8 with scales (Bq, M) float32: a score is then scales[row]
    times the product with the row as stored. The bank is read where it lies, whatever its strides and alignment: never
    copied, so it may be a file mapped into memory.
    """
    queries, bank, k, valid, scales, _ = _checks.search(queries, bank, k, valid, scales)
    batch, n, _ = queries.shape
    scores = np.full((batch, n, k), -np.inf, queries.dtype)
    index = np.full((batch, n, k), -1, np.int64)
    for b in range(batch):
        with np.errstate(invalid="ignore", over="ignore"):
            products = queries[b].astype(np.float64) @ bank[b].astype(np.float64).T
            products = products if scales is None else products * scales[b].astype(np.float64)
        for i in range(n):
            rows = np.flatnonzero(~np.isnan(products[i]) if valid is None else valid[b] & ~np.isnan(products[i]))
            best = rows[np.argsort(-products[i, rows], kind="stable")[:k]]
            with np.errstate(over="ignore"):
                scores[b, i, : len(best)] = products[i, best]
            index[b, i, : len(best)] = best
    return scores, index
