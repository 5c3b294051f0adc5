"""Batches for training: long texts as streams of segments.

At step t of a stream the encoder reads segment t and the decoder predicts segment t + 1. Before a document's
first segment stands a segment of one `bos` token, so that the first is predicted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InvalidType


@dataclass(frozen=True)
class Batch:
    """Token ids in segments: source (B, n, L) or None (decoder-only), target (B, n, L), and their lengths (B, n).

    weights: (B, n, L), of each target token in the loss; None: 1. Tokens past a length are masked.
    begins: (B, n) bool, where a new document begins with a segment: the row's memory is emptied, and nothing before it in the
    row is seen. None: no row changes its document. first: (B, n), the token in front of a segment that a document begins with,
    which nobody predicts; -1: none. None: nowhere (see `Config.framed_by_tokenizer`).
    """

    source: np.ndarray | None
    target: np.ndarray
    source_lengths: np.ndarray | None = None
    target_lengths: np.ndarray = None  # type: ignore[assignment]  # filled in: whole segments
    weights: np.ndarray | None = None
    begins: np.ndarray | None = None
    first: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, tokens in (("source_lengths", self.source), ("target_lengths", self.target)):
            if getattr(self, name) is None and tokens is not None:
                object.__setattr__(self, name, np.full(tokens.shape[:2], tokens.shape[2], np.int64))

    @property
    def n_tokens(self) -> int:
        """Target tokens that count."""
        return int(self.target_lengths.sum())


def fields(batch: Batch) -> tuple[Any, ...]:
    """A batch as the arguments of `Trainer.step`. Raises InvalidType where data gave something else."""
    if not isinstance(batch, Batch):
        remedy = "mini_tfm.train.Batch(source, target) of token ids (rows, segments, length)"
        raise InvalidType(f"batch: expected a {remedy}, got {type(batch).__name__}")
    return batch.source, batch.target, batch.source_lengths, batch.target_lengths, batch.weights, batch.begins


@dataclass(frozen=True)
class Example:
    """One row in one segment: source (S,) or None, and target (T,); both may be empty.

    unscored: number of tokens at the target's start that are not in the loss. begins: a new document begins here.
    """

    source: np.ndarray | None
    target: np.ndarray
    unscored: int = 0
    begins: bool = False


def lay_out(rows: Sequence[Sequence[Example | None]], pad_id: int) -> Batch:
    """The batch of rows of segments, padded to the longest. None is a pause; short rows pause at their end."""
    n = max(map(len, rows))
    size = (len(rows), n)
    everything = [example for row in rows for example in row if example is not None]
    lengths = np.zeros(size, np.int64)
    target = np.full((*size, max(1, *(len(e.target) for e in everything))), pad_id, np.int64)
    source, source_lengths = None, None
    if everything[0].source is not None:
        widest = max(1, *(len(e.source) for e in everything if e.source is not None))
        source, source_lengths = np.full((*size, widest), pad_id, np.int64), np.zeros(size, np.int64)
    weights = np.ones(target.shape, np.float32) if any(e.unscored for e in everything) else None
    begins = np.zeros(size, bool)
    for b, row in enumerate(rows):
        for t, example in enumerate(row):
            if example is None:
                continue
            target[b, t, : len(example.target)], lengths[b, t] = example.target, len(example.target)
            if source is not None and source_lengths is not None and example.source is not None:
                source[b, t, : len(example.source)], source_lengths[b, t] = example.source, len(example.source)
            if weights is not None:
                weights[b, t, : example.unscored] = 0
            begins[b, t] = example.begins
    return Batch(source, target, source_lengths, lengths, weights, begins if begins[:, 1:].any() else None)
