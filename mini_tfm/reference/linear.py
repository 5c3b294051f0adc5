"""Matrix product."""

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Real

__all__ = ["gemm"]


def to_bfloat16(x):
    """The nearest bfloat16, ties to even, in uint16."""
    return (in_bfloat16(x).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    """bfloat16 in uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def in_bfloat16(x):
    """To the nearest bfloat16, ties to even, as float32; NaN stays one."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return (np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(64), nearest).astype(np.uint32) << np.uint32(16)).view(np.float32)


def gemm(
    a: Real,
    b: Real,
    *,
    trans_a: bool = False,
    trans_b: bool = False,
    out: Real | None = None,
    accumulate: bool = False,
    bias: Real | None = None,
    bfloat16: bool = False,
) -> Real:
    """out (M, N) = op(a) (M, K) @ op(b) (K, N) + bias (N,), or out += ... when `accumulate`. Returns `out`, made when None.

    bfloat16: a and b are rounded to bfloat16 first; their products are exact then, and summed in float32. For float32 alone.
    """
    a, b, trans_a, trans_b, accumulate, bias, m, n, _ = _checks.gemm(a, b, trans_a, trans_b, out, accumulate, bias)
    if _checks.bfloat16(bfloat16, "a", a):
        a, b = in_bfloat16(a), in_bfloat16(b)
    a64 = (a.T if trans_a else a).astype(np.float64)
    b64 = (b.T if trans_b else b).astype(np.float64)
    if out is None:
        out = np.empty((m, n), a.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        out[...] = a64 @ b64 + (out if accumulate else 0.0 if bias is None else bias)
    return out
