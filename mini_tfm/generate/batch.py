"""Token ids in, token ids out: a batch generated from its first to its last token."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..attention import Encoded
from ..errors import InvalidType, InvalidValue
from ..inside import Inside, inside
from ..model import Model
from ..stream import Stream
from ..tokens import check_tokens
from .limits import segment_limit
from .options import GenerationOptions
from .results import Generated, Hypothesis
from .rules import deadline_of
from .segments import check_length, goes_on, in_segments
from .session import packed_weights
from .steps import AT_ONCE, Search, Steps, check_batch_tokens, in_lots, together


def generate(
    model: Model, source: Any = None, lengths: Any = None, *, encoder_outputs: Any = None, batch_tokens: int | None = None, **options: Any
) -> Any:
    """Token ids for each row of source (B, S), ragged by `lengths` (B,): B lists, without the eos.

    For an encoder-decoder the source is what the encoder reads, for a decoder-only model the prompt, which bos precedes unless its
    tokenizer frames a text (`Config.framed_by_tokenizer`). With
    num_return_sequences above 1: B lists of lists, best first; with output_scores=True: a `Generated`. encoder_outputs (B, S, d):
    in place of a source, what `model.encode` has made of it. batch_tokens: the most that are computed at once, where a row counts with its
    own tokens, and those that it may get, for each beam or draw; the longest begin, and as rows end others take their places. None: all
    at once. A model that was trained on segments reads a prompt, and makes what is
    longer than one, segment by segment; a published one ends where its context does. Options: see `GenerationOptions`.
    """
    chosen = GenerationOptions.over(model.generation, options)
    model.needs("decoder")
    config, encoded = model.config, None
    if batch_tokens is not None:
        check_batch_tokens(batch_tokens)
    if encoder_outputs is not None:
        if source is not None:
            raise InvalidValue("source: expected None beside encoder_outputs, which stand for it")
        if config.continues_source:
            raise InvalidValue("encoder_outputs: this model goes on from its source's last token (continues_source); give the source")
        encoded, lengths = _encoded(model, encoder_outputs, lengths)
        source = np.zeros(encoded.hidden.shape[:2], np.int64)
    source, lengths = check_tokens("source", source, config.vocab_size, lengths)
    results: list[list[Hypothesis]] = [[] for _ in range(len(source))]
    deadline, limit = deadline_of(chosen), segment_limit(config, config.segment_length)
    looks = chosen.output_attentions or chosen.output_hidden_states
    weights = packed_weights(model, config.vocab_size) if len(source) > 1 else None  # those that join have the same

    def begun(rows: np.ndarray) -> Steps:
        """What is generated for some rows; of a decoder-only model prompts of one length."""
        stream, longest = Stream(model, None, len(rows)), int(lengths[rows].max())
        read = source[rows, :longest] if config.has_encoder else stream.begin(source[rows, :longest])
        if config.has_encoder:
            stream.follow(read, lengths[rows])
        check_length(stream, read.shape[1], limit)
        prompt = stream.shifted(np.pad(read[:, : 0 if config.has_encoder else None], [(0, 0), (0, 1)]))  # what the decoder is fed first
        part = _counting_new_tokens(chosen, prompt.shape[1])
        if looks and limit is not None and goes_on(stream):
            _check_is_one_segment(prompt.shape[1] - 1 + part.max_new_tokens, limit)
        while not config.has_encoder and limit is not None and read.shape[1] >= limit:
            stream.read(read[:, :limit], np.full(len(rows), limit))
            read = read[:, limit:]
        own = None if encoded is None else Encoded(encoded.hidden[rows, :longest], encoded.valid[rows, :longest], 0)
        found = yield from in_segments(stream, read, lengths[rows], part, limit, rows=rows, deadline=deadline, encoded=own, weights=weights)
        for n, row in enumerate(rows):
            results[row] = found[n]
            for one in found[n] if looks else ():
                alone = None if own is None else Encoded(own.hidden[[n], : lengths[row]], own.valid[[n], : lengths[row]], 0)
                one.inside = _inside(model, one, source[row, : lengths[row]], prompt[n], alone)
        return found

    copies = max(chosen.num_beams, chosen.num_return_sequences)
    tokens = (lengths + (chosen.max_new_tokens if chosen.max_length is None else chosen.max_length)).tolist()
    kinds = list(range(len(source))) if chosen.guesses_by else [0] * len(source) if config.has_encoder else lengths.tolist()
    lots = in_lots(kinds, tokens, copies, batch_tokens)
    searches = (Search(begun(np.array(lot)), len(lot) * copies, tokens[lot[0]]) for lot in lots)
    for _ in together(searches, batch_tokens, AT_ONCE):
        pass
    if chosen.output_scores:
        return Generated.of(results, chosen)
    return [[one.ids for one in found] if chosen.num_return_sequences > 1 else found[0].ids for found in results]


def _check_is_one_segment(n_tokens: int, limit: int) -> None:
    if n_tokens > limit:
        raise InvalidValue(
            f"generate: output_attentions, output_hidden_states: expected a prompt and max_new_tokens of at most {limit} tokens together, a"
            f" segment of this model, got {n_tokens}; what is longer is computed in several"
        )


def _inside(model: Model, one: Hypothesis, source: np.ndarray, prompt: np.ndarray, encoded: Encoded | None) -> Inside:
    """Of what was generated, by a pass over what the decoder was fed: the prompt and all but the last token."""
    fed = np.concatenate([prompt, np.array(one.ids, np.int64)])[: max(0, len(prompt) + one.length - 1)]
    read = source[None] if model.config.has_encoder and encoded is None else None
    return inside(model, read, np.array([len(source)]), fed[None], np.array([len(fed)]), encoded)


def _counting_new_tokens(options: GenerationOptions, n_prompt: int) -> GenerationOptions:
    """The options without max_length and min_length, which count the prompt, too."""
    most, least = options.max_new_tokens, max(options.min_new_tokens, options.min_length - n_prompt)
    if options.max_length is not None:
        most = options.max_length - n_prompt
    if most < 0:
        raise InvalidValue(f"generate: max_length: expected at least the prompt's {n_prompt} tokens, got {options.max_length}")
    return dataclasses.replace(options, max_new_tokens=most, min_new_tokens=min(least, most), max_length=None, min_length=0)


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
