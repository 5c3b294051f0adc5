"""From scores to one token a row."""

from __future__ import annotations

import numpy as np

from .options import GenerationOptions


def choose_tokens(scores: np.ndarray, options: GenerationOptions, draws: list[np.random.Generator]) -> np.ndarray:
    """One token a row of scores (B, V)."""
    if not options.do_sample:
        return np.argmax(scores, axis=1)
    chosen = np.empty(len(scores), np.int64)
    for i, row in enumerate(scores.astype(np.float64) / options.temperature):
        order = np.argsort(-row, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        p = np.exp(row[order] - row[order[0]])
        p /= p.sum()
        if options.top_p < 1:
            keep = max(1, int(np.searchsorted(np.cumsum(p), options.top_p)) + 1)
            order, p = order[:keep], p[:keep] / p[:keep].sum()
        chosen[i] = order[min(int(np.searchsorted(np.cumsum(p), draws[i].random())), len(order) - 1)]
    return chosen
