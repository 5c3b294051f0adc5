"""The experiment: the same model, text and budget; one memory after another.

A common start: one model learns the text, and to answer a question about the segment it is reading (nothing to
remember yet). From there each memory is trained for the same number of steps on streams of several segments, with
facts that lie further and further back (the curriculum of arXiv 2207.06881, section 4). Whole documents are held
out; on them are measured bits per byte, recall of a fact by distance, speed and size.

Training runs as many memories at once as there are cores, with one thread each: small models have too little work
for more. Then each is measured alone, with all threads, in a process of its own, so that peak RAM is its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing
import os
import platform
import queue
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..checkpoint.models import load_saved, save_model
from ..config import Config
from ..data.batches import Batch, fields
from ..data.streams import TextStreams
from ..errors import InvalidValue
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..model import Transformer
from ..progress import track, training_progress
from ..text.documents import split_documents
from ..text.tokenizers import Tokenizer, train_bpe
from ..train.trainer import Trainer
from ..train.walk import measure
from .tasks.recall import CHANCE, Recall

SEGMENT_TOKENS = 32
VOCABULARY = 1024
HELD_OUT = 0.1  # of the bytes, in whole documents
DISTANCES = (0, 1, 2, 4, 6)  # segments between fact and question
FAR = (4, 6)
STRAYS = 2.0  # stray letters in a segment
SEGMENTS_A_STEP = 56  # in one batch of streams, however many a stream has
CURRICULUM = (2, 4, 7, 7)  # segments a stream, a quarter of the steps each


@dataclasses.dataclass(frozen=True)
class _Recipe:
    steps: int
    learning_rate: float
    source_dropout: float = 0.0


START = _Recipe(steps=1000, learning_rate=5e-3)
# Half of the segments are hidden from the decoder: without it, nothing teaches a recurrent memory to carry them.
WITH_MEMORY = _Recipe(steps=800, learning_rate=3e-3, source_dropout=0.5)
WARMUP_STEPS = 50
PACE_STEPS = 5  # measured before training, to know how many fit
LATE = 1.3  # times the time expected: a training that takes longer is cut short
START_SHARE = 0.35  # of the time for training, for the common start
MEASURE_SHARE = 0.1  # of all time, for measuring
RECALL_STREAMS = 128


@dataclasses.dataclass
class Row:
    """What was measured of one memory. Sizes in bytes; state of the longest document; recall is a share by distance."""

    memory: str
    bits_per_byte: float
    recall: dict[int, float]
    recall_far: float
    tokens_per_second: float
    state_bytes: int
    peak_rss_bytes: int
    folder: Path | None
    train_seconds: float = 0.0
    steps: int = 0
    history: list[tuple[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Experiment:
    """The set-up, and a row a memory."""

    text_name: str
    documents: int
    bytes_train: int
    bytes_held_out: int
    held_out_names: list[str]
    config: Config
    tokenizer_vocab: int
    seconds: float
    machine: dict[str, Any]
    distances: list[int]
    chance: float
    history: dict[str, list[tuple[int, float]]]
    rows: list[Row]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain = dataclasses.asdict(self)
        for row in plain["rows"]:
            row["folder"] = str(row["folder"]) if row["folder"] else None
        return plain


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a process needs to train, or to measure, one memory."""

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


def run_experiment(
    documents: dict[str, str],
    memories: Sequence[str | None],
    out: Path | None = None,
    *,
    seconds: float = 345,
    seed: int = 0,
    text_name: str = "text",
    tell: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> Experiment:
    """Trains and measures each of `memories` (text as for `mt.memory`; None: no memory) on `documents`.

    out: a folder for the models, `out/models/<memory>`; None keeps nothing. seconds: for everything, about; on a
    machine too slow for all steps, all get fewer. tell: is told in a line what begins. Raises InvalidValue for a
    text that is too short, an unknown memory or option.
    """
    began = time.perf_counter()
    names = [text or "none" for text in memories]
    if len(set(names)) < len(names):
        raise InvalidValue(f"memories: each once, got {', '.join(names)}")
    for text in memories:
        if text is not None:
            make_memory(text)  # an unknown name or option ends it here, before any work
    train_text, held_out_text = split_documents(documents, HELD_OUT, seed)
    tell(f"training a tokenizer of {VOCABULARY} tokens on {len(train_text)} documents")
    tokenizer = train_bpe(train_text.values(), VOCABULARY)
    train, held_out = ([tokenizer.encode(text) for text in part.values()] for part in (train_text, held_out_text))
    for what, part in (("for training", train), ("held out", held_out)):
        longest = max(map(len, part))
        if longest <= SEGMENT_TOKENS * (max(DISTANCES) + 2):
            raise InvalidValue(
                f"text: expected a document {what} of more than {SEGMENT_TOKENS * (max(DISTANCES) + 2)} tokens, the longest of"
                f" {len(part)} has {longest}; give more or longer text"
            )
    config = Config(
        vocab_size=VOCABULARY,
        d_model=64,
        n_heads=4,
        n_encoder_layers=1,
        n_decoder_layers=1,
        d_ff=256,
        segment_length=SEGMENT_TOKENS,
    )
    bytes_train, bytes_held_out = (sum(len(t.encode()) for t in part.values()) for part in (train_text, held_out_text))
    training_seconds = seconds * (1 - MEASURE_SHARE) - (time.perf_counter() - began)
    workers = min(len(names), n_cores())
    with tempfile.TemporaryDirectory() as scratch:
        tell("the common start: one model learns the text, without a memory")
        start_folder = os.path.join(scratch, "start")
        model = Transformer(config, seed=seed)
        history = _train_start(model, tokenizer, train, training_seconds * START_SHARE, seed, progress)
        save_model(start_folder, model, tokenizer=tokenizer)
        left = training_seconds - (time.perf_counter() - began)
        models = Path(out) / "models" if out is not None else Path(scratch)
        plans = [
            _Plan(
                memory=text,
                folder=str(models / folder_name(name)),
                start_folder=start_folder,
                train=train,
                held_out=held_out,
                bytes_held_out=bytes_held_out,
                seed=seed,
            )
            for name, text in zip(names, memories, strict=True)
        ]
        tell(f"training {len(names)} memories, {workers} at a time: {', '.join(names)}")
        histories = _train_all(plans, workers, left, progress)
        tell(f"measuring on {len(held_out)} held-out documents")
        rows = []
        for plan in track(plans, "measuring", total=len(plans), unit="memories") if progress else plans:
            with _processes(1) as pool, _ended_at_once(pool):
                rows.append(pool.submit(_measure, plan).result())
        for row, trained in zip(rows, histories, strict=True):
            row.train_seconds, row.history, row.steps = trained[0], trained[1], len(trained[1])
            row.folder = Path(row.folder) if out is not None and row.folder else None
    return Experiment(
        text_name=text_name,
        documents=len(documents),
        bytes_train=bytes_train,
        bytes_held_out=bytes_held_out,
        held_out_names=list(held_out_text),
        config=config,
        tokenizer_vocab=tokenizer.vocab_size,
        seconds=time.perf_counter() - began,
        machine=machine(),
        distances=list(DISTANCES),
        chance=CHANCE,
        history={"start": history, **{row.memory: row.history for row in rows}},
        rows=rows,
        seed=seed,
    )


def folder_name(memory: str) -> str:
    """A memory's text as the name of a folder."""
    return "".join(c if c.isalnum() or c in "+-_=" else "-" for c in memory)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": n_cores(),
        "threads": _core.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mini-tfm": metadata.version("mini-tfm"),
    }


def n_cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _processes(workers: int, steps: Any = None) -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork would not survive the threads of this process
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process, initargs=(steps,))


@contextlib.contextmanager
def _ended_at_once(pool: concurrent.futures.ProcessPoolExecutor) -> Iterator[None]:
    """Whatever goes wrong inside, Ctrl-C above all, ends the pool's processes, which would be waited for."""
    try:
        yield
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


_steps: Any = None  # in a training process: the queue on which each step is told


def _begin_process(steps: Any) -> None:
    """A child leaves Ctrl-C to its parent, which ends it."""
    global _steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _steps = steps


def _train_all(plans: list[_Plan], workers: int, seconds: float, progress: bool) -> list[tuple[float, list[tuple[int, float]]]]:
    """Seconds and history of each plan's training, `workers` at a time: the same steps for each, so many as fit."""
    told = multiprocessing.get_context("spawn").Queue()
    with _processes(workers, told) as pool, _ended_at_once(pool):
        paces = [job.result() for job in [pool.submit(_pace, plan) for plan in plans]]
        # The last to end may run alone: the longest there can be with so many workers.
        longest = sum(paces) / workers + max(paces) * (1 - 1 / workers)
        steps = max(1, min(WITH_MEMORY.steps, int(seconds / longest)))
        with training_progress(progress, len(plans) * steps, 0) as bar:
            jobs = [pool.submit(_train_memory, plan, steps, LATE * steps * pace) for plan, pace in zip(plans, paces, strict=True)]
            while not all(job.done() for job in jobs):
                with contextlib.suppress(queue.Empty):
                    bar(told.get(timeout=0.2), None)
            return [job.result() for job in jobs]


def _train_start(
    model: Transformer, tokenizer: Tokenizer, train: list[np.ndarray], seconds: float, seed: int, progress: bool
) -> list[tuple[int, float]]:
    """The text, and facts of the segment that is being read."""
    data = TextStreams(train, segment_length=SEGMENT_TOKENS, n_segments=1, batch_size=32, seed=seed)
    recall = Recall(tokenizer)
    batch_of = lambda step, done: recall.plant(data.batch(step), (seed, step), strays=STRAYS)[0]  # noqa: E731
    with training_progress(progress, START.steps, 0) as tell:
        return _train(model, None, batch_of, START, seconds, seed, tell)


def _pace(plan: _Plan) -> float:
    """Seconds a step takes here, of the longest streams, with all workers at work."""
    _core.set_num_threads(1)
    saved = load_saved(plan.start_folder)
    trainer = Trainer(saved.model, _memory(plan), source_dropout=WITH_MEMORY.source_dropout)
    batch_of = _batches(plan, saved.tokenizer)
    began = 0.0
    for step in range(PACE_STEPS + 1):
        if step == 1:  # the first pays for what is set up once
            began = time.perf_counter()
        trainer.step(*fields(batch_of(step, 1.0)))
    return (time.perf_counter() - began) / PACE_STEPS


def _train_memory(plan: _Plan, steps: int, seconds: float) -> tuple[float, list[tuple[int, float]]]:
    """From the common start to a model in `plan.folder`; seconds, and (step, loss) of each step."""
    _core.set_num_threads(1)
    saved, memory = load_saved(plan.start_folder), _memory(plan)
    began = time.perf_counter()
    tell = lambda loss, validation: _steps.put(loss)  # noqa: E731
    recipe = dataclasses.replace(WITH_MEMORY, steps=steps)
    history = _train(saved.model, memory, _batches(plan, saved.tokenizer), recipe, seconds, plan.seed, tell)
    save_model(plan.folder, saved.model, tokenizer=saved.tokenizer, memory=memory)
    return time.perf_counter() - began, history


def _batches(plan: _Plan, tokenizer: Tokenizer | None) -> Callable[[int, float], Batch]:
    """Streams with facts: the batch of a step, when a share of the training is done."""
    assert tokenizer is not None
    recall = Recall(tokenizer)
    streams = {
        n: TextStreams(plan.train, segment_length=SEGMENT_TOKENS, n_segments=n, batch_size=SEGMENTS_A_STEP // n, seed=plan.seed + 1)
        for n in CURRICULUM
    }

    def batch_of(step: int, done: float) -> Batch:
        n = CURRICULUM[min(int(done * len(CURRICULUM)), len(CURRICULUM) - 1)]
        return recall.plant(streams[n].batch(step), (plan.seed + 1, step), strays=STRAYS)[0]

    return batch_of


def _measure(plan: _Plan) -> Row:
    """What the model in `plan.folder` does on the held-out documents."""
    saved = load_saved(plan.folder)
    assert saved.tokenizer is not None
    model, memory, recall = saved.model, _memory(plan), Recall(saved.tokenizer)
    whole = TextStreams(plan.held_out, segment_length=SEGMENT_TOKENS, n_segments=1, batch_size=1)
    began = time.perf_counter()
    total_bits, state_bytes, n_tokens = 0.0, [], 0
    for document in plan.held_out:
        batch = whole.cut([(document, 0)], math.ceil(len(document) / SEGMENT_TOKENS))
        document_bits, document_state = measure(model, memory, batch)
        total_bits, n_tokens = total_bits + document_bits, n_tokens + batch.n_tokens
        state_bytes.append(document_state)
    tokens_per_second = n_tokens / (time.perf_counter() - began)
    rng = np.random.default_rng(plan.seed)
    far = SEGMENT_TOKENS * (max(DISTANCES) + 2)
    long_enough = [document for document in plan.held_out if len(document) > far]
    starts = [(d, int(rng.integers(1, len(d) - far + 1))) for d in (long_enough[i % len(long_enough)] for i in range(RECALL_STREAMS))]
    streams = whole.cut(starts, max(DISTANCES) + 1)
    recalled = {distance: recall.accuracy(model, memory, streams, distance, seed=plan.seed) for distance in DISTANCES}
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Row(
        memory=plan.name,
        bits_per_byte=total_bits / plan.bytes_held_out,
        recall=recalled,
        recall_far=float(np.mean([recalled[distance] for distance in FAR])),
        tokens_per_second=tokens_per_second,
        state_bytes=max(state_bytes),
        peak_rss_bytes=peak,
        folder=Path(plan.folder),
    )


def _memory(plan: _Plan) -> Memory | None:
    return make_memory(plan.memory) if plan.memory is not None else None


def _train(
    model: Transformer,
    memory: Memory | None,
    batch_of: Callable[[int, float], Batch],
    recipe: _Recipe,
    seconds: float,
    seed: int,
    tell: Callable[[float, float | None], None],
) -> list[tuple[int, float]]:
    """Trains by a recipe, or with fewer steps where all would not fit into `seconds`; (step, loss) of each.

    batch_of: gives the batch of a step, and is told what share of the training is done.
    """
    trainer = Trainer(
        model,
        memory,
        learning_rate=recipe.learning_rate,
        warmup_steps=WARMUP_STEPS,
        total_steps=recipe.steps,
        source_dropout=recipe.source_dropout,
        seed=seed,
    )
    began = time.perf_counter()
    total = recipe.steps
    for step in range(recipe.steps):
        used = time.perf_counter() - began
        if step >= total:
            break
        if step > 0 and step % 10 == 0:  # a slow machine: the schedule and the curriculum are drawn together
            total = min(recipe.steps, step + max(0, int((seconds - used) * step / used)))
            trainer.options = trainer.options.replace(total_steps=total)
        tell(trainer.step(*fields(batch_of(step, step / total))), None)
    return list(enumerate(trainer.losses))
