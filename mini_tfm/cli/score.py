"""`mini-tfm score`: measures how well a model predicts texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import (
    Clock,
    Reading,
    check_files,
    count,
    files_argument,
    folder_argument,
    json_option,
    memory_named,
    memory_option,
    none_of,
    pieces_of,
    print_json,
    print_table,
    segment_option,
    total_bytes,
)


@click.command(short_help="Measure bits per token and per byte of text files.")
@folder_argument
@files_argument
@memory_option
@segment_option
@json_option
def score(folder: Path, files: tuple[Path, ...], memory: str, segment_length: int | None, as_json: bool) -> None:
    """Measures how many bits the model in FOLDER needs per token and per byte of FILEs (- is standard input).

    Fewer is better; 8 bits per byte means no compression. Each file is read from its beginning, with the memory's contents;
    the memory does not change.
    """
    from ..errors import InvalidValue
    from ..pipeline import Pipeline

    check_files(files)
    pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length)
    scores: list[dict[str, Any]] = []
    with Reading("scoring", total_bytes(files)) as reading:
        for path in files:
            clock = Clock()
            try:
                measured = pipe.score(reading.through(pieces_of(path)))
            except InvalidValue as error:
                raise InvalidValue(str(error) if str(path) in str(error) else f"{path}: {error}") from error
            scores.append({"file": str(path), **measured, "tokens_per_second": measured["tokens"] / clock.seconds})
    total = {name: sum(each[name] for each in scores) for name in ("tokens", "bytes", "bits")}
    total |= {"bits_per_token": total["bits"] / total["tokens"], "bits_per_byte": total["bits"] / total["bytes"]}
    if as_json:
        print_json({"model": str(folder), "memory": memory_named(pipe), "files": scores, "all": total})
        return
    rows = [(each["file"], each) for each in scores] + ([("all", total)] if len(scores) > 1 else [])
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
            for name, each in rows
        ],
    )
