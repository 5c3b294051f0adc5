"""Shared by all commands: options, tables and JSON, input files and output folders, Ctrl-C."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FileProblem, InvalidValue, MiniTfmError

if TYPE_CHECKING:
    from ..memory import Memory
    from ..pipeline import Pipeline

T = TypeVar("T")

WIDTH = 110  # columns when the output is not a terminal
READ_BYTES = 1 << 16  # bytes read at once

# Options

memory_option = click.option(
    "--memory",
    metavar="SPEC",
    default="saved",
    show_default="what the model was trained with",
    help="The memory, as name:option=value,...; stack several with +, as in window:size=512+store:path=notes.mdb; none: no memory.",
)
lora_option = click.option(
    "--lora", metavar="DIR", type=click.Path(path_type=Path), help="Add the LoRA adapters in this folder, as PEFT has them, to the model."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    show_default="what the model is saved in",
    help="What the model's matrices are kept in: bfloat16 or int8 take less RAM and time, and round.",
)
prompt_cache_option = click.option(
    "--prompt-cache",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep what was read of prompts in this folder, and do not read again what another one began with; without a memory.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on standard output.")
segment_option = click.option(
    "--segment-length",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Tokens per segment, processed at once; default: as in training.",
)
overlap_option = click.option(
    "--overlap",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    default=0.0,
    show_default=True,
    help="Share of a segment that the next one has in common with it, for an encoder-decoder and a memory of its encoder's outputs.",
)
folder_argument = click.argument("folder", type=click.Path(path_type=Path))
files_argument = click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, allow_dash=True))


def none_of(spec: str) -> str | None:
    """The text of --memory, or None for "none"."""
    return None if spec == "none" else spec


def memory_named(pipe: Pipeline) -> str:
    """The name of the pipeline's memory, for output."""
    return "none" if pipe.memory is None else pipe.memory.text or pipe.memory.name


def warn_if_untrained(folder: Path, pipe: Pipeline, memory: str) -> None:
    """Warns where the model has never met such a memory as --memory gives it, with the command that trains one.

    Of a memory whose parameters it lacks, `Pipeline.load` has warned.
    """
    if memory in ("saved", "none"):
        return
    from ..memory.run import members_of, model_dims
    from ..memory.text import command_that_trains
    from ..transformer import load_checkpoint

    saved = load_checkpoint(folder)
    trained = None
    with contextlib.suppress(MiniTfmError):  # a memory of another package is not imported because a file names it
        trained = saved.memory()
    dims, members = model_dims(pipe.model.config, pipe.model.dtype), members_of(pipe.memory)
    lacks = {each.name for each in members if each.parameters(dims)}
    untrained = {each.name for each in members if each.spec.layers == () and not each.parameters(dims)}  # no layer meets its rows
    if other := sorted(_names(memory) - _names(saved.memory_text) - lacks - untrained):
        told = f"it has not learned to use {' and '.join(other)}"
    elif larger := _larger(pipe.memory, trained):
        told = f"it has never met rows as far back as {' and '.join(larger)} shows"
    else:
        return
    again = command_line(*command_that_trains(memory, pipe.model.config.has_encoder))
    warnings.warn(f"--memory: {folder} was trained with {saved.memory_text or 'none'}, and {told}; {again} trains one", stacklevel=2)


def _larger(memory: Memory | None, trained: Memory | None) -> list[str]:
    """The members, as text, that hold more rows than the one of the same name that a model was trained with."""
    from ..memory.run import members_of

    known = {member.name: member.spec.capacity for member in members_of(trained)}
    return [each.text or each.name for each in members_of(memory) if (each.spec.capacity or 0) > (known.get(each.name) or math.inf)]


def _names(memory: str | None) -> set[str]:
    """The names of the strategies in a memory's text."""
    from ..memory.text import members_of

    return {member.partition(":")[0].strip() for member in members_of(memory)} if memory else set()


# Answers


def print_json(answer: Any, *, indent: int | None = 2) -> None:
    """Prints a command's JSON document. NaN and infinity become null."""
    click.echo(json.dumps(plain(answer), indent=indent))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def print_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], *, title: str | None = None, err: bool = False) -> None:
    """Rows of text under (heading, "left" or "right") columns; where they are wider than the terminal, a line a figure."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError that it is called for: the command line has one exit code for all

    stream = sys.stderr if err else sys.stdout
    watched = stream.isatty()
    console = Plain(file=stream, force_terminal=watched, width=None if watched else WIDTH, highlight=False, emoji=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        header_style="bold",
        collapse_padding=True,
    )
    table.show_header = any(heading for heading, _ in columns)
    lines = max(heading.count("\n") for heading, _ in columns)
    for heading, side in columns:  # where it is too wide, words fold and numbers do not
        shown = Text("\n" * (lines - heading.count("\n")) + heading)
        table.add_column(shown, justify=side, overflow="fold", no_wrap=side == "right")  # type: ignore[arg-type]
    cells = [list(row) for row in rows]
    if _width_of(columns, cells) > console.width:
        _print_lines(console, columns, cells, title)
        return
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _width_of(columns: Sequence[tuple[str, str]], rows: list[list[str]]) -> int:
    """The least width of a table that breaks no word and no number."""
    total = 0
    for number, (heading, side) in enumerate(columns):
        lines = [*heading.splitlines(), *(row[number] for row in rows)]
        words = lines if side == "right" else [word for line in lines for word in line.split()]
        total += max(map(len, words), default=0) + 2
    return total


def _print_lines(console: Any, columns: Sequence[tuple[str, str]], rows: list[list[str]], title: str | None) -> None:
    """A row as its first cell, and below it a line for each of the others."""
    from rich.text import Text

    names = [" ".join(heading.split()) for heading, _ in columns]
    width = max(map(len, names), default=0)
    for line in [title] if title else []:
        console.print(Text(line, style="bold"), soft_wrap=True)
    for row in rows:
        console.print(Text(row[0], style="bold"), soft_wrap=True)
        for name, cell in zip(names[1:], row[1:], strict=True):
            if cell:
                console.print(Text(f"  {name:{width}}  {cell}"), soft_wrap=True)


def note(text: str) -> None:
    """Prints a line on standard error, for a human reader; work goes on where nobody reads."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def count(n: float) -> str:
    """12345 -> 12,345."""
    return f"{n:,.0f}"


def size(n_bytes: float) -> str:
    """Bytes in readable units: 1.5 MB."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# Files in


def check_files(files: Sequence[Path]) -> None:
    """Checks that all files can be opened before work begins, so that the last one does not fail after an hour."""
    from ..files.reading import open_regular

    for path in files:
        if str(path) != "-":
            with open_regular(path):
                pass


def total_bytes(files: Sequence[Path]) -> int | None:
    """Bytes of all files, or None if standard input is one of them."""
    return None if any(str(path) == "-" for path in files) else sum(path.stat().st_size for path in files)


def pieces_of(path: Path) -> Iterator[str]:
    """The text of a file or of standard input, piece by piece."""
    from ..text.files import stream_text

    if str(path) == "-":
        yield stdin_text()
    else:
        yield from stream_text(path, READ_BYTES)


def stdin_text() -> str:
    """All of standard input. Raises InvalidValue if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise InvalidValue("standard input: expected text, it is closed")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{source}: expected UTF-8, found something else at byte {error.start} ({error.reason})") from error


class Reading:
    """A progress bar on standard error, in bytes of text that is passed through it."""

    def __init__(self, what: str, total: int | None):
        from ..progress import progress_bar

        self._bar = progress_bar(what, total, "bytes")

    def __enter__(self) -> Reading:
        self._advance = self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def through(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same pieces; each is counted when the next one is requested, that is, after it was processed."""
        for piece in pieces:
            yield piece
            self._advance(_n_bytes(piece))

    def segments(self, pieces: Iterable[str], work: Callable[..., T]) -> T:
        """What `work`, a pipeline's `read` or `score`, makes of the pieces. The bar moves a segment at a time: a piece has hundreds."""
        given = moved = 0

        def counted() -> Iterator[str]:
            nonlocal given
            for piece in pieces:
                given += _n_bytes(piece)
                yield piece

        def progress(n: int) -> None:
            nonlocal moved
            n = min(n, given - moved)  # tokens may decode to more bytes than they were made of
            moved += n
            self._advance(n)

        done = work(counted(), progress=progress)
        self._advance(given - moved)
        return done


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def is_piped(path: Path) -> bool:
    """Whether text can be read from it once only: standard input, or a pipe such as <(zcat book.gz) of a shell."""
    return str(path) == "-" or path.is_fifo()


def piped_text(path: Path) -> str:
    """All of standard input or of a pipe. Raises InvalidValue if it is closed, empty or not UTF-8."""
    text = stdin_text() if str(path) == "-" else _decoded(path.read_bytes(), str(path))
    if not text:
        raise InvalidValue(f"{'standard input' if str(path) == '-' else path}: expected text, it is empty")
    return text


def read_documents(files: Sequence[Path], parts: bool = True, piped: Mapping[str, str] | None = None) -> tuple[str, dict[str, str]]:
    """(a name for all of them, documents by name) from text files; without files, Python's own documentation.

    parts: fewer than ten files are cut into parts, because whole documents are held out of training. piped: texts of `files` that are
    at hand already.
    """
    from ..text.documents import in_parts, python_topics
    from ..text.files import read_text

    if not files:
        return f"documentation of Python {sys.version_info.major}.{sys.version_info.minor} (pydoc_data.topics)", python_topics()
    piped = piped or {}
    texts = {str(path): piped[str(path)] if str(path) in piped else read_text(path) for path in dict.fromkeys(files)}
    name = f"{len(texts)} files" if len(texts) > 1 else next(iter(texts))
    if not parts:
        return name, texts
    cut = in_parts(texts)
    if len(cut) < 2:
        raise InvalidValue(
            f"--text: {name} is too short ({len(texts[name])} characters): it needs a held-out part and a part longer than a segment"
        )
    return name, cut


PROMPT_WORDS, PROMPT_CHARACTERS = 4, 24
OPENING = 2000  # characters of a text, among which a prompt is looked for
TAG, MARKUP = re.compile(r"<[a-zA-Z/!?][^<>]*>"), frozenset("<>\\{}[]|=#*_~^`@$%&/")


def prompt_from(text: str) -> str:
    """A few words of `text` to go on from: a prompt in its own language. Of a language without spaces, as many characters.

    They stand beside each other in a line, and none is markup, where the text has such words.
    """
    lines = [line.split() for line in TAG.sub("\n", text[:OPENING]).splitlines()]
    runs = [list(run) for line in lines for plain, run in itertools.groupby(line, _is_plain) if plain]
    lengths = [len(" ".join(run)) for run in runs]
    some = next((run for run, n in zip(runs, lengths, strict=True) if n >= PROMPT_CHARACTERS // 2), None)
    if some is None and runs:
        some = runs[lengths.index(max(lengths))]
    words = (some or [word.lstrip("-") for word in text[:OPENING].split() if any(c.isalnum() for c in word)])[:PROMPT_WORDS]
    while len(words) > 1 and len(" ".join(words)) > PROMPT_CHARACTERS:
        words.pop()
    return " ".join(words)[:PROMPT_CHARACTERS] or "PROMPT"


def _is_plain(word: str) -> bool:
    """Whether it is a word of a text. What begins with a dash or a dot is an option, or a request of man pages."""
    return word[0] not in "-." and any(c.isalpha() for c in word) and not MARKUP & set(word)


# Folders out


def check_new(out: Path) -> None:
    """Checks that OUT holds nothing, and can be created and written to."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileProblem(f"OUT: {out} exists already; give a new folder")
    check_out(out)


def check_out(folder: Path) -> None:
    """Checks that `folder` can be created and written to, before any work."""
    if folder.exists() and not folder.is_dir():
        raise FileProblem(f"--out: {folder} is a file; expected a folder, or a new path")
    for place in (folder, folder.parent) if folder.is_dir() else (_nearest(folder),):
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise FileProblem(f"--out: {folder} cannot be written: {place}: {error.strerror or error}") from error


def _nearest(path: Path) -> Path:
    """The deepest existing folder above `path`."""
    try:
        return next(place for place in (path.parent, *path.absolute().parents) if place.exists())
    except OSError:  # not even looking is allowed
        return path.parent


# Ctrl-C


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Delays Ctrl-C and SIGTERM: the returned function says whether one came. The second one raises.

    So a run stops after a whole step, and a resumed run equals an uninterrupted one. `mpirun` turns Ctrl-C into SIGTERM,
    and cluster schedulers send SIGTERM before they end a job.
    """
    stop = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal stop
        if stop:
            raise KeyboardInterrupt
        stop = True

    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    # A handler that is not Python's own belongs to an enclosing program, which has its own way to stop.
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, on_signal)
    try:
        yield lambda: stop
    finally:
        for number in ours:
            signal.signal(number, usual[number])


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._began, 1e-9)


def command_line(*words: str | os.PathLike) -> str:
    """A command for the user to type, with the program's path if `mini-tfm` is not on PATH."""
    import shlex
    import shutil

    called = Path(sys.argv[0])
    is_ours = called.name == "mini-tfm" and called.exists()
    program = str(called) if is_ours and shutil.which("mini-tfm") is None else "mini-tfm"
    return shlex.join([program, *(str(word) for word in words)])
