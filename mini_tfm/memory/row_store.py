"""RowStore: a place where rows outlive the process, as a strategy sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np

RowChunk = tuple[np.ndarray, np.ndarray]  # hidden (n, d) float32, positions (n,) int64


@runtime_checkable
class RowStore(Protocol):
    """Named documents, each of named banks, each a growing (N, d) array of float32 rows with their positions.

    All that `append` returned from is there after a crash, whole. Many processes may read and write one store.
    Errors are `mini_tfm.errors`: InvalidValue for a store of something else, FileProblem for one out of reach.
    """

    def open(self, d_model: int, model: str) -> None:
        """Makes the store if there is none; else checks that it holds rows of this width and of this model's weights."""

    def documents(self) -> dict[str, int]:
        """The rows of each document. Of a store that is not there: none, and it is not made."""

    def counts(self, document: str) -> dict[str, int]:
        """The rows of each bank of a document."""

    def next_position(self, document: str) -> int:
        """Behind the last row's position: where reading goes on."""

    def append(self, document: str, rows: Mapping[str, RowChunk]) -> dict[str, int]:
        """Adds rows to each bank, durably and all or none; the banks' new counts."""

    def reading(self, document: str, bank: str, count: int) -> AbstractContextManager[Iterator[RowChunk]]:
        """The first `count` rows, a chunk at a time, in order; valid inside the context only.

        Nothing if the document was deleted by then.
        """

    def delete(self, document: str) -> None:
        """Forgets a document, if it is there, and counts that."""

    def identity(self) -> int:
        """A number that another store at the same place, made after this one was deleted, does not have."""

    def deletions(self, document: str) -> int:
        """How often `delete` was called for this document, by any process: a session with rows of it must forget them, too."""
