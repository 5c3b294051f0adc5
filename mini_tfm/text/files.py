"""Text from files, whole or as a stream."""

import codecs
import os
from collections.abc import Iterator

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, shown
from mini_tfm.files.reading import open_regular
from mini_tfm.options import plain

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
    chunk_bytes = plain(chunk_bytes)
    if type(chunk_bytes) is not int:
        raise InvalidType(f"chunk_bytes: expected an int, got {type(chunk_bytes).__name__}")
    if chunk_bytes < 1:
        raise InvalidValue(f"chunk_bytes: expected at least 1, got {shown(chunk_bytes)}")
    return _pieces(path, chunk_bytes)


_UTF16 = "a file in UTF-16; convert it to UTF-8"


def _is_utf16(data: bytes) -> bool:
    """Whether a file begins so, as no text in UTF-8 does."""
    is_wider = data.startswith(codecs.BOM_UTF32_LE)
    return not is_wider and (data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or data in (b"\xff", b"\xfe"))


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
                told = f"a NUL byte {where}: a binary file?"
                raise InvalidValue(f"{file.name}: expected text, found {_UTF16 if offset == 0 and _is_utf16(data) else told}")
            try:
                piece, used = codecs.utf_8_decode(data, "strict", not chunk)
            except UnicodeDecodeError as error:
                if offset == 0 and _is_utf16(data):
                    raise InvalidValue(f"{file.name}: expected text, found {_UTF16}") from error
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
