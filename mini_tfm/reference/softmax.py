"""Softmax over the last axis (arXiv 1706.03762, eq. 1) and its backward."""

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Real

__all__ = ["log_softmax", "softmax", "softmax_backward"]


def _max_and_log_sum(x):
    """Row maximum with -inf replaced by 0, so that the subtraction is defined, and log sum exp(x - maximum). x is float64.

    Apart, for their sum loses what is small beside the maximum.
    """
    if x.shape[-1] == 0:
        return np.zeros((*x.shape[:-1], 1)), np.full((*x.shape[:-1], 1), -np.inf)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = x.max(-1, keepdims=True)
        top = np.where(top == -np.inf, 0.0, top)
        return top, np.log(np.exp(x - top).sum(-1, keepdims=True))


def softmax(x: Real, *, out: Real | None = None) -> Real:
    """exp(x) / sum exp(x) over the last axis. A row of -inf gives zeros; a row with NaN or +inf gives NaN.

    Here and in what else takes one, `out` is an array for the (first) result, of its shape; None: a new one.
    """
    x = _checks.real("x", x, min_ndim=1)
    out = _checks.optional_output(out, x, ("x", x))
    x64 = x.astype(np.float64)
    top, _ = _max_and_log_sum(x64)
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.exp(x64 - top)
        total = p.sum(-1, keepdims=True)
        return _checks.into(out, (p / np.where(total == 0.0, 1.0, total)).astype(x.dtype))


def softmax_backward(y: Real, dy: Real, *, out: Real | None = None) -> Real:
    """dx = y * (dy - sum(y * dy)), from softmax's own output."""
    y = _checks.real("y", y, min_ndim=1)
    dy = _checks.real("dy", dy, like=y, shape=y.shape)
    out = _checks.optional_output(out, y, ("y", y), ("dy", dy))
    y64, dy64 = y.astype(np.float64), dy.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return _checks.into(out, (y64 * (dy64 - (y64 * dy64).sum(-1, keepdims=True))).astype(y.dtype))


def log_softmax(x: Real, *, out: Real | None = None) -> Real:
    """x - log sum exp(x) over the last axis. A row of -inf stays -inf."""
    x = _checks.real("x", x, min_ndim=1)
    out = _checks.optional_output(out, x, ("x", x))
    x64 = x.astype(np.float64)
    top, log_sum = _max_and_log_sum(x64)
    with np.errstate(invalid="ignore", over="ignore"):
        return _checks.into(out, np.where(log_sum == -np.inf, -np.inf, x64 - top - log_sum).astype(x.dtype))
