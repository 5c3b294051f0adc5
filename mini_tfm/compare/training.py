"""Training for an experiment: a common start without a memory, then each memory from there, as many at once as there are cores.

Each process has one thread: small models have too little work for more. All memories get the same number of steps. How long they
take depends on the machine, and what comes out does not.
"""

from __future__ import annotations

import dataclasses
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
from ..transformer import Checkpoint, Transformer, load_checkpoint
from .processes import Failure, each_alone, report_step
from .tasks.recall import Recall
from .tasks.text import bits_of

SEGMENT_TOKENS = 32
SEGMENTS_A_STEP = 56  # in one batch of streams, however many a stream has
CURRICULUM = (2, 4, 7, 7)  # segments a stream, a quarter of the steps each (arXiv 2207.06881, section 4)


@dataclasses.dataclass(frozen=True)
class Recipe:
    steps: int
    learning_rate: float
    source_dropout: float = 0.0


START = Recipe(steps=1000, learning_rate=5e-3)  # where a memory gets those of WITH_MEMORY; else in proportion
# Half of the segments are hidden from the decoder: without it, nothing teaches a recurrent memory to carry them.
WITH_MEMORY = Recipe(steps=800, learning_rate=3e-3, source_dropout=0.5)
WARMUP_STEPS = 50
PACE_SEGMENTS = 8
PACE_STEPS = 5  # timed before training, to say how long it takes

History = list[tuple[int, float]]  # (step, loss)
BatchOf = Callable[[int, float], Batch]  # (step, share of the training that is done) -> the batch


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


class Pace(NamedTuple):
    """Seconds: of a training step, and of measuring."""

    step: float
    measuring: float


class Trained(NamedTuple):
    seconds: float
    history: History


def train_start(model: Transformer, tokenizer: Tokenizer, train: list[np.ndarray], steps: int, seed: int, progress: bool) -> History:
    """The common start: the text, and facts of the segment that is being read, so that nothing has to be remembered."""
    with training_progress(progress, steps, 0) as report:
        return _train(*_start(model, tokenizer, train, steps, seed), lambda loss: report(loss, None))


def _start(model: Transformer, tokenizer: Tokenizer, train: list[np.ndarray], steps: int, seed: int) -> tuple[Trainer, BatchOf]:
    config = model.config
    data = TextStreams(
        train, segment_length=config.segment_length or 0, n_segments=1, batch_size=32, seed=seed, has_encoder=config.has_encoder
    )
    recall = Recall(tokenizer)
    trainer = Trainer(model, **_options(dataclasses.replace(START, steps=steps), seed))
    return trainer, lambda step, done: recall.training_batch(data.batch(step), (seed, step))


def start_pace(model: Transformer, tokenizer: Tokenizer, train: list[np.ndarray], seed: int) -> float:
    """Seconds a step of the common start takes. Trains `model`, which is not to be used again."""
    return _seconds_a_step(*_start(model, tokenizer, train, START.steps, seed))


def paces(jobs: list[Job], workers: int) -> list[Pace | Failure]:
    """How long each job takes, with all workers at work; why, for a memory that cannot be trained."""
    return each_alone(_pace, [(job,) for job in jobs], workers)


def seconds_for_a_step_of_each(paces: list[Pace], workers: int) -> float:
    """The longest that one step of every job can take: the last job to end may run alone."""
    steps = [pace.step for pace in paces] or [0.0]
    return sum(steps) / workers + max(steps) * (1 - 1 / workers)


def train_all(jobs: list[Job], workers: int, steps: int, progress: bool) -> list[Trained | Failure]:
    """Trains the jobs for `steps` each, `workers` at a time; why, for a memory that fails."""
    with training_progress(progress, len(jobs) * steps, 0) as report:
        return each_alone(_train_memory, [(job, steps) for job in jobs], workers, lambda loss: report(loss, None))


def _pace(job: Job) -> Pace:
    """Of a few steps on the longest streams, and of the beginning of a held-out document."""
    _core.set_num_threads(1)
    checkpoint = load_checkpoint(job.start_folder)
    trainer = Trainer(checkpoint.model, job.make_memory(), **_options(_recipe(checkpoint.model, WITH_MEMORY.steps), job.seed))
    step = _seconds_a_step(trainer, _batches(job, checkpoint))
    config = checkpoint.model.config
    length = config.segment_length or 0
    cutter = TextStreams(job.held_out, segment_length=length, n_segments=1, batch_size=1, has_encoder=config.has_encoder)
    batch = cutter.cut([(cutter.documents[0], 0)], PACE_SEGMENTS)
    began = time.perf_counter()
    bits_of(checkpoint.model, trainer.memory, batch)
    return Pace(step, (time.perf_counter() - began) / PACE_SEGMENTS * sum(-(-len(document) // length) for document in job.held_out))


def _seconds_a_step(trainer: Trainer, batch_of: BatchOf) -> float:
    began = 0.0
    for step in range(PACE_STEPS + 1):
        if step == 1:  # the first step includes one-time set-up
            began = time.perf_counter()
        trainer.step(*fields(batch_of(step, 1.0)))
    return (time.perf_counter() - began) / PACE_STEPS


def _train_memory(job: Job, steps: int) -> Trained:
    """From the common start to a model in `job.folder`."""
    _core.set_num_threads(1)
    checkpoint, memory = load_checkpoint(job.start_folder), job.make_memory()
    began = time.perf_counter()
    trainer = Trainer(checkpoint.model, memory, **_options(_recipe(checkpoint.model, steps), job.seed))
    history = _train(trainer, _batches(job, checkpoint), report_step)
    save_model(job.folder, checkpoint.model, tokenizer=checkpoint.tokenizer, memory_text=memory.text if memory else None)
    return Trained(time.perf_counter() - began, history)


def _recipe(model: Transformer, steps: int) -> Recipe:
    """With a memory; a decoder-only model has no source to hide."""
    return dataclasses.replace(WITH_MEMORY, steps=steps, source_dropout=WITH_MEMORY.source_dropout if model.config.has_encoder else 0.0)


def _batches(job: Job, start: Checkpoint) -> BatchOf:
    """Streams with facts: the batch of a step, when a share of the training is done."""
    assert start.tokenizer is not None
    recall, config = Recall(start.tokenizer), start.model.config
    shape: dict[str, Any] = {"segment_length": config.segment_length, "seed": job.seed + 1, "has_encoder": config.has_encoder}
    streams = {n: TextStreams(job.train, n_segments=n, batch_size=SEGMENTS_A_STEP // n, **shape) for n in CURRICULUM}

    def batch_of(step: int, done: float) -> Batch:
        n = CURRICULUM[min(int(done * len(CURRICULUM)), len(CURRICULUM) - 1)]
        return recall.training_batch(streams[n].batch(step), (job.seed + 1, step))

    return batch_of


def _options(recipe: Recipe, seed: int) -> dict[str, Any]:
    """The recipe as options of a Trainer."""
    return {
        "learning_rate": recipe.learning_rate,
        "warmup_steps": min(WARMUP_STEPS, recipe.steps // 4),
        "total_steps": recipe.steps,
        "source_dropout": recipe.source_dropout,
        "seed": seed,
    }


def _train(trainer: Trainer, batch_of: BatchOf, report: Callable[[float], None]) -> History:
    """Trains for the trainer's steps, however long they take. report: called with the loss of each step."""
    steps = trainer.options.total_steps or 0
    for step in range(steps):
        report(trainer.step(*fields(batch_of(step, step / steps))))
    return list(enumerate(trainer.losses))
