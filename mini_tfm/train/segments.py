"""The segments of a batch, read one after another through a stream: what training and measuring share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..context import NO_DROPOUT, Dropout
from ..data.batches import Batch
from ..stream import Stream


def read_batch(stream: Stream, batch: Batch) -> Iterator[tuple[int, Any]]:
    """Yields (t, decoder outputs (B, T, d)) for each segment t of the batch, which is closed when the next is asked for."""
    for t in range(batch.target.shape[1]):
        yield t, read_segment(stream, batch, t)
        stream.finish()


def read_segment(stream: Stream, batch: Batch, t: int, dropout: Dropout = NO_DROPOUT, hide_source: np.ndarray | None = None) -> Any:
    """The decoder's outputs (B, T, d) of segment t, which stays open.

    Where the batch says that a document begins, nothing of what stood before in the row is seen: its memory is empty again.
    hide_source: (B, n) bool, where the decoder sees the memory alone, unless a document begins there. Reading a segment
    again, from the same states, gives the same again.
    """
    target, target_lengths = batch.target[:, t], batch.target_lengths[:, t]
    begins = np.zeros(len(target), bool) if batch.begins is None or t == 0 else batch.begins[:, t]
    if begins.any():
        stream.begin_documents(begins)
    if batch.first is not None:
        stream.last = np.where(batch.first[:, t] >= 0, batch.first[:, t], stream.last)
    if batch.source is None or batch.source_lengths is None:
        stream.open(None, target_lengths, target, dropout.at(t))
    else:
        stream.open(batch.source[:, t], batch.source_lengths[:, t], target, dropout.at(t))
    hidden_there = hide_source[:, t] & ~begins if hide_source is not None and t > 0 else None
    return stream.decode(target, target_lengths, hidden_there)
