"""Going through a batch of streams, segment after segment: the loop that training and measuring share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..data.batches import Batch
from ..memory.base import Memory
from ..memory.run import MemoryRun
from ..model import NO_DROPOUT, Dropout, Encoded, Transformer


def walk(model: Transformer, run: MemoryRun, batch: Batch) -> Iterator[tuple[int, Any]]:
    """Yields (t, decoder outputs (B, T, d)) for each segment t of the batch, which is closed when the next is asked for."""
    segments = Segments(model, batch)
    for t in range(batch.target.shape[1]):
        encoded, hidden = segments.read(run, t)
        yield t, hidden
        model.finish_segment(encoded, run)


class Segments:
    """The segments of a batch, to be read in turn; reading one again, from the same states, gives the same again.

    Where the batch says that a document begins, nothing of what stood before in the row is seen: its memory is empty again.
    w: the weights, if not the model's; hide_source: (B, n) bool, where the decoder sees the memory alone, unless a document
    begins there.
    """

    def __init__(
        self,
        model: Transformer,
        batch: Batch,
        w: Mapping[str, Any] | None = None,
        *,
        dropout: Dropout = NO_DROPOUT,
        hide_source: np.ndarray | None = None,
    ):
        self.model, self.batch, self.w, self.dropout, self.hide_source = model, batch, w, dropout, hide_source
        self.firsts: list[np.ndarray | None] = [None]  # a decoder-only model's first input is the last token of the segment before
        last = np.full(len(batch.target), model.config.bos_id)
        for t in range(batch.target.shape[1] - 1):
            target, lengths = batch.target[:, t], batch.target_lengths[:, t]
            last = np.where(lengths > 0, target[np.arange(len(target)), np.maximum(lengths - 1, 0)], last)  # others pause
            last = np.where(self.begins(t + 1), model.config.bos_id, last)
            self.firsts.append(None if model.config.has_encoder else last)

    def begins(self, t: int) -> np.ndarray:
        """(B,) bool: the rows that go on with another document at segment t. At the first one every memory is empty already."""
        return self.batch.begins[:, t] if self.batch.begins is not None and t > 0 else np.zeros(len(self.batch.target), bool)

    def read(self, run: MemoryRun, t: int) -> tuple[Encoded | None, Any]:
        """What `Transformer.finish_segment` asks for, and the decoder's outputs (B, T, d) of segment t, which stays open."""
        model, batch, w, dropout = self.model, self.batch, self.w, self.dropout.at(t)
        target, target_lengths = batch.target[:, t], batch.target_lengths[:, t]
        begins = self.begins(t)
        if begins.any():
            run.reset(begins)
        encoded = seen = None
        if batch.source is not None and batch.source_lengths is not None:
            run.open(batch.source_lengths[:, t], target)
            encoded = seen = model.encode_segment(batch.source[:, t], batch.source_lengths[:, t], run, w, dropout)
            if self.hide_source is not None and t > 0:
                seen = _without_text(encoded, self.hide_source[:, t] & ~begins)
        else:
            run.open(target_lengths, target)
        return encoded, model.decode_segment(model.shift_right(target, self.firsts[t]), target_lengths, seen, run, w, dropout)


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
