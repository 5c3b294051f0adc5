"""Cross entropy with label smoothing (arXiv 1512.00567, section 7), of logits and of an output layer."""

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.linear import in_bfloat16
from mini_tfm.reference.softmax import _max_and_log_sum
from mini_tfm.reference.types import Integers, Real

__all__ = ["cross_entropy", "cross_entropy_backward", "linear_cross_entropy", "linear_cross_entropy_backward"]


def cross_entropy(logits: Real, targets: Integers, ignore_index: int = -100, label_smoothing: float = 0.0) -> tuple[Real, Real]:
    """losses (N,), lse (N,), float64, of logits (N, V) against targets (N,).

    loss = lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean(logits), lse = log sum exp(logits).
    lse is float64 for every dtype: the gradient's exp(logits - lse) would lose what is rounded away beside a large offset.
    Rows whose target is `ignore_index` get loss 0 and lse 0. A target at -inf costs +inf.
    """
    logits, targets, ignore_index, smoothing = _checks.cross_entropy(logits, targets, ignore_index, label_smoothing)
    counted = targets != ignore_index
    x = logits[counted].astype(np.float64)
    at_target = x[np.arange(len(x)), targets[counted]]
    with np.errstate(invalid="ignore", over="ignore"):
        top, log_sum = (part[:, 0] for part in _max_and_log_sum(x))
        loss = log_sum + (1.0 - smoothing) * (top - at_target)
        if smoothing:
            loss = loss + smoothing * (top - x.mean(-1))
        loss = np.where(at_target == -np.inf, np.inf, loss)
    losses, lse = np.zeros(len(logits), logits.dtype), np.zeros(len(logits))
    with np.errstate(over="ignore"):
        losses[counted], lse[counted] = loss, top + log_sum
    return losses, lse


def cross_entropy_backward(
    logits: Real, targets: Integers, lse: Real, dlosses: Real, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Real:
    """dlogits (N, V) = (softmax(logits) - smoothed one-hot) * dlosses, from the lse that `cross_entropy` returned."""
    logits, targets, ignore_index, smoothing = _checks.cross_entropy(logits, targets, ignore_index, label_smoothing)
    lse, dlosses = _checks.of_losses(logits, lse, dlosses)
    counted = targets != ignore_index
    dlogits = np.zeros_like(logits)
    x, row_lse = logits[counted].astype(np.float64), lse[counted][:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.where(row_lse == -np.inf, 0.0, np.exp(x - row_lse)) - smoothing / max(logits.shape[1], 1)
        p[np.arange(len(x)), targets[counted]] -= 1.0 - smoothing
        dlogits[counted] = p * dlosses[counted].astype(np.float64)[:, None]
    return dlogits


def linear_cross_entropy(
    x: Real,
    weight: Real,
    targets: Integers,
    *,
    bias: Real | None = None,
    transposed: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
    bfloat16: bool = False,
) -> tuple[Real, Real]:
    """losses (N,), lse (N,): `cross_entropy` of the logits x (N, d) weight (d, V) + bias (V,); transposed: weight is (V, d).

    The compiled kernel makes the logits `chunk` classes at a time and holds no more than those; here there are all of them.
    bfloat16: the factors of the products, here and in the backward, are rounded to it, as in `gemm`.
    """
    x, weight, targets, bias, transposed, ignored, smoothing, _, _ = _checks.linear_cross_entropy(
        x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk
    )
    rounded = in_bfloat16 if _checks.bfloat16(bfloat16, "x", x) else np.asarray
    losses, lse = cross_entropy(_logits(rounded(x), rounded(weight), bias, transposed), targets, ignored, smoothing)
    with np.errstate(over="ignore"):
        return losses.astype(x.dtype), lse


def linear_cross_entropy_backward(
    x: Real,
    weight: Real,
    targets: Integers,
    lse: Real,
    dlosses: Real,
    dweight: Real | None = None,
    *,
    bias: Real | None = None,
    transposed: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
    bfloat16: bool = False,
) -> tuple[Real, Real | None, Real | None]:
    """dx (N, d), dweight, dbias (V,) or None without a bias, from the lse that `linear_cross_entropy` returned.

    dweight, of weight's shape, is added to in place and returned; None: it is not wanted.
    """
    x, weight, targets, bias, transposed, ignored, smoothing, _, _ = _checks.linear_cross_entropy(
        x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk
    )
    lse, dlosses = _checks.linear_cross_entropy_backward(x, weight, targets, bias, lse, dlosses, dweight)
    rounded = in_bfloat16 if _checks.bfloat16(bfloat16, "x", x) else np.asarray
    x, weight = rounded(x), rounded(weight)
    logits = _logits(x, weight, bias, transposed)
    dlogits = cross_entropy_backward(logits, targets, lse, dlosses.astype(np.float64), ignored, smoothing)
    dbias = None if bias is None else dlogits.sum(0).astype(x.dtype)
    dlogits = rounded(dlogits.astype(x.dtype)).astype(np.float64) if bfloat16 else dlogits
    w = weight.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        dx = (dlogits @ (w if transposed else w.T)).astype(x.dtype)
        if dweight is not None:
            x64 = x.astype(np.float64)
            dweight[...] = dweight + (dlogits.T @ x64 if transposed else x64.T @ dlogits)
        return dx, dweight, dbias


def _logits(x, weight, bias, transposed):
    w = weight.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return x.astype(np.float64) @ (w.T if transposed else w) + (0.0 if bias is None else bias.astype(np.float64))
