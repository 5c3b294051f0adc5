"""Text: how many bits does the model need for each byte of whole documents? Measures speed and state, too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ... import _core
from ...autodiff import value_of
from ...data.batches import Batch
from ...memory.base import Memory
from ...model import Model
from ...stream import Stream
from ...train.arguments import as_read
from ...train.segments import read_batch
from .base import HeldOut


class Text:
    """Reads each held-out document from its beginning. advance: called with the number of tokens read."""

    def __init__(self, advance: Callable[[float], None] = lambda n: None):
        self._advance = advance

    def measure(self, model: Model, memory: Memory | None, held_out: HeldOut) -> dict[str, Any]:
        """Bits per byte, tokens/s, and the bytes of state of one stream after the longest document."""
        documents, at_once = held_out.documents, held_out.documents_at_once
        began = time.perf_counter()
        bits, state_bytes, n_tokens = 0.0, 0, 0
        for some in (documents[i : i + at_once] for i in range(0, len(documents), at_once)):
            n_segments = -(-max(map(len, some)) // held_out.cutter.segment_length)
            batch = held_out.cutter.cut([(document, 0) for document in some], n_segments)
            taken, held = bits_of(model, memory, batch)
            bits, state_bytes, n_tokens = bits + taken, max(state_bytes, held // len(some)), n_tokens + batch.n_tokens
            self._advance(batch.n_tokens)
        return {
            "bits_per_byte": bits / held_out.n_bytes,
            "tokens_per_second": n_tokens / (time.perf_counter() - began),
            "state_bytes": state_bytes,
        }


def bits_of(model: Model, memory: Memory | None, batch: Batch) -> tuple[float, int]:
    """Bits that all target tokens of a batch take, from memories that start empty; and the bytes of state at the end."""
    stream, batch = Stream(model, memory, len(batch.target)), as_read(model.config, batch)
    total = 0.0
    for t, hidden in read_batch(stream, batch):
        counted = np.arange(batch.target.shape[2]) < batch.target_lengths[:, t, None]
        scores = stream.log_probs(hidden) if stream.run.changes_output else value_of(stream.logits(value_of(hidden)))
        losses, _ = _core.cross_entropy(scores[counted], batch.target[:, t][counted])
        total += float(losses.sum(dtype=np.float64)) / math.log(2)
    return total, stream.run.nbytes()
