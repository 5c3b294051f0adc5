"""Files as documents: what each kind gives, and what is wrong with a file is told with its line."""

import json
import os

import pytest

from mini_tfm.data import TextFiles
from mini_tfm.data import sources as sources_module
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_text_file_is_a_document_or_one_a_line(write):
    a, b = write("a.txt", "one\r\n\n  two \nthree"), write("b.md", "four\n")
    files = TextFiles([a, b])
    assert files.kind == "texts" and list(files) == ["one\r\n\n  two \nthree", "four\n"]
    assert list(TextFiles([a, b], documents="line")) == ["one", "two", "three", "four"]
    assert list(TextFiles(a)) == list(TextFiles(str(a))) == ["one\r\n\n  two \nthree"]


def test_lines_of_json(write):
    lines = [{"text": "eins\nzwei", "n": 1}, {"text": "drei\t", "source": "x"}]
    path = write("a.jsonl", b"\xef\xbb\xbf" + "\r\n".join(json.dumps(line) for line in lines).encode())
    assert list(TextFiles(path)) == ["eins\nzwei", "drei\t"] and TextFiles(path).kind == "texts"
    other = write("b.ndjson", '{"source": "a", "target": "b", "q": "c"}\n')
    assert list(TextFiles(other)) == [("a", "b")] and TextFiles(other).kind == "pairs"
    assert list(TextFiles(other, fields=("q", "source"))) == [("c", "a")]
    assert list(TextFiles(other, fields="q")) == ["c"]
    assert TextFiles(other, fields=["q"]).options == {"fields": ["q"], "documents": "file"}


def test_pairs_with_a_tab(write):
    files = TextFiles([write("a.tsv", "ein Haus\ta house\r\nja\tyes"), write("b.tsv", "nein\tno\n")])
    assert files.kind == "pairs" and list(files) == [("ein Haus", "a house"), ("ja", "yes"), ("nein", "no")]


def test_lines_are_the_same_however_the_file_is_read(write, monkeypatch):
    path = write("a.tsv", "".join(f"source {i} ä\ttarget {i} ö\n" for i in range(40)) + "last\tone")
    expected = list(TextFiles(path))
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr(sources_module, "_READ_BYTES", size)
        assert list(TextFiles(path)) == expected


def test_a_long_text_comes_in_pieces(write):
    text = "Wörter und so weiter. " * 120_000
    pieces = list(TextFiles(write("a.txt", text)).pieces())
    assert len(pieces) == 3 and [piece.ends for piece in pieces] == [False, False, True]
    assert "".join(piece.text for piece in pieces) == text


def test_fingerprints_name_the_content(write):
    a, b = write("a.txt", "one"), write("b.txt", "one")
    one, other = (TextFiles(path).fingerprints() for path in (a, b))
    assert one[0]["bytes"] == 3 and one[0]["sha256"] == other[0]["sha256"] and one[0]["name"] == "a.txt" != other[0]["name"]
    write("a.txt", "two")
    assert TextFiles(a).fingerprints()[0]["sha256"] != one[0]["sha256"]


GOOD = '{"text": "fine"}\n'
BAD = {
    "empty text": ("a.txt", b"", "a.txt: the file is empty"),
    "empty json": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "empty pairs": ("a.tsv", b"", "a.tsv: the file is empty"),
    "not utf-8": ("a.txt", b"fine\nfine\ncaf\xe9 noir", "a.txt: expected UTF-8, .* at byte 13, line 3"),
    "nul": ("a.txt", b"a\nb\0", "a.txt: expected text, found a NUL byte at byte 3, line 2"),
    "not utf-8 in pairs": ("a.tsv", b"a\tb\n\xff\tb\n", "a.tsv, line 2: expected UTF-8, .* byte 0 of the line"),
    "nul in pairs": ("a.tsv", b"a\tb\n\0\tb\n", "a.tsv, line 2: expected text, found a NUL"),
    "no tab": ("a.tsv", "a\tb\nonly one side\n", "a.tsv, line 2: .* found 0 tabs"),
    "two tabs": ("a.tsv", "a\tb\tc\n", "a.tsv, line 1: .* found 2 tabs"),
    "empty line of pairs": ("a.tsv", "a\tb\n\nc\td\n", "a.tsv, line 2: .* found an empty line"),
    "empty source": ("a.tsv", "a\tb\n\tb\n", "a.tsv, line 2: the source is empty"),
    "empty target": ("a.tsv", "a\t\n", "a.tsv, line 1: the target is empty"),
    "no such field at first": ("a.jsonl", '{"body": "x"}\n', r"a.jsonl, line 1: expected field 'text'.*\['body'\]"),
    "no such field later": ("a.jsonl", GOOD + '{"body": "x"}\n', "a.jsonl, line 2: expected text in field 'text'"),
    "half a pair": ("a.jsonl", '{"source": "x"}\n', "a.jsonl, line 1: expected field"),
    "not an object": ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl, line 2: .* object"),
    "not json": ("a.jsonl", GOOD * 2 + "text: fine\n", "a.jsonl, line 3: not the JSON"),
    "a field twice": ("a.jsonl", GOOD + '{"text": "a", "text": "b"}\n', "a.jsonl, line 2: .* twice"),
    "half a character in json": ("a.jsonl", GOOD + '{"text": "\\ud800"}\n', "a.jsonl, line 2"),
    "not utf-8 in json": ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', "a.jsonl, line 2"),
    "a number": ("a.jsonl", GOOD + '{"text": 5}\n', "a.jsonl, line 2: expected text in field 'text', got int"),
    "an empty field": ("a.jsonl", GOOD + '{"text": ""}\n', "a.jsonl, line 2: field 'text' is empty"),
    "empty line of json": ("a.jsonl", GOOD + "\n" + GOOD, "a.jsonl, line 2: .* empty line"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_told_with_its_line(write, kind):
    name, content, told = BAD[kind]
    path = write(name, content)
    with pytest.raises(InvalidValue, match=told):
        list(TextFiles(path))


def test_lines_that_are_all_empty(write):
    with pytest.raises(InvalidValue, match="all lines are empty"):
        list(TextFiles(write("a.txt", "\n \n\r\n"), documents="line"))


def test_a_line_without_end_is_refused_before_it_fills_the_ram(write, monkeypatch):
    monkeypatch.setattr(sources_module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(sources_module, "_READ_BYTES", 100)
    assert len(next(iter(TextFiles(write("a.txt", "x" * 1000), documents="line")))) == 1000
    with pytest.raises(InvalidValue, match="line 2: expected at most 1,000 bytes"):
        list(TextFiles(write("a.txt", "short\n" + "x" * 5000), documents="line"))


@pytest.mark.parametrize(
    ("paths", "options", "error", "told"),
    [
        ([], {}, InvalidValue, "at least one file"),
        (5, {}, InvalidType, "paths: expected"),
        ([5], {}, InvalidType, "path: expected"),
        (["a.txt"], {"documents": "page"}, InvalidValue, "documents: expected 'file' or 'line'"),
        (["a.txt"], {"fields": ()}, InvalidValue, "fields: expected"),
        (["a.txt"], {"fields": ("a", "b", "c")}, InvalidValue, "fields: expected"),
        (["a.txt"], {"fields": [5]}, InvalidValue, "fields: expected"),
        (["a.txt", "b.tsv"], {}, InvalidValue, "a.txt holds texts, .*b.tsv holds pairs"),
        (["missing.txt"], {}, FileProblem, "no such file"),
        (["missing.jsonl"], {}, FileProblem, "no such file"),
        ([""], {}, FileProblem, "no such file"),
        (["."], {}, FileProblem, "regular file"),
        (["fifo"], {}, FileProblem, "regular file"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(write, tmp_path, monkeypatch, paths, options, error, told):
    write("a.txt", "a")
    write("b.tsv", "a\tb")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=told):
        TextFiles(paths, **options)
