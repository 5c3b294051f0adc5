"""The experiment: the same model, text and steps; one memory after another.

A common start: one model learns the text, and to answer a question about the segment it is reading (nothing to
remember yet). From there each memory is trained for the same number of steps on streams of several segments, with
facts that lie further and further back. Whole documents are held out; on them the tasks are measured.

The budget is a number of steps, so a slow or busy machine takes longer and finds the same. Training runs as many memories at
once as there are cores. Then each is measured alone, with all threads, in a process of its own, so that peak RAM is its own.
A memory that fails is a row that says why.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.models import save_model
from ..config import Config
from ..data.streams import TextStreams
from ..errors import InvalidValue, PluginError
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..progress import track
from ..text.documents import split_documents
from ..text.tokenizers import Tokenizer, train_bpe
from ..transformer import Transformer, load_checkpoint
from .machine import machine, n_cores
from .measure import measure_memory, refuse_durable
from .processes import Failure, each_alone, why
from .tasks import HeldOut
from .tasks.recall import CHANCE, DISTANCES
from .training import SEGMENT_TOKENS, START, WITH_MEMORY, Job, Pace, paces, seconds_for_a_step_of_each, start_pace, train_all, train_start

STEPS = WITH_MEMORY.steps
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "d_model": 64,
    "n_heads": 4,
    "n_encoder_layers": 1,
    "n_decoder_layers": 1,
    "d_ff": 256,
    "segment_length": SEGMENT_TOKENS,
}
HELD_OUT = 0.1  # of the bytes, in whole documents
RECALL_STREAMS = 128
FAR_SEGMENTS = max(DISTANCES) + 2  # a document must be longer, to ask about the farthest fact


@dataclasses.dataclass
class Result:
    """What was measured of one memory. Sizes in bytes; state of the longest document; recall is a share by distance.

    error: why there are no figures, which are NaN then. spread: over several seeds, the standard deviation of figures by name.
    """

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
    error: str | None = None
    spread: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Experiment:
    """The set-up, and a row a memory.

    steps, start_steps: of each memory, and of the common start. planned_steps: more than `steps` where --seconds cut them short.
    """

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
    rows: list[Result]
    seed: int
    steps: int
    start_steps: int
    planned_steps: int
    seeds: list[int] = dataclasses.field(default_factory=list)

    @property
    def cut_short(self) -> str | None:
        """In words, if fewer steps were taken than planned."""
        if self.steps >= self.planned_steps:
            return None
        return f"cut short: {self.steps} of {self.planned_steps} steps for each memory, which is what the time allowed"

    @property
    def failed(self) -> list[Result]:
        return [row for row in self.rows if row.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain = dataclasses.asdict(self)
        for row in plain["rows"]:
            row["folder"] = str(row["folder"]) if row["folder"] else None
        return plain


def run_experiment(
    documents: dict[str, str],
    memories: Sequence[str | None],
    out: Path | None = None,
    *,
    steps: int = STEPS,
    seconds: float | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    text_name: str = "text",
    report: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> Experiment:
    """Trains and measures each of `memories` (text as for `mt.memory`; None: no memory) on `documents`.

    out: a folder for the models, `out/models/<memory>`; None keeps nothing. steps: of each memory; the common start takes as many
    in proportion. seconds: a budget for everything, about; where it is too short for all steps, all memories get the same fewer
    ones (`Experiment.cut_short`). config: fields of `Config` that replace those of `SHAPE`. report: called with a line when a part
    begins. A memory that fails has a row with its `error`. Raises InvalidValue for a text that is too short, an unknown memory or
    option, PluginError for a memory that cannot be made.
    """
    began = time.perf_counter()
    names = _checked_names(memories)
    shape = Config.from_dict({**SHAPE, **(config or {})})
    if not shape.has_decoder:
        raise InvalidValue("config: expected a decoder, because the text is predicted; n_decoder_layers is 0")
    texts = _prepare(documents, shape, seed, report)
    with tempfile.TemporaryDirectory() as scratch:
        start = os.path.join(scratch, "start")
        models = Path(out) / "models" if out is not None else Path(scratch)
        jobs = [
            Job(text, str(models / folder_name(name)), start, texts.train, texts.held_out, texts.bytes_held_out, seed)
            for name, text in zip(names, memories, strict=True)
        ]
        workers = min(len(jobs), n_cores())
        save_model(start, Transformer(shape, seed=seed), tokenizer=texts.tokenizer)
        report("timing a few steps of each memory")
        times = paces(jobs, workers)
        working = [job for job, pace in zip(jobs, times, strict=True) if not isinstance(pace, Failure)]
        known = [pace for pace in times if not isinstance(pace, Failure)]
        measuring = sum(pace.measuring for pace in known)
        a_step = (
            seconds_for_a_step_of_each(known, workers)
            + start_pace(Transformer(shape, seed=seed), texts.tokenizer, texts.train, seed) * START.steps / STEPS
        )
        planned, spent = steps, time.perf_counter() - began
        if seconds is not None:
            steps = max(1, min(steps, int((seconds - spent - measuring) / a_step)))
        start_steps = max(1, round(steps * START.steps / STEPS))
        report(f"{steps} steps for each memory: {_minutes(spent + steps * a_step + measuring)} in all, if this machine keeps its pace")
        report(f"the common start: one model learns the text, without a memory, in {start_steps} steps")
        model = Transformer(shape, seed=seed)
        history = train_start(model, texts.tokenizer, texts.train, start_steps, seed, progress)
        save_model(start, model, tokenizer=texts.tokenizer)
        rows = _rows(jobs, working, times, workers, steps, report, progress)
    return Experiment(
        text_name=text_name,
        documents=len(documents),
        bytes_train=texts.bytes_train,
        bytes_held_out=texts.bytes_held_out,
        held_out_names=texts.held_out_names,
        config=shape,
        tokenizer_vocab=texts.tokenizer.vocab_size,
        seconds=time.perf_counter() - began,
        machine=machine(),
        distances=list(DISTANCES),
        chance=CHANCE,
        history={"start": history, **{row.memory: row.history for row in rows}},
        rows=rows if out is not None else [dataclasses.replace(row, folder=None) for row in rows],
        seed=seed,
        steps=steps,
        start_steps=start_steps,
        planned_steps=planned,
        seeds=[seed],
    )


def over_seeds(experiments: Sequence[Experiment]) -> Experiment:
    """Experiments that differ in their seed as one: means of the figures, their spread, the curves of the first."""
    first = experiments[0]
    if len(experiments) == 1:
        return first
    rows = []
    for of_memory in zip(*(each.rows for each in experiments), strict=True):
        worked = [row for row in of_memory if row.error is None]
        errors = [f"seed {each.seed}: {row.error}" for each, row in zip(experiments, of_memory, strict=True) if row.error is not None]
        mean: dict[str, Any] = {name: float(np.mean([getattr(row, name) for row in worked])) for name in _MEASURED if worked}
        if worked:
            mean["recall"] = {d: float(np.mean([row.recall[d] for row in worked])) for d in first.distances}
        spread = {name: float(np.std([getattr(row, name) for row in worked])) for name in ("bits_per_byte", "recall_far") if worked}
        rows.append(dataclasses.replace(of_memory[0], **mean, spread=spread, error="; ".join(errors) or None))
    seconds = sum(each.seconds for each in experiments)
    return dataclasses.replace(first, rows=rows, seconds=seconds, seeds=[each.seed for each in experiments])


_MEASURED = ("bits_per_byte", "recall_far", "tokens_per_second", "state_bytes", "peak_rss_bytes", "train_seconds")


def folder_name(memory: str) -> str:
    """A memory's text as the name of a folder."""
    return "".join(c if c.isalnum() or c in "+-_=" else "-" for c in memory)


def n_bytes(documents: Mapping[str, str]) -> int:
    return sum(len(text.encode()) for text in documents.values())


def _checked_names(memories: Sequence[str | None]) -> list[str]:
    """The memories by name. An unknown one, or a wrong option, is an error before any work."""
    names = [text or "none" for text in memories]
    if len(set(names)) < len(names):
        raise InvalidValue(f"memories: expected each memory once, got {', '.join(names)}")
    for text in memories:
        if text is not None:
            refuse_durable(made(text))
    return names


def made(text: str) -> Memory:
    """`mt.memory(text)`; a strategy that ends the process instead is an error like any other."""
    try:
        return make_memory(text)
    except SystemExit as error:
        raise PluginError(f"memory {text!r}: {why(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Documents as token ids, (tokens,) each, in two parts."""

    tokenizer: Tokenizer
    train: list[np.ndarray]
    held_out: list[np.ndarray]
    bytes_train: int
    bytes_held_out: int
    held_out_names: list[str]


def _prepare(documents: dict[str, str], config: Config, seed: int, report: Callable[[str], None]) -> _Texts:
    """Splits and tokenizes the documents. Raises InvalidValue where one part has no document that is long enough."""
    train_texts, held_out_texts = split_documents(documents, HELD_OUT, seed)
    report(f"training a tokenizer of {config.vocab_size} tokens on {len(train_texts)} documents")
    tokenizer = train_bpe(train_texts.values(), config.vocab_size)
    far = (config.segment_length or 0) * FAR_SEGMENTS
    train, held_out = ([tokenizer.encode(text) for text in part.values()] for part in (train_texts, held_out_texts))
    for what, part in (("for training", train), ("held out", held_out)):
        longest = max(map(len, part))
        if longest <= far:
            raise InvalidValue(
                f"text: expected a document {what} of more than {far} tokens, the longest of {len(part)} has {longest}; give more or"
                " longer text"
            )
    return _Texts(tokenizer, train, held_out, n_bytes(train_texts), n_bytes(held_out_texts), list(held_out_texts))


def _rows(
    jobs: list[Job],
    working: list[Job],
    times: Sequence[Pace | Failure],
    workers: int,
    steps: int,
    report: Callable[[str], None],
    progress: bool,
) -> list[Result]:
    """Trains the jobs that work, then measures one after the other; a row for each job, in order."""
    report(f"training {len(working)} memories, {workers} at a time: {', '.join(job.name for job in working)}")
    trained: dict[str, Any] = {job.name: pace for job, pace in zip(jobs, times, strict=True)}
    trained |= {job.name: result for job, result in zip(working, train_all(working, workers, steps, progress), strict=True)}
    report(f"measuring on {len(jobs[0].held_out)} held-out documents")
    rows = []
    for job in track(jobs, "measuring", len(jobs), "memories") if progress else jobs:
        result = trained[job.name]
        figures = result if isinstance(result, Failure) else each_alone(_measure, [(job,)])[0]
        if isinstance(figures, Failure):
            report(f"{job.name} failed: {figures.why}")
            rows.append(failed(job.name, figures.why))
        else:
            history = result.history
            more = {"folder": Path(job.folder), "train_seconds": result.seconds, "steps": len(history), "history": history}
            rows.append(Result(memory=job.name, **more, **figures))
    return rows


def failed(memory: str, why: str) -> Result:
    """The row of a memory that failed."""
    nan = float("nan")
    recall = dict.fromkeys(DISTANCES, nan)
    return Result(memory, nan, recall, nan, tokens_per_second=nan, state_bytes=0, peak_rss_bytes=0, folder=None, error=why)


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} seconds"


def _measure(job: Job) -> dict[str, Any]:
    """The figures of the model in `job.folder` on the held-out documents, in a process of its own."""
    checkpoint = load_checkpoint(job.folder)
    assert checkpoint.tokenizer is not None
    config = checkpoint.model.config
    length = config.segment_length or 0
    cutter = TextStreams(job.held_out, segment_length=length, n_segments=1, batch_size=1, has_encoder=config.has_encoder)
    rng = np.random.default_rng(job.seed)
    far = length * FAR_SEGMENTS
    long_enough = [document for document in job.held_out if len(document) > far]
    documents = [long_enough[i % len(long_enough)] for i in range(RECALL_STREAMS)]
    streams = cutter.cut([(document, int(rng.integers(1, len(document) - far + 1))) for document in documents], max(DISTANCES) + 1)
    held_out = HeldOut(job.held_out, job.bytes_held_out, cutter, streams, seed=job.seed)
    return measure_memory(checkpoint.model, job.make_memory(), checkpoint.tokenizer, held_out)
