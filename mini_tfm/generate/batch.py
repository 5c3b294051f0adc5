"""Token ids in, token ids out: a batch generated from its first to its last token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention import Encoded
from ..errors import InvalidType, InvalidValue
from ..model import Model
from ..stream import Stream
from ..tokens import check_tokens
from .options import GenerationOptions
from .results import Generated, Hypothesis
from .rules import Rules, deadline_of
from .search import found_by, search
from .session import Session
from .stops import no_tokenizer


def generate(model: Model, source: Any = None, lengths: Any = None, *, encoder_outputs: Any = None, **options: Any) -> Any:
    """Token ids for each row of source (B, S), ragged by `lengths` (B,): B lists, without the eos.

    For an encoder-decoder the source is what the encoder reads, for a decoder-only model the prompt, which bos precedes. With
    num_return_sequences above 1: B lists of lists, best first; with output_scores=True: a `Generated`. encoder_outputs (B, S, d):
    in place of a source, what `model.encode` has made of it. Options: see `GenerationOptions`.
    """
    chosen = GenerationOptions.of(options)
    model.needs("decoder")
    if chosen.stop_strings is not None:
        raise no_tokenizer("stop_strings")
    encoded, has_ids = None, source is not None
    if encoder_outputs is not None:
        encoded, lengths = _encoded(model, encoder_outputs, lengths)
        source = np.zeros(encoded.hidden.shape[:2], np.int64) if source is None else source
        if np.shape(source) != encoded.hidden.shape[:2]:
            raise InvalidValue(f"source: expected shape {encoded.hidden.shape[:2]}, as encoder_outputs has, got {np.shape(source)}")
    source, lengths = check_tokens("source", source, model.config.vocab_size, lengths)
    results: list[list[Hypothesis]] = [[] for _ in range(len(source))]
    if model.config.has_encoder:
        groups = [np.arange(len(source))]
    else:  # prompts of one length at a time
        groups = [np.flatnonzero(lengths == n) for n in np.unique(lengths)]
    deadline = deadline_of(chosen)
    for rows in groups:
        if not len(rows):
            continue
        stream = Stream(model, None, len(rows))
        prompt = np.full((len(rows), 1), model.config.bos_id)
        if encoded is not None:
            stream.open(None, lengths)
            stream.encoded = encoded
        else:
            stream.open(source[rows] if model.config.has_encoder else None, lengths[rows])
        if not model.config.has_encoder and lengths[rows[0]]:
            prompt = np.concatenate([prompt, source[rows, : lengths[rows[0]]]], axis=1)  # as `logits` feeds it
        session = Session(stream)
        rules = Rules.of(
            chosen,
            model.config,
            prompt.shape[1],
            n_ids=session.n_ids,
            sources=(lambda row: source[row, : lengths[row]]) if model.config.has_encoder and has_ids else None,
            deadline=deadline,
        )
        for row, found in zip(rows, found_by(search(session, prompt, rules, rows)), strict=True):
            results[row] = found
    if chosen.output_scores:
        return Generated.of(results, chosen.num_return_sequences > 1)
    return [[one.ids for one in found] if chosen.num_return_sequences > 1 else found[0].ids for found in results]


def _encoded(model: Model, outputs: Any, lengths: Any) -> tuple[Encoded, np.ndarray]:
    model.needs("encoder")
    hidden = np.asarray(outputs)
    if hidden.dtype.kind != "f":
        raise InvalidType(f"encoder_outputs: expected floats, got {hidden.dtype}")
    if hidden.ndim != 3 or hidden.shape[2] != model.config.d_model:
        raise InvalidValue(f"encoder_outputs: expected shape (batch, source, {model.config.d_model}), got {hidden.shape}")
    if not np.isfinite(hidden).all():
        raise InvalidValue("encoder_outputs: expected finite numbers, got NaN or infinity")
    _, lengths = check_tokens("encoder_outputs", np.zeros(hidden.shape[:2], np.int64), 1, lengths)
    return Encoded(hidden.astype(model.dtype), np.arange(hidden.shape[1]) < lengths[:, None], 0), lengths
