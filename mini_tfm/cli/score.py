"""`mini-tfm score`: measures how well a model predicts texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shared import (
    Clock,
    Reading,
    check_files,
    count,
    dtype_option,
    files_argument,
    folder_argument,
    json_option,
    lora_option,
    memory_named,
    none_of,
    pieces_of,
    print_json,
    print_table,
    segment_option,
    total_bytes,
    warn_if_untrained,
)

if TYPE_CHECKING:
    from ..pipeline import Pipeline


@click.command(short_help="Measure bits per token and per byte of text files.")
@folder_argument
@files_argument
@click.option(
    "--memory",
    "memories",
    multiple=True,
    metavar="SPEC",
    default=["saved"],
    show_default="what the model was trained with",
    help="The memory, as name:option=value,...; stack several with +; none: no memory. Repeat the option to compare memories.",
)
@lora_option
@dtype_option
@segment_option
@json_option
def score(
    folder: Path,
    files: tuple[Path, ...],
    memories: tuple[str, ...],
    lora: Path | None,
    dtype: str | None,
    segment_length: int | None,
    as_json: bool,
) -> None:
    """Measures how many bits the model in FOLDER needs per token and per byte of FILEs (- is standard input).

    Fewer is better; 8 bits per byte means no compression. Each file is read from its beginning, with the memory's contents;
    the memory does not change.

    \b
    Examples:
      mini-tfm score model book.txt
      mini-tfm score model book.txt --memory saved --memory none
    """
    from ..pipeline import Pipeline

    if len(set(memories)) < len(memories):
        raise click.UsageError(f"--memory: expected each memory once, got {', '.join(memories)}")
    if len(memories) > 1 and any(str(path) == "-" for path in files):
        raise click.UsageError("-: standard input can be read once; with several --memory, give a file")
    check_files(files)
    found = []
    for memory in memories:
        pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length, lora=lora, dtype=dtype)
        warn_if_untrained(folder, pipe, memory)
        found.append(_measured(pipe, files))
    if as_json:
        print_json({"model": str(folder), **(found[0] if len(found) == 1 else {"memories": found})})
    elif len(found) == 1:
        _print(found[0])
    else:
        _print_side_by_side(found)


def _measured(pipe: Pipeline, files: tuple[Path, ...]) -> dict[str, Any]:
    """The memory's name, the score of each file and of all."""
    from ..errors import InvalidValue

    scores: list[dict[str, Any]] = []
    with Reading("scoring", total_bytes(files)) as reading:
        for path in files:
            clock = Clock()
            try:
                measured = reading.segments(pieces_of(path), pipe.score)
            except InvalidValue as error:
                raise InvalidValue(str(error) if str(path) in str(error) else f"{path}: {error}") from error
            scores.append({"file": str(path), **measured, "tokens_per_second": measured["tokens"] / clock.seconds})
    total = {name: sum(each[name] for each in scores) for name in ("tokens", "bytes", "bits")}
    total |= {"bits_per_token": total["bits"] / total["tokens"], "bits_per_byte": total["bits"] / total["bytes"]}
    return {"memory": memory_named(pipe), "files": scores, "all": total}


def _rows(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, score) of each file, and of all where there are several."""
    return [(each["file"], each) for each in found["files"]] + ([("all", found["all"])] if len(found["files"]) > 1 else [])


def _print(found: dict[str, Any]) -> None:
    print_table(
        [("file", "left"), ("tokens", "right"), ("bytes", "right"), ("bits/token", "right"), ("bits/byte", "right"), ("tokens/s", "right")],
        [
            (
                name,
                count(each["tokens"]),
                count(each["bytes"]),
                f"{each['bits_per_token']:.3f}",
                f"{each['bits_per_byte']:.3f}",
                count(each["tokens_per_second"]) if "tokens_per_second" in each else "",
            )
            for name, each in _rows(found)
        ],
    )


def _print_side_by_side(found: list[dict[str, Any]]) -> None:
    """A row a file, a column a memory."""
    print_table(
        [("file", "left"), ("bytes", "right"), *((f"bits/byte\n{each['memory']}", "right") for each in found)],
        [
            (rows[0][0], count(rows[0][1]["bytes"]), *(f"{each['bits_per_byte']:.3f}" for _, each in rows))
            for rows in zip(*map(_rows, found), strict=True)
        ],
    )
