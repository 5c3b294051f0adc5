"""Bits per byte: how well a model with a memory predicts a batch of documents."""

from __future__ import annotations

import math

import numpy as np

from .. import _core
from ..autodiff import value_of
from ..data.batches import Batch
from ..memory.base import Memory
from ..model import Model
from ..stream import Stream
from ..train.segments import read_batch


def measure(model: Model, memory: Memory | None, batch: Batch) -> tuple[float, int]:
    """Bits that all target tokens of a batch take, from memories that start empty; and the bytes of state at the end."""
    stream = Stream(model, memory, len(batch.target), training=True)
    total = 0.0
    for t, hidden in read_batch(stream, batch):
        counted = np.arange(batch.target.shape[2]) < batch.target_lengths[:, t, None]
        scores = stream.log_probs(hidden) if stream.run.changes_output else value_of(stream.logits(value_of(hidden)))
        losses, _ = _core.cross_entropy(scores[counted], batch.target[:, t][counted])
        total += float(losses.sum(dtype=np.float64)) / math.log(2)
    return total, stream.run.nbytes()
