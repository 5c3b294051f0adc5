"""Training for an experiment: a common start without a memory, then each memory from there, as many at once as there are cores.

Each process has one thread: small models have too little work for more. All memories get the same number of steps, as many
as fit into the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..checkpoint.models import save_model
from ..data.batches import Batch, fields
from ..data.streams import TextStreams
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..progress import training_progress
from ..text.tokenizers import Tokenizer
from ..train.trainer import Trainer
from ..transformer import Transformer, load_checkpoint
from .processes import processes, report_step, step_queue
from .tasks.recall import Recall

SEGMENT_TOKENS = 32
SEGMENTS_A_STEP = 56  # in one batch of streams, however many a stream has
CURRICULUM = (2, 4, 7, 7)  # segments a stream, a quarter of the steps each (arXiv 2207.06881, section 4)


@dataclasses.dataclass(frozen=True)
class Recipe:
    steps: int
    learning_rate: float
    source_dropout: float = 0.0


START = Recipe(steps=1000, learning_rate=5e-3)
# Half of the segments are hidden from the decoder: without it, nothing teaches a recurrent memory to carry them.
WITH_MEMORY = Recipe(steps=800, learning_rate=3e-3, source_dropout=0.5)
WARMUP_STEPS = 50
PACE_STEPS = 5  # timed before training, to know how many fit
LATE = 1.3  # times the expected time: a training that takes longer gets fewer steps

History = list[tuple[int, float]]  # (step, loss)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to train, or to measure, one memory. Documents are token ids, (tokens,) each."""

    memory: str | None
    folder: str
    start_folder: str
    train: list[np.ndarray]
    held_out: list[np.ndarray]
    bytes_held_out: int
    seed: int

    @property
    def name(self) -> str:
        return self.memory or "none"

    def make_memory(self) -> Memory | None:
        return make_memory(self.memory) if self.memory is not None else None


class Trained(NamedTuple):
    seconds: float
    history: History


def train_start(model: Transformer, tokenizer: Tokenizer, train: list[np.ndarray], seconds: float, seed: int, progress: bool) -> History:
    """The common start: the text, and facts of the segment that is being read, so that nothing has to be remembered."""
    data = TextStreams(train, segment_length=SEGMENT_TOKENS, n_segments=1, batch_size=32, seed=seed)
    recall = Recall(tokenizer)

    def batch_of(step: int, done: float) -> Batch:
        return recall.training_batch(data.batch(step), (seed, step))

    with training_progress(progress, START.steps, 0) as report:
        return _train(Trainer(model, **_options(START, seed)), batch_of, seconds, lambda loss: report(loss, None))


def train_all(jobs: list[Job], workers: int, seconds: float, progress: bool) -> list[Trained]:
    """Trains the jobs, `workers` at a time: the same steps for each, as many as fit into `seconds`."""
    steps_done = step_queue()
    with processes(workers, steps_done) as pool:
        paces = [future.result() for future in [pool.submit(_pace, job) for job in jobs]]
        # The last to end may run alone: the longest there can be with so many workers.
        longest = sum(paces) / workers + max(paces) * (1 - 1 / workers)
        steps = max(1, min(WITH_MEMORY.steps, int(seconds / longest)))
        with training_progress(progress, len(jobs) * steps, 0) as report:
            futures = [pool.submit(_train_memory, job, steps, LATE * steps * pace) for job, pace in zip(jobs, paces, strict=True)]
            while not all(future.done() for future in futures):
                with contextlib.suppress(queue.Empty):
                    report(steps_done.get(timeout=0.2), None)
            return [future.result() for future in futures]


def _pace(job: Job) -> float:
    """Seconds a step takes here, on the longest streams, with all workers at work."""
    _core.set_num_threads(1)
    checkpoint = load_checkpoint(job.start_folder)
    trainer = Trainer(checkpoint.model, job.make_memory(), source_dropout=WITH_MEMORY.source_dropout)
    batch_of = _batches(job, checkpoint.tokenizer)
    began = 0.0
    for step in range(PACE_STEPS + 1):
        if step == 1:  # the first step includes one-time set-up
            began = time.perf_counter()
        trainer.step(*fields(batch_of(step, 1.0)))
    return (time.perf_counter() - began) / PACE_STEPS


def _train_memory(job: Job, steps: int, seconds: float) -> Trained:
    """From the common start to a model in `job.folder`."""
    _core.set_num_threads(1)
    checkpoint, memory = load_checkpoint(job.start_folder), job.make_memory()
    began = time.perf_counter()
    trainer = Trainer(checkpoint.model, memory, **_options(dataclasses.replace(WITH_MEMORY, steps=steps), job.seed))
    history = _train(trainer, _batches(job, checkpoint.tokenizer), seconds, report_step)
    save_model(job.folder, checkpoint.model, tokenizer=checkpoint.tokenizer, memory_text=memory.text if memory else None)
    return Trained(time.perf_counter() - began, history)


def _batches(job: Job, tokenizer: Tokenizer | None) -> Callable[[int, float], Batch]:
    """Streams with facts: the batch of a step, when a share of the training is done."""
    assert tokenizer is not None
    recall = Recall(tokenizer)
    streams = {
        n: TextStreams(job.train, segment_length=SEGMENT_TOKENS, n_segments=n, batch_size=SEGMENTS_A_STEP // n, seed=job.seed + 1)
        for n in CURRICULUM
    }

    def batch_of(step: int, done: float) -> Batch:
        n = CURRICULUM[min(int(done * len(CURRICULUM)), len(CURRICULUM) - 1)]
        return recall.training_batch(streams[n].batch(step), (job.seed + 1, step))

    return batch_of


def _options(recipe: Recipe, seed: int) -> dict[str, Any]:
    """The recipe as options of a Trainer."""
    return {
        "learning_rate": recipe.learning_rate,
        "warmup_steps": WARMUP_STEPS,
        "total_steps": recipe.steps,
        "source_dropout": recipe.source_dropout,
        "seed": seed,
    }


def _train(trainer: Trainer, batch_of: Callable[[int, float], Batch], seconds: float, report: Callable[[float], None]) -> History:
    """Trains for the trainer's steps, or for fewer where they would not fit into `seconds`.

    batch_of: gives the batch of (step, share of the training that is done). report: called with the loss of each step.
    """
    planned = total = trainer.options.total_steps or 0
    began = time.perf_counter()
    for step in range(planned):
        used = time.perf_counter() - began
        if step >= total:
            break
        if step > 0 and step % 10 == 0:  # a slow machine: the schedule and the curriculum are shortened together
            total = min(planned, step + max(0, int((seconds - used) * step / used)))
            trainer.options = trainer.options.replace(total_steps=total)
        report(trainer.step(*fields(batch_of(step, step / total))))
    return list(enumerate(trainer.losses))
