"""Long text in pieces that are tokenized one at a time, in bounded RAM.

in_pieces       for tokenizers whose words end where white space begins
in_windows      for every other: windows that overlap, joined where two of them agree
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..errors import InvalidType

PIECE_CHARACTERS = 1 << 16  # text is tokenized in pieces of about this size: bounded RAM
LONGEST_WORD_CHARACTERS = 1 << 20  # text without a space is cut after so many all the same


def in_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The same text cut where no tokenizer's word goes across: before white space that follows a word."""
    waiting = ""
    for text in _slices(texts):
        waiting += text
        while len(waiting) > PIECE_CHARACTERS:
            cut = _last_cut(waiting, PIECE_CHARACTERS)
            if cut is None:
                if len(waiting) <= LONGEST_WORD_CHARACTERS:
                    break
                cut = LONGEST_WORD_CHARACTERS
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting


class Spans(NamedTuple):
    """Tokens of a text: (T,) ids, and where in the text each begins and ends, in characters."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def part(self, first: int, last: int | None, origin: int = 0) -> Spans:
        """Tokens first to last - 1, in the text from character `origin` on."""
        return Spans(self.ids[first:last], self.starts[first:last] - origin, self.ends[first:last] - origin)

    def boundaries(self) -> dict[int, int]:
        """Character -> the first token behind it, wherever no token goes across."""
        before = np.concatenate([[0], np.maximum.accumulate(self.ends)])
        after = np.minimum.accumulate(np.append(self.starts, before[-1])[::-1])[::-1]
        found: dict[int, int] = {}
        for token in np.flatnonzero(before <= after):
            found.setdefault(int(before[token]), int(token))
        return found


MAX_AGREEMENT = 16  # tokens


def in_windows(texts: Iterable[str], encode: Callable[[str, bool], Spans], at_once: int) -> Iterator[np.ndarray]:
    """Ids of the texts, joined: those that `encode` gives for all of it at once, in bounded RAM.

    at_once: characters of a window, at most PIECE_CHARACTERS. encode: tokens of a text, which the whole text begins with or not
    (then there is no space to put before it). What a tokenizer merges across a cut is seen in one window and not in the next. So
    each window begins where a token of the last one begins, and its tokens are taken from where both have the same tokens on either
    side. Where there is no such place, as in a word longer than LONGEST_WORD_CHARACTERS, it is taken from its beginning.
    """
    at_once = min(at_once, PIECE_CHARACTERS)
    overlap = max(64, at_once // 16)
    slices, waiting, is_first, is_last = _slices(texts), "", True, False
    known = Spans(*np.zeros((3, 0), np.int64))  # of the window before, from the beginning of `waiting` on
    size = at_once + overlap
    while True:
        while len(waiting) < size and not is_last:
            if (text := next(slices, None)) is None:
                is_last = True
            else:
                waiting += text
        if not waiting:
            return
        window = encode(waiting if is_last else waiting[:size], is_first)
        old, new = _join(known, window)
        if is_last:
            yield np.concatenate([known.ids[:old], window.ids[new:]])
            return
        places = window.boundaries()
        inside = [place for place, token in places.items() if 0 < place <= size - overlap and token >= new]
        if not inside and size < LONGEST_WORD_CHARACTERS:
            size *= 2
            continue
        cut = max(inside, default=size - overlap)
        token = places.get(cut, len(window.ids))
        yield np.concatenate([known.ids[:old], window.ids[new:token]])
        known, waiting, is_first = window.part(token, None, cut), waiting[cut:], False
        size = at_once + overlap


def _join(old: Spans, new: Spans) -> tuple[int, int]:
    """(i, j): tokens up to old[i] and from new[j] on, of two windows that begin at one place, joined where most tokens agree."""
    ours, theirs = (list(zip(*(part.tolist() for part in spans), strict=True)) for spans in (old, new.part(0, 2 * len(old.ids) + 64)))
    best, place = 0, (0, 0)
    others = new.boundaries()
    for character, i in old.boundaries().items():
        j = others.get(character)
        if j is None or j > len(theirs):
            continue
        left = _equal(zip(reversed(ours[max(0, i - MAX_AGREEMENT) : i]), reversed(theirs[max(0, j - MAX_AGREEMENT) : j]), strict=False))
        right = _equal(zip(ours[i : i + MAX_AGREEMENT], theirs[j : j + MAX_AGREEMENT], strict=False))
        if min(left, right) > best:
            best, place = min(left, right), (i, j)
    return place


def _equal(pairs: Iterable[tuple[object, object]]) -> int:
    """How many pairs in front are of equals."""
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """The texts, long ones in slices: cutting a piece from the front of a whole book at a time would copy it each time."""
    if not isinstance(texts, Iterable):
        raise InvalidType(f"text: expected str or an iterable of str, got {type(texts).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise InvalidType(f"text: expected str or an iterable of str, got {type(text).__name__}")
        for start in range(0, len(text), PIECE_CHARACTERS):
            yield text[start : start + PIECE_CHARACTERS]


def _last_cut(text: str, before: int) -> int | None:
    """Where to cut `text`: the last start of white space up to `before`, else the first after it.

    White space at the very end of the text is no place to cut: what follows it is not known yet.
    """
    starts = re.compile(r"(?<=\S)\s")
    inside = [m.start() for m in starts.finditer(text, max(0, before - 4096), before)]
    if inside:
        return inside[-1]
    after = starts.search(text, before, LONGEST_WORD_CHARACTERS)  # what else is there must not matter
    return after.start() if after else None
