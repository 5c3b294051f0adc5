"""Functions that many strategies need: of arrays or Vars, in the dtype of what they are given."""

from __future__ import annotations

import numpy as np

from ..autodiff import value_of
from ..ops import sigmoid, softmax
from .base import Array

__all__ = ["sigmoid", "silu", "softmax", "unit", "value_of"]


def silu(x: Array) -> Array:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def unit(x: Array) -> Array:
    """x (..., D), each vector divided by its length; zeros stay zeros."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-12)
