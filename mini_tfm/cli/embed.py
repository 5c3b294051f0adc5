"""`mini-tfm embed`: computes one vector per line of text."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileProblem
from .shared import (
    Reading,
    check_files,
    check_out,
    count,
    dtype_option,
    files_argument,
    folder_argument,
    json_option,
    lora_option,
    note,
    pieces_of,
    print_json,
    segment_option,
    total_bytes,
)

if TYPE_CHECKING:
    import numpy as np

TEXTS_AT_ONCE = 1024
IN_FOLDERS = (".txt", ".md")


@click.command(short_help="Write a vector for each line of text files.")
@folder_argument
@files_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write a NumPy file (.npy), float32 of shape (lines, d), or a line of JSON per vector (.jsonl, or - for standard output).",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--prompt", metavar="NAME", help="Put the model's prompt of this name before each line, such as query.")
@click.option(
    "--normalize/--no-normalize",
    default=None,
    show_default="as the model was trained",
    help="Bring vectors to length 1, so that a product of two is their cosine.",
)
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    metavar="NUMBERS",
    help="Keep only the first so many numbers, for models trained so (Matryoshka).",
)
@lora_option
@dtype_option
@segment_option
@json_option
def embed(
    folder: Path,
    files: tuple[Path, ...],
    out: Path | None,
    overwrite: bool,
    lora: Path | None,
    dtype: str | None,
    segment_length: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Computes one vector per line of FILEs (- is standard input; of a folder all .txt and .md files) with the model in FOLDER.

    Vectors are made as the model was trained to embed; where it was not, they are the mean of the encoder's outputs over a line's
    tokens. They are in the order of the lines; an empty line without tokens gives zeros. A line longer than a segment, in tokens,
    is truncated. RAM is bounded with --out, whatever the length of the files.

    \b
    Examples:
      mini-tfm embed minilm notes.txt --out notes.npy
      mini-tfm embed minilm notes/ --out - --dimensions 128 > notes.jsonl
    """
    from ..pipeline import Pipeline

    to_stdout = out is not None and str(out) == "-"
    if out is None and not as_json:
        raise click.UsageError("give --out FILE.npy or --out FILE.jsonl, or --json for vectors on standard output")
    if to_stdout and as_json:
        raise click.UsageError("give --out - for lines of JSON or --json for one document, not both")
    if out is not None and not to_stdout:
        _check_out(out, overwrite)
    files = tuple(_files(files))
    check_files(files)
    pipe = Pipeline.load(folder, memory=None, segment_length=segment_length, lora=lora, dtype=dtype)
    answer: dict[str, Any] = {"model": str(folder), "file": ", ".join(map(str, files))}
    with Reading("embedding", total_bytes(files)) as reading, contextlib.ExitStack() as stack:
        lines = Lines(files, reading)
        vectors = (pipe.embed(some, **options) for some in lines)
        if out is not None and not to_stdout:
            from ..files.writing import building

            fd = stack.enter_context(building(os.path.abspath(out), overwrite))
            width = _write_npy(fd, vectors, pipe.embed([], **options)) if out.suffix == ".npy" else _write_lines(fd, lines, vectors)
            answer["out"] = str(out)
        elif to_stdout:
            width = _write_lines(None, lines, vectors)
        else:
            answer["vectors"] = [vector for some in vectors for vector in some.tolist()]
            width = pipe.embed([], **options).shape[1]
    if lines.empty:
        note(f"{count(lines.empty)} of {count(lines.count)} lines are empty: their vectors are those of no text")
    answer |= {"texts": lines.count, "d_model": width}
    if as_json:
        print_json(answer, indent=None)
    elif not to_stdout:
        click.echo(f"{out}: {count(lines.count)} vectors of {width} numbers (float32)")


class Lines:
    """The lines of files, TEXTS_AT_ONCE at a time; `at` says of the last ones given which file and line each is."""

    def __init__(self, files: tuple[Path, ...], reading: Reading):
        self.files, self.reading = files, reading
        self.count = self.empty = 0
        self.at: list[tuple[str, int]] = []

    def __iter__(self) -> Iterator[list[str]]:
        every = ((str(path), number, line) for path in self.files for number, line in enumerate(self._lines(path), 1))
        while some := list(itertools.islice(every, TEXTS_AT_ONCE)):
            self.at = [(path, number) for path, number, _ in some]
            lines = [line for _, _, line in some]
            self.count += len(lines)
            self.empty += sum(not line for line in lines)
            yield lines

    def _lines(self, path: Path) -> Iterator[str]:
        rest = ""
        for piece in self.reading.through(pieces_of(path)):
            *whole, rest = (rest + piece).split("\n")
            yield from (line.removesuffix("\r") for line in whole)
        if rest:
            yield rest.removesuffix("\r")


def _write_npy(fd: int, vectors: Iterable[np.ndarray], none: np.ndarray) -> int:
    """Rows as they come, then the number of them in the header; returns their width. none: (0, d)."""
    import numpy as np

    from ..files.writing import write_all

    def header(n: int) -> bytes:
        buffer = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": (n, none.shape[1])}
        np.lib.format.write_array_header_1_0(buffer, about)  # leaves room for any number of rows
        return buffer.getvalue()

    n = 0
    write_all(fd, header(n))
    for some in vectors:
        write_all(fd, np.ascontiguousarray(some, "<f4").tobytes())
        n += len(some)
    os.lseek(fd, 0, os.SEEK_SET)
    write_all(fd, header(n))
    return none.shape[1]


def _write_lines(fd: int | None, lines: Lines, vectors: Iterable[np.ndarray]) -> int:
    """A line of JSON per vector, to standard output if there is no descriptor; returns their width."""
    from ..files.writing import write_all

    width = 0
    for some in vectors:
        width = some.shape[1]
        for (path, number), vector in zip(lines.at, some.tolist(), strict=True):
            told = json.dumps({"file": path, "line": number, "vector": vector})
            if fd is None:
                click.echo(told)
            else:
                write_all(fd, told.encode() + b"\n")
    return width


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and those in folders, in order."""
    for path in paths:
        if str(path) == "-" or not path.is_dir():
            yield path
            continue
        found = sorted(each for each in path.rglob("*") if each.suffix in IN_FOLDERS and each.is_file())
        if not found:
            raise FileProblem(f"{path}: expected {' or '.join(IN_FOLDERS)} files in this folder, found none")
        yield from found


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise FileProblem(f"--out: {out} is a folder; expected the path of a file")
    if out.suffix not in (".npy", ".jsonl"):
        raise FileProblem(f"--out: {out}: expected a name that ends with .npy or .jsonl, or -")
    if out.exists() and not overwrite:
        raise FileProblem(f"--out: {out} exists already; --overwrite replaces it")
    if not out.parent.is_dir():
        raise FileProblem(f"--out: {out.parent} is not a folder; expected a file in a folder that exists")
    check_out(out.parent)
