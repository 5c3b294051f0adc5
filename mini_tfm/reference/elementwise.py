"""Activations, sums, recurrences and dropout."""

import math

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Real

__all__ = ["activation", "activation_backward", "add", "dropout", "recurrence"]


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _gelu_tanh_argument(x):
    """2 u of gelu_tanh, and d(2 u)/dx: 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    c = 2.0 * np.sqrt(2.0 / np.pi)
    return c * (x + 0.044715 * x**3), c * (1.0 + 3.0 * 0.044715 * x * x)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activation(x: Real, kind: str, *, out: Real | None = None) -> Real:
    """y = kind(x): "relu", "gelu" (exact, by erf), "gelu_tanh" (arXiv 1606.08415), "silu"."""
    x = _checks.real("x", x)
    _checks.activation_kind(kind)
    out = _checks.optional_output(out, x, ("x", x))
    x64 = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "relu":
            y = np.where(x64 <= 0.0, 0.0, x64)
        elif kind == "gelu":
            y = 0.5 * x64 * (1.0 + _erf(x64 / np.sqrt(2.0)))
        elif kind == "gelu_tanh":
            y = x64 * _sigmoid(_gelu_tanh_argument(x64)[0])
        else:
            y = x64 * _sigmoid(x64)
        return _checks.into(out, y.astype(x.dtype))


def activation_backward(x: Real, dy: Real, kind: str, *, out: Real | None = None) -> Real:
    """dx = dy * kind'(x), from the activation's input.

    Where x is NaN, relu, which gives NaN there, lets dy through as PyTorch does; the slope of the others is NaN.
    """
    x = _checks.real("x", x)
    dy = _checks.real("dy", dy, like=x, shape=x.shape)
    _checks.activation_kind(kind)
    out = _checks.optional_output(out, x, ("x", x), ("dy", dy))
    x64, dy64 = x.astype(np.float64), dy.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "relu":
            return _checks.into(out, np.where(x64 <= 0.0, 0.0, dy64).astype(x.dtype))
        if kind == "gelu":
            near = np.clip(x64, -40.0, 40.0)  # beyond, the density is 0, and inf times 0 would be NaN
            slope = 0.5 * (1.0 + _erf(x64 / np.sqrt(2.0))) + near * np.exp(-0.5 * near * near) / np.sqrt(2.0 * np.pi)
        elif kind == "gelu_tanh":
            near = np.clip(x64, -30.0, 30.0)  # beyond, the slope is 0 or 1, and 0 times x^3 = inf would be NaN
            argument, d_argument = _gelu_tanh_argument(near)
            s = _sigmoid(argument)
            slope = s + near * s * _sigmoid(-argument) * d_argument
        else:
            s = _sigmoid(x64)
            slope = s + x64 * s * _sigmoid(-x64)  # 1 - s would cancel
        return _checks.into(out, (dy64 * slope).astype(x.dtype))


def add(x: Real, y: Real) -> Real:
    """x + y, of one shape."""
    x = _checks.real("x", x)
    y = _checks.real("y", y, like=x, shape=x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        return x + y


def recurrence(x: Real, forget: Real, state: Real) -> Real:
    """c (B, T, d): c_t = f_t * c_{t-1} + (1 - f_t) * x_t, f = sigmoid(forget); state (B, d), c before the first, becomes the last.

    x, forget (B, T, d). The recurrence of SRU (arXiv 1709.02755, equation 2) without its output. c is rounded at every step.
    """
    x, forget = _checks.recurrence(x, forget, state)
    c = np.empty_like(x)
    with np.errstate(invalid="ignore", over="ignore"):
        f = _sigmoid(forget.astype(np.float64))
        for t in range(x.shape[1]):
            c[:, t] = state[...] = f[:, t] * state + (1.0 - f[:, t]) * x[:, t]
    return c


def _drawn(x, low, high):
    """What is drawn for counters x of uint32 under two keys: a bijection that spreads every input bit over the word.

    Two multiply-xorshift rounds, the second key in between.
    """
    x = x + low
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15)) ^ high) * np.uint32(0xD35A2D97)
    return x ^ (x >> np.uint32(15))


def _mix64(x: int) -> int:
    """The finaliser of splitmix64, on Python ints."""
    whole = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
    return x ^ (x >> 31)


def dropout(x: Real, p: float, seed: int) -> Real:
    """y = x / (1 - p) where the hash of (seed, flat index) keeps the element, else 0; 0 <= p < 1, 0 <= seed < 2**64.

    The mask depends on nothing else, so the same call on dy is the backward and nothing has to be stored. Two
    32-bit keys are drawn from the seed for every 2**32 elements; element i of these is kept when
    _drawn(i, key0, key1) >= floor(p * 2**32).
    """
    x, p, seed = _checks.dropout(x, p, seed)
    flat = x.reshape(-1)
    y = np.zeros_like(flat)
    scale = x.dtype.type(1.0 / (1.0 - p))
    for block, start in enumerate(range(0, flat.size, 2**32)):
        key = _mix64((seed + (block + 1) * 0x9E3779B97F4A7C15) % 2**64)
        index = np.arange(min(2**32, flat.size - start), dtype=np.uint32)
        drawn = _drawn(index, np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32))
        keep = drawn >= np.uint32(int(p * 2**32))
        part = slice(start, start + index.size)
        with np.errstate(invalid="ignore", over="ignore"):
            y[part][keep] = flat[part][keep] * scale
    return y.reshape(x.shape)
