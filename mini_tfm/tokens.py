"""Token ids as a caller gives them, checked once at the public door."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InvalidType, InvalidValue


def check_tokens(name: str, tokens: Any, vocab_size: int, lengths: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(B, S) ids as int64 and their (B,) lengths, or InvalidValue / InvalidType that names the argument."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # rows of different lengths
        raise InvalidValue(f"{name}: expected sequences of one length; pad short ones with pad_id and give their lengths") from error
    if array.dtype.kind not in "iu" and array.size:
        raise InvalidType(f"{name}: expected integer token ids, got {array.dtype}")
    if array.ndim != 2:
        raise InvalidValue(f"{name}: expected shape (batch, tokens), got {array.shape}")
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        bad = array[(array < 0) | (array >= vocab_size)][0]
        raise InvalidValue(f"{name}: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}, got {bad}; is it the model's own tokenizer?")
    if lengths is None:
        return array.astype(np.int64), np.full(len(array), array.shape[1], np.int64)
    try:
        lengths = np.asarray(lengths)
    except ValueError as error:
        raise InvalidValue(f"{name} lengths: expected {len(array)} integers, got lists of different lengths") from error
    if lengths.dtype.kind not in "iu" or lengths.shape != (len(array),):
        raise InvalidValue(f"{name} lengths: expected {len(array)} integers, got {lengths.dtype} of shape {lengths.shape}")
    if len(lengths) and (lengths.min() < 0 or lengths.max() > array.shape[1]):
        raise InvalidValue(f"{name} lengths: expected 0 to {array.shape[1]}, got {lengths.min()} to {lengths.max()}")
    return array.astype(np.int64), lengths.astype(np.int64)
