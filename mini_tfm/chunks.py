"""A long text cut into chunks for an encoder, which may overlap: of what two have in common each keeps its half.

So every token is kept of one chunk alone, with context on both sides (arXiv 2305.01625, section 2.2, where an overlap of one half
leaves the middle half of a chunk). The first chunk keeps its head as well, and the last its tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """Tokens (n,) that are read at once; first to stop - 1 are kept, the others are context."""

    tokens: np.ndarray
    first: int
    stop: int

    @property
    def n_kept(self) -> int:
        return self.stop - self.first

    @property
    def kept(self) -> np.ndarray:
        """(n,) bool."""
        place = np.arange(len(self.tokens))
        return (place >= self.first) & (place < self.stop)


def streamed(pieces: Iterable[np.ndarray], length: int, shared: int = 0) -> Iterator[Chunk]:
    """Chunks of `length` tokens, of which each has `shared` < length in common with the next; the last may be shorter.

    pieces: the text's ids, (n,) each. The chunks are the same however it is cut, and need the RAM of one piece and one chunk.
    """
    before, behind = shared // 2, shared - shared // 2
    pending, first = np.zeros(0, np.int64), 0
    for ids in pieces:
        pending = np.concatenate([pending, ids])
        while len(pending) > length:
            yield Chunk(pending[:length], first, length - behind)
            pending, first = pending[length - shared :], before
    if len(pending):
        yield Chunk(pending, first, len(pending))


def ending_full(tokens: np.ndarray, length: int, shared: int = 0) -> list[Chunk]:
    """The same of tokens (n,), n > 0, but that the first may be shorter, and the last is full if there is enough text."""
    before, behind, step = shared // 2, shared - shared // 2, length - shared
    more = max(0, -((length - len(tokens)) // step))
    found = []
    for number in range(more + 1):
        end = len(tokens) - (more - number) * step
        start = max(0, end - length)
        found.append(Chunk(tokens[start:end], before if number else 0, end - start - (behind if number < more else 0)))
    return found
