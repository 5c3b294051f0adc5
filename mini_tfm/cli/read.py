"""`mini-tfm read`: reads text files into a memory on disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidValue
from .already_read import read_once
from .shared import (
    Clock,
    Reading,
    check_files,
    command_line,
    count,
    dtype_option,
    folder_argument,
    is_piped,
    json_option,
    lora_option,
    memory_named,
    memory_option,
    none_of,
    note,
    overlap_option,
    pieces_of,
    print_json,
    print_table,
    prompt_from,
    segment_option,
    size,
    total_bytes,
    warn_if_untrained,
)

if TYPE_CHECKING:
    from ..memory import Memory, Stack
    from ..pipeline import Pipeline


@click.command(short_help="Read text files into a memory on disk.")
@folder_argument
@click.argument("files", nargs=-1, metavar="FILE...", type=click.Path(path_type=Path, allow_dash=True))
@memory_option
@click.option("--reset", metavar="DOCUMENT", help="First delete this document from the memory.")
@click.option("--compact", is_flag=True, help="At the end, give back the space of deleted documents. FILEs may be left out.")
@lora_option
@dtype_option
@segment_option
@overlap_option
@json_option
def read(
    folder: Path,
    files: tuple[Path, ...],
    memory: str,
    reset: str | None,
    compact: bool,
    lora: Path | None,
    dtype: str | None,
    segment_length: int | None,
    overlap: float,
    as_json: bool,
) -> None:
    """Reads FILEs (- is standard input) of any length through the model in FOLDER into a memory on disk.

    RAM use is bounded. A text is read into a memory once, known by its content; a reading that was interrupted goes on. Prints
    bytes, tokens, tokens/s and rows (the vectors that the memory keeps). To use the text later, run generate or score with the
    same --memory, in any process.

    \b
    Example:
      mini-tfm read model book.txt --memory store:path=book.mdb
      mini-tfm generate model "The murderer is" --memory store:path=book.mdb
    """
    from ..pipeline import Pipeline

    if not files and not compact:
        raise click.MissingParameter(param_type="argument", param_hint="'FILE...'")
    check_files(files)
    pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length, lora=lora, dtype=dtype, overlap=overlap)
    on_disk = _durable(pipe.memory)
    warn_if_untrained(folder, pipe, memory)
    if reset is not None:
        _reset(pipe, on_disk, reset)
    before = on_disk.documents()
    done: list[dict[str, Any]] = []
    try:
        _read(pipe, files, done)
    except KeyboardInterrupt:
        read_now = f"{len(done)} of {len(files)} files were read completely"
        raise KeyboardInterrupt(f"{_contents(on_disk)}; {read_now}; the same command goes on from there") from None
    except Exception:
        if done:
            note(f"read before the error: {', '.join(each['file'] for each in done)}; {_contents(on_disk)}")
        raise
    documents, sizes = on_disk.documents(), on_disk.compact() if compact else None
    if as_json:
        new = sum(documents.values()) - sum(before.values())
        about = {"model": str(folder), "memory": memory_named(pipe), "files": done, "documents": documents, "new_rows": new}
        print_json(about if sizes is None else {**about, "bytes_before": sizes[0], "bytes_after": sizes[1]})
        return
    _print(done, documents, before)
    if sizes is not None:
        click.echo(f"compacted from {size(sizes[0])} to {size(sizes[1])}")
    same = (*(("--lora", lora) if lora is not None else ()), *(("--dtype", dtype) if dtype is not None else ()))
    note("\nTry next:\n  " + command_line("generate", folder, _prompt(files), "--memory", memory_named(pipe), *same))


def _read(pipe: Pipeline, files: tuple[Path, ...], done: list[dict[str, Any]]) -> None:
    """Reads the files into the memory; adds the figures of each to `done` when it is complete."""
    with Reading("reading", total_bytes(files)) as reading:
        for path in files:
            clock = Clock()
            tokens, before, n_bytes = read_once(pipe, path, reading)
            figures = {"file": str(path), "bytes": n_bytes, "tokens": tokens, "tokens_read_before": before}
            done.append({**figures, "seconds": clock.seconds, "tokens_per_second": tokens / clock.seconds})
    pipe.close()


def _print(done: list[dict[str, Any]], documents: dict[str, int], before: dict[str, int]) -> None:
    if done:
        _print_files(done)
    for name, rows in documents.items():
        gained = rows - before.get(name, 0)
        click.echo(f"document {name!r}: {count(rows)} rows" + (f", {count(gained)} of them new" if gained else ""))


def _print_files(done: list[dict[str, Any]]) -> None:
    """A row a file, with its whole size; where a part was read before, two columns say how many of its tokens are of when."""
    goes_on = any(each["tokens_read_before"] for each in done)
    tokens = (("tokens\nread before", "right"), ("tokens\nread now", "right")) if goes_on else (("tokens", "right"),)
    print_table(
        [("file", "left"), ("size", "right"), *tokens, ("time (s)", "right"), ("tokens/s", "right")],
        [
            (
                each["file"],
                size(each["bytes"]),
                *((count(each["tokens_read_before"]),) if goes_on else ()),
                count(each["tokens"]),
                f"{each['seconds']:.2f}",
                count(each["tokens_per_second"]),
            )
            for each in done
        ],
    )


def _reset(pipe: Pipeline, memory: Memory, document: str) -> None:
    """Deletes a document from the memory."""
    there = memory.documents()
    if document not in there:
        raise InvalidValue(f"--reset: expected a document of the memory ({', '.join(there) or 'it has none'}), got {document!r}")
    memory.reset(document)
    pipe.reset()


def _durable(memory: Memory | None) -> Stack:
    """The memory as a stack, whose errors name the strategy; refuses one that keeps nothing on disk, before any work."""
    from ..memory import Stack

    if memory is None:
        raise InvalidValue("--memory: expected a memory to read into, got none; for example --memory store:path=notes.mdb")
    stack = Stack([memory])
    if "read_only=true" in (memory.text or "").lower().replace(" ", ""):
        raise InvalidValue(f"--memory: {memory.text or memory.name} is only read; leave out read_only=true to write into it")
    if not any(member.durable for member in stack.members):
        raise InvalidValue(
            f"--memory: {memory.text or memory.name} keeps nothing on disk, so all rows would be lost when this process ends; give a memory"
            " on disk, for example --memory store:path=notes.mdb"
        )
    return stack


def _prompt(files: tuple[Path, ...]) -> str:
    """From the last file that can be read again."""
    named = [path for path in files if not is_piped(path)]
    return prompt_from("".join(itertools.islice(pieces_of(named[-1]), 1)) if named else "")


def _contents(memory: Any) -> str:
    documents = memory.documents()
    return "the memory holds " + (", ".join(f"{count(rows)} rows of document {name!r}" for name, rows in documents.items()) or "nothing")
