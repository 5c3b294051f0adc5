"""`mini-tfm generate`: continues a text, using a memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..generate.options import GenerationOptions
from ..progress import track
from .already_read import read_once
from .options import options_of
from .shared import (
    Clock,
    Reading,
    check_files,
    count,
    dtype_option,
    folder_argument,
    json_option,
    lora_option,
    memory_named,
    memory_option,
    none_of,
    note,
    overlap_option,
    print_json,
    prompt_cache_option,
    segment_option,
    stdin_text,
    total_bytes,
    warn_if_untrained,
)

if TYPE_CHECKING:
    from ..pipeline import Pipeline


@click.command(short_help="Continue a text, using a memory.", context_settings={"allow_extra_args": True})
@folder_argument
@click.argument("prompt", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read the prompt from this text file; with --out, a prompt from each line: of a .jsonl file a string, or an object's prompt.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a line for each prompt of --file, in order; a .jsonl file gets objects, in any other line breaks become spaces.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="TOKENS",
    help="With --out: the most tokens computed at once, those of a prompt and those that it may get, for each beam or draw.",
)
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
@lora_option
@dtype_option
@segment_option
@overlap_option
@prompt_cache_option
@click.option("--no-stream", is_flag=True, help="Print the text only when it is complete.")
@json_option
@click.pass_context
def generate(
    context: click.Context,
    folder: Path,
    prompt: str | None,
    file: Path | None,
    out: Path | None,
    batch_tokens: int,
    memory: str,
    read_first: tuple[Path, ...],
    lora: Path | None,
    dtype: str | None,
    segment_length: int | None,
    overlap: float,
    prompt_cache: Path | None,
    no_stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continues PROMPT, the text of --file, or standard input, with the model in FOLDER: one prompt, of any number of lines.

    Prints only the new text, as it is generated. Lengths are in tokens. A prompt longer than a segment is first read into
    a copy of the memory. A memory on disk keeps the files given with --read.

    With --out every line of --file is a prompt. The same command goes on where it was stopped, by Ctrl-C or a crash. Under
    mpirun each process takes its share of the lines.

    \b
    Examples:
      mini-tfm generate model "The import statement" --do-sample --top-p 0.9
      mini-tfm generate model "In short:" --memory store:path=notes.mdb --read notes.txt
      mini-tfm generate model < prompt.txt
      mini-tfm generate model --file sources.txt --out targets.txt --num-beams 4
      mpirun -n 4 mini-tfm generate model --file prompts.jsonl --out texts.jsonl
    """
    from ..pipeline import Pipeline

    chosen = GenerationOptions.of(options)  # report faults before anything is loaded
    if chosen.seed is not None and not chosen.do_sample:
        raise click.UsageError("--seed: nothing is drawn; add --do-sample")
    if context.args:
        raise click.UsageError("expected one PROMPT: put it in quotes; for several, write each in a line of a file: --file FILE --out OUT")
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if out is not None and file is None:
        raise click.UsageError("--out needs --file: a prompt a line")
    if out is not None and prompt_cache is not None:
        raise click.UsageError("--prompt-cache is for one prompt; leave out --out")
    check_files([*read_first, *([file] if file else [])])
    if file is not None and out is not None:
        loading = {"segment_length": segment_length, "lora": lora, "dtype": dtype, "overlap": overlap}
        _generate_file(folder, file, out, batch_tokens, memory, read_first, loading, as_json, options)
        return
    pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length, lora=lora, dtype=dtype, overlap=overlap)
    warn_if_untrained(folder, pipe, memory)
    text = _prompt(prompt, file)
    n_read, clock = _read(pipe, read_first), Clock()
    about = {"memory": memory_named(pipe), "tokens_read": n_read, "options": options}
    if options["num_return_sequences"] > 1:
        texts = pipe.generate(text, prompt_cache=prompt_cache, **options)
        if as_json:
            print_json({"prompt": text, "texts": texts, "seconds": clock.seconds, **about})
            return
        for each in texts:
            click.echo(each, nl=not each.endswith("\n"))
        return
    pieces = pipe.generate(text, stream=True, prompt_cache=prompt_cache, **options)
    if not (no_stream or as_json):
        _print_stream(pieces)
        return
    whole = "".join(track(pieces, "writing", options["max_new_tokens"], "pieces"))
    if as_json:
        print_json({"prompt": text, "text": whole, "seconds": clock.seconds, **about})
    else:
        click.echo(whole, nl=not whole.endswith("\n"))


def _generate_file(
    folder: Path,
    file: Path,
    out: Path,
    batch_tokens: int,
    memory: str,
    read_first: tuple[Path, ...],
    loading: dict[str, Any],
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from ..pipeline import Pipeline
    from .generating import generate_file
    from .training import ranks_of_command

    ranks = ranks_of_command()
    with ranks.together():
        if read_first and ranks.size > 1:
            raise click.UsageError("--read fills one memory: read first, with `mini-tfm read`, then start several processes")
        pipe = Pipeline.load(folder, memory=none_of(memory), **loading)
        n_read = _read(pipe, read_first)
        about = {"memory": memory_named(pipe), "tokens_read": n_read, "segment_length": pipe.segment_length, "overlap": pipe.overlap}
        done = generate_file(pipe, file, out, batch_tokens, options, {"model": pipe.model.fingerprint(), **about}, ranks)
        if as_json:
            print_json({"out": str(out), **done, **about, "options": options})
        else:
            note(f"{count(done['lines'])} lines in {out}")


def _read(pipe: Pipeline, files: tuple[Path, ...]) -> int:
    """Reads files into the memory; returns their number of tokens."""
    if not files:
        return 0
    n_read, clock = 0, Clock()
    with Reading("reading", total_bytes(files)) as reading:
        for path in files:
            n_read += read_once(pipe, path, reading)[0]
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
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no prompt: give PROMPT, --file FILE, or text on standard input")
    return stdin_text()
