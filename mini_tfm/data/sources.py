"""Text files of three kinds as documents: plain text, lines of JSON, and source-target lines with a tab.

    .jsonl .ndjson   an object a line; a named field is a document, or two named fields are a source and its target
    .tsv             source, tab, target; one pair a line
    all others       text: a file is a document, or each line that is not blank

An error names the file and the line. RAM holds one line, or one piece of a long text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import FileProblem, InvalidType, InvalidValue
from ..files.reading import as_path, open_regular
from ..files.strict_json import parse_json_strict
from ..text.files import stream_text

JSON_LINES = (".jsonl", ".ndjson")
PAIR_LINES = (".tsv",)
MAX_LINE_BYTES = 1 << 26  # a line is held in RAM
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """Text of a document, or of one side of a pair, and whether it ends there; `where` it is, for errors."""

    text: str
    ends: bool
    where: str


class TextFiles:
    """Documents, or source-target pairs, in files of one kind, known by their extension (see above).

    paths: one or several. fields: of JSON lines, the name of the text's field, or the names of source and target; None takes
    "text", or else "source" and "target", whichever the first line has. documents: what counts as a document in a plain text
    file, "file" or "line". Iterating gives str, or (source, target). kind: "texts" or "pairs".
    Raises FileProblem, InvalidValue at once for a file that cannot be opened or is of another kind, and while iterating for
    a bad line.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        fields: str | Sequence[str] | None = None,
        documents: str = "file",
    ):
        several = [paths] if isinstance(paths, str | bytes | os.PathLike) else paths
        if not isinstance(several, Iterable):
            raise InvalidType(f"paths: expected a path or several, got {type(paths).__name__}")
        self.paths = [as_path(path) for path in several]
        if not self.paths:
            raise InvalidValue("paths: expected at least one file, got none")
        names = (fields,) if isinstance(fields, str) else fields if fields is None else tuple(fields)
        if names is not None and (len(names) not in (1, 2) or not all(isinstance(name, str) and name for name in names)):
            raise InvalidValue(f"fields: expected the name of one field, or two for source and target, got {fields!r}")
        if documents not in ("file", "line"):
            raise InvalidValue(f"documents: expected 'file' or 'line', got {documents!r}")
        self.fields, self.documents = names, documents
        self._fields_of = {path: self._find_fields(path) for path in self.paths}
        kinds = {path: self._kind_of(path) for path in self.paths}
        self.kind = kinds[self.paths[0]]
        if other := [path for path in self.paths if kinds[path] != self.kind]:
            first = self.paths[0]
            raise InvalidValue(f"paths: {first} holds {self.kind}, {other[0]} holds {kinds[other[0]]}; expected files of one kind")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that change what is read, as plain data."""
        return {"fields": list(self.fields) if self.fields else None, "documents": self.documents}

    def __iter__(self) -> Iterator[Any]:
        parts: list[str] = []
        sides: list[str] = []
        for piece in self.pieces():
            parts.append(piece.text)
            if piece.ends:
                whole, parts = "".join(parts), []
                sides.append(whole)
                if self.kind == "texts":
                    yield whole
                    sides = []
                elif len(sides) == 2:
                    yield sides[0], sides[1]
                    sides = []

    def pieces(self) -> Iterator[Piece]:
        """All text in order; a pair is two documents, the source and the target."""
        for path in self.paths:
            if path.endswith(PAIR_LINES):
                yield from _pair_lines(path)
            elif path.endswith(JSON_LINES):
                yield from _json_lines(path, self._fields_of[path])
            elif self.documents == "line":
                yield from _text_lines(path)
            else:
                last = None
                for text in stream_text(path):
                    if last is not None:
                        yield Piece(last, False, path)
                    last = text
                yield Piece(last or "", True, path)

    def fingerprints(self) -> list[dict[str, Any]]:
        """Name, size in bytes and SHA-256 of each file. Reads all of them."""
        return [_fingerprint(path) for path in self.paths]

    def stamps(self) -> list[tuple[int, ...]]:
        """Inode, size and time of change of each file: they differ after a write."""
        found: list[tuple[int, ...]] = []
        for path in self.paths:
            try:
                about = os.stat(path)
            except OSError as error:
                raise FileProblem(f"{path}: cannot be read: {error.strerror}") from error
            found.append((about.st_ino, about.st_size, about.st_mtime_ns))
        return found

    def _kind_of(self, path: str) -> str:
        if path.endswith(PAIR_LINES):
            return "pairs"
        return "pairs" if len(self._fields_of[path]) == 2 else "texts"

    def _find_fields(self, path: str) -> tuple[str, ...]:
        """The fields of a file of JSON lines: those given, or those of its first line."""
        if not path.endswith(JSON_LINES):
            with open_regular(path):
                return ()
        _, where, line = next(_lines(path))
        record = parse_json_strict(line, where)
        choices = [self.fields] if self.fields else [("text",), ("source", "target")]
        for names in choices:
            if all(name in record for name in names):
                return names
        wanted = " and ".join(map(repr, self.fields)) if self.fields else "'text', or 'source' and 'target',"
        raise InvalidValue(f"{where}: expected field {wanted} in the object, it has {sorted(record)[:8]}; name the field to read")


def _lines(path: str) -> Iterator[tuple[int, str, bytes]]:
    """(number, "path, line number", bytes without the line's end). Raises InvalidValue for an empty file."""
    number, rest, at_start = 0, b"", True
    with open_regular(path) as file:
        while True:
            try:
                chunk = file.read(_READ_BYTES)
            except OSError as error:
                raise FileProblem(f"{path}: cannot be read: {error.strerror}") from error
            if at_start:
                chunk, at_start = chunk.removeprefix(_BOM), False
            *whole, rest = (rest + chunk).split(b"\n")
            if not chunk and rest:
                whole, rest = [rest], b""
            for line in whole:
                number += 1
                yield number, f"{path}, line {number}", line.removesuffix(b"\r")
            if len(rest) > MAX_LINE_BYTES:
                where = f"{path}, line {number + 1}"
                raise InvalidValue(f"{where}: expected at most {MAX_LINE_BYTES:,} bytes per line; does the file match its extension?")
            if not chunk:
                break
    if not number:
        raise InvalidValue(f"{path}: the file is empty; expected lines")


def _decoded(line: bytes, where: str) -> str:
    if b"\0" in line:
        raise InvalidValue(f"{where}: expected text, found a NUL byte: a binary file?")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{where}: expected UTF-8, found something else at byte {error.start} of the line ({error.reason})") from error


def _text_lines(path: str) -> Iterator[Piece]:
    empty = True
    for _, where, line in _lines(path):
        if text := _decoded(line, where).strip():
            empty = False
            yield Piece(text, True, where)
    if empty:
        raise InvalidValue(f"{path}: all lines are empty; expected one document per line")


def _pair_lines(path: str) -> Iterator[Piece]:
    for _, where, line in _lines(path):
        sides = _decoded(line, where).split("\t")
        if len(sides) != 2:
            found = "an empty line" if sides == [""] else f"{len(sides) - 1} tabs"
            raise InvalidValue(f"{where}: expected source, one tab and target, found {found}")
        for name, text in zip(("source", "target"), sides, strict=True):
            if not text:
                raise InvalidValue(f"{where}: the {name} is empty")
            yield Piece(text, True, where)


def _json_lines(path: str, names: tuple[str, ...]) -> Iterator[Piece]:
    for _, where, line in _lines(path):
        if not line.strip():
            raise InvalidValue(f"{where}: expected a JSON object, found an empty line")
        record = parse_json_strict(line, where)
        for name in names:
            text = record.get(name)
            if not isinstance(text, str):
                found = f"it has {sorted(record)[:8]}" if name not in record else f"got {type(text).__name__}"
                raise InvalidValue(f"{where}: expected text in field {name!r}, {found}")
            if not text:
                raise InvalidValue(f"{where}: field {name!r} is empty")
            yield Piece(text, True, where)


def _fingerprint(path: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        try:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
                size += len(chunk)
        except OSError as error:
            raise FileProblem(f"{path}: cannot be read: {error.strerror}") from error
    return {"name": os.path.basename(path), "bytes": size, "sha256": digest.hexdigest()}
