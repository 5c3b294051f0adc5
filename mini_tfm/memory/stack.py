"""Stack: several memories as one. What one drops, the next is offered."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidType
from .base import Memory


class Stack(Memory):
    """Memories in order, from working memory to long-term memory.

    New rows enter at the first member that takes rows (that has its own `write`); what it drops goes to
    the `absorb` of the next such member, and so on: exchange between memories needs no code in either.
    Rows from `begin` go in front in order; views of all members are attended to. The library walks the
    members (memory/run.py); a stack itself computes nothing.
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

    def reset(self, document: str) -> None:
        for member in self.members:
            if document in member.documents():
                member.reset(document)
