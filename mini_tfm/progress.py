"""Progress bars on standard error, with rate and time left; silent where nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def _bar(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *columns,
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def track(items: Iterable[Any], what: str, total: int | None = None, unit: str = "it") -> Iterator[Any]:
    """The items, with a bar that shows how many of `total` are done and `unit`s a second."""
    with _bar() as bar:
        task = bar.add_task(what, total=total, rate="")
        for item in items:
            yield item
            bar.advance(task)
            bar.update(task, rate=_rate(bar, task, unit))


@contextlib.contextmanager
def training_progress(shown: bool, steps: int | None, done: int) -> Iterator[Callable[[float, float | None], None]]:
    """A bar for training; gives the function to call after each step with its loss and the last validation loss."""
    if not shown:
        yield lambda loss, validation: None
        return
    from rich.progress import TextColumn

    with _bar(TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task("training", total=steps, completed=done, rate="", loss="")

        def tell(loss: float, validation: float | None) -> None:
            told = f"loss {loss:.3f}" + ("" if validation is None else f", validation {validation:.3f}")
            bar.update(task, advance=1, loss=told)
            bar.update(task, rate=_rate(bar, task, "steps"))

        yield tell


def _rate(bar: Any, task: Any, unit: str) -> str:
    speed = bar.tasks[task].speed
    return "" if speed is None else f"{speed:.1f} {unit}/s"
