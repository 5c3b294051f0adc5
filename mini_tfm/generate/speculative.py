"""Speculative decoding (arXiv 2211.17192), greedily: several tokens are guessed, and checked in one step. Greedy search's tokens, sooner.

As many of the guesses as greedy search would have chosen are kept, and one token more; the cache forgets the rest. There are two that
guess: `Lookup` looks up what followed the last few tokens where they occurred before, in the source or in what was generated, which pays
where the output quotes; `Draft` asks a smaller model. A step of few tokens takes about as long as one of one.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..errors import InvalidValue
from ..model import Model
from ..stream import Stream
from .limits import segment_limit
from .results import Hypothesis
from .rules import Rules
from .session import Session
from .steps import Step, Steps


class Guesses(Protocol):
    def after(self, ids: np.ndarray, n: int) -> np.ndarray:
        """At most n tokens that may follow ids, which the decoder was fed and has said."""


def speculative(session: Session, prompt: np.ndarray, rules: Rules) -> Steps:
    """See search.py. One sequence, prompt (1, n), without processors. Raises InvalidValue for recurrent decoders."""
    options, config = rules.options, session.stream.model.config
    if config.decoder_mixer != "attention":
        raise InvalidValue(f"generate: {options.guesses_by}: needs a decoder with attention: the state of a recurrence cannot go back")
    source = None if rules.sources is None else rules.sources[0]
    guesses: Guesses
    if options.assistant_model is None:
        guesses, most = Lookup(source, options.max_matching_ngram_size), options.prompt_lookup_num_tokens
    else:
        check_assistant(options.assistant_model, session.stream.model)
        guesses, most = Draft(options.assistant_model, source, session.n_ids), options.num_assistant_tokens
    made, ids, tokens = Hypothesis(), prompt[0].astype(np.int64), prompt[0].astype(np.int64)
    while made.length < rules.limit and not made.ended:
        guessed = guesses.after(ids, min(most, rules.limit - made.length - 1))
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
        yield Step([settled])
    return [[made]]


class Lookup:
    """Prompt lookup: the draft is the text itself."""

    def __init__(self, source: np.ndarray | None, ngram: int):
        self.source = np.zeros(0, np.int64) if source is None else np.append(source, -1)  # no run of tokens goes beyond its end
        self.ngram = ngram

    def after(self, ids: np.ndarray, n: int) -> np.ndarray:
        return looked_up(np.concatenate([self.source, ids]), self.ngram, n)


def looked_up(ids: np.ndarray, ngram: int, n: int) -> np.ndarray:
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


class Draft:
    """What another model would say, greedily: it reads the same source and is fed the same tokens.

    It sees no memory. Where it has no positions for more tokens it guesses none.
    """

    def __init__(self, model: Model, source: np.ndarray | None, n_ids: int):
        self.limit = segment_limit(model.config, model.config.segment_length)
        self.fed = np.zeros(0, np.int64)
        self.session: Session | None = None
        if self.limit is None or source is None or len(source) <= self.limit:
            stream = Stream(model, None, 1)
            stream.open(None if source is None else source[None], np.array([0 if source is None else len(source)]))
            self.session = Session(stream, n_ids=n_ids)

    def after(self, ids: np.ndarray, n: int) -> np.ndarray:
        if self.limit is not None:
            n = min(n, self.limit - len(ids))
        if self.session is None or n < 1:
            return ids[:0]
        both = min(len(self.fed), len(ids) - 1)  # the last is fed once more, if need be: what follows it is asked
        known = int((self.fed[:both] == ids[:both]).cumprod().sum())
        self.session.forget(len(self.fed) - known)
        tokens = ids[known:]
        guessed: list[int] = []
        while len(guessed) < n:
            guessed.append(int(self.session.best(self.session.step(tokens[None]))[0]))
            tokens = np.array(guessed[-1:])
        self.fed = np.concatenate([ids, guessed[:-1]])
        return np.array(guessed, np.int64)


def check_assistant(assistant: Model, model: Model) -> None:
    """Raises InvalidValue for a model that cannot guess what the other one says."""
    config, wanted = assistant.config, model.config
    if not config.has_decoder or config.has_encoder != wanted.has_encoder:
        needed = "an encoder and a decoder" if wanted.has_encoder else "a decoder alone"
        raise InvalidValue(f"generate: assistant_model: expected a model with {needed}, as the one that it guesses for")
    if config.decoder_mixer != "attention":
        raise InvalidValue("generate: assistant_model: needs a decoder with attention: the state of a recurrence cannot go back")
    for name in ("vocab_size", "bos_id", "eos_id"):
        mine, others = getattr(config, name), getattr(wanted, name)
        if mine != others:
            raise InvalidValue(
                f"generate: assistant_model: expected a model of the same vocabulary, whose {name} is {others}, got {mine}; ids must mean"
                " the same tokens to both"
            )
