"""Text: how many bits does the model need for each byte of whole documents? Measures speed and state, too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ...memory.base import Memory
from ...model import Transformer
from ...train.walk import measure
from .base import HeldOut


class Text:
    """Reads each held-out document from its beginning. advance: called with the number of tokens read."""

    def __init__(self, advance: Callable[[float], None] = lambda n: None):
        self._advance = advance

    def measure(self, model: Transformer, memory: Memory | None, held_out: HeldOut) -> dict[str, Any]:
        """Bits per byte, tokens/s, and the bytes of state of one stream after the longest document."""
        documents, at_once = held_out.documents, held_out.documents_at_once
        began = time.perf_counter()
        bits, state_bytes, n_tokens = 0.0, 0, 0
        for some in (documents[i : i + at_once] for i in range(0, len(documents), at_once)):
            n_segments = -(-max(map(len, some)) // held_out.cutter.segment_length)
            batch = held_out.cutter.cut([(document, 0) for document in some], n_segments)
            taken, held = measure(model, memory, batch)
            bits, state_bytes, n_tokens = bits + taken, max(state_bytes, held // len(some)), n_tokens + batch.n_tokens
            self._advance(batch.n_tokens)
        return {
            "bits_per_byte": bits / held_out.n_bytes,
            "tokens_per_second": n_tokens / (time.perf_counter() - began),
            "state_bytes": state_bytes,
        }
