"""`mini-tfm read`: text files into a memory that outlives the process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shared import (
    Clock,
    Reading,
    check_files,
    command_line,
    count,
    files_argument,
    folder_argument,
    json_option,
    memory_named,
    memory_option,
    none_of,
    note,
    pieces_of,
    print_json,
    print_table,
    segment_option,
    size,
    total_bytes,
)

if TYPE_CHECKING:
    from ..memory import Memory


@click.command(short_help="Read text files into a memory on disk.")
@folder_argument
@files_argument
@memory_option
@click.option("--reset", metavar="DOCUMENT", help="First forget this document of the memory.")
@segment_option
@json_option
def read(folder: Path, files: tuple[Path, ...], memory: str, reset: str | None, segment_length: int | None, as_json: bool) -> None:
    """Streams FILEs (- is standard input) of any length through the model in FOLDER into a memory on disk.

    RAM stays bounded; says bytes, tokens, tokens/s and rows (what the memory keeps of a token). Generate and score
    with the same --memory afterwards, in any process, to use what was read.

    \b
    Example:
      mini-tfm read model book.txt --memory store:path=book.mdb
      mini-tfm generate model "The murderer is" --memory store:path=book.mdb
    """
    from ..errors import InvalidValue
    from ..pipeline import Pipeline

    check_files(files)
    pipe = Pipeline.load(folder, memory=none_of(memory), segment_length=segment_length)
    kept = _that_stays(pipe.memory)
    before = kept.documents()
    if reset is not None:
        if reset not in before:
            raise InvalidValue(f"--reset: expected a document of the memory ({', '.join(before) or 'it has none'}), got {reset!r}")
        kept.reset(reset)
        pipe.reset()
        before = kept.documents()
    done: list[dict[str, Any]] = []
    try:
        with Reading("reading", total_bytes(files)) as reading:
            for path in files:
                clock, bytes_before = Clock(), reading.bytes
                tokens = pipe.read(reading.through(pieces_of(path)))
                n_bytes = reading.bytes - bytes_before
                done.append(
                    {
                        "file": str(path),
                        "bytes": n_bytes,
                        "tokens": tokens,
                        "seconds": clock.seconds,
                        "tokens_per_second": tokens / clock.seconds,
                    }
                )
            pipe.close()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{_held(kept)}; {len(done)} of {len(files)} files were read to their end") from None
    except Exception:
        if done:
            note(f"read before the error: {', '.join(each['file'] for each in done)}; {_held(kept)}")
        raise
    documents = kept.documents()
    if as_json:
        new = sum(documents.values()) - sum(before.values())
        print_json({"model": str(folder), "memory": memory_named(pipe), "files": done, "documents": documents, "new_rows": new})
        return
    print_table(
        [("file", "left"), ("size", "right"), ("tokens", "right"), ("time (s)", "right"), ("tokens/s", "right")],
        [
            (each["file"], size(each["bytes"]), count(each["tokens"]), f"{each['seconds']:.2f}", count(each["tokens_per_second"]))
            for each in done
        ],
    )
    for name, rows in documents.items():
        gained = rows - before.get(name, 0)
        click.echo(f"document {name!r}: {count(rows)} rows" + (f", {count(gained)} of them new" if gained else ""))
    note("\nTry next:\n  " + command_line("generate", folder, "In short,", "--memory", memory_named(pipe)))


def _that_stays(memory: Memory | None) -> Memory:
    """The memory; refused, before any work, if none of its members makes anything durable."""
    from ..errors import InvalidValue

    if memory is None:
        raise InvalidValue("--memory: expected a memory to read into, got none; for example --memory store:path=notes.mdb")
    members = getattr(memory, "members", [memory])
    if not any(member.durable for member in members):
        raise InvalidValue(_nothing_left(memory))
    return memory


def _nothing_left(memory: Any) -> str:
    return (
        f"--memory: {memory.text or memory.name} keeps nothing on disk: nothing would be left after this process;"
        " give one that does, for example --memory store:path=notes.mdb"
    )


def _held(memory: Any) -> str:
    documents = memory.documents()
    return "the memory holds " + (", ".join(f"{count(rows)} rows of document {name!r}" for name, rows in documents.items()) or "nothing")
