"""From scores to one token a stream. A processor a class: scores (V,) in, scores (V,) out, -inf for what is ruled out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .options import GenerationOptions

Processor = Callable[[np.ndarray], np.ndarray]


class Temperature:
    """Divides the scores: below 1 the likeliest gain, above 1 they lose."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # the best stays 0, however small the temperature
            return (scores - scores.max()) / self.temperature


class TopK:
    """Only the k likeliest; of equal ones the lower id first."""

    def __init__(self, k: int):
        self.k = k

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return _only(scores, _by_score(scores)[: self.k])


class TopP:
    """Only the fewest whose probabilities add up to p (arXiv 1904.09751)."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        order = _by_score(scores)
        enough = int(np.searchsorted(np.cumsum(_probabilities(scores[order])), self.p)) + 1
        return _only(scores, order[:enough])


def processors_of(options: GenerationOptions) -> list[Processor]:
    """What the options ask for, in Hugging Face's order."""
    found: list[Processor] = []
    if options.temperature != 1:
        found.append(Temperature(options.temperature))
    if options.top_k:
        found.append(TopK(options.top_k))
    if options.top_p < 1:
        found.append(TopP(options.top_p))
    return found


def draw(scores: np.ndarray, processors: Sequence[Processor], rng: np.random.Generator) -> int:
    """A token drawn from the softmax of scores (V,), as the processors leave them."""
    scores = scores.astype(np.float64)
    for processor in processors:
        scores = processor(scores)
    order = _by_score(scores)
    total = np.cumsum(_probabilities(scores[order]))
    return int(order[np.searchsorted(total, rng.random() * total[-1], side="right")])  # "right": never one of probability 0


def _by_score(scores: np.ndarray) -> np.ndarray:
    """Ids that are not ruled out, best first; of equal ones the lower id first."""
    order = np.argsort(-scores, kind="stable")
    return order[: int(np.isfinite(scores).sum())]


def _probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax of scores in falling order."""
    p = np.exp(scores - scores[0])
    return p / p.sum()


def _only(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    kept = np.full_like(scores, -np.inf)
    kept[ids] = scores[ids]
    return kept
