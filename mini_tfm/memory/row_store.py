"""RowStore: a place where rows outlive the process, as a strategy sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

RowChunk = tuple[np.ndarray, np.ndarray]  # hidden (n, d) float32, positions (n,) int64


@dataclass(frozen=True)
class Claim:
    """What a stream holds of a document: how often it was deleted, in which store, and what the rows of each bank are made of."""

    identity: int
    deletions: int
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A write of a stream, as the store has it.

    again: it was written before, and nothing was added now. counts: the banks' rows behind it. first: the number of the first
    of its rows in each bank. moved: positions that it was moved by, as others had written behind `end`. end: the position
    behind the document's last row.
    """

    again: bool
    counts: Mapping[str, int]
    first: Mapping[str, int]
    moved: int
    end: int


@runtime_checkable
class RowStore(Protocol):
    """Named documents, each of named banks, each a growing (N, d) array of float32 rows with their positions.

    All that `append` and `write` returned from is there after a crash, whole. Many processes may read and write one store.
    Errors are `mini_tfm.errors`: InvalidValue for a store of something else, FileProblem for one out of reach.
    """

    def open(self, d_model: int, model: str | Mapping[str, str], former: Callable[[], str] | None = None) -> None:
        """Makes the store if there is none; else checks that it holds rows of this width and of this model.

        model: the name of what rows are made of, in each bank or in all. A bank without rows takes the name it is given.
        former: gives the one name for all banks, that of all weights, under which stores of earlier versions may have them.
        """

    def documents(self) -> dict[str, int]:
        """The rows of each document. Of a store that is not there: none, and it is not made."""

    def counts(self, document: str) -> dict[str, int]:
        """The rows of each bank of a document."""

    def next_position(self, document: str) -> int:
        """Behind the last row's position: where reading goes on."""

    def append(self, document: str, rows: Mapping[str, RowChunk]) -> dict[str, int]:
        """Adds rows to each bank, durably and all or none; the banks' new counts."""

    def write(self, document: str, rows: Mapping[str, RowChunk], claim: Claim, writer: int, number: int, end: int) -> Written | None:
        """The same for a stream, `writer`, of which it is write `number`, counted from 1; checked in the transaction that writes.

        end: the position behind the document's last row, as the stream knows it. Where others have written more, the rows
        are moved behind theirs. A write that is there already is not repeated. None, and nothing is written, if the
        document was deleted since. Raises InvalidValue if a bank now has rows of another model.
        """

    def reading(self, document: str, bank: str, count: int, claim: Claim | None = None) -> AbstractContextManager[Iterator[RowChunk]]:
        """The first `count` rows, a chunk at a time, in order; valid inside the context only.

        Nothing if the document was deleted by then. Raises InvalidValue if the bank now has rows of another model.
        """

    def gather(self, document: str, bank: str, numbers: np.ndarray, claim: Claim | None = None) -> RowChunk:
        """Copies of the rows with these numbers (n,), counted from 0, in ascending order.

        Nothing if the document was deleted by then. Raises InvalidValue if the bank now has rows of another model.
        """

    def delete(self, document: str) -> None:
        """Forgets a document, if it is there, and counts that."""

    def compact(self) -> tuple[int, int]:
        """Gives back the space of what was deleted, while others read and write: the store's bytes before and after."""

    def identity(self) -> int:
        """A number that another store at the same place, made after this one was deleted, does not have."""

    def deletions(self, document: str) -> int:
        """How often `delete` was called for this document, by any process: a session with rows of it must forget them, too."""
