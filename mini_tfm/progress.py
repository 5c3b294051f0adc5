"""Progress on standard error, with rate and time left: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SECONDS_A_LINE = 10.0  # off a terminal: quick work says nothing, slow work is seen to be alive
BAR = 24
NARROW = 80  # columns; with fewer there is no bar


@contextlib.contextmanager
def progress_bar(what: str, total: float | None = None, unit: str = "it") -> Iterator[Callable[[float], None]]:
    """A bar; gives the function to call with how many `unit`s more are done. unit "bytes": shown as kB and MB."""
    if not sys.stderr.isatty():
        yield _Lines(what, total, unit).advance
        return
    with _bar(unit) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.update(task, advance=n)


def track(items: Iterable[Any], what: str, total: int | None = None, unit: str = "it") -> Iterator[Any]:
    """The items, with a bar that shows how many of `total` are done and `unit`s a second."""
    with progress_bar(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def training_progress(shown: bool, steps: int | None, done: int) -> Iterator[Callable[..., None]]:
    """A bar for training, updated after each step: update(loss, last validation loss or None, learning rate, new tokens)."""
    if not shown:
        yield lambda *what: None
        return
    began, tokens = time.perf_counter(), 0

    def figures_of(loss: float, validation: float | None, learning_rate: float | None = None, new_tokens: int = 0) -> list[str]:
        nonlocal tokens
        tokens += new_tokens
        figures = [f"loss {loss:.3f}"]
        figures += [] if validation is None else [f"validation {validation:.3f}"]
        figures += [] if learning_rate is None else [f"rate {learning_rate:.2g}"]
        return figures + ([] if not tokens else [f"{tokens / (time.perf_counter() - began):,.0f} tokens/s"])

    if not sys.stderr.isatty():
        lines = _Lines("training", steps, "steps", done)
        yield lambda *what: lines.advance(1, figures_of(*what))
        return
    from rich.progress import TextColumn

    with _bar("steps", TextColumn("{task.fields[figures]}")) as bar:
        task = bar.add_task("training", total=steps, completed=done, figures="")
        # The step, the rate and the time left first; then as many figures as there is room for.
        n = len(str(steps or 0))
        taken = len("training  0:00:00 left ") + 2 * n + 3 + (BAR + len(" 0,000.0 steps/s ") if _is_wide(bar.console) else 0)
        room = bar.console.width - taken

        def update(*what: Any) -> None:
            shown: list[str] = []
            for figure in figures_of(*what):
                if len(", ".join([*shown, figure])) <= room:
                    shown.append(figure)
            bar.update(task, advance=1, figures=", ".join(shown))

        yield update


class _Lines:
    """Where nobody watches: a line at most every SECONDS_A_LINE."""

    def __init__(self, what: str, total: float | None, unit: str, done: float = 0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.told, self.done_then = time.monotonic(), done

    def advance(self, n: float, figures: Iterable[str] = ()) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.told < SECONDS_A_LINE:
            return
        rate = (self.done - self.done_then) / max(now - self.told, 1e-9)  # of late: a store that grows is searched for longer
        self.told, self.done_then = now, self.done
        words = [f"{self.what}: {self.done:,.0f}" + (f" of {self.total:,.0f}" if self.total else "") + f" {self.unit}"]
        words += [*figures, f"{rate:,.1f} {self.unit}/s"]
        words += [f"{max(self.total - self.done, 0) / rate:,.0f} s left"] if self.total and rate else []
        with contextlib.suppress(OSError, ValueError):  # nobody reads: the work goes on
            print(", ".join(words), file=sys.stderr, flush=True)


def _is_wide(console: Any) -> bool:
    return bool(console.width >= NARROW)


def _bar(unit: str, *columns: Any) -> Any:
    """A rich Progress that is gone when it is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f} {unit}/s", style="progress.data.speed")

    in_bytes, console = unit == "bytes", Console(file=sys.stderr)
    speed = TransferSpeedColumn() if in_bytes else Rate()
    return Progress(
        TextColumn("{task.description}"),
        *([BarColumn(BAR)] if _is_wide(console) else []),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        *([speed] if _is_wide(console) else []),
        TimeRemainingColumn(),
        TextColumn("left"),
        *columns,
        console=console,
        transient=True,
    )
