"""Token embedding and the two positional encodings that need no parameters."""

from typing import Any

import numpy as np

from mini_tfm.reference import _checks
from mini_tfm.reference.types import Integers, Real

__all__ = ["embedding", "embedding_backward", "rotary", "sinusoidal_positions"]


def _frequencies(base, exponents):
    """base to each power, rounded once: NumPy's own in double may be off by 4 units in the last place, which positions multiply."""
    with np.errstate(over="ignore"):
        return (np.longdouble(base) ** exponents).astype(np.float64)


def embedding(table: Real, ids: Integers) -> Real:
    """Rows of table (V, d) at ids (...): (..., d)."""
    table, ids = _checks.embedding(table, ids)
    return table[ids]


def embedding_backward(ids: Integers, dout: Real, dtable: Real) -> Real:
    """dtable (V, d)[ids] += dout (..., d), in place; repeated ids add up. Returns dtable."""
    ids, dout = _checks.embedding_backward(ids, dout, dtable)
    total = dtable.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        np.add.at(total, ids.reshape(-1), dout.reshape(ids.size, dtable.shape[1]).astype(np.float64))
        dtable[...] = total
    return dtable


def sinusoidal_positions(n: int, d_model: int, dtype: Any = np.float32) -> Real:
    """The table of arXiv 1706.03762 section 3.5, (n, d_model): sin at even columns, cos at odd, computed in double."""
    n, d_model, dtype = _checks.sinusoidal_positions(n, d_model, dtype)
    column = np.arange(d_model)
    angle = np.arange(n)[:, None] * _frequencies(10000.0, -(column - column % 2) / max(d_model, 1))
    return np.where(column % 2 == 0, np.sin(angle), np.cos(angle)).astype(dtype)


def rotary(x: Real, positions: Integers, frequencies: Real, inverse: bool = False) -> Real:
    """Rotary encoding (arXiv 2104.09864) of x (B, H, T, D) at positions (T,) or (B, T) by frequencies (n,) float64, 2 n <= D.

    The pair (x[i], x[i + n]) turns by position * frequencies[i]: the layout of GPT-NeoX and LLaMA, not the paper's interleaved
    one. What is behind the pairs stays. `inverse` turns back, which is also the backward.
    """
    x, positions, frequencies, inverse = _checks.rotary(x, positions, frequencies, inverse)
    half = len(frequencies)
    angle = positions[..., None].astype(np.float64) * frequencies
    cos, sin = np.cos(angle), np.sin(-angle if inverse else angle)
    if positions.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1).astype(x.dtype)
