"""Text from files, the documentation inside every Python, and a split into what is trained on and what is not."""

import codecs
import hashlib
import os
from collections.abc import Iterator

from mini_tfm.checkpoint.native import open_regular
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue

_READ_BYTES = 1 << 20


def read_text(path: str | os.PathLike) -> str:
    """The whole file as strict UTF-8: a leading byte-order mark is dropped, line ends stay as they are.

    Raises FileProblem when the path is missing, unreadable or not a regular file; InvalidValue when the file is
    empty, holds a NUL byte or is not UTF-8, with the offset in bytes and the line.
    """
    return "".join(stream_text(path, _READ_BYTES))


def stream_text(path: str | os.PathLike, chunk_bytes: int = _READ_BYTES) -> Iterator[str]:
    """The text of `read_text` in pieces of at most `chunk_bytes` + 3 bytes, none of which splits a character.

    RAM is bounded by the chunk, whatever the file's size. Raises what `read_text` raises, at the piece at fault.
    """
    if type(chunk_bytes) is not int:
        raise InvalidType(f"chunk_bytes: expected an int, got {type(chunk_bytes).__name__}")
    if chunk_bytes < 1:
        raise InvalidValue(f"chunk_bytes: expected at least 1, got {chunk_bytes}")
    return _pieces(path, chunk_bytes)


def _pieces(path: str | os.PathLike, chunk_bytes: int) -> Iterator[str]:
    with open_regular(path) as file:
        offset, line = 0, 1  # bytes decoded so far, and where that is
        rest = b""  # the bytes of a character that a chunk cut, at most 3
        is_start = is_empty = True
        while True:
            try:
                chunk = file.read(chunk_bytes)
            except OSError as error:
                raise FileProblem(f"{file.name}: cannot be read: {error.strerror}") from error
            data = rest + chunk
            if b"\0" in data:
                at = data.index(0)
                where = f"at byte {offset + at}, line {line + data.count(10, 0, at)}"
                raise InvalidValue(f"{file.name}: expected text, found a NUL byte {where}: a binary file?")
            try:
                piece, used = codecs.utf_8_decode(data, "strict", not chunk)
            except UnicodeDecodeError as error:
                where = f"at byte {offset + error.start}, line {line + data.count(10, 0, error.start)}"
                raise InvalidValue(
                    f"{file.name}: expected UTF-8, found something else {where} ({error.reason}); convert the file to UTF-8"
                ) from error
            offset, line = offset + used, line + data.count(10, 0, used)
            rest = data[used:]
            if is_start and piece:
                piece = piece.removeprefix("\ufeff")
                is_start = False
            if piece:
                is_empty = False
                yield piece
            if not chunk:
                break
        if is_empty:
            raise InvalidValue(f"{file.name}: the file is empty; expected text")


def python_topics() -> dict[str, str]:
    """The language documentation that CPython carries for `help()`: topic -> text, sorted by topic.

    About 0.5 MB of English that needs no download. Raises FileProblem where Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileProblem(
            "pydoc_data.topics: this Python was installed without its documentation; install the full standard library"
        ) from error
    return dict(sorted(topics.items()))


def in_parts(documents: dict[str, str], least: int = 10) -> dict[str, str]:
    """The documents as they are where there are `least` or more; else each cut into `least` parts, so that some can
    be held out. A cut is moved on to the next paragraph, line or space; parts that would be empty are left out.
    """
    if len(documents) >= least:
        return documents
    parts: dict[str, str] = {}
    for name, text in documents.items():
        start = 0
        for number in range(1, least + 1):
            wanted = len(text) * number // least
            stop = len(text) if number == least else max(start, _cut_after(text, wanted))
            if text[start:stop].strip():
                parts[f"{name} (part {number} of {least})"] = text[start:stop]
            start = stop
    return parts


def _cut_after(text: str, place: int) -> int:
    """The first good place to cut at or after `place`, no more than 2,000 characters on."""
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, place, place + 2000)
        if found >= 0:
            return found + len(mark)
    return place


def split_documents(documents: dict[str, str], held_out_fraction: float, seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """(train, held_out), both sorted by name: whole documents, at least one on each side.

    Documents are taken in an order drawn from `seed`, each if it still fits into `held_out_fraction` of all UTF-8
    bytes; if none fits, the smallest is taken. The order is a hash of seed and name, so a split stays the same on
    every Python version and machine. Raises InvalidValue, InvalidType.
    """
    if not all(isinstance(item, str) for pair in documents.items() for item in pair):
        raise InvalidType("documents: expected names and texts that are str")
    if len(documents) < 2:
        raise InvalidValue(f"documents: expected at least 2, one for each side, got {len(documents)}")
    if isinstance(held_out_fraction, bool) or not isinstance(held_out_fraction, (int, float)):
        raise InvalidType(f"held_out_fraction: expected a float, got {type(held_out_fraction).__name__}")
    if not 0 < held_out_fraction < 1:
        raise InvalidValue(f"held_out_fraction: expected a number between 0 and 1, got {held_out_fraction}")
    if type(seed) is not int:
        raise InvalidType(f"seed: expected an int, got {type(seed).__name__}")

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()

    sizes = {name: len(text.encode("utf-8", "surrogatepass")) for name, text in documents.items()}
    room = held_out_fraction * sum(sizes.values())
    chosen: set[str] = set()
    for name in sorted(documents, key=draw):
        if sizes[name] <= room and len(chosen) < len(documents) - 1:
            chosen.add(name)
            room -= sizes[name]
    if not chosen:
        chosen = {min(sorted(documents), key=sizes.__getitem__)}
    train = {name: documents[name] for name in sorted(documents) if name not in chosen}
    return train, {name: documents[name] for name in sorted(chosen)}
