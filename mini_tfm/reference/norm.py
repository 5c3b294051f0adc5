"""Layer normalisation (arXiv 1607.06450) and root-mean-square normalisation (arXiv 1910.07467), over the last axis.

mean and rstd have one value a row, (N,), N the product of the leading dimensions. The mean is float64 for every dtype: what rounding
takes from it may be more than a row's values differ by.
"""

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Real

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]


def _mean(x):
    """Mean over the last axis; of nothing, 0."""
    return x.sum(-1) / max(x.shape[-1], 1)


def layer_norm(x: Real, weight: Real, bias: Real | None, eps: float, *, out: Real | None = None) -> tuple[Real, Real, Real]:
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), var biased. Returns y, mean (float64), rstd."""
    x, weight, bias, eps = _checks.layer_norm(x, weight, bias, eps)
    out = _checks.optional_output(out, x, ("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)]))
    x_nd = x.reshape(_checks.rows(x)).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean = _mean(x_nd)
        missed = _mean(x_nd - mean[:, None])  # the mean of equal values is that value
        mean = mean + np.where(np.isfinite(missed), missed, 0.0)
        centred = x_nd - mean[:, None]
        rstd = 1.0 / np.sqrt(_mean(centred * centred) + eps)
        y = centred * rstd[:, None] * weight + (0.0 if bias is None else bias)
        return _checks.into(out, y.reshape(x.shape).astype(x.dtype)), mean, rstd.astype(x.dtype)


def layer_norm_backward(dy: Real, x: Real, weight: Real, mean: Real, rstd: Real, *, out: Real | None = None) -> tuple[Real, Real, Real]:
    """dx, dweight, dbias of `layer_norm`, from what it returned."""
    dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
    mean = _checks.double("mean", mean, shape=rstd.shape)
    out = _checks.optional_output(out, x, ("dy", dy), ("x", x), ("weight", weight), ("mean", mean), ("rstd", rstd))
    shape, dtype = x.shape, x.dtype
    x, dy = (a.reshape(_checks.rows(a)).astype(np.float64) for a in (x, dy))
    with np.errstate(invalid="ignore", over="ignore"):
        normed = (x - mean[:, None]) * rstd.astype(np.float64)[:, None]
        g = dy * weight
        dx = (g - _mean(g)[:, None] - normed * _mean(g * normed)[:, None]) * rstd.astype(np.float64)[:, None]
        dx = _checks.into(out, dx.reshape(shape).astype(dtype))
        return dx, (dy * normed).sum(0).astype(dtype), dy.sum(0).astype(dtype)


def rms_norm(x: Real, weight: Real, eps: float, *, out: Real | None = None) -> tuple[Real, Real]:
    """y = x * rstd * weight, rstd = 1 / sqrt(mean(x * x) + eps). Returns y, rstd."""
    x, weight, eps = _checks.rms_norm(x, weight, eps)
    out = _checks.optional_output(out, x, ("x", x), ("weight", weight))
    x_nd = x.reshape(_checks.rows(x)).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        rstd = 1.0 / np.sqrt(_mean(x_nd * x_nd) + eps)
        y = x_nd * rstd[:, None] * weight
        return _checks.into(out, y.reshape(x.shape).astype(x.dtype)), rstd.astype(x.dtype)


def rms_norm_backward(dy: Real, x: Real, weight: Real, rstd: Real, *, out: Real | None = None) -> tuple[Real, Real]:
    """dx, dweight of `rms_norm`, from what it returned."""
    dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
    out = _checks.optional_output(out, x, ("dy", dy), ("x", x), ("weight", weight), ("rstd", rstd))
    shape, dtype = x.shape, x.dtype
    x, dy = (a.reshape(_checks.rows(a)).astype(np.float64) for a in (x, dy))
    with np.errstate(invalid="ignore", over="ignore"):
        normed = x * rstd.astype(np.float64)[:, None]
        g = dy * weight
        dx = (g - normed * _mean(g * normed)[:, None]) * rstd.astype(np.float64)[:, None]
        return _checks.into(out, dx.reshape(shape).astype(dtype)), (dy * normed).sum(0).astype(dtype)
