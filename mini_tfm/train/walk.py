"""Going through a batch of streams, segment after segment: the loop that training and measuring share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..memory.base import Memory
from ..memory.run import MemoryRun
from ..model import NO_DROPOUT, Dropout, Encoded, Transformer
from .data import Batch


def walk(
    model: Transformer,
    run: MemoryRun,
    batch: Batch,
    w: Mapping[str, Any] | None = None,
    *,
    dropout: Dropout = NO_DROPOUT,
    hide_source: np.ndarray | None = None,
    detach_every: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yields (t, decoder outputs (B, T, d)) for each segment t of the batch.

    hide_source: (B, n) bool, where the decoder sees the memory alone. detach_every: gradients stop after so many
    segments.
    """
    size, n_segments, _ = batch.target.shape
    last = None  # a decoder-only model's first input of a segment is the last token of the one before
    for t in range(n_segments):
        if detach_every and t and t % detach_every == 0:
            run.detach()
        target, target_lengths = batch.target[:, t], batch.target_lengths[:, t]
        begins = batch.begins[:, t] if batch.begins is not None and t > 0 else np.zeros(size, bool)
        if begins.any():  # other documents: nothing of what stood before in these rows is seen
            run.reset(begins)
            last = None if last is None else np.where(begins, model.config.bos_id, last)
        encoded = None
        if batch.source is not None and batch.source_lengths is not None:
            run.open(batch.source_lengths[:, t], target)
            encoded = model.encode_segment(batch.source[:, t], batch.source_lengths[:, t], run, w, dropout)
        else:
            run.open(target_lengths, target)
        inputs = model.shift_right(target, None if encoded is not None else last)
        seen = encoded
        if encoded is not None and hide_source is not None and t > 0:
            seen = _without_text(encoded, hide_source[:, t] & ~begins)
        yield t, model.decode_segment(inputs, target_lengths, seen, run, w, dropout)
        model.finish_segment(encoded, run)
        ends = target[np.arange(size), np.maximum(target_lengths - 1, 0)]
        last = np.where(target_lengths > 0, ends, model.config.bos_id if last is None else last)  # others pause


def _without_text(encoded: Encoded, rows: np.ndarray) -> Encoded:
    valid = encoded.valid.copy()
    valid[rows, encoded.n_rows :] = False
    return dataclasses.replace(encoded, valid=valid)


def measure(model: Transformer, memory: Memory | None, batch: Batch) -> tuple[float, int]:
    """Bits that all target tokens of a batch take, from memories that start empty; and the bytes of state at the end."""
    run = model.start_run(memory, len(batch.target), training=True)
    total = 0.0
    for t, hidden in walk(model, run, batch):
        counted = np.arange(batch.target.shape[2]) < batch.target_lengths[:, t, None]
        scores = value_of(model.output_logits(value_of(hidden)))
        scores = (run.logits(value_of(hidden), _core.log_softmax(scores)) if run.changes_output else scores)[counted]
        losses, _ = _core.cross_entropy(scores, batch.target[:, t][counted])
        total += float(losses.sum(dtype=np.float64)) / math.log(2)
    return total, run.nbytes()
