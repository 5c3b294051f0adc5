"""Generation over several segments: no token stands at a position that training has not seen.

A model that was trained on streams knows positions within a segment alone. So a segment that is full is read back, as `Stream`
reads any text, and the next one begins: a continuation is laid out as `score` and training lay out the same tokens. Of several
results each goes on by itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..attention import Encoded
from ..stream import Stream
from ..text.tokenizers import Tokenizer
from ..weights import Weights
from .limits import too_long
from .options import GenerationOptions
from .results import Hypothesis
from .rules import Rules, check_choices
from .search import search
from .session import Prompts, Session
from .steps import Steps


def goes_on(stream: Stream) -> bool:
    """Whether a full segment is followed by another one: a published model without a memory would know nothing of what came
    before."""
    return not stream.model.config.framed_by_tokenizer or bool(stream.run.members)


def check_length(stream: Stream, n_tokens: int, limit: int | None) -> None:
    """Raises InvalidValue if a model that reads a text at once gets more than it can."""
    if limit is not None and n_tokens > limit and not goes_on(stream):
        raise too_long("text", n_tokens, limit, stream.model.config)


def in_segments(
    stream: Stream,
    source: np.ndarray,
    lengths: np.ndarray,
    options: GenerationOptions,
    limit: int | None,
    *,
    rows: np.ndarray | None = None,
    tokenizer: Tokenizer | None = None,
    deadline: float | None = None,
    encoded: Encoded | None = None,
    kept: np.ndarray | None = None,
    prompts: Prompts | None = None,
    weights: Weights | None = None,
) -> Steps:
    """A search (see steps.py) for at most max_new_tokens tokens of each row, in as many segments as it takes.

    source: (B, n) what the encoder reads, of it the first `lengths` (B,); for a decoder-only model what its segment begins with,
    all n of each row. limit: tokens a segment may have, see `segment_limit`. rows: numbers of the rows, see `Rules`. tokenizer:
    only its ids are chosen. encoded: what the encoder has made of the source already. kept: see `Stream.open`. prompts: see `Session`.
    weights: those of the session, which others may join; None: none does. Where nothing follows a full segment (see `goes_on`) rows end
    with it.
    """
    config, size = stream.model.config, len(source)
    n_ids = config.vocab_size if tokenizer is None else tokenizer.vocab_size
    numbers = np.arange(size) if rows is None else rows
    check_choices(options)
    results: list[list[tuple[int, Hypothesis]]] = [[] for _ in range(size)]  # each with its number among the row's
    # What goes on: which row each is, which of its results, and what that is so far.
    row_of, copies, so_far = np.arange(size), np.zeros(size, np.int64), [Hypothesis() for _ in range(size)]
    left, number = options.max_new_tokens, 0
    while len(row_of):
        begun = 0 if config.has_encoder else source.shape[1]
        room = left if limit is None else max(0, min(left, limit - begun))
        if room > 0 or left == 0:
            has_ids = config.has_encoder and encoded is None
            stream.open(source if has_ids else None, lengths, kept=kept)
            stream.encoded = encoded or stream.encoded
            # The first inputs of a decoder are bos, or what came before, and then its own text.
            prompt = stream.shifted(np.pad(source[:, :begun], [(0, 0), (0, 1)]))
            part = _options_of_segment(options, number, room, options.max_new_tokens - left)
            rules = Rules.of(
                part,
                config,
                prompt.shape[1],
                numbers[row_of],
                n_ids=n_ids,
                sources=[ids[:n] for ids, n in zip(source, lengths, strict=True)] if has_ids else None,
                tokenizer=tokenizer,
                before=[one.ids for one in so_far],
                deadline=deadline,
                goes_on=room < left,
                is_alone=weights is None,
            )
            session = Session(
                stream.copy(),  # the stream keeps its rows
                n_ids=n_ids,
                cache_dtype=options.cache_dtype,
                room=room,
                among=rules.among,
                prompts=prompts,
                weights=weights,
                names=numbers[row_of],
            )
            found = yield from _of_rows(search(session, prompt, rules, copies), row_of, copies, size)
        else:
            found = [[Hypothesis()] for _ in row_of]
        left, number, encoded, kept = left - room if goes_on(stream) else 0, number + 1, None, None
        index, going = [], []
        for i, (row, ones) in enumerate(zip(row_of.tolist(), found, strict=True)):
            for k, one in enumerate(ones):
                copy = k if len(so_far) == size and not so_far[i].length else int(copies[i])
                whole = so_far[i].followed_by(one)
                if left and not whole.ended:
                    index.append(i)
                    going.append((row, copy, whole, one.ids))
                else:
                    results[row].append((copy, whole))
        row_of = np.array([row for row, *_ in going], np.int64)
        copies = np.array([copy for _, copy, *_ in going], np.int64)
        so_far = [whole for _, _, whole, _ in going]
        if going:
            stream.reorder(np.array(index))
            made = np.array([ids for *_, ids in going], np.int64).reshape(len(going), -1)
            source = _next_segment(stream, source[index], lengths[index], made)
            lengths = np.full(len(going), source.shape[1])
    power = options.length_penalty
    by_score, by_number = (lambda each: -each[1].score(power)), (lambda each: each[0])
    return [[one for _, one in sorted(ones, key=by_score if options.num_beams > 1 else by_number)] for ones in results]


def _options_of_segment(options: GenerationOptions, number: int, room: int, n_made: int) -> GenerationOptions:
    seed = None if options.seed is None else options.seed * 1_000_003 + number
    least = min(room, max(0, options.min_new_tokens - n_made))
    several = options.num_return_sequences if n_made == 0 else 1
    return dataclasses.replace(options, seed=seed, max_new_tokens=room, min_new_tokens=least, num_return_sequences=several)


def _of_rows(steps: Steps, row_of: np.ndarray, copies: np.ndarray, size: int) -> Steps:
    """The same search, and what it settles by rows of the whole batch."""
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        by_row: list[list[int]] = [[] for _ in range(size)]
        for row, copy, ids in zip(row_of.tolist(), copies.tolist(), step.settled, strict=True):
            if copy == 0:
                by_row[row] += ids
        answer = yield step._replace(settled=by_row)


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
