"""Objectives, which turn a corpus into batches: the next segment, masked spans, targets of given sources.

Each has `batch(step)`, a pure function of its seed and the step, that gives every item of the corpus exactly once per epoch,
in a new order each epoch; `state`, plain data that describes all of that, for a saved run; and `with_segments(n)`, the same
with another number of segments per row, for a `Curriculum`.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, TypeVar

import numpy as np

from ..errors import InvalidValue, shown
from .batches import Batch, Example, lay_out
from .checks import MOST, integers, large, number
from .corpus import CHUNK, as_corpus
from .packing import CUTS, PackedRows, SegmentLines, Window
from .permutation import Permutation

A = TypeVar("A", bound="Packed")


class Packed:
    """Batches of documents packed into rows (packing.py): the base of `NextSegment` and `SpanDenoising`.

    documents: a `Corpus` of texts, or arrays of ids. Rows hold `n_segments` segments of at most `segment_length` tokens. No
    segment crosses a document's end, and `Batch.begins` marks where a document begins, so that memories are emptied. A document
    of more than one segment is cut at other places in each epoch: its first segment is shorter.
    """

    name = ""

    def __init__(
        self,
        documents: Any,
        *,
        segment_length: int,
        n_segments: int,
        batch_size: int,
        seed: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
        pad_id: int = 0,
        has_encoder: bool = True,
    ):
        counts = integers(segment_length=segment_length, n_segments=n_segments, batch_size=batch_size)
        self.segment_length, self.n_segments, self.batch_size = counts
        [self.seed] = large(seed=seed)
        self.corpus = as_corpus(documents, "texts")
        self.bos_id, self.eos_id, self.pad_id = integers(0, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
        self.has_encoder = has_encoder
        self._lines = SegmentLines(self.corpus, self.segment_length)

    @property
    def steps_per_epoch(self) -> float:
        """On average: epochs are cut at other places, and so differ by a segment for each document at most."""
        return self._rows.in_all / self._lines.n / self.batch_size

    @property
    def padding(self) -> float:
        """The share of padding in all segments."""
        return self._lines.padding

    @property
    def state(self) -> dict[str, Any]:
        """Everything the batches depend on, as plain data."""
        names = ("segment_length", "n_segments", "batch_size", "seed", "bos_id", "eos_id", "has_encoder")
        own = {name: getattr(self, name) for name in names}
        return {"objective": self.name, "corpus": self.corpus.fingerprint, "cuts": CUTS, **own}

    def with_segments(self: A, n_segments: int, batch_size: int | None = None) -> A:
        """The same with `n_segments` segments per row, and `batch_size` rows if given; the corpus is shared."""
        other = copy.copy(self)
        other.n_segments, other.batch_size = integers(n_segments=n_segments, batch_size=batch_size or self.batch_size)
        return other

    def batch(self, step: int) -> Batch:
        [step] = large(step=step)
        rows = []
        for place, windows in self._rows.rows(step):
            rows.append([self._example(window, (*place, t)) for t, window in enumerate(windows)])
        return lay_out(rows, self.pad_id)

    @property
    def _rows(self) -> PackedRows:
        return PackedRows(self._lines, self.n_segments, self.batch_size, self.seed)

    def _example(self, window: Window, place: tuple[int, int, int]) -> Example:
        """The example made of a segment. place: (epoch, row, segment of the row)."""
        raise NotImplementedError


class NextSegment(Packed):
    """The encoder reads a segment, the decoder predicts the next one; a document's first is predicted from `bos`.

    With has_encoder=False, for decoder-only models: language modelling, each segment predicted token by token. Every
    token of the corpus is a target exactly once per epoch. A document longer than a segment is cut at other places in each epoch.
    """

    name = "next-segment"

    def _example(self, window: Window, place: tuple[int, int, int]) -> Example:
        i, start, stop = window
        begins = start == 0
        target = self.corpus.document(i, start, stop)
        if not self.has_encoder:
            return Example(None, target, begins=begins)
        source = np.array([self.bos_id]) if begins else self.corpus.document(i, max(0, start - self.segment_length), start)
        return Example(source, target, begins=begins)


class SpanDenoising(Packed):
    """Span corruption (T5: arXiv 1910.10683, section 3.1.4 and figure 2): the model predicts masked spans.

    Spans of `mean_span` tokens on average, `noise_density` of each segment in all, are replaced by one sentinel each; the
    target is each sentinel followed by its span, and one more sentinel. Sentinels are the last ids of the vocabulary: the
    first is vocab_size - 1. The spans are a pure function of (seed, epoch, row, segment). Every token of the corpus is in a
    source or in a target exactly once per epoch. For decoder-only models source, `eos` and target are one text, and the
    source is not in the loss.

    vocab_size: the model's; text must not use its last `SpanDenoising.sentinels(segment_length)` ids. In the paper no two
    spans touch, and no text begins with one; here a span may come first.
    """

    name = "denoise"

    def __init__(
        self,
        documents: Any,
        *,
        vocab_size: int,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        **options: Any,
    ):
        super().__init__(documents, **options)
        faults = _span_faults(noise_density, mean_span)
        if not isinstance(number(vocab_size), int) or not 1 <= vocab_size <= MOST:
            faults.append(f"vocab_size: expected an integer of at least 1 and at most {MOST}, got {shown(vocab_size)}")
        if faults:
            raise InvalidValue("SpanDenoising: " + "; ".join(faults))
        self.vocab_size, self.noise_density, self.mean_span = int(vocab_size), number(noise_density), number(mean_span)
        self.first_sentinel = self.vocab_size - 1
        self.n_sentinels = self.sentinels(self.segment_length, self.noise_density, self.mean_span)
        if self.n_sentinels >= vocab_size:
            raise InvalidValue(f"vocab_size: expected room for {self.n_sentinels} sentinels and the text, got {vocab_size}")

    @staticmethod
    def sentinels(segment_length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> int:
        """The number of sentinels for segments of `segment_length` tokens, the last one included. Raises InvalidValue."""
        if faults := _span_faults(noise_density, mean_span):
            raise InvalidValue("SpanDenoising: " + "; ".join(faults))
        [segment_length] = integers(segment_length=segment_length)
        return _spans(segment_length, noise_density, mean_span)[1] + 1

    @property
    def state(self) -> dict[str, Any]:
        return super().state | {"vocab_size": self.vocab_size, "noise_density": self.noise_density, "mean_span": self.mean_span}

    def _example(self, window: Window, place: tuple[int, int, int]) -> Example:
        tokens = self.corpus.document(*window).astype(np.int64)
        last = self.first_sentinel - self.n_sentinels
        if tokens.max() > last:
            raise InvalidValue(
                f"vocab_size: {self.vocab_size} leaves ids up to {last} for the text and {self.n_sentinels} for sentinels, but document"
                f" {window.document} holds {tokens.max()}; use a model with a larger vocabulary"
            )
        rng = np.random.default_rng([self.seed, *place])
        n_noise, n_spans = _spans(len(tokens), self.noise_density, self.mean_span)
        spans = 1 + _parts(rng, n_noise - n_spans, n_spans)
        gaps = _parts(rng, len(tokens) - n_noise - (n_spans - 1), n_spans + 1)
        gaps[1:-1] += 1  # spans do not touch
        marks = self.first_sentinel - np.arange(n_spans + 1)[:, None]  # each an array of one id
        source, target, at = [], [], 0
        for k in range(n_spans):
            begin, end = at + gaps[k], at + gaps[k] + spans[k]
            source += [tokens[at:begin], marks[k]]
            target += [marks[k], tokens[begin:end]]
            at = end
        source.append(tokens[at:])
        target.append(marks[-1])
        joined = _given(np.concatenate(source), np.concatenate(target), self.eos_id, self.has_encoder)
        return Example(*joined, begins=window.start == 0)


def _span_faults(noise_density: Any, mean_span: Any) -> list[str]:
    faults = []
    if not 0 < number(noise_density) < 1:
        faults.append(f"noise_density: expected a share between 0 and 1, got {shown(noise_density)}")
    if not 1 <= number(mean_span) < math.inf:
        faults.append(f"mean_span: expected at least 1 token, got {shown(mean_span)}")
    return faults


def _spans(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(masked tokens, spans) of `length` tokens."""
    n_noise = min(max(1, round(length * noise_density)), max(1, length - 1))
    most = length - n_noise + 1  # a token must stay between two spans
    return n_noise, min(max(1, round(n_noise / mean_span)), n_noise, most)


def _parts(rng: np.random.Generator, total: int, n: int) -> np.ndarray:
    """`total` as a sum of `n` numbers of at least 0, each sum as likely as any other."""
    bars = np.sort(rng.choice(total + n - 1, n - 1, replace=False))
    return np.diff(np.concatenate([[-1], bars, [total + n - 1]])) - 1


def _given(source: np.ndarray, target: np.ndarray, eos_id: int, has_encoder: bool) -> tuple[np.ndarray | None, np.ndarray, int]:
    """(source, target, tokens of it that are not scored); for a model without an encoder, one text."""
    if has_encoder:
        return source, target, 0
    return None, np.concatenate([source, [eos_id], target]), len(source) + 1


class Pairs:
    """Given source-target pairs: translations, questions and answers, texts and summaries.

    pairs: a `Corpus` of pairs, or (source, target) arrays of ids. `eos_id` is appended to each target. Pairs of similar
    length share a batch, to save padding: each pool of `pool_batches` batches in the shuffled order is sorted by length, cut
    into batches, and these are shuffled. Every pair comes once per epoch; the last batch of an epoch may be smaller.

    segment_length: longer sources are read in segments, through the memory, and the target follows the last of them
    (shorter sources wait for the longest). None: sources are read at once. max_source_length, max_target_length: longer
    pairs are an error, or with cut=True are cut; None: no limit. frame: ids put before and after every source, which limits do not
    count: `tokenizer.frame()` for a published model. For decoder-only models source, `eos` and target are one
    text, and the source is not in the loss.
    """

    name = "pairs"

    def __init__(
        self,
        pairs: Any,
        *,
        batch_size: int,
        segment_length: int | None = None,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        cut: bool = False,
        frame: tuple[Any, Any] = ((), ()),
        pool_batches: int = 64,
        seed: int = 0,
        eos_id: int = 2,
        pad_id: int = 0,
        has_encoder: bool = True,
    ):
        limits = {"segment_length": segment_length, "max_source_length": max_source_length, "max_target_length": max_target_length}
        given = {name: n for name, n in limits.items() if n is not None}
        self.batch_size, self.pool_batches, *counts = integers(batch_size=batch_size, pool_batches=pool_batches, **given)
        limits |= dict(zip(given, counts, strict=True))
        self.segment_length, self.max_source_length, self.max_target_length = limits.values()
        [self.seed] = large(seed=seed)
        if segment_length is not None and not has_encoder:
            raise InvalidValue("segment_length: expected None, because a decoder-only model reads source and target as one text")
        self.corpus = as_corpus(pairs, "pairs")
        self.cut, self.frame = cut, tuple(np.asarray(ids, np.int64) for ids in frame)
        self.eos_id, self.pad_id = integers(0, eos_id=eos_id, pad_id=pad_id)
        self.has_encoder = has_encoder
        if not cut:
            self._check_lengths()
        self._pool = functools.lru_cache(2)(self._sorted_pool)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.corpus) // self.batch_size)

    @property
    def state(self) -> dict[str, Any]:
        names = ("batch_size", "segment_length", "max_source_length", "max_target_length", "cut", "pool_batches", "seed")
        own = {name: getattr(self, name) for name in (*names, "eos_id", "has_encoder")}
        own |= {"frame": [ids.tolist() for ids in self.frame]} if any(map(len, self.frame)) else {}
        return {"objective": self.name, "corpus": self.corpus.fingerprint, **own}

    def with_segments(self, n_segments: int, batch_size: int | None = None) -> Pairs:
        """The same object: sources determine the number of segments."""
        return self

    def batch(self, step: int) -> Batch:
        [step] = large(step=step)
        epoch, at = divmod(step, self.steps_per_epoch)
        pool, within = divmod(at, self.pool_batches)
        rows = [self._row(int(i)) for i in self._pool(epoch, pool)[within]]
        longest = max(map(len, rows))
        waiting: list[Example | None] = [None]
        return lay_out([waiting * (longest - len(row)) + row for row in rows], self.pad_id)

    def _row(self, i: int) -> list[Example | None]:
        source, target = self.corpus[i]
        source, target = source[: self.max_source_length], np.append(target[: self.max_target_length].astype(np.int64), self.eos_id)
        source = np.concatenate([self.frame[0], source, self.frame[1]])
        length = self.segment_length or max(1, len(source))
        if not self.has_encoder or len(source) <= length:
            return [Example(*_given(source, target, self.eos_id, self.has_encoder))]
        parts = [source[start : start + length] for start in range(0, len(source), length)]
        return [*(Example(part, target[:0]) for part in parts[:-1]), Example(parts[-1], target)]

    def _sorted_pool(self, epoch: int, pool: int) -> list[np.ndarray]:
        """The batches of a pool, in a shuffled order: numbers of pairs of similar length."""
        size, total = self.pool_batches * self.batch_size, len(self.corpus)
        order = Permutation(total, self.seed, epoch)(np.arange(pool * size, min(total, (pool + 1) * size)))
        offsets = self.corpus.offsets
        sources, targets = (offsets[2 * order + side + 1] - offsets[2 * order + side] for side in (0, 1))
        sources = sources + sum(map(len, self.frame))
        segments = -(-sources // self.segment_length) if self.segment_length and self.has_encoder else sources
        back_and_forth = np.where(sources % 2, targets, -targets)  # neighbours are alike where the source's length changes, too
        by_length = order[np.lexsort((back_and_forth, sources, segments))]
        batches = [by_length[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[i] for i in np.random.default_rng([self.seed, epoch, pool]).permutation(len(batches))]

    def _check_lengths(self) -> None:
        for side, (name, most) in enumerate((("source", self.max_source_length), ("target", self.max_target_length))):
            for start in range(0, self.corpus.n_documents, CHUNK) if most is not None else ():
                lengths = self.corpus.lengths(start, min(self.corpus.n_documents, start + CHUNK))[side::2]
                if lengths.max() > most:
                    raise InvalidValue(
                        f"max_{name}_length: expected at most {most} tokens, the {name} of pair {start // 2 + int(lengths.argmax())} has"
                        f" {lengths.max()}; raise it, or give cut=True"
                    )
