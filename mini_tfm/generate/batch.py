"""Token ids in, token ids out: a batch generated from its first to its last token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..model import Model
from ..stream import Stream
from ..tokens import check_tokens
from .options import GenerationOptions
from .search import one_by_one
from .session import Session


def generate(model: Model, source: Any, lengths: Any = None, **options: Any) -> list[list[int]]:
    """Token ids for each row of source (B, S), ragged by `lengths` (B,): B lists, without the eos.

    For an encoder-decoder the source is what the encoder reads, for a decoder-only model the prompt, which bos precedes. Options:
    see `GenerationOptions`.
    """
    chosen = GenerationOptions.of(options)
    model.needs("decoder")
    source, lengths = check_tokens("source", source, model.config.vocab_size, lengths)
    results: list[list[int]] = [[] for _ in range(len(source))]
    if model.config.has_encoder:
        groups = [np.arange(len(source))]
    else:  # prompts of one length at a time
        groups = [np.flatnonzero(lengths == n) for n in np.unique(lengths)]
    for rows in groups:
        if not len(rows):
            continue
        stream = Stream(model, None, len(rows))
        stream.open(source[rows] if model.config.has_encoder else None, lengths[rows])
        prompt = np.full((len(rows), 1), model.config.bos_id)
        if not model.config.has_encoder and lengths[rows[0]]:
            prompt = np.concatenate([prompt, source[rows, : lengths[rows[0]]]], axis=1)  # as `logits` feeds it
        session = Session(stream)
        for step in one_by_one(session, prompt, chosen, rows=rows):
            for row in np.flatnonzero(step >= 0):
                results[rows[row]].append(int(step[row]))
    return results
