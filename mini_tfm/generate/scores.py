"""Log-probabilities, the best of them, and where draws come from."""

from __future__ import annotations

import numpy as np

from .. import _core
from ..errors import InvalidValue
from .options import GenerationOptions


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    """Log-softmax of (B, V), of which some may be -inf."""
    best = scores.max(axis=1, keepdims=True)
    if np.isneginf(scores).any():
        shifted = scores - np.where(np.isneginf(best), 0, best)
        with np.errstate(divide="ignore"):
            return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return _core.log_softmax(scores)


def best_of(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest of values (n,), best first, of equal ones the first."""
    if k < len(values):
        values_k = -np.partition(-values, k - 1)[k - 1]
        places = np.flatnonzero(values >= values_k)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:k]


def top_of(log_probs: np.ndarray, n: int) -> list[tuple[int, float]]:
    """The n best tokens of log_probs (V,) with theirs; those that are ruled out are left out."""
    return [(int(i), float(log_probs[i])) for i in best_of(log_probs, n) if log_probs[i] > -np.inf] if n else []


def nothing_left(row: int, n: int) -> InvalidValue:
    return InvalidValue(f"generate: the options rule out every token at token {n} of sequence {row}; allow more")


def rng_of(options: GenerationOptions, number: int, copy: int) -> np.random.Generator:
    """The draws of a sequence, by its number; copy: which of several of that number it is."""
    if options.seed is None:
        return np.random.default_rng()
    return np.random.default_rng([options.seed, int(number), int(copy)] if copy else [options.seed, int(number)])
