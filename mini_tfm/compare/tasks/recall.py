"""Recall: is a fact from several segments back still known? The task that shows whether a memory remembers.

Into a stream of real text a fact is planted, "The code word is Q."; some segments later the decoder is asked by a
target that begins "The code word is", and must give the letter. The distance is the number of segments between
the one that holds the fact and the one being read when the question comes; at distance 0 no memory is needed.
The fact overwrites text of one source segment, the question that of one target: the letter is nowhere else. A decoder-only
model has no sources: there the fact overwrites text of a target, and the question is at the end of the same or a later one.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...autodiff import value_of
from ...data.batches import Batch
from ...errors import InvalidValue
from ...memory.base import Memory
from ...model import Model
from ...stream import Stream
from ...text.tokenizers import Tokenizer
from ...train.segments import read_batch
from .base import HeldOut

FACT = "\nThe code word is {}.\n"
LETTERS = string.ascii_uppercase
CHANCE = 1 / len(LETTERS)
DISTANCES = (0, 1, 2, 4, 6)  # segments between fact and question
FAR = (4, 6)
STRAYS = 2.0  # stray letters in a segment, in training


class Recall:
    """Plants facts and questions in batches, and measures how many are answered."""

    name = "recall"

    def __init__(self, tokenizer: Tokenizer):
        before, after = FACT.split("{}")
        self.before, self.after = tokenizer.encode(before), tokenizer.encode(after)
        letters = [tokenizer.encode(letter) for letter in LETTERS]
        if any(len(ids) != 1 for ids in letters) or len(np.unique(np.concatenate(letters))) < len(LETTERS):
            raise InvalidValue("tokenizer: expected a token for each capital letter, as byte-level tokenizers have")
        self.letters = np.concatenate(letters)
        self.length = len(self.before) + 1 + len(self.after)  # tokens of a fact

    def plant(
        self, batch: Batch, seed: tuple[int, ...], *, facts_at: int | None = None, asked_at: int | None = None, strays: float = 0.0
    ) -> tuple[Batch, np.ndarray]:
        """A batch with one fact in each stream, and the letters that answer its questions (B, n); -1: no question.

        facts_at, asked_at: the segments of the fact and of the only question; by default the fact is anywhere in the
        first half, and every segment from there on has the question, or one in two where there is only one segment.
        In the loss the question and the fact have weight 0 in the target, and all letters together weigh as much as all the
        text. strays: average number of letters per segment that replace tokens, so that a lone capital is not mistaken for a
        fact. Raises InvalidValue.
        """
        size, n, length = batch.target.shape
        needed = self.length * (2 if batch.source is None else 1)
        if length < needed:
            holds = "a fact and its question" if batch.source is None else "a fact"
            raise InvalidValue(f"batch: expected segments of at least {needed} tokens, as long as {holds}, got {length}")
        rng = np.random.default_rng(seed)
        target, at = batch.target.copy(), self.asked_from(batch)
        text = target if batch.source is None else batch.source.copy()  # what holds the facts
        lengths = batch.target_lengths if batch.source_lengths is None else batch.source_lengths
        weights = np.ones(target.shape, np.float32) if batch.weights is None else batch.weights.copy()
        if strays:
            stray = rng.random(text.shape) < strays / length
            text[...] = np.where(stray, self.letters[rng.integers(len(self.letters), size=text.shape)], text)
            if text is target:
                weights[stray] = 0
        asked: np.ndarray = np.full((size, n), -1, np.int64)
        for b in range(size):
            t = int(rng.integers((n + 1) // 2)) if facts_at is None else facts_at
            letter = self.letters[rng.integers(len(self.letters))]
            fact = np.concatenate([self.before, [letter], self.after])
            place, coins = float(rng.random()), np.asarray(rng.random(n))
            room = min(int(lengths[b, t]), at or text.shape[2]) - self.length
            if room < 0:
                continue
            start = int(place * (room + 1))
            text[b, t, start : start + self.length] = fact
            if text is target:
                weights[b, t, start : start + self.length] = 0
            for later in self._questions(batch, b, t, coins < 0.5, asked_at):
                target[b, later, at : at + self.length], weights[b, later, at : at + self.length], asked[b, later] = fact, 0, letter
        counted = np.arange(length) < batch.target_lengths[..., None]
        weights[..., at + len(self.before)][asked >= 0] = (weights * counted).sum() / max(1, (asked >= 0).sum())
        return dataclasses.replace(batch, source=None if batch.source is None else text, target=target, weights=weights), asked

    def asked_from(self, batch: Batch) -> int:
        """The first token of a question in its target: 0, or what puts it at the end where the fact may be in the same target."""
        return batch.target.shape[2] - self.length if batch.source is None else 0

    def _questions(self, batch: Batch, row: int, fact_at: int, coins: np.ndarray, asked_at: int | None) -> Iterator[int]:
        """The segments of a row in which the question is asked; coins: (n,) bool, drawn for a stream of one segment."""
        n = len(coins)
        for t in range(fact_at, n):
            if t > fact_at and batch.begins is not None and batch.begins[row, t]:
                return  # another document, whose memory does not know the fact
            wanted = n > 1 or coins[t] if asked_at is None else t == asked_at
            if wanted and batch.target_lengths[row, t] >= self.asked_from(batch) + self.length:
                yield t

    def training_batch(self, batch: Batch, seed: tuple[int, ...]) -> Batch:
        """A batch of text with facts, questions and stray letters."""
        return self.plant(batch, seed, strays=STRAYS)[0]

    def measure(self, model: Model, memory: Memory | None, held_out: HeldOut) -> dict[str, Any]:
        """Shares of facts that are still known, by distance in segments, and the mean of the far ones.

        Raises InvalidValue where segments are too short for a fact.
        """
        known = {d: self.accuracy(model, memory, held_out.streams, d, seed=held_out.seed) for d in DISTANCES}
        return {"recall": known, "recall_far": float(np.mean([known[d] for d in FAR]))}

    @staticmethod
    def unmeasured() -> dict[str, Any]:
        return {"recall": dict.fromkeys(DISTANCES, float("nan")), "recall_far": float("nan")}

    def accuracy(self, model: Model, memory: Memory | None, batch: Batch, distance: int, seed: int = 0) -> float:
        """Share of questions whose letter is the likeliest of all tokens; facts are `distance` segments back.

        batch: streams of at least distance + 1 whole segments; the fact is in the first. NaN if none fits.
        """
        batch = cut_segments(batch, distance + 1)
        batch, asked = self.plant(batch, (seed, distance), facts_at=0, asked_at=distance)
        right = total = 0
        stream, letter_at = Stream(model, memory, len(batch.target)), self.asked_from(batch) + len(self.before)
        for t, hidden in read_batch(stream, batch):
            rows = np.flatnonzero(asked[:, t] >= 0)
            if len(rows):
                scores = (
                    stream.log_probs(hidden)[rows, letter_at]
                    if stream.run.changes_output
                    else stream.logits(value_of(hidden)[rows, letter_at])
                )
                right += int((np.argmax(value_of(scores), axis=1) == asked[rows, t]).sum())
                total += len(rows)
        return right / total if total else float("nan")


def cut_segments(batch: Batch, n: int) -> Batch:
    """The first `n` segments of a batch."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{name: value[:, :n] for name, value in fields.items() if value is not None})
