"""One memory measured on held-out text: by an experiment after training, and of a saved model by `mini-tfm compare FOLDER`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import InvalidValue
from ..memory.base import Memory
from ..model import Model
from ..text.tokenizers import Tokenizer
from .machine import peak_ram
from .tasks import TASKS, HeldOut, Text


def measure_memory(
    model: Model,
    memory: Memory | None,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    *,
    advance: Callable[[float], None] = lambda n: None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The figures of all tasks, and the peak RAM of this process: what `Result` has fields for.

    advance: called with the number of tokens read. report: called with a line about a task that this model cannot do; its
    figures are NaN.
    """
    figures = Text(advance).measure(model, memory, held_out)
    for task in TASKS:
        try:
            figures |= task(tokenizer).measure(model, memory, held_out)
        except InvalidValue as error:
            report(f"{task.name} cannot be measured: {error}")
            figures |= task.unmeasured()
    return {**figures, "peak_rss_bytes": peak_ram()}
