"""One memory measured on held-out text: by an experiment after training, and of a saved model by `mini-tfm compare FOLDER`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.batches import Batch
from ..errors import InvalidValue
from ..memory.base import Memory
from ..memory.run import members_of
from ..model import Model
from ..stream import Stream
from ..text.tokenizers import Tokenizer
from ..train.segments import read_batch
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
    refuse_durable(memory)
    check_causality(model, memory, held_out.streams)
    figures = Text(advance).measure(model, memory, held_out)
    for task in TASKS:
        try:
            figures |= task(tokenizer).measure(model, memory, held_out)
        except InvalidValue as error:
            report(f"{task.name} cannot be measured: {error}")
            figures |= task.unmeasured()
    return {**figures, "peak_rss_bytes": peak_ram()}


def refuse_durable(memory: Memory | None) -> None:
    """Raises InvalidValue for a memory with a file of its own: a comparison begins with empty memories, and changes no file."""
    for member in members_of(memory):
        if member.durable:
            raise InvalidValue(
                f"memory {member.text or member.name!r}: keeps rows outside the process, and a comparison begins with empty memories; leave"
                " its path out"
            )


def check_causality(model: Model, memory: Memory | None, batch: Batch) -> None:
    """Raises InvalidValue where the last input token of a segment changes the scores of earlier ones: the memory shows what comes."""
    if memory is None or batch.target.shape[1] < 2 or batch.target.shape[2] < 3:
        return
    batch = dataclasses.replace(
        batch, **{f.name: getattr(batch, f.name)[:1, :2] for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None}
    )
    changed = batch.target.copy()
    changed[:, -1, -2] = np.where(changed[:, -1, -2] == 0, 1, changed[:, -1, -2] - 1)
    scores = []
    for target in (batch.target, changed):
        stream = Stream(model, memory, 1)
        seen = [stream.log_probs(hidden) for _, hidden in read_batch(stream, dataclasses.replace(batch, target=target))]
        scores.append(seen[-1][:, :-1])
    if not all(np.isfinite(each).all() for each in scores):
        raise InvalidValue("model: its scores are not finite; check that its weights are")
    if not np.allclose(scores[0], scores[1], rtol=1e-4, atol=1e-4):
        raise InvalidValue(
            f"memory {memory.text or memory.name!r}: shows the decoder tokens that it is yet to predict, so its figures would mean nothing;"
            " check it with `mini-tfm plugins check`"
        )
