"""`mini-tfm generate --out`: a file of prompts -> a file of results, in order, resumed after whatever stopped it.

While OUT grows, `.OUT.state` beside it says what it is made of. Results of some lines are appended by one write and made durable;
what a crash leaves of a line is cut off by the next run, which goes on behind the last whole one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileProblem, InvalidValue
from ..progress import progress_bar
from .shared import Clock, count, note

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..train.parallel import Alone

JSON_LINES = ".jsonl"
BATCHES_AT_ONCE = 8  # lines of so many batches are sorted by length, and written together


def generate_file(
    pipe: Pipeline, file: Path, out: Path, batch_tokens: int, options: dict[str, Any], about: dict[str, Any], ranks: Alone
) -> dict[str, Any]:
    """Writes a line of `out` for each of `file`; returns what was done. about: what else results depend on."""
    n_lines = sum(1 for _ in prompts_of(file))
    state = json.dumps({"file": _digest(file), "options": options, **about}, sort_keys=True, default=str)
    clock = Clock()
    with _opened(out, state, ranks) as (fd, done):
        if done > n_lines:
            raise FileProblem(f"--out: {out} has {done} lines, and {file} only {n_lines}; give another --out")
        n_before = done
        with progress_bar("generating", n_lines - done, "lines") as advance:
            for start, prompts in _windows(prompts_of(file), done, batch_tokens, options):
                lines = _in_shares(pipe, prompts, start, out, batch_tokens, options, ranks)
                if ranks.rank == 0:
                    _append(fd, out, lines)
                done += len(prompts)
                advance(len(prompts))
    ranks.wait()
    if ranks.rank == 0:
        _state_of(out).unlink(missing_ok=True)
    if n_before and ranks.rank == 0:
        note(f"{out} had {count(n_before)} lines already")
    return {"lines": n_lines, "lines_before": n_before, "seconds": clock.seconds}


def prompts_of(file: Path) -> Iterator[str]:
    """The lines of a text, without their ends; of JSON lines a string, or the field "prompt" of an object. An error names the line."""
    from ..files.strict_json import parse_json_strict
    from ..text.files import stream_text

    rest, number = "", 0

    def prompt(line: str) -> str:
        if file.suffix != JSON_LINES:
            return line.removesuffix("\r")
        where = f"{file}, line {number}"
        record = parse_json_strict(b'{"prompt": ' + line.encode() + b"}", where)["prompt"]
        found = record.get("prompt") if isinstance(record, dict) else record
        if not isinstance(found, str):
            raise InvalidValue(f'{where}: expected a string, or an object with the string "prompt"')
        return found

    for piece in stream_text(file):
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            number += 1
            yield prompt(line)
    if rest:
        number += 1
        yield prompt(rest)


def _windows(prompts: Iterator[str], done: int, batch_tokens: int, options: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first, prompts) whose results are written together."""
    window: list[str] = []
    size = 0
    start = done
    for number, prompt in enumerate(prompts):
        if number < done:
            continue
        window.append(prompt)
        size += (len(prompt) // 4 + options["max_new_tokens"]) * max(options["num_beams"], options["num_return_sequences"])
        if size >= BATCHES_AT_ONCE * batch_tokens:
            yield start, window
            start, window, size = number + 1, [], 0
    if window:
        yield start, window


def _in_shares(
    pipe: Pipeline, prompts: list[str], start: int, out: Path, batch_tokens: int, options: dict[str, Any], ranks: Alone
) -> bytes:
    """The lines of `prompts`; each rank makes some, and all get all."""
    import numpy as np

    mine = range(ranks.rank, len(prompts), ranks.size)
    lines: dict[int, bytes] = {}
    made = pipe.generate_many([prompts[i] for i in mine], batch_tokens=batch_tokens, numbers=[start + i for i in mine], **options)
    for i, result in zip(mine, made, strict=True):
        lines[i] = _line(prompts[i], result, out)
    if ranks.size == 1:
        return b"".join(lines[i] for i in mine)
    sizes = np.zeros(len(prompts), np.int64)
    for i, line in lines.items():
        sizes[i] = len(line)
    ranks.sum(sizes)
    ends = np.cumsum(sizes)
    everything = np.zeros(int(ends[-1]), np.uint8)
    for i, line in lines.items():
        everything[ends[i] - sizes[i] : ends[i]] = np.frombuffer(line, np.uint8)
    ranks.sum(everything)
    return everything.tobytes()


def _line(prompt: str, result: str | list[str], out: Path) -> bytes:
    if out.suffix == JSON_LINES:
        record = {"prompt": prompt, **({"text": result} if isinstance(result, str) else {"texts": result})}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    if isinstance(result, str):
        return " ".join(result.splitlines()).encode() + b"\n"
    return "\t".join(" ".join(text.replace("\t", " ").splitlines()) for text in result).encode() + b"\n"


# The file out


@contextlib.contextmanager
def _opened(out: Path, state: str, ranks: Alone) -> Iterator[tuple[int, int]]:
    """(a descriptor to append to, lines that are there). Other ranks only look."""
    import numpy as np

    fd, found = -1, np.zeros(1, np.int64)
    try:
        if ranks.rank == 0:
            fd, found[0] = _begin(out, state)
        ranks.share(found)
        yield fd, int(found[0])
    finally:
        if fd >= 0:
            os.close(fd)


def _begin(out: Path, state: str) -> tuple[int, int]:
    from ..files.reading import reason
    from ..files.writing import write_file

    beside = _state_of(out)
    try:
        if beside.exists() and beside.read_text() != state:
            raise FileProblem(
                f"--out: {out} was begun from another file, model or options; give another --out, or remove it and {beside.name}"
            )
        if not beside.exists():
            if out.exists():
                raise FileProblem(
                    f"--out: {out} is there already, complete or of another command; give another --out, or remove it to make it again"
                )
            write_file(beside, state)
        fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666)
    except FileProblem:
        raise
    except OSError as error:
        raise FileProblem(f"--out: {out} cannot be written: {reason(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise FileProblem(f"--out: {out} is being written by another process") from error
    n_lines = whole = 0
    with open(out, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                n_lines, whole = n_lines + 1, whole + len(line)
    os.ftruncate(fd, whole)
    return fd, n_lines


def _append(fd: int, out: Path, lines: bytes) -> None:
    from ..files.reading import reason
    from ..files.writing import fsync, write_all

    try:
        write_all(fd, lines)
        fsync(fd)
    except OSError as error:
        raise FileProblem(f"--out: {out} cannot be written: {reason(error)}") from error


def _state_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.state")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
