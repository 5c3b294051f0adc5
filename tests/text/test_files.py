"""Reading text, Python's own documentation, whole-document splits."""

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue
from mini_tfm.text import files as text

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda value: not value.startswith("\ufeff")
)


@given(value=TEXTS, chunk_bytes=st.integers(1, 9))
def test_any_text_comes_back_whole_and_in_pieces(tmp_path_factory, value, chunk_bytes):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(value.encode())
    assert text.read_text(path) == value
    pieces = list(text.stream_text(path, chunk_bytes))
    assert "".join(pieces) == value
    assert all(0 < len(piece.encode()) <= chunk_bytes + 3 for piece in pieces)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 4, 1000])
def test_the_mark_is_dropped_once_and_line_ends_stay(tmp_path, chunk_bytes):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfa\r\nb\rc\n")
    assert text.read_text(path) == "\ufeffa\r\nb\rc\n"
    assert "".join(text.stream_text(path, chunk_bytes)) == "\ufeffa\r\nb\rc\n"


BAD_CONTENTS = {
    "empty": (b"", "empty"),
    "only-a-mark": (b"\xef\xbb\xbf", "empty"),
    "nul": ("é".encode() * 9 + b"\0", "NUL byte at byte 18"),
    "utf-16": ("one".encode("utf-16"), "found a file in UTF-16; convert it to UTF-8"),
    "stray-continuation": (b"abc\x80", "at byte 3"),
    "cut-character": (b"abcde\xf0\x9f\x98", "at byte 5"),
    "surrogate": (b"a\xed\xa0\x80", "at byte 1"),
    "overlong": (b"ab\xc0\xaf", "at byte 2"),
    "latin-1": (b"caf\xe9 noir", "at byte 3"),
}


@pytest.mark.parametrize("chunk_bytes", [1, 2, 5, 100])
@pytest.mark.parametrize("kind", BAD_CONTENTS)
def test_what_is_not_text_is_refused_with_its_offset(tmp_path, kind, chunk_bytes):
    content, expected = BAD_CONTENTS[kind]
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidValue, match=expected) as caught:
        list(text.stream_text(path, chunk_bytes))
    assert str(path) in str(caught.value)
    with pytest.raises(InvalidValue, match=expected):
        text.read_text(path)


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "fifo", "a\0b", "/dev/null", tmp_path / ("x" * 300)):
        with pytest.raises(FileProblem):
            text.read_text(path)
    with pytest.raises(InvalidType, match="path"):
        text.read_text(3)


@pytest.mark.parametrize("chunk_bytes, error", [(0, InvalidValue), (-1, InvalidValue), (1.5, InvalidType)])
def test_chunk_bytes_is_checked_before_iteration(tmp_path, chunk_bytes, error):
    with pytest.raises(error, match="chunk_bytes"):
        text.stream_text(tmp_path, chunk_bytes)


def test_streaming_takes_bounded_ram(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes("é€😀x".encode() * 1_000_000)
    tracemalloc.start()
    try:
        total = sum(len(piece) for piece in text.stream_text(path, 1 << 14))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 4_000_000
    assert peak_bytes < 1 << 20
