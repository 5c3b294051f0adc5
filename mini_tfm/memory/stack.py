"""Stack: several memories as one. Each is offered what the one before it drops."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidType
from .base import Memory


class Stack(Memory):
    """Memories in order, from working memory to long-term memory.

    New rows go to the first member at their site and layer that has a `write`. What it drops goes to the `absorb` of the
    next member there, and so on: an exchange between memories needs no code in either. Rows from `begin` go in front of
    the text in the order of the members; the views of all members are attended to. The library calls the members
    (memory/run.py); a stack computes nothing.
    """

    def __init__(self, members: Sequence[Memory]):
        flat: list[Memory] = [inner for member in members for inner in (member.members if isinstance(member, Stack) else [member])]
        for member in flat:
            if not isinstance(member, Memory):
                raise InvalidType(f"members: expected Memory objects, got {type(member).__name__}")
        self.members: list[Memory] = flat
        self.name = "+".join(member.name for member in flat)
        texts = [member.text for member in flat]
        self.text = "+".join(filter(None, texts)) if all(texts) else None

    def documents(self) -> dict[str, int]:
        return {name: rows for member in self.members for name, rows in member.documents().items()}

    def compact(self) -> tuple[int, int]:
        before, after = zip(*(member.compact() for member in self.members), strict=True) if self.members else ((), ())
        return sum(before), sum(after)

    def reset(self, document: str) -> None:
        for member in self.members:
            member.reset(document)
