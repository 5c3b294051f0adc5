"""`mini-tfm generate`: continues a text, using a memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..generate.options import GenerationOptions
from ..progress import track
from .options import options_of
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

if TYPE_CHECKING:
    from ..pipeline import Pipeline


@click.command(short_help="Continue a text, using a memory.")
@folder_argument
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from this text file.")
@memory_option
@click.option(
    "--read",
    "read_first",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="First read this text file into the memory; can be repeated.",
)
@options_of(GenerationOptions)
@segment_option
@click.option("--no-stream", is_flag=True, help="Print the text only when it is complete.")
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
    """Continues PROMPT, the text of --file, or standard input, with the model in FOLDER.

    Prints only the new text, as it is generated. Lengths are in tokens. A prompt longer than a segment is first read into
    a copy of the memory. A memory on disk keeps the files given with --read.

    \b
    Examples:
      mini-tfm generate model "The import statement" --do-sample --top-p 0.9
      mini-tfm generate model "In short:" --memory store:path=notes.mdb --read notes.txt
      mini-tfm generate model < prompt.txt
    """
    from ..pipeline import Pipeline

    GenerationOptions.of(options)  # report faults before anything is loaded
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    check_files([*read_first, *([file] if file else [])])
    pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length)
    text = _prompt(prompt, file)
    n_read, clock = _read(pipe, read_first), Clock()
    about = {"memory": memory_named(pipe), "tokens_read": n_read, "options": options}
    if options["num_return_sequences"] > 1:
        texts = pipe.generate(text, **options)
        if as_json:
            print_json({"prompt": text, "texts": texts, "seconds": clock.seconds, **about})
            return
        for each in texts:
            click.echo(each, nl=not each.endswith("\n"))
        return
    pieces = pipe.generate(text, stream=True, **options)
    if not (no_stream or as_json):
        _print_stream(pieces)
        return
    whole = "".join(track(pieces, "writing", options["max_new_tokens"], "pieces"))
    if as_json:
        print_json({"prompt": text, "text": whole, "seconds": clock.seconds, **about})
    else:
        click.echo(whole, nl=not whole.endswith("\n"))


def _read(pipe: Pipeline, files: tuple[Path, ...]) -> int:
    """Reads files into the memory; returns their number of tokens."""
    if not files:
        return 0
    n_read, clock = 0, Clock()
    with Reading("reading", total_bytes(files)) as reading:
        for path in files:
            n_read += pipe.read(reading.through(pieces_of(path)))
    note(f"read {count(n_read)} tokens into the memory ({count(n_read / clock.seconds)} tokens/s)")
    return n_read


def _print_stream(pieces: Iterable[str]) -> None:
    """Prints pieces as they come, and ends the line."""
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
