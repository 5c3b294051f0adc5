"""A saved model measured with several memories, without training: what `mini-tfm compare FOLDER` shows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.streams import TextStreams
from ..errors import InvalidValue
from ..memory.run import memory_parameters
from ..memory.text import command_that_trains
from ..pipeline import Pipeline
from ..text.pieces import in_pieces
from ..text.tokenizers import Tokenizer
from ..transformer import load_checkpoint
from .experiment import failed, made, n_bytes
from .measure import measure_memory, refuse_durable
from .processes import Failure, each_alone, report_step
from .tasks import HeldOut
from .tasks.recall import DISTANCES

STREAMS = 64  # questions asked of a saved model at each distance
DOCUMENTS_AT_ONCE = 16


def measure_saved(
    folder: Path,
    memories: Sequence[str],
    documents: Mapping[str, str],
    seed: int,
    *,
    advance: Callable[[float], None] = lambda n: None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row a memory: the model in `folder` on each document as a whole, read with an empty memory, as `mini-tfm score` does.

    memories: texts, "none", or "saved" for what it was trained with. advance: called with the number of tokens read. report: called
    with a line about what could not be measured. A memory that fails has a row with its `error`. Raises InvalidValue for a memory
    with parameters that the model was not trained with, or with rows on disk, and for text that is too short.
    """
    saved = load_checkpoint(folder)
    if saved.tokenizer is None:
        raise InvalidValue(f"folder: {folder} has no tokenizer (tokenizer.json)")
    for spec in memories:  # report what cannot be measured now, not after minutes
        memory = saved.memory() if spec == "saved" else made(spec) if spec != "none" else None
        refuse_durable(memory)
        if new := sorted(set(memory_parameters(memory, saved.model.config, saved.model.dtype)) - set(saved.model.weights)):
            raise InvalidValue(
                f"--memory: {spec} has parameters ({new[0]}) that {folder} was not trained with, so they would be random; train a model"
                f" with it: mini-tfm {shlex.join(command_that_trains(spec, saved.model.config.has_encoder))}"
            )
    tokenizer = saved.tokenizer
    ids = sorted((_encoded(tokenizer, text) for text in documents.values()), key=len)
    work = _Work(folder, ids, n_bytes(documents), seed)
    work.held_out(Pipeline.load(folder, memory=None))  # text that is too short is an error of the command, not of every memory
    rows = []
    for spec in memories:

        def tell(step: Any, spec: str = spec) -> None:
            report(f"{spec}: {step}") if isinstance(step, str) else advance(step)

        [figures] = each_alone(work.measure, [(spec,)], on_step=tell)
        if isinstance(figures, Failure):
            row = failed(spec, figures.why)
            figures = {name: getattr(row, name) for name in ("bits_per_byte", "recall", "recall_far", "tokens_per_second")}
            figures |= {"state_bytes": None, "peak_rss_bytes": None, "error": row.error}
        rows.append({"memory": spec, "error": None, **figures})
    return rows


def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """In pieces, as a pipeline does."""
    return np.concatenate([np.zeros(0, np.int64), *map(tokenizer.encode, in_pieces([text]))])


class _Work:
    """What a process needs to measure one memory."""

    def __init__(self, folder: Path, ids: list[np.ndarray], n_bytes: int, seed: int):
        self.folder, self.ids, self.n_bytes, self.seed = folder, ids, n_bytes, seed

    def held_out(self, pipe: Pipeline) -> HeldOut:
        shape: dict[str, Any] = {"segment_length": pipe.segment_length, "n_segments": max(DISTANCES) + 1, "batch_size": STREAMS}
        cutter = TextStreams(self.ids, **shape, seed=self.seed, has_encoder=pipe.model.config.has_encoder)
        return HeldOut(self.ids, self.n_bytes, cutter, cutter.batch(0), DOCUMENTS_AT_ONCE, self.seed)

    def measure(self, spec: str) -> dict[str, Any]:
        pipe = Pipeline.load(self.folder, memory=None if spec == "none" else spec)
        return measure_memory(pipe.model, pipe.memory, pipe.tokenizer, self.held_out(pipe), advance=report_step, report=report_step)
