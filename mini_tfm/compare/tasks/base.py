"""What a task is, and what it measures on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...data.batches import Batch
from ...data.streams import TextStreams
from ...memory.base import Memory
from ...model import Model


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Text that the model was not trained on.

    documents: token ids of each, (tokens,). n_bytes: of their text. cutter: cuts documents into segments. streams: (B, n, L),
    whole segments in sequence. documents_at_once: rows of a batch of whole documents. seed: of a task's draws.
    """

    documents: Sequence[np.ndarray]
    n_bytes: int
    cutter: TextStreams
    streams: Batch
    documents_at_once: int = 1
    seed: int = 0


class Task(Protocol):
    """Measures one thing about a model with a memory. A task that has to be trained also plants examples (see `Recall.plant`)."""

    name: str

    def measure(self, model: Model, memory: Memory | None, held_out: HeldOut) -> dict[str, Any]:
        """Figures by name: fields of `Result`. Memories start empty. Raises InvalidValue where this model cannot do the task."""
        ...

    @staticmethod
    def unmeasured() -> dict[str, Any]:
        """The same figures as NaN, for a model that cannot do the task."""
        ...
