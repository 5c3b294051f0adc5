"""What was read into a memory on disk, so that a text is read once and an interrupted reading goes on: beside `notes.mdb`, in
`notes.mdb.read/`, a small file for each text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shared import count, note, pieces_of, stdin_text

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from .shared import Reading


def read_once(pipe: Pipeline, path: Path, reading: Reading) -> tuple[int, int, int]:
    """Reads a file, or standard input, into the pipeline's memory, as far as it was not read before.

    Gives tokens read now, and before, and the bytes of the whole text.
    """
    pieces = [stdin_text()] if str(path) == "-" else None  # which can be read once
    log = AlreadyRead(pipe, pieces or pieces_of(path))
    with log.alone():
        before = log.tokens
        if log.is_whole:
            note(f"{path}: was read into this memory before; nothing is read again")
            return 0, before, log.n_bytes
        if before:
            note(f"{path}: goes on after {count(before)} tokens that were read before")
        tokens = reading.segments(pieces or pieces_of(path), partial(pipe.read, skip=before, durable=log.record))
        log.record(before + tokens, is_whole=True)
    return tokens, before, log.n_bytes


class AlreadyRead:
    """How much of one text a pipeline's memory has.

    Known by the text's content, the memory, the model's weights, the segment length and the overlap: other rows would come of
    others. It
    counts for nothing when the document was deleted since, or the store made anew. A memory without rows on disk knows nothing.
    """

    def __init__(self, pipe: Pipeline, pieces: Iterable[str]):
        """pieces: all of the text; raises what reading it raises, so a text at fault is not read in part."""
        digest, self.n_bytes = hashlib.sha256(), 0
        for piece in pieces:
            content = piece.encode("utf-8", "surrogatepass")
            digest.update(content)
            self.n_bytes += len(content)
        members: list[Any] = list(getattr(pipe.memory, "members", [pipe.memory]))
        self._member = next((member for member in members if member is not None and member.durable and hasattr(member, "disk")), None)
        self.tokens, self.is_whole = 0, False
        if self._member is None:
            return
        cut = [pipe.segment_length, pipe.overlap] if pipe.overlap else [pipe.segment_length]  # the name that earlier versions gave
        known = [digest.hexdigest(), pipe.memory.text if pipe.memory else None, pipe.model.fingerprint(), *cut]
        name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
        self.path = Path(f"{self._member.disk.given}.read") / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(self.path.read_text())
            if about["place"] == self._place():
                self.tokens, self.is_whole = int(about["tokens"]), bool(about["is_whole"])

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process reads the same text into the same memory. Raises FileProblem where one does."""
        from ..files.folders import claimed

        with claimed(self.path) if self._member is not None else contextlib.nullcontext():
            yield

    def record(self, tokens: int, is_whole: bool = False) -> None:
        """The first `tokens` of the text are durable in the memory."""
        from ..files.writing import write_file

        self.tokens, self.is_whole = tokens, is_whole
        if self._member is not None:
            write_file(self.path, json.dumps({"tokens": tokens, "is_whole": is_whole, "place": self._place()}))

    def _place(self) -> list[int]:
        """Which store, and since which deletion of the document."""
        assert self._member is not None
        return [self._member.disk.identity(), self._member.disk.deletions(self._member.document)]
