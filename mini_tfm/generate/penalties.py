"""What may be said, and what costs something, whether tokens are drawn or searched: processors (see sampling.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import InvalidType, InvalidValue


class SequenceBias:
    """Adds a number to the score of the token that completes a sequence; -inf forbids it."""

    def __init__(self, biases: Iterable[tuple[Sequence[int], float]]):
        self.biases = [(np.array(ids[:-1], np.int64), ids[-1], bias) for ids, bias in biases]

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        total = np.zeros_like(scores)
        for prefix, token, bias in self.biases:
            if len(prefix) <= ids.shape[1]:
                begun = (ids[:, ids.shape[1] - len(prefix) :] == prefix).all(axis=1)
                total[begun, token] += bias
        return scores + total


class RepetitionPenalty:
    """Tokens that the decoder was fed, bos and the prompt included: positive scores divided, others multiplied (arXiv 1909.05858)."""

    def __init__(self, penalty: float):
        self.penalty = penalty

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.where(_counts(ids, scores.shape[1]) > 0, np.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


class CountPenalty:
    """Subtracts `presence` from the scores of tokens that were generated, and `frequency` for each time that they were."""

    def __init__(self, presence: float, frequency: float, n_prompt: int):
        self.presence, self.frequency, self.n_prompt = presence, frequency, n_prompt

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        counts = _counts(ids[:, self.n_prompt :], scores.shape[1])
        return (scores - self.presence * (counts > 0) - self.frequency * counts).astype(scores.dtype)


class NoRepeatNGram:
    """No sequence of n tokens occurs twice, the prompt included."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        n, length = self.n, ids.shape[1]
        if length < n:
            return scores
        windows = sliding_window_view(ids, n, axis=1)
        row, at = np.nonzero((windows[..., :-1] == ids[:, None, length + 1 - n :]).all(axis=2))
        return _banned(scores, row, windows[row, at, -1])


class Shortlisted:
    """No token that a shortlist does not have for what the encoder has read. sources: its ids, of each sequence."""

    def __init__(self, shortlist: Callable[[np.ndarray, int], np.ndarray], sources: Sequence[np.ndarray]):
        self.shortlist, self.sources = shortlist, sources
        self._allowed: dict[int, np.ndarray] = {}

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.where(np.stack([self.allowed(row, scores.shape[1]) for row in rows.tolist()]), scores, scores.dtype.type(-np.inf))

    def allowed(self, row: int, n: int) -> np.ndarray:
        """(n,) bool: which of the first n ids it has for a sequence."""
        if row not in self._allowed:
            allowed = np.asarray(self.shortlist(self.sources[row], n))
            if allowed.shape != (n,) or allowed.dtype != np.bool_:
                raise InvalidValue(f"generate: shortlist: expected bool of shape ({n},), got {allowed.dtype} of shape {allowed.shape}")
            self._allowed[row] = allowed
        return self._allowed[row]


class EncoderNoRepeatNGram:
    """No sequence of n tokens of what the encoder has read. sources: its ids, of each sequence."""

    def __init__(self, n: int, sources: Sequence[np.ndarray]):
        self.n, self.sources = n, sources
        self._next: dict[int, dict[tuple[int, ...], list[int]]] = {}

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        scores = scores.copy()
        if ids.shape[1] < self.n - 1:
            return scores
        for i, sequence in enumerate(rows.tolist()):
            if sequence not in self._next:
                found = self._next.setdefault(sequence, {})
                source = self.sources[sequence].tolist()
                for start in range(len(source) + 1 - self.n):
                    *prefix, last = source[start : start + self.n]
                    found.setdefault(tuple(prefix), []).append(last)
            followers = self._next[sequence].get(tuple(ids[i, ids.shape[1] + 1 - self.n :].tolist()), ())
            scores[i, [token for token in followers if token < scores.shape[1]]] = -np.inf
        return scores


class Suppressed:
    """Tokens that are ruled out while what was fed is of these lengths."""

    def __init__(self, tokens: Iterable[int], at: range | None = None):
        self.tokens, self.at = np.array(list(tokens), np.int64), at

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self.at is not None and ids.shape[1] not in self.at:
            return scores
        scores = scores.copy()
        scores[:, self.tokens[self.tokens < scores.shape[1]]] = -np.inf
        return scores


class Forced:
    """At one length of what was fed: these tokens alone, all equal."""

    def __init__(self, tokens: Iterable[int], at: int):
        self.tokens, self.at = list(tokens), at

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if ids.shape[1] != self.at:
            return scores
        forced = np.full_like(scores, -np.inf)
        forced[:, self.tokens] = 0
        return forced


class Allowed:
    """Only the tokens that a function of (which of the search's sequences, ids (n,)) allows.

    Where other rules have forbidden all that it allows, in every beam of a sequence, it has the last word.
    """

    def __init__(self, allowed: Callable[[int, np.ndarray], Iterable[int]], name: str):
        self.allowed, self.name = allowed, name

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        mask = np.full_like(scores, -np.inf)
        for i, row in enumerate(rows.tolist()):
            tokens = np.asarray(list(self.allowed(row, ids[i])))
            if not tokens.size or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= scores.shape[1]:
                what = tokens.tolist() if tokens.size else "none"
                raise InvalidValue(
                    f"generate: {self.name}: expected at least one token id from 0 to {scores.shape[1] - 1}, got {what} for sequence"
                    f" {row} after {ids[i].tolist()}"
                )
            mask[i, tokens] = 0
        left = scores + mask
        has_some = np.isin(rows, rows[left.max(axis=1) > -np.inf])
        return np.where(has_some[:, None], left, mask)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a sequence has said so far. n_prompt, before: see `StopStrings`; bos_id: what is forced at the start, and is not said."""

    n_prompt: int
    before: Sequence[list[int]]
    bos_id: int | None

    def __call__(self, row: int, ids: np.ndarray) -> list[int]:
        return self.without_bos(self.before[row] + ids[self.n_prompt :].tolist())

    def without_bos(self, ids: Iterable[int]) -> list[int]:
        return [int(token) for token in ids if token != self.bos_id]


class Choices:
    """One of some sequences of tokens, and then an eos: what may follow, by a tree of them."""

    def __init__(self, choices: Iterable[Sequence[int]], eos_ids: Sequence[int], made: Made):
        self.eos_ids, self.made = list(eos_ids), made
        self.tree: dict[int | None, Any] = {}
        for choice in choices:
            at = self.tree
            for token in made.without_bos(choice):
                at = at.setdefault(token, {})
            at[None] = {}  # a choice ends here

    def __call__(self, row: int, ids: np.ndarray) -> list[int]:
        at = self.tree
        for token in self.made(row, ids):
            at = at[token]
        return [each for token in at for each in (self.eos_ids if token is None else [token])]


class Given:
    """A user's function of (ids, scores)."""

    def __init__(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self.function = function

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found = np.asarray(self.function(ids.copy(), scores.copy()))
        if found.shape != scores.shape or found.dtype.kind not in "fiu":
            raise InvalidType(
                f"generate: logits_processor: expected scores of shape {scores.shape}, got {found.dtype} of shape {found.shape}"
            )
        if np.isnan(found).any() or np.isposinf(found).any():
            raise InvalidValue("generate: logits_processor: expected finite scores or -inf, got NaN or infinity")
        return found.astype(scores.dtype)


def _counts(ids: np.ndarray, n_ids: int) -> np.ndarray:
    """(B, V): how often each token occurs in ids (B, n)."""
    counts = np.zeros((len(ids), n_ids + 1), np.int64)
    np.add.at(counts, (np.arange(len(ids))[:, None], np.minimum(ids, n_ids)), 1)
    return counts[:, :n_ids]


def _banned(scores: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    scores, known = scores.copy(), tokens < scores.shape[1]
    scores[rows[known], tokens[known]] = -np.inf
    return scores
