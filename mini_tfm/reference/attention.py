"""Scaled dot-product attention over several key/value blocks in one softmax (arXiv 1706.03762, eq. 1).

Written for reading: one head at a time, the whole (T, S) matrix at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.elementwise import _drawn, _mix64
from mini_tfm.reference.kept import from_kept
from mini_tfm.reference.types import Block, BlockGrad, Mask, Real

__all__ = ["attention", "attention_backward", "attention_mass"]


def _visible(block, b, h, length):
    """(T, S or K) bool: which scores of head h in batch row b exist."""
    source = block.k.shape[2]
    rows = np.ones(source, bool) if block.valid is None else block.valid[b].copy()
    if block.lengths is not None:
        rows[block.lengths[b] :] = False
    if block.index is not None:
        index = block.index[b, h]
        if source == 0:
            return np.zeros(index.shape, bool)
        return (index >= 0) & rows[index]
    seen = np.broadcast_to(rows, (length, source)).copy()
    distance = np.arange(source)[None, :] - np.arange(length)[:, None] - block.offset  # 0: the query's own key
    if block.causal:
        seen &= (distance <= 0) | (np.arange(source) < block.prefix)
    if block.window is not None:
        seen &= distance > -block.window
        if not block.causal:
            seen &= distance < block.window
    return seen


def _rows(bank, block, b, h, heads):
    """The bank's rows in double: (S, D), or (T, K, D) where an index picks them (anything where it is -1)."""
    kv = h // (heads // bank.shape[1])
    rows = bank[b, kv] if block.owners is None else bank[block.owners[b], kv, np.arange(bank.shape[2])]
    rows = from_kept(rows)
    if block.index is None:
        return rows
    index = block.index[b, h]
    return rows[np.maximum(index, 0)] if len(rows) else np.zeros((*index.shape, rows.shape[1]))


def _scores(q, block, b, h, scale, cap):
    """(T, S or K): scale * q k^T, capped, + bias, -inf where hidden; which are not hidden; and the slope of the cap."""
    heads, length = q.shape[1], q.shape[2]
    seen = _visible(block, b, h, length)
    keys = _rows(block.k, block, b, h, heads)
    scores = q[b, h].astype(np.float64) @ keys.T if block.index is None else np.einsum("td,tkd->tk", q[b, h].astype(np.float64), keys)
    scores, slope = scores * scale, 1.0
    if cap is not None:
        t = np.tanh(scores / cap)
        scores, slope = cap * t, 1.0 - t * t
    if block.bias is not None:
        bias = block.bias[b, h]
        scores = np.where(bias == -np.inf, -np.inf, scores + bias)  # whatever the score: NaN + -inf would be NaN
    scores = np.where(seen, scores, -np.inf)
    return scores, scores != -np.inf, slope


def _product(weights, rows, seen):
    """sum_j weights[i, j] rows[j] over the j that i sees, so that 0 * NaN of a hidden row does not get in."""
    if rows.ndim == 3:
        return np.einsum("tk,tkd->td", weights, np.where(seen[:, :, None], rows, 0.0))
    if np.isfinite(rows).all():
        return weights @ rows
    return np.array([weights[i, seen[i]] @ rows[seen[i]] for i in range(len(weights))]).reshape(len(weights), rows.shape[1])


def _kept(dropout, seed, at_block, row, shape):
    """(T, S or K) bool: which weights of the head whose first query is row `row` of (B, H, T) dropout keeps.

    A hash of (seed, block, row, column), under two keys of the row's: nothing has to be
    stored for the backward.
    """
    if dropout == 0.0:
        return np.ones(shape, bool)
    whole = 2**64 - 1
    of_block = _mix64((seed + at_block * 0x9E3779B97F4A7C15) & whole)
    keys = [_mix64((of_block + (row + i) * 0xD1B54A32D192ED03) & whole) for i in range(shape[0])]
    low, high = (np.array([key >> shift & 0xFFFFFFFF for key in keys], np.uint32)[:, None] for shift in (0, 32))
    return _drawn(np.arange(shape[1], dtype=np.uint32), low, high) >= np.uint32(int(dropout * 2**32))


def attention(
    q: Real, blocks: Sequence[Block], scale: float, *, dropout: float = 0.0, seed: int = 0, cap: float | None = None
) -> tuple[Real, Real]:
    """out (B, H, T, D), lse (B, H, T) of queries q (B, H, T, D) over all blocks in one softmax.

    lse is the log of the sum of exponentials of the scores, what the backward needs, in float64 for every dtype. A query that
    sees no key gets a zero row and lse -inf. dropout: the share of the normalised weights that is zeroed, 0 <= dropout < 1; the rest is
    divided by 1 - dropout. Which ones is a function of seed, 0 <= seed < 2**64, block, row and key alone. cap, from 0.001 to 1e6: a
    score is cap * tanh(score / cap) before its bias is added (arXiv 2408.00118, section 2).
    """
    q, blocks, scale, dropout, seed, cap = _checks.attention(q, blocks, scale, dropout, seed, cap)
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for b, h in np.ndindex(q.shape[:2]):
            pairs = [_scores(q, block, b, h, scale, cap)[:2] for block in blocks]
            if not pairs:
                continue
            every = np.concatenate([scores for scores, _ in pairs], axis=-1)
            top = every.max(-1, initial=-np.inf, keepdims=True)
            top = np.where(top == -np.inf, 0.0, top)
            total = np.exp(every - top).sum(-1, keepdims=True)
            lse[b, h] = (top + np.log(total))[:, 0]
            row = (b * q.shape[1] + h) * q.shape[2]
            for at_block, (block, (scores, seen)) in enumerate(zip(blocks, pairs, strict=True)):
                weights = np.exp(scores - top) / np.where(total == 0.0, 1.0, total)
                weights = np.where(_kept(dropout, seed, at_block, row, scores.shape), weights / (1.0 - dropout), 0.0)
                out[b, h] += _product(weights, _rows(block.v, block, b, h, q.shape[1]), seen).astype(q.dtype)
    return out, lse


def attention_backward(
    dout: Real,
    out: Real,
    lse: Real,
    q: Real,
    blocks: Sequence[Block],
    scale: float,
    needs: Sequence[bool] | None = None,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    cap: float | None = None,
) -> tuple[Real, list[BlockGrad]]:
    """dq (B, H, T, D) and one `BlockGrad` a block, from what `attention` took and returned.

    needs: one bool a block; where False, dk and dv are not computed (None). None: all are. dropout, seed and cap as they were.
    """
    checked = _checks.attention_backward(dout, out, lse, q, blocks, scale, needs, dropout, seed, cap)
    dout, out, lse, q, blocks, scale, needs, dropout, seed, cap = checked
    heads = q.shape[1]
    dq = np.zeros(q.shape)
    dks = [np.zeros(block.k.shape) if need else None for block, need in zip(blocks, needs, strict=True)]
    dvs = [np.zeros(block.k.shape) if need else None for block, need in zip(blocks, needs, strict=True)]
    with np.errstate(invalid="ignore", over="ignore"):
        every = enumerate(zip(blocks, dks, dvs, strict=True))
        for (b, h), (at_block, (block, dk, dv)) in itertools.product(np.ndindex(q.shape[:2]), every):
            q_h, dout_h = q[b, h].astype(np.float64), dout[b, h].astype(np.float64)
            row_lse = lse[b, h][:, None]
            delta = (dout_h * out[b, h]).sum(-1, keepdims=True)
            scores, seen, slope = _scores(q, block, b, h, scale, cap)
            seen = seen & (row_lse != -np.inf)
            weights = np.where(seen, np.exp(scores - row_lse), 0.0)
            keys, values = _rows(block.k, block, b, h, heads), _rows(block.v, block, b, h, heads)
            dweights = dout_h @ values.T if block.index is None else np.einsum("td,tkd->tk", dout_h, values)
            kept = _kept(dropout, seed, at_block, (b * heads + h) * q.shape[2], scores.shape)
            dweights = np.where(kept, dweights / (1.0 - dropout), 0.0)
            dscores = np.where(seen, weights * (dweights - delta), 0.0)
            weights = np.where(kept, weights / (1.0 - dropout), 0.0)
            if block.dbias is not None:
                _add_through_strides(_writeable_view(block.dbias, (*q.shape[:2], *scores.shape))[b, h], dscores)
            dscores = np.where(seen, dscores * slope, 0.0)
            dq[b, h] += _product(dscores, keys, seen) * scale
            if dk is None or dv is None:
                continue
            kv = h // (heads // block.k.shape[1])
            if block.index is None:
                dk[b, kv] += _product(dscores.T, q_h, seen.T) * scale
                dv[b, kv] += _product(weights.T, dout_h, seen.T)
            else:
                i, j = np.nonzero(seen)
                np.add.at(dk[b, kv], block.index[b, h][i, j], dscores[i, j, None] * q_h[i] * scale)
                np.add.at(dv[b, kv], block.index[b, h][i, j], weights[i, j, None] * dout_h[i])
        grads = [
            BlockGrad(None if dk is None else dk.astype(q.dtype), None if dv is None else dv.astype(q.dtype), block.dbias)
            for block, dk, dv in zip(blocks, dks, dvs, strict=True)
        ]
        return dq.astype(q.dtype), grads


def attention_mass(q: Real, block: Block, lse: Real, scale: float, asking: Mask, *, cap: float | None = None) -> Real:
    """(B, S): the weights exp(score - lse) that each row of the block received from the queries asking (B, T), summed over heads.

    lse is that of `attention` over all blocks together. No gradient: what it is for (arXiv 2306.14048) chooses rows by it.
    """
    q, block, lse, scale, asking, cap = _checks.attention_mass(q, block, lse, scale, asking, cap)
    mass = np.zeros((q.shape[0], block.k.shape[2]))
    with np.errstate(invalid="ignore", over="ignore"):
        for b, h in np.ndindex(q.shape[:2]):
            scores, seen, _ = _scores(q, block, b, h, scale, cap)
            row_lse = lse[b, h][:, None]
            seen = seen & asking[b][:, None] & (row_lse != -np.inf)
            weights = np.where(seen, np.exp(scores - row_lse), 0.0)
            if block.index is None:
                mass[b] += weights.sum(axis=0)
            else:
                np.add.at(mass[b], block.index[b, h][seen], weights[seen])
    return mass.astype(q.dtype)


def _writeable_view(dbias, shape):
    """`dbias` broadcast to `shape`, writeable: several elements of the view may be one in memory."""
    strides = np.broadcast_to(dbias, shape).strides
    return np.lib.stride_tricks.as_strided(dbias, shape, strides)


def _add_through_strides(view, values):
    """view += values where several elements of `view` may be the same memory: each of them adds."""
    if not view.size:
        return
    strides = [stride // view.itemsize for stride in view.strides]
    lowest = sum(stride * (n - 1) for stride, n in zip(strides, view.shape, strict=True) if stride < 0)
    offset = sum(np.arange(n).reshape(-1, *[1] * (view.ndim - 1 - axis)) * strides[axis] for axis, n in enumerate(view.shape)) - lowest
    corner = view[tuple(slice(n - 1, None) if stride < 0 else slice(0, 1) for stride, n in zip(strides, view.shape, strict=True))]
    memory = np.lib.stride_tricks.as_strided(corner, (int(offset.max()) + 1,), (view.itemsize,))
    memory += np.bincount(offset.reshape(-1), values.reshape(-1), len(memory)).astype(view.dtype)
