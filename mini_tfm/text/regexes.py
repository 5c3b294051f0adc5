"""Whether a regular expression of a `tokenizer.json` can be run on any text: its time is at most quadratic in the text's length.

The engine is Oniguruma, which backtracks. What published tokenizers split with needs little of its syntax: alternatives of a few
classes, each repeated or not, a lookahead. More is refused:

    (a+)+  (a|b)*      a repetition of what has a repetition or alternatives in it: exponential
    a*b*c              something required behind two repetitions without a limit: cubic
    a{0,99}b{0,99}     limited repetitions with more than MAX_WAYS ways to match, all together
    \\1 \\g<1> (?~a)     references, recursion, absent operators, conditions
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_CHARACTERS = 1 << 14
MAX_WAYS = 1000
MAX_DEPTH = 32


def check_regex(pattern: str) -> bool:
    """Whether a pattern may take quadratic time; it is linear otherwise. Raises ValueError that says what is refused."""
    if len(pattern) > MAX_CHARACTERS:
        raise ValueError(f"expected at most {MAX_CHARACTERS} characters, found {len(pattern)}")
    reader = _Reader(pattern)
    reader.read()
    return reader.is_quadratic


_REPETITION = re.compile(r"([*+])[?+]?|(\?)[?+]?|\{(\d+)\}|\{(\d*),(\d*)\}\??")
_OPENING = re.compile(r"\?(?:[:=!>]|<[=!]|<[A-Za-z_]\w*>|[im]*(?:-[im]+)?([:)]))")


class _Part(NamedTuple):
    """What a part of a pattern does. Repetitions are those without a limit.

    repetitions: the most of them in one way through the part. before: the most of them in front of something that is
    required, -1 where nothing is. plain: it has neither alternatives nor repetitions of any kind.
    """

    repetitions: int
    before: int
    plain: bool


class _Reader:
    """Reads a pattern once, from left to right. Raises ValueError that says what is refused."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.ways, self.depth, self.is_quadratic = pattern, 0, 1, 0, False

    def read(self) -> None:
        self.alternatives()
        if self.at < len(self.pattern):
            raise ValueError(f"a bracket is closed that is not open, at character {self.at}")

    def alternatives(self) -> _Part:
        """Up to the end of a group."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} groups inside each other")
        ways = [self.sequence()]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            ways.append(self.sequence())
        self.depth -= 1
        return _Part(max(way.repetitions for way in ways), max(way.before for way in ways), len(ways) == 1 and ways[0].plain)

    def sequence(self) -> _Part:
        repetitions, before, plain = 0, -1, True
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            start, part = self.at, self.repeated()
            if part.before >= 0:
                before = max(before, repetitions + part.before)
            self.is_quadratic |= before >= 1
            if before >= 2:
                raise ValueError(f"something is required behind two repetitions without a limit, at character {start}")
            repetitions, plain = repetitions + part.repetitions, plain and part.plain
        return _Part(repetitions, before, plain)

    def repeated(self) -> _Part:
        """One atom and how often it is repeated."""
        start = self.at
        part = self.atom()
        found = _REPETITION.match(self.pattern, self.at)
        if found is None or found[0] in ("{,}", "{,}?"):
            return part
        self.at = found.end()
        if self.pattern[self.at : self.at + 1] in ("*", "+", "?"):
            raise ValueError(f"a repetition is repeated, at character {self.at}")
        if found[2]:
            return _Part(part.repetitions, -1, False)
        if any(len(number or "") > 8 for number in found.groups()):
            raise ValueError(f"more than {MAX_WAYS} repetitions, at character {start}")
        least = int(found[3] or found[4] or found[1] == "+")
        most = int(found[3] or found[5] or MAX_WAYS + 1)  # without a limit: more than any limit
        if not part.plain and most > 1:
            raise ValueError(f"a repetition of what has repetitions or alternatives in it, at character {start}")
        is_endless = not found[3] and not found[5]
        if not is_endless:
            self.ways *= max(1, most - least + 1)
            if self.ways > MAX_WAYS or most > MAX_WAYS:
                raise ValueError(f"limited repetitions with more than {MAX_WAYS} ways to match, at character {start}")
        return _Part(int(is_endless), 0 if least and part.before >= 0 else -1, bool(found[3]))

    def atom(self) -> _Part:
        char = self.pattern[self.at]
        self.at += 1
        if char == "(":
            return self.group()
        if char == "[":
            self.char_class()
        elif char == "\\":
            self.escape()
        elif char in "*+?":
            raise ValueError(f"nothing is repeated, at character {self.at - 1}")
        return _Part(0, 0, True)

    def group(self) -> _Part:
        opening = _OPENING.match(self.pattern, self.at)
        if opening is None and self.pattern[self.at : self.at + 1] == "?":
            raise ValueError(f"an unusual group, at character {self.at - 1}")
        if opening is not None:
            self.at = opening.end()
            if opening[1] == ")":
                return _Part(0, -1, False)
        part = self.alternatives()
        if self.pattern[self.at : self.at + 1] != ")":
            raise ValueError("a bracket is not closed")
        self.at += 1
        looks = opening is not None and opening[0] in ("?=", "?!", "?<=", "?<!")
        return _Part(part.repetitions, max(part.before, 0), False) if looks else part

    def char_class(self) -> None:
        """The rest of a class, in which there may be others."""
        depth, opened = 1, True
        while depth:
            if opened:  # behind its bracket, "]" is a character
                self.at += self.pattern.startswith("^", self.at)
                self.at += self.pattern.startswith("]", self.at)
            char = self.pattern[self.at : self.at + 1]
            if not char or depth > MAX_DEPTH:
                raise ValueError("a class is not closed" if not char else f"more than {MAX_DEPTH} classes inside each other")
            opened = char == "["
            depth += opened - (char == "]")
            self.at += 2 if char == "\\" else 1

    def escape(self) -> None:
        char = self.pattern[self.at : self.at + 1]
        if not char or char in "kg123456789":
            raise ValueError(f"a reference to a group, at character {self.at - 1}")
        self.at += 1
        if char in "pPx" and (braces := re.compile(r"\{[^{}]*\}").match(self.pattern, self.at)):
            self.at = braces.end()
