"""Fused, differentiable operations: one compiled forward, one compiled backward for all inputs.

Each takes arrays or Vars. With plain arrays it just computes; with a Var among its inputs it records itself
(see autodiff.py). Legend: B batch, H heads, T queries, S keys, D head size, d model size, N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from . import _core
from ._core import Block
from .autodiff import Var, gathered, is_traced, record, value_of

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first


_bfloat16 = contextvars.ContextVar("bfloat16_products", default=False)


@contextlib.contextmanager
def bfloat16_products(enabled: bool = True) -> Iterator[None]:
    """Within it, the factors of the products of `linear` and `linear_cross_entropy` are rounded to bfloat16.

    Forward, and in the backward of what was computed within it (arXiv 1710.03740: weights and sums stay float32). All else, sums of
    bias gradients too, is as without it. Of float32 alone: float64 raises InvalidType. About twice as fast where the processor
    has such products (`mt.show_config()`); elsewhere the same numbers up to the order of summation, at the speed of float32.
    """
    before = _bfloat16.set(enabled)
    try:
        yield
    finally:
        _bfloat16.reset(before)


def _flat(x: np.ndarray) -> np.ndarray:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def linear(x: Array, weight: Array, bias: Array | None = None, *, transposed: bool = False) -> Array:
    """x (..., d_in) weight (d_in, d_out) + bias (d_out,) -> (..., d_out); transposed: weight is (d_out, d_in)."""
    vx, vw, vb = value_of(x), value_of(weight), value_of(bias)
    rows, bfloat16 = _flat(vx), _bfloat16.get()
    y = _core.gemm(rows, vw, trans_b=transposed, bias=vb, bfloat16=bfloat16)
    y = y if vx.ndim == 2 else y.reshape(*vx.shape[:-1], y.shape[1])
    if not is_traced(x, weight, bias):
        return y

    def vjp(dy: np.ndarray) -> tuple[Any, ...]:
        d_out = np.ascontiguousarray(_flat(dy))
        dx = dweight = dbias = None
        if type(x) is Var:
            dx = _product(x, d_out, vw, trans_b=not transposed, bfloat16=bfloat16)
        if type(weight) is Var:
            a, b = (d_out, rows) if transposed else (rows, d_out)
            dweight = _product(weight, a, b, trans_a=True, bfloat16=bfloat16)
        if type(bias) is Var:
            dbias = _product(bias, _ones(len(d_out), d_out.dtype), d_out)
        return dx, dweight, dbias

    return record(y, (x, weight, bias), vjp, fresh=True)


def _product(of: Var, a: np.ndarray, b: np.ndarray, **flags: Any) -> np.ndarray | None:
    """The gradient a b of `of`: added in place to what there is, else new."""
    into = gathered(of)
    if into is None or not into.flags.c_contiguous:
        return _core.gemm(a, b, **flags).reshape(of.value.shape)
    into = into if into.ndim == 2 else into.reshape(-1, b.shape[0] if flags.get("trans_b") else b.shape[1])
    _core.gemm(a, b, out=into, accumulate=True, **flags)
    return None


@functools.lru_cache(16)
def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    """(1, n), by which a product sums n rows."""
    ones = np.ones((1, n), dtype)
    ones.flags.writeable = False
    return ones


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    y = _core.softmax(value_of(x))
    return record(y, (x,), lambda dy: (_core.softmax_backward(y, dy),), fresh=True) if is_traced(x) else y


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow: through tanh."""
    return np.tanh(x * 0.5) * 0.5 + 0.5


def norm(x: Array, weight: Array, bias: Array | None, eps: float, kind: str) -> Array:
    """Layer norm (arXiv 1607.06450) or, with kind "rms", RMS norm (arXiv 1910.07467) over the last axis."""
    vx, vw = value_of(x), value_of(weight)
    if kind == "rms":
        y, rstd = _core.rms_norm(vx, vw, eps)
    else:
        y, mean, rstd = _core.layer_norm(vx, vw, value_of(bias), eps)
    if not is_traced(x, weight, bias):
        return y

    def vjp(dy: np.ndarray) -> tuple[Any, ...]:
        if kind == "rms":
            return (*_core.rms_norm_backward(dy, vx, vw, rstd), None)
        dx, dweight, dbias = _core.layer_norm_backward(dy, vx, vw, mean, rstd)
        return dx, dweight, dbias

    return record(y, (x, weight, bias), vjp, fresh=True)


def activation(x: Array, kind: str) -> Array:
    """relu, gelu (exact), gelu_tanh or silu."""
    vx = value_of(x)
    y = _core.activation(vx, kind)
    return record(y, (x,), lambda dy: (_core.activation_backward(vx, dy, kind),), fresh=True) if is_traced(x) else y


def add(x: Array, y: Array) -> Array:
    """x + y, of one shape: a kernel, so that decoding steps may note it."""
    return x + y if is_traced(x, y) else _core.add(x, y)


def embedding(table: Array, ids: np.ndarray) -> Array:
    """Rows of table (V, d) for ids (...) -> (..., d)."""
    vt = value_of(table)
    y = _core.embedding(vt, ids)
    if not is_traced(table):
        return y

    def vjp(dy: np.ndarray) -> tuple[Any]:
        into = gathered(table)
        made = _core.embedding_backward(ids, dy, np.zeros_like(vt) if into is None else into)
        return (made if into is None else None,)

    return record(y, (table,), vjp, fresh=True)


def cross_entropy(logits: Array, targets: np.ndarray, weights: np.ndarray | None = None, label_smoothing: float = 0.0) -> Array:
    """Weighted mean of the negative log-likelihood in nats: logits (N, V), targets (N,), weights (N,) -> scalar.

    A target of weight 0 does not count; its id may be anything in range.
    """
    vl = value_of(logits)
    share = _shares(len(targets), weights, vl.dtype)
    losses, lse = _core.cross_entropy(vl, targets, label_smoothing=label_smoothing)
    loss = np.asarray(np.dot(losses.astype(np.float64), share.astype(np.float64)), vl.dtype)
    if not is_traced(logits):
        return loss

    def vjp(dy: np.ndarray) -> tuple[np.ndarray]:
        return (_core.cross_entropy_backward(vl, targets, lse, share * dy, label_smoothing=label_smoothing),)

    return record(loss, (logits,), vjp, fresh=True)


def linear_cross_entropy(
    x: Array,
    weight: Array,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    *,
    bias: Array | None = None,
    transposed: bool = False,
) -> Array:
    """`cross_entropy` of `linear(x, weight, bias)` for targets of x's leading shape, without the logits (N, V).

    They are made a chunk of the vocabulary at a time, and once more for the gradient: a fourth product in place of memory.
    """
    vx, vw, vb = value_of(x), value_of(weight), value_of(bias)
    rows, ids = _flat(vx), np.reshape(targets, -1)
    share = _shares(len(ids), weights, vx.dtype)
    options = {"bias": vb, "transposed": transposed, "label_smoothing": label_smoothing, "bfloat16": _bfloat16.get()}
    losses, lse = _core.linear_cross_entropy(rows, vw, ids, **options)
    loss = np.asarray(np.dot(losses.astype(np.float64), share.astype(np.float64)), vx.dtype)
    if not is_traced(x, weight, bias):
        return loss

    def vjp(dy: np.ndarray) -> tuple[Any, ...]:
        into = gathered(weight)
        dweight = np.zeros_like(vw) if into is None and isinstance(weight, Var) else into
        dx, _, dbias = _core.linear_cross_entropy_backward(rows, vw, ids, lse, share * dy, dweight, **options)
        return dx.reshape(vx.shape), dweight if into is None else None, dbias

    return record(loss, (x, weight, bias), vjp, fresh=True)


# More logits than that are never held at once. Without them the loss of a large vocabulary takes a fourth product, 1.3 times
# the time, and a tenth of the RAM: benchmarks/benchmarks/steps.py.
LOGITS_BYTES = 1 << 25


def output_loss(
    x: Array,
    weight: Array,
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    bias: Array | None = None,
    label_smoothing: float = 0.0,
    transposed: bool = False,
) -> Array:
    """`cross_entropy` of the output layer x W + bias: with logits in RAM where they are few, else without.

    x (..., d); targets, weights of its leading shape. Without them it takes a fourth product, and no memory.
    """
    n_classes = weight.shape[0 if transposed else 1]
    if np.size(targets) * n_classes * x.dtype.itemsize > LOGITS_BYTES:
        return linear_cross_entropy(x, weight, targets, weights, label_smoothing, bias=bias, transposed=transposed)
    logits = np.reshape(linear(x, weight, bias, transposed=transposed), (-1, n_classes))
    return cross_entropy(logits, np.reshape(targets, -1), np.reshape(weights, -1), label_smoothing)


def _shares(n: int, weights: np.ndarray | None, dtype: Any) -> np.ndarray:
    """What each of n targets counts for in the weighted mean."""
    weights = np.ones(n, dtype) if weights is None else np.reshape(np.asarray(weights, dtype), -1)
    total = weights.sum(dtype=np.float64)
    return (weights / (total or 1.0)).astype(dtype)


def dropout(x: Array, p: float, seed: int) -> Array:
    """Zeroes each element with probability p and scales the rest by 1 / (1 - p); the mask is a function of the seed."""
    if p == 0:
        return x
    y = _core.dropout(value_of(x), p, seed)
    return record(y, (x,), lambda dy: (_core.dropout(dy, p, seed),), fresh=True) if is_traced(x) else y


def rotary(x: Array, positions: np.ndarray, frequencies: np.ndarray) -> Array:
    """Rotary positions (arXiv 2104.09864, eq. 34): x (B, H, T, D), positions (T,) or (B, T), frequencies (n,), 2 n <= D."""
    y = _core.rotary(value_of(x), positions, frequencies)
    return record(y, (x,), lambda dy: (_core.rotary(dy, positions, frequencies, inverse=True),), fresh=True) if is_traced(x) else y


def recurrence(x: Array, forget: Array, state: np.ndarray) -> Array:
    """c_t = f_t * c_{t-1} + (1 - f_t) * x_t over axis 1, f = sigmoid(forget): x, forget (B, T, d) -> (B, T, d).

    state (B, d): c before the first, becomes the last, in place. No gradient goes to it.
    """
    vx, vf = value_of(x), value_of(forget)
    if not is_traced(x, forget):
        return _core.recurrence(vx, vf, state)
    start = state.copy()
    c = _core.recurrence(vx, vf, state)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keep, dc = sigmoid(vf), dy.copy()  # dc: of all that comes after, too
        for t in range(c.shape[1] - 1, 0, -1):
            dc[:, t - 1] += keep[:, t] * dc[:, t]
        before = np.concatenate([start[:, None], c[:, :-1]], axis=1)[:, : c.shape[1]]
        return (1 - keep) * dc, (before - vx) * dc * keep * (1 - keep)

    return record(c, (x, forget), vjp, fresh=True)


@dataclasses.dataclass(frozen=True)
class DistanceBias:
    """A bias that depends on key - query alone: table (H, T + S - 1), entry [h, j - i + T - 1] for query i, key j.

    The kernel reads it through strides, so the (H, T, S) array never exists, nor does its gradient.
    """

    table: Array
    n_queries: int
    n_keys: int

    def strided(self, table: np.ndarray) -> np.ndarray:
        h, j = table.strides
        return np.lib.stride_tricks.as_strided(table[:, self.n_queries - 1 :], (1, len(table), self.n_queries, self.n_keys), (0, h, -j, j))


def relative_buckets(distance: np.ndarray, n_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Bucket of each distance = key - query (arXiv 1910.10683, section 2.1): exact when near, logarithmic when far."""
    bucket = np.zeros(distance.shape, np.int64)
    if bidirectional:
        n_buckets //= 2
        bucket += (distance > 0) * n_buckets
        far = np.abs(distance)
    else:
        far = np.maximum(-distance, 0)
    exact = n_buckets // 2
    scaled = np.log(np.maximum(far, exact) / exact) / np.log(max_distance / exact) * (n_buckets - exact)
    return bucket + np.where(far < exact, far, np.minimum(exact + scaled.astype(np.int64), n_buckets - 1))


def attention(q: Array, blocks: Sequence[Block], scale: float, *, dropout: float = 0.0, seed: int = 0, cap: float | None = None) -> Array:
    """softmax(scale q k^T + bias) v over the rows of all blocks together: q (B, H, T, D) -> (B, H, T, D).

    k, v and bias of a Block may be Vars; bias may be a DistanceBias. dropout: the share of the weights that is zeroed, a
    function of the seed alone, so that the backward draws it again. cap: a score is cap * tanh(score / cap) before its bias is added.
    """
    return attention_with_lse(q, blocks, scale, dropout=dropout, seed=seed, cap=cap)[0]


def attention_with_lse(
    q: Array, blocks: Sequence[Block], scale: float, *, dropout: float = 0.0, seed: int = 0, cap: float | None = None
) -> tuple[Array, np.ndarray]:
    """`attention`, and the log-sum-exp of each query's scores (B, H, T), which carries no gradient."""
    if type(q) is not Var and all(map(_is_plain, blocks)):
        return _core.attention(q, blocks, scale, dropout=dropout, seed=seed, cap=cap)
    tables = [block.bias.table if isinstance(block.bias, DistanceBias) else block.bias for block in blocks]
    plain = [_plain(block, value_of(table)) for block, table in zip(blocks, tables, strict=True)]
    vq = value_of(q)
    out, lse = _core.attention(vq, plain, scale, dropout=dropout, seed=seed, cap=cap)
    parents = [q, *(x for block, table in zip(blocks, tables, strict=True) for x in (block.k, block.v, table))]
    if not is_traced(*parents):
        return out, lse

    def vjp(dy: np.ndarray) -> list[np.ndarray | None]:
        dtables = [np.zeros_like(table.value) if isinstance(table, Var) else None for table in tables]
        asked = [
            block if d is None else dataclasses.replace(block, dbias=_bias_view(original.bias, d), needs_dbias=True)
            for block, original, d in zip(plain, blocks, dtables, strict=True)
        ]
        dq, grads = _core.attention_backward(dy, out, lse, vq, asked, scale, dropout=dropout, seed=seed, cap=cap)
        return [dq, *(x for grad, d in zip(grads, dtables, strict=True) for x in (grad.dk, grad.dv, d))]

    return record(out, parents, vjp, fresh=True), lse


def _is_plain(block: Block) -> bool:
    """Whether the kernel can take it as it is."""
    return type(block.k) is not Var and type(block.v) is not Var and type(block.bias) not in (Var, DistanceBias)


def _plain(block: Block, table: Any) -> Block:
    """The block as the kernel takes it; a DistanceBias is read through its table."""
    return Block(
        value_of(block.k),
        value_of(block.v),
        block.valid,
        block.lengths,
        block.index,
        _bias_view(block.bias, table),
        causal=block.causal,
        prefix=block.prefix,
        offset=block.offset,
        window=block.window,
    )


def _bias_view(bias: Any, table: Any) -> np.ndarray | None:
    return bias.strided(table) if isinstance(bias, DistanceBias) else table


def attention_mass(q: Array, block: Block, lse: np.ndarray, scale: float, asking: np.ndarray, *, cap: float | None = None) -> np.ndarray:
    """Attention each row of `block` received, summed over heads and the queries `asking` (B, T): (B, S). No gradient."""
    bias = block.bias
    plain = _plain(block, value_of(bias.table if isinstance(bias, DistanceBias) else bias))
    return _core.attention_mass(value_of(q), plain, lse, scale, asking, cap=cap)


def attention_weights(q: Array, block: Block, lse: np.ndarray, scale: float, *, cap: float | None = None) -> np.ndarray:
    """The weight exp(score - lse) of each row of `block` for each query, (B, H, T, S): `attention_mass`, not summed. No gradient.

    Attention to values that are 1 in a column of their own, some columns at a time, gives the weights among the block's rows alone.
    """
    bias, queries = block.bias, value_of(q)
    plain = _plain(block, value_of(bias.table if isinstance(bias, DistanceBias) else bias))
    (batch, heads, rows, width), nowhere = plain.k.shape, lse == -np.inf
    weights = np.zeros((*queries.shape[:3], rows), queries.dtype)
    for at in range(0, rows, width):
        one = np.broadcast_to(np.eye(rows, width, -at, dtype=queries.dtype), (batch, heads, rows, width))
        part, own = _core.attention(queries, [dataclasses.replace(plain, v=one)], scale, cap=cap)
        share = np.exp(np.where(nowhere, -np.inf, own - np.where(nowhere, 0, lse))).astype(queries.dtype)
        weights[..., at : at + width] = part[..., : rows - at] * share[..., None]
    return weights
