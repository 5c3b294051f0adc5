"""The arguments of a training step, checked: any shape that `Trainer.step` accepts -> a Batch of (B, n, L) arrays.

And which weights are trained.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..config import Config
from ..data.batches import Batch
from ..errors import InvalidType, InvalidValue
from ..model import Model
from ..tokens import check_tokens
from ..weights import LORA, LORA_SCALE


def checked_batch(
    model: Model, source: Any, target: Any, source_lengths: Any, target_lengths: Any, weights: Any, begins: Any = None
) -> Batch:
    """The arguments of `Trainer.step` as checked (B, n, L) arrays. Raises InvalidType, InvalidValue naming the argument."""
    config = model.config
    target, target_lengths = _segments("target", target, target_lengths, config.vocab_size)
    if not config.has_encoder:
        if source is not None:
            raise InvalidValue("source: expected None, because this model has no encoder; data for it are made with has_encoder=False")
    else:
        source, source_lengths = _segments("source", source, source_lengths, config.vocab_size)
        if source.shape[:2] != target.shape[:2]:
            raise InvalidValue(f"target: expected (batch, segments) {source.shape[:2]} as source has, got {target.shape[:2]}")
    if weights is not None:
        weights = _weights(weights, target.shape, model.dtype)
    if begins is not None:
        begins = np.asarray(begins)
        if begins.dtype != bool or begins.shape not in (target.shape[:2], (target.shape[0] * target.shape[1],)):
            raise InvalidValue(f"begins: expected bool of shape {target.shape[:2]}, got {begins.dtype} of shape {begins.shape}")
        begins = begins.reshape(target.shape[:2])
    batch = Batch(source, target, source_lengths, target_lengths, weights, begins)
    return as_read(config, batch)


def as_read(config: Config, batch: Batch) -> Batch:
    """The batch as the model reads it: where no bos precedes a text, a document's first token is given, and predicted by nobody.

    So a text is trained on as `Stream.begin` has it read and scored, and as Transformers has it.
    """
    if config.has_encoder or not config.framed_by_tokenizer:
        return batch
    lengths, begins = batch.target_lengths, np.zeros(batch.target_lengths.shape, bool)
    unread = np.ones(len(lengths), bool)
    for t in range(lengths.shape[1]):
        unread |= False if batch.begins is None else batch.begins[:, t]
        begins[:, t] = unread & (lengths[:, t] > 0)
        unread &= ~begins[:, t]

    def moved(array: np.ndarray) -> np.ndarray:
        return np.where(begins[..., None], np.roll(array, -1, axis=2), array)

    return dataclasses.replace(
        batch,
        target=moved(batch.target),
        target_lengths=lengths - begins,
        weights=None if batch.weights is None else moved(batch.weights),
        first=np.where(begins, batch.target[..., :1].sum(2), -1),
    )


def _segments(name: str, tokens: Any, lengths: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) or (B, n, T) ids -> (B, n, T) and lengths (B, n)."""
    if tokens is None:
        raise InvalidType(f"{name}: expected token ids, got None")
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InvalidValue(f"{name}: expected sequences of one length; pad short ones with pad_id and give their lengths") from error
    if array.ndim not in (2, 3):
        raise InvalidValue(f"{name}: expected shape (batch, tokens) or (batch, segments, tokens), got {array.shape}")
    array = array[:, None] if array.ndim == 2 else array
    size, n, length = array.shape
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape not in ((size, n), (size * n,)):
            raise InvalidValue(f"{name} lengths: expected shape {(size, n) if n > 1 else (size,)}, got {lengths.shape}")
        lengths = lengths.reshape(-1)
    ids, lengths = check_tokens(name, array.reshape(size * n, length), vocab_size, lengths)
    return ids.reshape(size, n, length), lengths.reshape(size, n)


def _weights(weights: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """(B, T) or (B, n, T) weights of target tokens -> (B, n, T)."""
    try:
        array = np.asarray(weights, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidValue(f"weights: expected numbers of shape {shape}: {error}") from error
    if array.shape not in (shape, (shape[0], shape[2])) or array.size != np.prod(shape):
        raise InvalidValue(f"weights: expected shape {shape}, as target has, got {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise InvalidValue("weights: expected finite numbers of at least 0")
    return array.reshape(shape)


def trained_names(patterns: tuple[str, ...] | None, names: Iterable[str]) -> list[str]:
    """The weights that `patterns` choose. None: all of them or, beside a model with adapters, these and the memories' parameters.

    Raises InvalidValue naming every pattern that fits none.
    """
    names = [name for name in names if name != LORA_SCALE]
    if patterns is None:
        adapted = any(name.startswith(LORA) for name in names)
        return [name for name in names if name.startswith((LORA, "memory."))] if adapted else names
    if wrong := [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]:
        some = [name for name in names if name.startswith("memory.")] + names[:3]
        raise InvalidValue(
            f"trainable: expected patterns of weights' names, got {', '.join(map(repr, wrong))}, which fits none; names are"
            f" {', '.join(some[:4])} and so on: print(list(model.weights))"
        )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
