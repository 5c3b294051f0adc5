"""Long text in pieces that are tokenized one at a time, in bounded RAM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

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
