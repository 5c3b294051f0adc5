"""Progress bars on standard error, with rate and time left; silent where nobody watches."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(what: str, total: float | None = None, unit: str = "it") -> Iterator[Callable[[float], None]]:
    """A bar; gives the function to call with how many `unit`s more are done. unit "bytes": shown as kB and MB."""
    if not sys.stderr.isatty():
        yield lambda n: None
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
    if not shown or not sys.stderr.isatty():
        yield lambda *what: None
        return
    from rich.progress import TextColumn

    with _bar("steps", TextColumn("{task.fields[figures]}")) as bar:
        task = bar.add_task("training", total=steps, completed=done, figures="")
        began, tokens = time.perf_counter(), 0

        def update(loss: float, validation: float | None, learning_rate: float | None = None, new_tokens: int = 0) -> None:
            nonlocal tokens
            tokens += new_tokens
            figures = [f"loss {loss:.3f}"]
            figures += [] if validation is None else [f"validation {validation:.3f}"]
            figures += [] if learning_rate is None else [f"rate {learning_rate:.2g}"]
            figures += [] if not tokens else [f"{tokens / (time.perf_counter() - began):,.0f} tokens/s"]
            bar.update(task, advance=1, figures=", ".join(figures))

        yield update


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

    in_bytes = unit == "bytes"
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(24),  # room for rate and time left in 80 columns
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TransferSpeedColumn() if in_bytes else Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("left"),
        *columns,
        console=Console(file=sys.stderr),
        transient=True,
    )
