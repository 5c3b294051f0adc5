"""Matrix product."""

import numpy as np

from mini_tfm.reference import _checks


def gemm(a, b, *, trans_a=False, trans_b=False, out=None, accumulate=False, bias=None):
    """out (M, N) = op(a) (M, K) @ op(b) (K, N) + bias (N,), or out += ... when `accumulate`. Returns `out`, made when None."""
    a, b, trans_a, trans_b, accumulate, bias, m, n, _ = _checks.gemm(a, b, trans_a, trans_b, out, accumulate, bias)
    a64 = (a.T if trans_a else a).astype(np.float64)
    b64 = (b.T if trans_b else b).astype(np.float64)
    if out is None:
        out = np.empty((m, n), a.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        out[...] = a64 @ b64 + (out if accumulate else 0.0 if bias is None else bias)
    return out
