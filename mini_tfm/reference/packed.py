"""Weights packed once for many products, products with them, and the best k of a row."""

from typing import Any

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.elementwise import activation as activated
from mini_tfm.reference.linear import gemm, in_bfloat16
from mini_tfm.reference.types import PackedWeight, Real

__all__ = ["linear_top_k", "pack", "packed_linear", "repack"]


class _Weights(PackedWeight):
    def __init__(self, numbers, dtype, group):
        self._numbers, self.dtype, self.group = numbers, dtype, group
        self.shape, self.gated = numbers[0][0].shape[::-1], len(numbers) == 2
        self.nbytes = sum(values.nbytes + (0 if scales is None else scales.nbytes) for values, scales in numbers)

    def kept(self):
        return [(values.copy(), None if scales is None else scales.copy()) for values, scales in self._numbers]

    def unpack(self):
        weights = [np.ascontiguousarray(self._value(*each).T) for each in self._numbers]
        return tuple(weights) if self.gated else weights[0]

    def _value(self, values, scales):
        if self.dtype == "int8":
            return values.astype(np.float32) * np.repeat(scales, self.group, 1)[:, : values.shape[1]]
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32) if self.dtype == "bfloat16" else values


def _in_int8(weight, group):
    """weight (d_out, d_in) as int8 q in [-127, 127] to the nearest, and scales (d_out, groups): max|w| / 127 of `group` columns."""
    starts = range(0, weight.shape[1], group)
    q, scales = np.empty(weight.shape, np.int8), np.empty((len(weight), len(starts)), np.float32)
    for i, at in enumerate(starts):
        part = weight[:, at : at + group]
        scale = np.abs(part).max(1, keepdims=True, initial=0) / np.float32(127)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            q[:, at : at + group] = np.clip(np.where(scale > 0, np.rint(part / scale), 0), -127, 127)
        scales[:, i] = scale[:, 0]
    return q, scales


def pack(
    weight: Real, *, dtype: str = "float32", transposed: bool = False, gate: Real | None = None, group: int | None = None
) -> PackedWeight:
    """A PackedWeight of weight (d_in, d_out) float32, or of (d_out, d_in) when transposed.

    dtype  what it is kept in: float32; bfloat16 (to the nearest); int8 (symmetric, a scale for each column and
           `group` rows); float64, of float64 weights
    gate   a second weight of the same shape, for gated feed-forwards
    group  rows that share a scale in int8: a multiple of 4, at most 65536; None: 256. Smaller groups follow the values more
           closely; activations are quantised for the same groups
    """
    weight, dtype, transposed, gate, group = _checks.pack(weight, dtype, transposed, gate, group)
    weights = []
    for given in (weight,) if gate is None else (weight, gate):
        kept = np.array(given if transposed else given.T, order="C")
        if dtype == "int8":
            weights.append(_in_int8(kept, group))
        else:
            weights.append(((in_bfloat16(kept).view(np.uint32) >> np.uint32(16)).astype(np.uint16) if dtype == "bfloat16" else kept, None))
    return _Weights(weights, dtype, group)


def repack(
    values: np.ndarray,
    scales: np.ndarray | None = None,
    *,
    gate: np.ndarray | None = None,
    gate_scales: np.ndarray | None = None,
    group: int | None = None,
) -> PackedWeight:
    """The PackedWeight whose `kept` gave values and scales, and those of a gate, with the bits that it had; group: its own.

    values (d_out, d_in), scales (d_out, groups), see `PackedWeight.kept`; values say by their dtype what they are.
    """
    dtype, values, scales, gate, gate_scales, group = _checks.repack(values, scales, gate, gate_scales, group)
    given = [(values, scales)] if gate is None else [(values, scales), (gate, gate_scales)]
    return _Weights([(v.copy(), None if s is None else s.copy()) for v, s in given], dtype, group)


def _quantised(x, group):
    """scale * (q - zero) of x (N, d), q from 0 to 255 with an integral zero, for each row and `group` columns.

    The range is that of the values and 0. A group that is not all finite, or whose range is not, is all NaN.
    """
    result = np.empty(x.shape, np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for at in range(0, x.shape[1], group):
            part = x[:, at : at + group]
            low = np.minimum(part.min(1, keepdims=True), np.float32(0))
            extent = np.maximum(part.max(1, keepdims=True), np.float32(0)) - low
            inverse = np.float32(255) / extent
            zero = np.rint(-low * inverse)
            q = np.clip(np.rint(part * inverse) + zero, 0, 255)
            values = (extent / np.float32(255)).astype(np.float64) * (q.astype(np.float64) - zero)
            result[:, at : at + group] = np.where(np.isfinite(extent), np.where(extent > 1e-30, values, 0.0), np.nan)
    return result


def _product(x, weight, packed, bias):
    """x W + bias; beside weights that are not narrowed as `gemm` has it, rounded, so that what follows has the same bits."""
    x = x.reshape(_checks.rows(x))
    if packed.dtype in ("float32", "float64"):
        return gemm(x, weight, bias=bias)
    if packed.dtype == "int8":
        x = _quantised(x, packed.group)
    elif packed.dtype == "bfloat16":
        x = in_bfloat16(x)
    return x.astype(np.float64) @ weight.astype(np.float64) + (0.0 if bias is None else bias)


def packed_linear(
    x: Real,
    weight: PackedWeight,
    bias: Real | None = None,
    *,
    gate_bias: Real | None = None,
    activation: str | None = None,
    residual: Real | None = None,
    out: Real | None = None,
) -> Real:
    """y (..., d_out) = activation(x W + bias) + residual for x (..., d_in) and a PackedWeight.

    With a gate (arXiv 2002.05202): activation(x W_gate + gate_bias) * (x W + bias) + residual. activation: None or a kind
    of `activation`. x and all else are float32 (float64 with a float64 weight). Beside bfloat16 weights x is rounded to
    bfloat16, too, as `gemm(bfloat16=True)` does: the products are exact then, and summed in float32; the processor's own
    instruction, where it is used, takes factors below 1.2e-38 for zero. With int8 weights every row of x is quantised first,
    see `_quantised`; what is left of both roundings is below 1 % of a result for normal values.
    """
    x, bias, gate_bias, _, residual, _ = _checks.packed_linear(x, weight, bias, gate_bias, activation, residual, out)
    value, gate = weight.unpack() if weight.gated else (weight.unpack(), None)
    with np.errstate(invalid="ignore", over="ignore"):
        y = _product(x, value, weight, bias)
        if gate is not None:
            gated = _product(x, gate, weight, gate_bias)
            y = y * (gated if activation is None else activated(gated, activation))
        elif activation is not None:
            y = activated(y, activation)
        y = y.reshape(*x.shape[:-1], weight.shape[1]) + (0.0 if residual is None else residual)
        if out is None:
            return y.astype(x.dtype)
        out[...] = y
    return out


def linear_top_k(x: Real, weight: PackedWeight, k: int, bias: Real | None = None, *, lse: bool = False) -> tuple[Any, ...]:
    """The k largest of x W + bias in every row of x (..., d_in): scores (..., k), ids (..., k) int64.

    Best first; of equal scores the smaller id first. A score that is NaN is never returned; where fewer than k are left, id
    is -1 and score -inf. lse: also log(sum(exp(scores))) over all d_out, (...) float64.
    """
    x, k, bias, lse, n = _checks.linear_top_k(x, weight, k, bias, lse)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        y = _product(x, weight.unpack(), weight, bias).astype(np.float64)
        scores, ids = np.full((n, k), -np.inf, x.dtype), np.full((n, k), -1, np.int64)
        rounded = y.astype(x.dtype)  # equal scores are those that come out equal
        for row in range(n):
            real = np.flatnonzero(~np.isnan(y[row]))
            best = real[np.argsort(-rounded[row, real], kind="stable")[:k]]
            scores[row, : len(best)], ids[row, : len(best)] = rounded[row, best], best
        top = y.max(1, initial=-np.inf, keepdims=True)
        totals = (np.where(np.isneginf(top), 0, top) + np.log(np.exp(y - np.where(np.isneginf(top), 0, top)).sum(1, keepdims=True)))[:, 0]
    leading = x.shape[:-1]
    found = scores.reshape(*leading, k), ids.reshape(*leading, k)
    return (*found, totals.reshape(leading)) if lse else found
