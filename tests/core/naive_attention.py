"""Attention with everything written out: each query gets its own copy of every key of every block, and a dense mask.

A bank row that no query may name stands at the end of each bank, so that an index of -1 names it.
"""

from types import SimpleNamespace

import numpy as np


def rows_and_seen(q, block):
    """(B, H, T, N) each: which row of the bank stands at place n of a query's list, and whether the query sees it."""
    batch, heads, length, _ = q.shape
    source = block.k.shape[2]
    if block.index is not None:
        rows = block.index
    else:
        rows = np.broadcast_to(np.arange(source), (batch, heads, length, source))
    seen = rows >= 0
    for b in range(batch):
        if block.lengths is not None:
            seen[b] &= rows[b] < block.lengths[b]
        if block.valid is not None:
            seen[b] &= np.append(block.valid[b], False)[rows[b]]
    i, offset = np.arange(length)[:, None], source - length if block.offset is None else block.offset
    if block.causal:
        seen &= (rows <= i + offset) | (rows < block.prefix)
    if block.window is not None:
        seen &= rows > i + offset - block.window
        if not block.causal:
            seen &= rows < i + offset + block.window
    return rows, seen


def every_querys_own(bank, rows, heads):
    """(B, Hkv, S, D) -> (B, H, T, N, D), float64."""
    padded = np.pad(bank.astype(np.float64), ((0, 0), (0, 0), (0, 1), (0, 0)))
    b, h = np.arange(len(bank))[:, None, None, None], np.arange(heads)[None, :, None, None]
    return padded[b, h // max(heads // max(bank.shape[1], 1), 1), rows]


def back_to_the_bank(d_own, bank, rows, heads):
    """The reverse: what every query's own copies receive, added up in the bank's rows."""
    d_bank = np.zeros((bank.shape[0], bank.shape[1], bank.shape[2] + 1, bank.shape[3]))
    if d_own.size:
        b, h = np.arange(len(bank))[:, None, None, None], np.arange(heads)[None, :, None, None]
        np.add.at(d_bank, (b, h // (heads // bank.shape[1]), rows), d_own)
    return d_bank[:, :, :-1]


def attention(q, blocks, scale, cap=None):
    """A namespace: out, lse; what the backward wants of the way there; for the bounds n keys, and terms_*."""
    batch, heads, length, d = q.shape
    lists = [rows_and_seen(q, block) for block in blocks]
    keys = np.concatenate(
        [every_querys_own(block.k, rows, heads) for block, (rows, _) in zip(blocks, lists, strict=True)]
        or [np.zeros((batch, heads, length, 0, d))], axis=3)  # fmt: skip
    values = np.concatenate(
        [every_querys_own(block.v, rows, heads) for block, (rows, _) in zip(blocks, lists, strict=True)]
        or [np.zeros((batch, heads, length, 0, d))], axis=3)  # fmt: skip
    nothing = np.zeros((batch, heads, length, 0))
    bias = [np.broadcast_to(0.0 if b.bias is None else b.bias, rows.shape) for b, (rows, _) in zip(blocks, lists, strict=True)]
    bias = np.concatenate([*bias, nothing], axis=3)
    seen = np.concatenate([*(seen for _, seen in lists), nothing], axis=3) > 0
    seen &= bias != -np.inf
    bias = np.where(seen, bias, 0.0)
    products = np.einsum("bhtd,bhtnd->bhtn", q.astype(np.float64), keys) * scale
    slope = np.ones(products.shape)
    if cap is not None:
        products, slope = cap * np.tanh(products / cap), 1 / np.cosh(np.clip(products / cap, -300, 300)) ** 2
    scores = np.where(seen, products + bias, -np.inf)
    top = np.where(seen.any(-1, keepdims=True), scores.max(-1, keepdims=True, initial=-np.inf), 0.0)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    some = total > 0
    p = np.exp(scores - top) / np.where(some, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = np.where(some, top + np.log(total), -np.inf)[..., 0]
    # How far rounding moves a score, in eps; it multiplies whatever the score weighs.
    moved = d**0.5 * np.abs(q).max(initial=0.0) * np.abs(keys).max(initial=0.0) * abs(scale) + np.abs(bias).max(initial=0.0)
    return SimpleNamespace(
        out=np.einsum("bhtn,bhtnd->bhtd", p, values), lse=lse, p=p, slope=slope, keys=keys, values=values, lists=lists,
        n=keys.shape[3], terms_lse=1.0 + moved, terms_out=(1.0 + moved) * np.abs(values).max(initial=0.0),
    )  # fmt: skip


def attention_backward(dout, q, blocks, scale, cap=None):
    """A namespace: dq; dk, dv, and dscores (the dense gradient of the bias), one a block; for the bounds n keys, n_queries, terms_*."""
    heads, length = q.shape[1:3]
    forward = attention(q, blocks, scale, cap)
    dp = np.einsum("bhtd,bhtnd->bhtn", dout.astype(np.float64), forward.values)
    ds = forward.p * (dp - (forward.p * dp).sum(-1, keepdims=True))
    through = ds * forward.slope  # the cap comes before the bias
    dkeys = through[..., None] * q[:, :, :, None, :] * scale
    dvalues = forward.p[..., None] * dout[:, :, :, None, :]
    ends = np.cumsum([rows.shape[3] for rows, _ in forward.lists])[:-1]
    dk, dv, dscores = [], [], []
    for block, (rows, _), ds_n, dkeys_n, dvalues_n in zip(
        blocks, forward.lists, *(np.split(x, ends, axis=3) if blocks else [] for x in (ds, dkeys, dvalues)), strict=True
    ):
        dk.append(back_to_the_bank(dkeys_n, block.k, rows, heads))
        dv.append(back_to_the_bank(dvalues_n, block.k, rows, heads))
        dscores.append(ds_n)
    dp_max = q.shape[3] ** 0.5 * np.abs(dout).max(initial=0.0) * np.abs(forward.values).max(initial=0.0)
    return SimpleNamespace(
        dq=np.einsum("bhtn,bhtnd->bhtd", through, forward.keys) * scale, dk=dk, dv=dv, dscores=dscores,
        n=forward.n, n_queries=length * heads,
        terms_dq=forward.terms_lse * dp_max * np.abs(forward.keys).max(initial=0.0) * abs(scale),
        terms_dk=forward.terms_lse * dp_max * np.abs(q).max(initial=0.0) * abs(scale),
        terms_dv=forward.terms_lse * np.abs(dout).max(initial=0.0), terms_dbias=forward.terms_lse * dp_max,
    )  # fmt: skip
