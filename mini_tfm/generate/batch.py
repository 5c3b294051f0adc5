"""Token ids in, token ids out: a batch generated from its first to its last token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..model import Model
from ..stream import Stream
from ..tokens import check_tokens
from .options import GenerationOptions
from .segments import check_length, in_segments, segment_limit


def generate(model: Model, source: Any, lengths: Any = None, **options: Any) -> list[list[int]]:
    """Token ids for each row of source (B, S), ragged by `lengths` (B,): B lists, without the eos.

    For an encoder-decoder the source is what the encoder reads, for a decoder-only model the prompt, which bos precedes unless its
    tokenizer frames a text (`Config.framed_by_tokenizer`). A model that was trained on segments reads a prompt, and makes what is
    longer than one, segment by segment; another one ends where its context does. Options: see `GenerationOptions`.
    """
    chosen = GenerationOptions.of({**model.generation, **options})
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
        stream, begun = Stream(model, None, len(rows)), source[rows]
        limit = segment_limit(model.config, model.config.segment_length)
        if not model.config.has_encoder:
            begun = stream.begin(begun[:, : lengths[rows[0]]])
        check_length(stream, begun.shape[1], limit)
        if not model.config.has_encoder:
            while limit is not None and begun.shape[1] >= limit:
                stream.read(begun[:, :limit], np.full(len(rows), limit))
                begun = begun[:, limit:]
        for step in in_segments(stream, begun, lengths[rows], chosen, limit, rows=rows):
            for row in np.flatnonzero(step >= 0):
                results[rows[row]].append(int(step[row]))
    return results
