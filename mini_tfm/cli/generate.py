"""`mini-tfm generate`: goes on from a text, with what a memory holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .shared import (
    Clock,
    Reading,
    check_files,
    count,
    folder_argument,
    json_option,
    memory_named,
    memory_option,
    none_of,
    note,
    pieces_of,
    print_json,
    segment_option,
    stdin_text,
    total_bytes,
)


@click.command(short_help="Go on from a text, with what a memory holds.")
@folder_argument
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from a text file.")
@memory_option
@click.option(
    "--read", "read_first", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Read a text file into the memory first."
)
@click.option("--max-new-tokens", default=64, show_default=True, metavar="TOKENS", help="Tokens to write at most.")
@click.option("--do-sample", is_flag=True, help="Draw tokens instead of taking the likeliest.")
@click.option("--top-k", default=0, show_default=True, metavar="TOKENS", help="Draw among the k likeliest tokens; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, metavar="SHARE", help="Draw among the likeliest that make up this probability.")
@click.option("--temperature", default=1.0, show_default=True, help="Divides the scores: below 1 is more careful.")
@click.option("--seed", type=int, help="Of the draws; without it every call differs.")
@segment_option
@click.option("--no-stream", is_flag=True, help="Print the text when all of it is there.")
@json_option
def generate(
    folder: Path,
    prompt: str | None,
    file: Path | None,
    memory: str,
    read_first: tuple[Path, ...],
    segment_length: int | None,
    no_stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Writes on from PROMPT, from --file, or from standard input, with the model in FOLDER.

    Only what is new goes to standard output, as it comes. Lengths are in tokens. A prompt longer than a segment is
    read into a copy of the memory first. What --read reads into a memory on disk stays there.

    \b
    Examples:
      mini-tfm generate model "The import statement" --do-sample --top-p 0.9
      mini-tfm generate model "In short:" --memory store:path=notes.mdb --read notes.txt
      mini-tfm generate model < prompt.txt
    """
    from ..generate.options import GenerationOptions
    from ..pipeline import Pipeline
    from ..progress import track

    GenerationOptions.of(options)  # faults are told before anything is loaded
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    check_files([*read_first, *([file] if file else [])])
    pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length)
    text = _prompt(prompt, file)
    n_read, clock = 0, Clock()
    if read_first:
        with Reading("reading", total_bytes(read_first)) as reading:
            for path in read_first:
                n_read += pipe.read(reading.through(pieces_of(path)))
        note(f"read {count(n_read)} tokens into the memory ({count(n_read / clock.seconds)} tokens/s)")
    clock = Clock()
    pieces = pipe.generate(text, stream=True, **options)
    if no_stream or as_json:
        whole = "".join(track(pieces, "writing", options["max_new_tokens"], "pieces"))
        if as_json:
            answer = {"prompt": text, "text": whole, "memory": memory_named(pipe), "tokens_read": n_read, "seconds": clock.seconds}
            print_json({**answer, "options": options})
        else:
            click.echo(whole, nl=not whole.endswith("\n"))
        return
    last = "\n"
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
        last = piece
    if not last.endswith("\n"):
        click.echo()


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if file is not None:
        from ..text.files import read_text

        return read_text(file)
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give PROMPT, --file FILE, or text on standard input")
    return stdin_text()
