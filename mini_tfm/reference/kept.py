"""What keys and values are kept in by a cache: as they are, in bfloat16, or in int8, where each row has a scale of its own.

A row of int8 is D whole numbers from -127 to 127 and behind them, in four bytes, the float32 that they are multiplied by: D + 4 bytes.
"""

import numpy as np

from mini_tfm.reference.linear import from_bfloat16, to_bfloat16
from mini_tfm.reference.types import SCALE_BYTES

LEAST = np.float32(1e-30)  # of the largest number of a row; the inverse of less might not be finite


def to_kept(rows, dtype):
    """Rows (..., D) as they are kept in a dtype: rows' own, uint16 for bfloat16, or int8."""
    return to_int8(rows) if dtype == np.int8 else to_bfloat16(rows) if dtype == np.uint16 else rows


def from_kept(rows):
    """The numbers (..., D) that rows stand for, in double."""
    return from_int8(rows) if rows.dtype == np.int8 else (from_bfloat16(rows) if rows.dtype == np.uint16 else rows).astype(np.float64)


def to_int8(x):
    """x (..., D) float32 -> (..., D + 4) int8: to the nearest whole number, ties to even, of as many steps as the largest has 127 of.

    The scale of a row that is not all finite is NaN, and that of one whose numbers are all below 1e-30 is 0.
    """
    most, is_finite = np.abs(x).max(-1, initial=0, keepdims=True), np.isfinite(x).all(-1, keepdims=True)
    is_large = is_finite & (most >= LEAST)
    scale = np.where(is_finite, np.where(is_large, most / np.float32(127), np.float32(0)), np.float32(np.nan))
    inverse = np.float32(127) / np.where(is_large, most, np.float32(1))
    steps = np.rint(np.where(is_large, x, 0).astype(np.float64) * inverse.astype(np.float64))
    return np.concatenate([steps.astype(np.int8), np.ascontiguousarray(scale).view(np.int8)], axis=-1)


def from_int8(rows):
    """The numbers (..., D) that rows (..., D + 4) of int8 stand for, in double."""
    d = rows.shape[-1] - SCALE_BYTES
    return rows[..., :d] * np.ascontiguousarray(rows[..., d:]).view(np.float32).astype(np.float64)
