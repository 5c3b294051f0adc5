"""The experiment: the same model, text and budget; one memory after another.

A common start: one model learns the text, and to answer a question about the segment it is reading (nothing to
remember yet). From there each memory is trained for the same number of steps on streams of several segments, with
facts that lie further and further back. Whole documents are held out; on them the tasks are measured.

Training runs as many memories at once as there are cores. Then each is measured alone, with all threads, in a process of its
own, so that peak RAM is its own.
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
from ..errors import InvalidValue
from ..memory.registry import memory as make_memory
from ..progress import track
from ..text.documents import split_documents
from ..text.tokenizers import Tokenizer, train_bpe
from ..transformer import Transformer, load_checkpoint
from .machine import machine, n_cores
from .measure import measure_memory, refuse_durable
from .processes import processes
from .tasks import HeldOut
from .tasks.recall import CHANCE, DISTANCES
from .training import SEGMENT_TOKENS, Job, train_all, train_start

VOCABULARY = 1024
SHAPE: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 256}
HELD_OUT = 0.1  # of the bytes, in whole documents
FAR_TOKENS = SEGMENT_TOKENS * (max(DISTANCES) + 2)  # a document must be longer, to ask about the farthest fact
START_SHARE = 0.35  # of the time for training, for the common start
MEASURE_SHARE = 0.1  # of all time, for measuring
RECALL_STREAMS = 128


@dataclasses.dataclass
class Result:
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
    rows: list[Result]
    seed: int

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
    seconds: float = 345,
    seed: int = 0,
    text_name: str = "text",
    report: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> Experiment:
    """Trains and measures each of `memories` (text as for `mt.memory`; None: no memory) on `documents`.

    out: a folder for the models, `out/models/<memory>`; None keeps nothing. seconds: for everything, about; on a
    machine too slow for all steps, all memories get fewer. report: called with a line when a part begins. Raises
    InvalidValue for a text that is too short, an unknown memory or option.
    """
    began = time.perf_counter()
    names = _checked_names(memories)
    texts = _prepare(documents, seed, report)
    config = Config(vocab_size=VOCABULARY, segment_length=SEGMENT_TOKENS, **SHAPE)
    training_seconds = seconds * (1 - MEASURE_SHARE) - (time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as scratch:
        report("the common start: one model learns the text, without a memory")
        start = os.path.join(scratch, "start")
        model = Transformer(config, seed=seed)
        history = train_start(model, texts.tokenizer, texts.train, training_seconds * START_SHARE, seed, progress)
        save_model(start, model, tokenizer=texts.tokenizer)
        models = Path(out) / "models" if out is not None else Path(scratch)
        jobs = [
            Job(text, str(models / folder_name(name)), start, texts.train, texts.held_out, texts.bytes_held_out, seed)
            for name, text in zip(names, memories, strict=True)
        ]
        rows = _rows(jobs, training_seconds - (time.perf_counter() - began), report, progress)
    return Experiment(
        text_name=text_name,
        documents=len(documents),
        bytes_train=texts.bytes_train,
        bytes_held_out=texts.bytes_held_out,
        held_out_names=texts.held_out_names,
        config=config,
        tokenizer_vocab=texts.tokenizer.vocab_size,
        seconds=time.perf_counter() - began,
        machine=machine(),
        distances=list(DISTANCES),
        chance=CHANCE,
        history={"start": history, **{row.memory: row.history for row in rows}},
        rows=rows if out is not None else [dataclasses.replace(row, folder=None) for row in rows],
        seed=seed,
    )


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
            refuse_durable(make_memory(text))
    return names


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Documents as token ids, (tokens,) each, in two parts."""

    tokenizer: Tokenizer
    train: list[np.ndarray]
    held_out: list[np.ndarray]
    bytes_train: int
    bytes_held_out: int
    held_out_names: list[str]


def _prepare(documents: dict[str, str], seed: int, report: Callable[[str], None]) -> _Texts:
    """Splits and tokenizes the documents. Raises InvalidValue where one part has no document that is long enough."""
    train_texts, held_out_texts = split_documents(documents, HELD_OUT, seed)
    report(f"training a tokenizer of {VOCABULARY} tokens on {len(train_texts)} documents")
    tokenizer = train_bpe(train_texts.values(), VOCABULARY)
    train, held_out = ([tokenizer.encode(text) for text in part.values()] for part in (train_texts, held_out_texts))
    for what, part in (("for training", train), ("held out", held_out)):
        longest = max(map(len, part))
        if longest <= FAR_TOKENS:
            raise InvalidValue(
                f"text: expected a document {what} of more than {FAR_TOKENS} tokens, the longest of {len(part)} has {longest}; give more or"
                " longer text"
            )
    return _Texts(tokenizer, train, held_out, n_bytes(train_texts), n_bytes(held_out_texts), list(held_out_texts))


def _rows(jobs: list[Job], seconds: float, report: Callable[[str], None], progress: bool) -> list[Result]:
    """Trains all jobs in about `seconds`, then measures one after the other."""
    workers = min(len(jobs), n_cores())
    report(f"training {len(jobs)} memories, {workers} at a time: {', '.join(job.name for job in jobs)}")
    trained = train_all(jobs, workers, seconds, progress)
    report(f"measuring on {len(jobs[0].held_out)} held-out documents")
    rows = []
    for job, (train_seconds, history) in zip(track(jobs, "measuring", len(jobs), "memories") if progress else jobs, trained, strict=True):
        with processes(1) as pool:
            figures = pool.submit(_measure, job).result()
        rows.append(
            Result(memory=job.name, folder=Path(job.folder), train_seconds=train_seconds, steps=len(history), history=history, **figures)
        )
    return rows


def _measure(job: Job) -> dict[str, Any]:
    """The figures of the model in `job.folder` on the held-out documents, in a process of its own."""
    checkpoint = load_checkpoint(job.folder)
    assert checkpoint.tokenizer is not None
    cutter = TextStreams(job.held_out, segment_length=SEGMENT_TOKENS, n_segments=1, batch_size=1)
    rng = np.random.default_rng(job.seed)
    long_enough = [document for document in job.held_out if len(document) > FAR_TOKENS]
    documents = [long_enough[i % len(long_enough)] for i in range(RECALL_STREAMS)]
    streams = cutter.cut([(document, int(rng.integers(1, len(document) - FAR_TOKENS + 1))) for document in documents], max(DISTANCES) + 1)
    held_out = HeldOut(job.held_out, job.bytes_held_out, cutter, streams, seed=job.seed)
    return measure_memory(checkpoint.model, job.make_memory(), checkpoint.tokenizer, held_out)
