"""One AdamW step, and the norm for gradient clipping."""

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Real

__all__ = ["adamw", "sum_of_squares"]


def adamw(
    param: Real,
    grad: Real,
    m: Real,
    v: Real,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW (arXiv 1711.05101) on flat arrays; param, m and v are changed in place.

    g = grad * grad_scale;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    param -= lr * (weight_decay * param + (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)).
    `step` counts from 1.
    """
    checked = _checks.adamw(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    grad, lr, beta1, beta2, eps, weight_decay, step, grad_scale = checked
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        g = grad.astype(np.float64) * grad_scale
        m64 = beta1 * m.astype(np.float64) + (1.0 - beta1) * g
        v64 = beta2 * v.astype(np.float64) + (1.0 - beta2) * g * g
        p64 = param.astype(np.float64)
        update = (m64 / (1.0 - beta1**step)) / (np.sqrt(v64 / (1.0 - beta2**step)) + eps)
        param[...] = p64 - lr * weight_decay * p64 - lr * update
        m[...], v[...] = m64, v64


def sum_of_squares(x: Real) -> float:
    """sum(x * x) over everything, accumulated in double: a Python float."""
    x64 = _checks.real("x", x).astype(np.float64).reshape(-1)
    return float(x64 @ x64)
