"""`mini-tfm embed`: computes one vector per line of text."""

from __future__ import annotations

import io
from pathlib import Path

import click

from ..errors import FileProblem
from .shared import check_out, count, folder_argument, json_option, note, pieces_of, print_json, segment_option

TEXTS_AT_ONCE = 64


@click.command(short_help="Write a vector for each line of a text file.")
@folder_argument
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="VECTORS.npy", help="Write a NumPy file, float32 of shape (lines, d_model)."
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@segment_option
@json_option
def embed(folder: Path, file: Path, out: Path | None, overwrite: bool, segment_length: int | None, as_json: bool) -> None:
    """Computes one vector per line of FILE (- is standard input): the mean of the encoder's outputs over its tokens.

    Row i of the result is the vector of line i; an empty line gives zeros. A line longer than a segment, in tokens, is
    truncated.
    """
    import numpy as np

    from ..files.writing import write_file
    from ..pipeline import Pipeline
    from ..progress import track

    if out is not None:
        _check_out(out, overwrite)
    elif not as_json:
        raise click.UsageError("give --out VECTORS.npy, or --json for vectors on standard output")
    pipe = Pipeline.load(folder, memory=None, segment_length=segment_length)
    lines = "".join(pieces_of(file)).split("\n")
    lines = [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]
    groups = [lines[i : i + TEXTS_AT_ONCE] for i in range(0, len(lines), TEXTS_AT_ONCE)]
    vectors = np.concatenate([pipe.embed([]), *track(map(pipe.embed, groups), "embedding", len(groups), f"x {TEXTS_AT_ONCE} lines")])
    if empty := sum(not line for line in lines):
        note(f"{count(empty)} of {count(len(lines))} lines are empty: their vectors are zeros")
    answer = {"model": str(folder), "file": str(file), "texts": len(lines), "d_model": vectors.shape[1]}
    if out is not None:
        buffer = io.BytesIO()
        np.save(buffer, vectors)
        write_file(out, buffer.getvalue(), new=not overwrite)
        answer["out"] = str(out)
    else:
        answer["vectors"] = vectors.tolist()
    if as_json:
        print_json(answer, indent=None)
    else:
        click.echo(f"{out}: {count(len(lines))} vectors of {vectors.shape[1]} numbers (float32)")


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise FileProblem(f"--out: {out} is a folder; expected the path of a file")
    if out.exists() and not overwrite:
        raise FileProblem(f"--out: {out} exists already; --overwrite replaces it")
    if not out.parent.is_dir():
        raise FileProblem(f"--out: {out.parent} is not a folder; expected a file in a folder that exists")
    check_out(out.parent)
