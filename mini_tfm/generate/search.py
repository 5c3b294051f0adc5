"""Which tokens a session goes on with: greedy, or drawn. A way to search is a function that steps a session until it ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .options import GenerationOptions
from .sampling import draw, processors_of
from .session import Session


def one_by_one(
    session: Session, prompt: np.ndarray, options: GenerationOptions, *, rows: np.ndarray | None = None, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Yields the next token (B,) of each row, -1 for rows that have ended, at most max_new_tokens (or `limit`) times.

    prompt: (B, n) the decoder's first inputs. rows: numbers of the rows, by which their draws differ. A row that has ended
    leaves the session.
    """
    size = len(prompt)
    numbers = range(size) if rows is None else rows
    draws = [np.random.default_rng(None if options.seed is None else [options.seed, int(row)]) for row in numbers]
    processors, eos_id = processors_of(options), session.stream.model.config.eos_id
    left = np.arange(size)  # the rows that the session still has
    tokens = prompt.astype(np.int64)
    for _ in range(options.max_new_tokens if limit is None else limit):
        hidden = session.step(tokens)
        if options.samples:
            scores = session.scores(hidden)
            chosen = np.array([draw(row, processors, draws[i]) for row, i in zip(scores, left, strict=True)], np.int64)
        else:
            chosen = session.best(hidden)
        going = chosen != eos_id if options.stop_at_eos else np.ones(len(chosen), bool)
        step = np.full(size, -1, np.int64)
        step[left[going]] = chosen[going]
        yield step
        if not going.all():
            if not going.any():
                return
            stay = np.flatnonzero(going)
            session.reorder(stay)
            left, chosen = left[stay], chosen[stay]
        tokens = chosen[:, None]
