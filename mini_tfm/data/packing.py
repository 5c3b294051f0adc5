"""Packing: documents one after another in the rows of a batch, cut into segments that never cross a document's end.

    documents   aaaaaaaaaaa bbbb ccccccc        of 11, 4 and 7 tokens
    segments    aaaa aaaa aaa|bbbb|cccc ccc     of at most 4; a bar is where a memory is emptied
    rows        [aaaa aaaa aaa] [bbbb cccc ccc] of n = 3

All segments of a corpus form one line; a row is n of them in sequence. Each epoch starts at another place on the line and
takes the rows in another order, both drawn from (seed, epoch), and has each segment exactly once. Only the end of each
document's last segment is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import InvalidValue
from .corpus import CHUNK, Corpus
from .permutation import Permutation

BLOCK = 1024  # documents; RAM holds where each block's segments begin, the rest is counted when it is needed


class Window(NamedTuple):
    """A segment: tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


class SegmentLine:
    """All segments of a corpus, each of at most `length` tokens. `len` counts them."""

    def __init__(self, corpus: Corpus, length: int):
        self.corpus, self.length = corpus, length
        counts = []
        for start in range(0, corpus.n_documents, CHUNK):
            here = self._counts(start, min(corpus.n_documents, start + CHUNK))
            counts.append(np.add.reduceat(here, np.arange(0, len(here), BLOCK)))
        self._before = np.cumsum(np.concatenate([[0], *counts]))
        if not len(self):
            raise InvalidValue("documents: expected at least one token, got none")

    def __len__(self) -> int:
        return int(self._before[-1])

    @property
    def padding(self) -> float:
        """The share of padding in all segments."""
        return 1 - self.corpus.n_tokens / (len(self) * self.length)

    def windows(self, first: int, n: int) -> Iterator[Window]:
        """`n` segments from number `first` on; the first follows the last."""
        while n > 0:
            first %= len(self)
            block = int(np.searchsorted(self._before, first, side="right")) - 1
            begin = block * BLOCK
            ends = np.cumsum(self._counts(begin, min(self.corpus.n_documents, begin + BLOCK))) + self._before[block]
            while n > 0 and first < ends[-1]:
                i = int(np.searchsorted(ends, first, side="right"))
                lengths = self.corpus.lengths(begin + i, begin + i + 1)
                n_segments = -(-int(lengths[0]) // self.length)
                for k in range(first - (int(ends[i]) - n_segments), n_segments):
                    if n == 0:
                        return
                    yield Window(begin + i, k * self.length, min(int(lengths[0]), (k + 1) * self.length))
                    first, n = first + 1, n - 1

    def _counts(self, start: int, stop: int) -> np.ndarray:
        lengths = self.corpus.lengths(start, stop)
        if len(lengths) and lengths.min() < 0:
            raise InvalidValue(f"offsets: document {start + int(lengths.argmin())} is damaged: its length is negative")
        return -(-lengths // self.length)


class PackedRows:
    """The rows of a line, `size` per step, in an order that is a pure function of (seed, step)."""

    def __init__(self, line: SegmentLine, n_segments: int, size: int, seed: int):
        self.line, self.n_segments, self.size, self.seed = line, n_segments, size, seed

    @property
    def an_epoch(self) -> int:
        """Rows; the last one on the line may be short."""
        return -(-len(self.line) // self.n_segments)

    def rows(self, step: int) -> list[tuple[tuple[int, int], list[Window]]]:
        """((epoch, number of the row), its segments) of each row of a step."""
        found = []
        positions = np.arange(step * self.size, (step + 1) * self.size)
        for epoch in range(int(positions[0]) // self.an_epoch, int(positions[-1]) // self.an_epoch + 1):
            within = positions[positions // self.an_epoch == epoch] % self.an_epoch
            begin = int(np.random.default_rng([self.seed, epoch, 1]).integers(len(self.line)))  # of the line, in this epoch
            for number in Permutation(self.an_epoch, self.seed, epoch)(within).tolist():
                first = number * self.n_segments
                windows = self.line.windows(begin + first, min(self.n_segments, len(self.line) - first))
                found.append(((epoch, number), list(windows)))
        return found
