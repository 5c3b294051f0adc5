"""Packing: documents one after another in the rows of a batch, cut into segments that never cross a document's end.

    documents   aaaaaaaaaaa bbbb ccccccc        of 11, 4 and 7 tokens
    segments    aa aaaa aaaa a|bbbb|cccc ccc    of at most 4; a bar is where a memory is emptied
    rows        [aa aaaa aaaa] [a bbbb cccc] [ccc] of n = 3

In each epoch documents are cut at other places, or a model would learn a text that it sees many times by heart, cuts and all: the first
segment of a document of more than one has 1 to `length` tokens, each number once in `length` epochs, and all others follow from it. All
segments of an epoch form one line; a row is n of them in sequence. Each epoch starts at another place on its line and takes the rows in
another order, both drawn from (seed, epoch), and has each token exactly once. Only the first and the last segment of a document are padded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import InvalidValue
from .corpus import CHUNK, Corpus
from .permutation import Permutation

BLOCK = 1024  # documents; RAM holds where each block's segments begin, the rest is counted when it is needed
CUTS = "other in each epoch"  # in the state of data: a run that was cut otherwise is not continued as if it were the same


class Window(NamedTuple):
    """A segment: tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


class SegmentLine:
    """All segments of a corpus, each of at most `length` tokens. `len` counts them.

    shift: where documents are cut; the first segment of document i, if that is longer than `length`, has
    1 + (shift + i) % length tokens, so that in any epoch neighbours are cut at different places.
    """

    def __init__(self, corpus: Corpus, length: int, shift: int):
        self.corpus, self.length, self.shift = corpus, length, shift
        counts = []
        for start in range(0, corpus.n_documents, CHUNK):
            here = self._measured(start, min(corpus.n_documents, start + CHUNK))[2]
            counts.append(np.add.reduceat(here, np.arange(0, len(here), BLOCK)))
        self._before = np.cumsum(np.concatenate([[0], *counts]))

    def __len__(self) -> int:
        return int(self._before[-1])

    def windows(self, first: int, n: int) -> Iterator[Window]:
        """`n` segments from number `first` on; the first follows the last."""
        while n > 0:
            first %= len(self)
            block = int(np.searchsorted(self._before, first, side="right")) - 1
            begin = block * BLOCK
            lengths, firsts, counts = self._measured(begin, min(self.corpus.n_documents, begin + BLOCK))
            ends = np.cumsum(counts) + self._before[block]
            while n > 0 and first < ends[-1]:
                i = int(np.searchsorted(ends, first, side="right"))
                for k in range(first - int(ends[i] - counts[i]), int(counts[i])):
                    if n == 0:
                        return
                    stop = int(firsts[i]) + k * self.length
                    yield Window(begin + i, max(0, stop - self.length), min(stop, int(lengths[i])))
                    first, n = first + 1, n - 1

    def _measured(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of documents `start` to `stop`: tokens, tokens of the first segment (at most), and segments."""
        lengths = lengths_of(self.corpus, start, stop)
        firsts = np.where(lengths > self.length, 1 + (self.shift + np.arange(start, stop)) % self.length, self.length)
        return lengths, firsts, 1 - (firsts - lengths) // self.length


class SegmentLines:
    """The lines of a corpus by shift, 0 to `n` - 1, each made when it is needed. sizes: (n,) segments of each."""

    def __init__(self, corpus: Corpus, length: int):
        self.corpus, self.length = corpus, length
        chunks = [(start, min(corpus.n_documents, start + CHUNK)) for start in range(0, corpus.n_documents, CHUNK)]
        self.n = length if any(lengths_of(corpus, *chunk).max() > length for chunk in chunks) else 1
        steps, fewest = np.zeros(2 * self.n + 1, np.int64), 0
        for chunk in chunks:
            lengths = lengths_of(corpus, *chunk)
            fewest += int((-(-lengths // length)).sum())
            # One segment more where the first is shorter than what whole segments leave over: at so many shifts, one after another.
            shifts = np.where(lengths > length, (lengths - 1) % length, 0)
            begin = -np.arange(*chunk) % self.n
            steps += np.bincount(begin, minlength=len(steps)) - np.bincount(begin + shifts, minlength=len(steps))
        self.sizes = fewest + np.cumsum(steps)[:-1].reshape(2, self.n).sum(axis=0)
        if not fewest:
            raise InvalidValue("documents: expected at least one token, got none")
        self.line = functools.lru_cache(2)(functools.partial(SegmentLine, corpus, length))  # a batch may hold the ends of two epochs

    @property
    def padding(self) -> float:
        """The share of padding in all segments."""
        return 1 - self.corpus.n_tokens / (float(self.sizes.mean()) * self.length)


def lengths_of(corpus: Corpus, start: int, stop: int) -> np.ndarray:
    """Tokens of documents `start` to `stop`. Raises InvalidValue where one is negative."""
    lengths = corpus.lengths(start, stop)
    if len(lengths) and lengths.min() < 0:
        raise InvalidValue(f"offsets: document {start + int(lengths.argmin())} is damaged: its length is negative")
    return lengths


class PackedRows:
    """The rows of an epoch's line, `size` per step, in an order that is a pure function of (seed, step).

    Each shift of the lines has its epoch in every `lines.n` epochs, in an order drawn anew; so these have a fixed number of rows,
    `in_all`. The last row on a line may be short.
    """

    def __init__(self, lines: SegmentLines, n_segments: int, size: int, seed: int):
        self.lines, self.n_segments, self.size, self.seed = lines, n_segments, size, seed
        self._rows = -(-lines.sizes // n_segments)  # of each shift
        self.in_all = int(self._rows.sum())

    def epochs(self, begin: int, n: int) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, its shift, number of its first row, and behind its last) of `n` rows, counted from the first epoch's first."""
        while n > 0:
            turn, within = divmod(begin, self.in_all)
            # The stages of a curriculum begin at epoch 0 again, with another number of segments: they are cut elsewhere, too.
            shifts = np.random.default_rng([self.seed, turn, self.n_segments, 1]).permutation(self.lines.n)
            ends = np.cumsum(self._rows[shifts])
            i = int(np.searchsorted(ends, within, side="right"))
            rows = int(self._rows[shifts[i]])
            first = within - int(ends[i]) + rows
            here = min(n, rows - first)
            yield turn * self.lines.n + i, int(shifts[i]), first, first + here
            begin, n = begin + here, n - here

    def rows(self, step: int) -> list[tuple[tuple[int, int], list[Window]]]:
        """((epoch, number of the row), its segments) of each row of a step."""
        found = []
        for epoch, shift, first_row, behind in self.epochs(step * self.size, self.size):
            line = self.lines.line(shift)
            begin = int(np.random.default_rng([self.seed, epoch, 1]).integers(len(line)))  # of the line, in this epoch
            for number in Permutation(int(self._rows[shift]), self.seed, epoch)(np.arange(first_row, behind)).tolist():
                first = number * self.n_segments
                windows = line.windows(begin + first, min(self.n_segments, len(line) - first))
                found.append(((epoch, number), list(windows)))
        return found
