"""Greedy search that guesses several tokens at a time, and checks them all in one step: the tokens of greedy search, sooner.

Prompt lookup, a form of speculative decoding (arXiv 2211.17192) whose draft is the text itself: what followed the last occurrence
of the last few tokens, in the source or in what was generated, is fed behind the last token. As many of the guesses as greedy
search would have chosen are kept, and one token more; the cache forgets the rest. It pays where the output quotes: a step of
few tokens takes about as long as one of one.
"""

from __future__ import annotations

import numpy as np

from ..errors import InvalidValue
from .results import Hypothesis, Search
from .rules import Rules
from .session import Session


def with_lookup(session: Session, prompt: np.ndarray, rules: Rules) -> Search:
    """See search.py. One sequence, prompt (1, n), without processors. Raises InvalidValue for more, and for recurrent decoders."""
    options = rules.options
    if len(prompt) != 1:
        raise InvalidValue(f"generate: prompt_lookup_num_tokens: expected one sequence at a time, got {len(prompt)}")
    if session.stream.model.config.decoder_mixer != "attention":
        raise InvalidValue("generate: prompt_lookup_num_tokens: needs a decoder with attention: the state of a recurrence cannot go back")
    source = np.zeros(0, np.int64) if rules.sources is None else np.append(rules.sources[0], -1)  # no run of tokens goes beyond its end
    made, ids, tokens = Hypothesis(), prompt[0].astype(np.int64), prompt[0].astype(np.int64)
    while made.length < rules.limit and not made.ended:
        room = min(options.prompt_lookup_num_tokens, rules.limit - made.length - 1)
        guessed = guess(np.concatenate([source, ids]), options.max_matching_ngram_size, room)
        hidden = session.outputs(np.concatenate([tokens, guessed])[None], len(guessed) + 1)[0]
        chosen = session.best(hidden)
        right = int(np.cumprod(chosen[:-1] == guessed).sum())
        session.forget(len(guessed) - right)
        settled: list[int] = []
        for token in chosen[: right + 1].tolist():
            made.length += 1
            ids = np.append(ids, token)
            if bool(rules.is_eos(np.array([token]))[0]):
                made.ended = True
                break
            settled.append(token)
            made.ended = bool(rules.stops and rules.ends(ids[None], np.zeros(1, np.int64))[0])
            if made.ended:
                break
        made.ended |= rules.out_of_time()
        made.ids += settled
        tokens = ids[-1:]
        yield [settled]
    return [[made]]


def guess(ids: np.ndarray, ngram: int, n: int) -> np.ndarray:
    """At most n tokens that followed the last `ngram` ids, or as many of them as occur before; none from a -1 on.

    Of several occurrences: the last that n tokens follow, else the first, which is followed by the most.
    """
    for size in range(min(ngram, len(ids) - 1), 0, -1):
        if n < 1:
            break
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        found = np.flatnonzero((windows == ids[-size:]).all(axis=1))
        if len(found):
            starts = found + size
            whole = starts[starts + n <= len(ids)]
            start = int(whole[-1] if len(whole) else starts[0])
            after = ids[start : start + n]
            return after[: int((after >= 0).cumprod().sum())]
    return ids[:0]
