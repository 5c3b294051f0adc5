"""Streams of segments that start at random places of long documents.

At step t of a stream the encoder reads segment t and the decoder predicts segment t + 1. Before a document's
first segment stands a segment of one `bos` token, so that the first is predicted too.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InvalidType, InvalidValue
from .batches import Batch
from .checks import integers, large


class TextStreams:
    """Draws `batch_size` streams of `n_segments` segments of `segment_length` tokens from documents.

    Each stream starts at a random place of a document drawn by its length, or at its beginning (one in eight).
    `batch(step)` is a pure function of (seed, step). documents: arrays of ids, or a `Corpus` of texts, which is not
    copied. `NextSegment` gives every token once per epoch instead; and a model of it has met sources of any length up to a segment, where
    those of this are whole or bos, so that it goes on badly from a prompt that is shorter. Raises InvalidType, InvalidValue.
    """

    def __init__(
        self,
        documents: Mapping[str, np.ndarray] | Sequence[np.ndarray],
        *,
        segment_length: int,
        n_segments: int,
        batch_size: int,
        bos_id: int = 1,
        pad_id: int = 0,
        seed: int = 0,
        has_encoder: bool = True,
    ):
        arrays = list(documents.values()) if isinstance(documents, Mapping) else list(documents)
        segment_length, n_segments, batch_size = integers(segment_length=segment_length, n_segments=n_segments, batch_size=batch_size)
        [self.seed] = large(seed=seed)
        if any(np.asarray(a).dtype.kind not in "iu" or np.ndim(a) != 1 for a in arrays):
            raise InvalidType("documents: expected arrays of token ids, each (tokens,); encode the text first")
        self.documents = [np.asarray(a) for a in arrays if len(a) > segment_length]
        if not self.documents:
            longest = max((len(a) for a in arrays), default=0)
            raise InvalidValue(
                f"documents: expected one longer than a segment ({segment_length} tokens), the longest has {longest} tokens;"
                " give more text or a smaller segment_length"
            )
        self.segment_length, self.n_segments, self.batch_size = segment_length, n_segments, batch_size
        self.bos_id, self.pad_id = integers(0, bos_id=bos_id, pad_id=pad_id)
        self.has_encoder = has_encoder
        lengths = np.array([len(a) for a in self.documents], np.float64)
        self._share = lengths / lengths.sum()
        self._fingerprint: str | None = None

    @property
    def state(self) -> dict[str, Any]:
        """Everything the batches depend on, as plain data. Reads all documents the first time."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for document in self.documents:
                digest.update(f"{len(document)} ".encode() + np.ascontiguousarray(document, "<i8").data)
            self._fingerprint = digest.hexdigest()
        names = ("segment_length", "n_segments", "batch_size", "bos_id", "pad_id", "seed", "has_encoder")
        return {"objective": "text-streams", "corpus": self._fingerprint, **{name: getattr(self, name) for name in names}}

    def with_segments(self, n_segments: int, batch_size: int | None = None) -> TextStreams:
        """The same with `n_segments` segments per stream, and `batch_size` streams if given; the documents are shared."""
        other = copy.copy(self)
        other.n_segments, other.batch_size = integers(n_segments=n_segments, batch_size=batch_size or self.batch_size)
        return other

    def batch(self, step: int, n_segments: int | None = None) -> Batch:
        [step], [n] = large(step=step), integers(n_segments=self.n_segments if n_segments is None else n_segments)
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.documents), self.batch_size, p=self._share)
        streams = []
        for document in (self.documents[i] for i in chosen):
            room = len(document) - self.segment_length
            start = 0 if rng.random() < 0.125 else int(rng.integers(0, room))
            streams.append((document, start))
        return self.cut(streams, n)

    def cut(self, streams: Sequence[tuple[np.ndarray, int]], n_segments: int) -> Batch:
        """The batch of given streams: (document, first token); a start of 0 begins with the `bos` segment."""
        length, size = self.segment_length, (len(streams), n_segments, self.segment_length)
        source, target = np.full(size, self.pad_id, np.int64), np.full(size, self.pad_id, np.int64)
        source_lengths, target_lengths = np.zeros(size[:2], np.int64), np.zeros(size[:2], np.int64)
        for b, (document, start) in enumerate(streams):
            at = start
            for t in range(n_segments):
                if t == 0 and start == 0 and self.has_encoder:
                    piece, following = np.array([self.bos_id]), document[:length]
                elif self.has_encoder:
                    piece, following = document[at : at + length], document[at + length : at + 2 * length]
                    at += length
                else:
                    piece, following = document[:0], document[at : at + length]
                    at += length
                if not len(following):
                    break
                source[b, t, : len(piece)], source_lengths[b, t] = piece, len(piece)
                target[b, t, : len(following)], target_lengths[b, t] = following, len(following)
        if not self.has_encoder:
            return Batch(None, target, None, target_lengths)
        return Batch(source, target, source_lengths, target_lengths)
