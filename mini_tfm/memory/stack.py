"""Stack: several memories as one. Each is offered what the one before it drops."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidType, shown
from .base import Memory
from .validate import attributed, require


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
        """The rows of each document, of all members together. Raises the error of a member, with its name."""
        rows: dict[str, int] = {}
        for member in self.members:
            with attributed(member, "documents", step=None):
                of_member = member.documents()
                whole = isinstance(of_member, dict) and all(isinstance(n, str) and type(m) is int and m >= 0 for n, m in of_member.items())
                require(whole, "expected the number of rows of each document, {{name: rows}}, got {}", shown(of_member))
            for name, more in of_member.items():
                rows[name] = rows.get(name, 0) + more
        return rows

    def compact(self) -> tuple[int, int]:
        before, after = 0, 0
        for member in self.members:
            with attributed(member, "compact", step=None):
                sizes = member.compact()
                pair = isinstance(sizes, tuple) and len(sizes) == 2 and all(type(size) is int and size >= 0 for size in sizes)
                require(pair, "expected the bytes before and after, got {}", shown(sizes))
            before, after = before + sizes[0], after + sizes[1]
        return before, after

    def reset(self, document: str) -> None:
        for member in self.members:
            with attributed(member, "reset", step=None):
                member.reset(document)
