"""Generation over several segments: no token stands at a position that training has not seen.

A model that was trained on streams knows positions within a segment alone. So a segment that is full is read back, as `Stream`
reads any text, and the next one begins: a continuation is laid out as `score` and training lay out the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..config import Config
from ..errors import InvalidValue
from ..stream import Stream
from .options import GenerationOptions
from .search import one_by_one
from .session import Session


def segment_limit(config: Config, segment_length: int | None) -> int | None:
    """Tokens that a decoder's segment may have. None: no limit, as for a model trained on whole sequences without a table."""
    if config.segment_length is not None:
        return segment_length
    return config.max_positions if config.positions == "learned" else config.context_length


def goes_on(stream: Stream) -> bool:
    """Whether a full segment is followed by another one: a published model without a memory would know nothing of what came
    before."""
    return not stream.model.config.framed_by_tokenizer or bool(stream.run.members)


def check_length(stream: Stream, n_tokens: int, limit: int | None) -> None:
    """Raises InvalidValue if a model that reads a text at once gets more than it can."""
    if limit is not None and n_tokens > limit and not goes_on(stream):
        raise InvalidValue(
            f"text: has {n_tokens} tokens, and the model reads at most {limit} at once; shorten it, or give a memory, which reads text"
            " of any length: memory='window', --memory window"
        )


def in_segments(
    stream: Stream,
    source: np.ndarray,
    lengths: np.ndarray,
    options: GenerationOptions,
    limit: int | None,
    *,
    rows: np.ndarray | None = None,
    n_ids: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token (B,) of each row, -1 for rows that have ended, at most max_new_tokens times.

    source: (B, n) what the encoder reads, of it the first `lengths` (B,); for a decoder-only model what its segment begins with,
    all n of each row. limit: tokens a segment may have, see `segment_limit`. rows: numbers of the rows, by which their draws
    differ. n_ids: see `Session`. Where nothing follows a full segment (see `goes_on`) rows end with it.
    """
    has_encoder, size = stream.model.config.has_encoder, len(source)
    rolls = goes_on(stream)
    numbers = np.arange(size) if rows is None else rows
    going, left, number = np.arange(size), options.max_new_tokens, 0
    while left > 0 and len(going):
        begun = 0 if has_encoder else source.shape[1]
        room = left if limit is None else max(0, min(left, limit - begun))
        made = np.zeros((len(going), 0), np.int64)
        if room > 0:
            stream.open(source if has_encoder else None, lengths)
            # The first inputs of a decoder are bos, or what came before, and then its own text.
            prompt = stream.shifted(np.pad(source[:, :begun], [(0, 0), (0, 1)]))
            seed = None if options.seed is None else options.seed * 1_000_003 + number
            session = Session(stream, n_ids=n_ids)
            steps = []
            for step in one_by_one(session, prompt, dataclasses.replace(options, seed=seed), rows=numbers[going], limit=room):
                steps.append(step)
                found = np.full(size, -1, np.int64)
                found[going] = step
                yield found
            stay = np.flatnonzero(steps[-1] >= 0)
            made, source, lengths, going = np.stack(steps, axis=1)[stay], source[stay], lengths[stay], going[stay]
        if not rolls:
            return
        left, number = left - room, number + 1
        if left > 0 and len(going):
            source = _next_segment(stream, source, lengths, made)
            lengths = np.full(len(going), source.shape[1])


def _next_segment(stream: Stream, source: np.ndarray, lengths: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Ends a segment whose decoder made `made` (B, n): the next one's source."""
    if not stream.model.config.has_encoder:
        written = np.concatenate([source, made], axis=1)
        stream.read(written, np.full(len(written), written.shape[1]))
        return written[:, :0]
    if stream.run.uses("decoder"):  # one token at a time writes nothing
        stream.run.abandon()
        stream.open(source, lengths, made)
        stream.decode(made, np.full(len(made), made.shape[1]))
    stream.finish()
    return made
