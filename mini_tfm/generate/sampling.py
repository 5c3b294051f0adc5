"""From scores to one token a sequence: which tokens are left to draw from, and the draw.

A processor is a function of (ids, scores, rows). ids (B, n): what the decoder was fed so far, bos and the prompt included.
scores (B, V) of the next token. rows (B,): which of the search's sequences each is, of which several may be beams or draws of
one. It gives new scores, -inf for what is ruled out. Those here serve draws; what may be said at all is in penalties.py.

keep: at least so many tokens are left, ruled out or not: beams must be able to go on without an eos.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Processor: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Temperature:
    """Divides the scores: below 1 the likeliest gain, above 1 they lose."""

    def __init__(self, temperature: float):
        self.temperature = np.float64(temperature)

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            divided = (scores / self.temperature).astype(scores.dtype)
            if np.isfinite(divided.max(axis=1)).all():
                return divided
            # The best stays 0, however small the temperature.
            from_best = ((scores - scores.max(axis=1, keepdims=True)) / self.temperature).astype(scores.dtype)
            return np.where(np.isfinite(divided.max(axis=1, keepdims=True)), divided, from_best)


class TopK:
    """Only the k likeliest; those that equal the last of them stay, too."""

    def __init__(self, k: int, keep: int = 1):
        self.k = max(k, keep)

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.where(scores < _kth(scores, self.k), -np.inf, scores)


class TopP:
    """Only the fewest whose probabilities add up to p (arXiv 1904.09751); of equal ones the lower id first."""

    def __init__(self, p: float, keep: int = 1):
        self.p, self.keep = p, keep

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores, axis=1, kind="stable")[:, ::-1]
        drop = _added_up(_probabilities(np.take_along_axis(scores, order, 1))) <= 1 - self.p
        drop[:, -self.keep :] = False
        return _without(scores, order, drop)


class MinP:
    """Only tokens with a share p of the best one's probability (arXiv 2407.01082)."""

    def __init__(self, p: float, keep: int = 1):
        self.p, self.keep = p, keep

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        p = _probabilities(scores)
        drop = p < self.p * p.max(axis=1, keepdims=True)
        np.put_along_axis(drop, np.argsort(-p, axis=1, kind="stable")[:, : self.keep], False, 1)
        return np.where(drop, -np.inf, scores)


class Typical:
    """Only the tokens whose information is nearest the entropy, until their probabilities add up to p (arXiv 2202.00666)."""

    def __init__(self, p: float, keep: int = 1):
        self.p, self.keep = p, keep

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        log_p = _log_probabilities(scores)
        with np.errstate(invalid="ignore"):
            far = np.abs(-log_p - _entropy(log_p))
        order = np.argsort(far, axis=1, kind="stable")
        reached = _added_up(_probabilities(np.take_along_axis(scores, order, 1))) < self.p
        last = np.minimum(reached.sum(axis=1, keepdims=True), scores.shape[1] - 1)
        far = np.take_along_axis(far, order, 1)
        drop = far > np.take_along_axis(far, last, 1)
        drop[:, : self.keep] = False
        return _without(scores, order, drop)


class EpsilonCutoff:
    """Only tokens of a probability of at least epsilon, and the best (arXiv 2210.15191)."""

    def __init__(self, epsilon: float, keep: int = 1):
        self.epsilon, self.keep = epsilon, keep

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.where((_probabilities(scores) < self.epsilon) & (scores < _kth(scores, self.keep)), -np.inf, scores)


class EtaCutoff:
    """The same with eta = min(epsilon, sqrt(epsilon) exp(-entropy)) (arXiv 2210.15191)."""

    def __init__(self, epsilon: float, keep: int = 1):
        self.epsilon, self.keep = epsilon, keep

    def __call__(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        log_p = _log_probabilities(scores)
        eta = np.minimum(self.epsilon, self.epsilon**0.5 * np.exp(-_entropy(log_p)))
        return np.where((_probabilities(scores) < eta) & (scores < _kth(scores, self.keep)), -np.inf, scores)


def draw(scores: np.ndarray, rng: np.random.Generator) -> int:
    """A token drawn from the softmax of scores (V,)."""
    left = np.flatnonzero(np.isfinite(scores))
    order = left[np.argsort(-scores[left], kind="stable")]
    falling = scores[order].astype(np.float64)
    total = np.cumsum(np.exp(falling - falling[0]))
    return int(order[np.searchsorted(total, rng.random() * total[-1], side="right")])  # "right": never one of probability 0


def _kth(scores: np.ndarray, k: int) -> np.ndarray:
    """(B, 1): the k-th best score of each row, or the worst of fewer."""
    k = min(k, scores.shape[1])
    return -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]


def _log_probabilities(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _probabilities(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def _entropy(log_p: np.ndarray) -> np.ndarray:
    """(B, 1), in nats."""
    p = np.exp(log_p)
    return -np.sum(p * np.where(p > 0, log_p, 0), axis=1, keepdims=True)


def _added_up(p: np.ndarray) -> np.ndarray:
    """Running sums, added in float64 as PyTorch does, so that a threshold falls on the same token."""
    return np.cumsum(p, axis=1, dtype=np.float64).astype(p.dtype)


def _without(scores: np.ndarray, order: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """-inf where `drop` says so of the tokens in that order."""
    dropped = np.empty_like(drop)
    np.put_along_axis(dropped, order, drop, 1)
    return np.where(dropped, -np.inf, scores)
