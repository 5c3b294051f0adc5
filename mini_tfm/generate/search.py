"""Which tokens a session goes on with: the best, drawn ones, or beams (beams.py).

A way to search is a coroutine (steps.py) of (session, prompt, rules), which begins with that session. What it returns in the end are B
lists of `Hypothesis`, best first.
"""

from __future__ import annotations

import numpy as np

from .beams import beams
from .results import Hypothesis
from .rules import Rules
from .sampling import draw
from .scores import log_probabilities, nothing_left, rng_of, top_of
from .session import Session
from .speculative import speculative
from .steps import Ahead, Step, Steps, Wants


def search(session: Session, prompt: np.ndarray, rules: Rules, copies: np.ndarray | None = None) -> Steps:
    """Goes on from prompt (B, n), the decoder's first inputs, as the options say.

    copies: (B,) which of several draws of its number a sequence is, where they are in the session already.
    """
    if rules.limit == 0:
        return _nothing(len(prompt), 1 if rules.options.num_beams > 1 else rules.options.num_return_sequences)
    if rules.options.guesses_by:
        return speculative(session, prompt, rules)
    copies = np.zeros(len(prompt), np.int64) if copies is None else copies
    return (one_by_one if rules.options.num_beams == 1 else beams)(session, prompt, rules, copies)


def one_by_one(session: Session, prompt: np.ndarray, rules: Rules, copy_of: np.ndarray) -> Steps:
    """The best token, or a drawn one, at each step. A sequence that has ended leaves the session."""
    options, size = rules.options, len(prompt)
    copies = options.num_return_sequences
    made = [Hypothesis() for _ in range(size * copies)]
    draws = [rng_of(options, rules.numbers[i], copy_of[i] + copy) for i in range(size) for copy in range(copies)]
    is_plain = not (rules.processors or options.do_sample or options.output_scores)
    wants = Wants("best" if is_plain else "scores")
    has_a_say = bool(rules.stops) or rules.deadline is not None  # after each token, beside an eos
    ids = prompt.astype(np.int64)
    (answer,) = yield Step([[] for _ in range(size)], np.arange(size), ids, wants, session)
    left = index = np.arange(size)  # the results that the session still works on, and the rows that it has them in
    if copies > 1:
        left, index = np.arange(size * copies), np.repeat(np.arange(size), copies)
        answer, ids = answer[index], ids[index]
    n = 0  # tokens so far
    while True:
        if is_plain and answer.ndim == 2:  # several in a row, of which only the last may be an eos
            before, answer = answer[:, :-1], answer[:, -1]
            for i, tokens in zip(left.tolist(), before.tolist(), strict=True):
                made[i].ids += tokens
                made[i].length += len(tokens)
            ids, n = np.concatenate([ids, before], axis=1), n + before.shape[1]
        else:
            before = ids[:, :0]
        if is_plain:
            chosen = answer
        else:
            scores = rules.process(ids, answer, left // copies)
            _check_some_are_left(scores, rules.numbers[left // copies], n)
            if options.do_sample:
                chosen = np.array([draw(row, draws[i]) for row, i in zip(scores, left, strict=True)], np.int64)
            else:
                chosen = np.argmax(scores, axis=1)
            if options.output_scores:
                _note_scores([made[i] for i in left], log_probabilities(scores), chosen, options.top_logprobs)
        is_eos = rules.is_eos(chosen)
        settled: list[list[int]] = [[] for _ in range(size)]
        for i, tokens, token, ends in zip(left.tolist(), before.tolist(), chosen.tolist(), is_eos.tolist(), strict=True):
            if not ends:
                made[i].ids.append(token)
                tokens.append(token)
            made[i].length += 1
            if i % copies == 0:
                settled[i // copies] += tokens
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
        going = ~(is_eos | rules.ends(ids, left // copies)) if rules.stops else ~is_eos
        if rules.out_of_time():
            going[:] = False
        for i in left[~going]:
            made[i].ended = True
        n += 1
        if n == rules.limit or not going.any():
            yield Step(settled)
            break
        left, ids = left[going], ids[going]
        ahead = Ahead(rules.limit - n, tuple(rules.eos_ids.tolist())) if is_plain and not has_a_say else None
        (answer,) = yield Step(settled, index[going], chosen[going, None], wants, ahead=ahead)
        index = np.arange(len(left))
    return [made[start : start + copies] for start in range(0, len(made), copies)]


def _check_some_are_left(scores: np.ndarray, rows: np.ndarray, n: int) -> None:
    none = np.flatnonzero(np.isneginf(scores.max(axis=1)))
    if len(none):
        raise nothing_left(int(rows[none[0]]), n + 1)


def _note_scores(made: list[Hypothesis], log_probs: np.ndarray, chosen: np.ndarray, n_top: int) -> None:
    for one, row, token in zip(made, log_probs, chosen.tolist(), strict=True):
        one.log_probs.append(float(row[token]))
        one.log_prob += float(row[token])
        if n_top:
            one.top.append(top_of(row, n_top))


def _nothing(size: int, copies: int) -> Steps:
    yield from ()
    return [[Hypothesis() for _ in range(copies)] for _ in range(size)]
