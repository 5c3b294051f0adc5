"""Searches at work: one alone, or many in one session, which others join as some end (continuous batching).

A search (search.py, beams.py) is a coroutine. It yields a `Step`: what it has settled, the rows that it goes on with, the tokens that
they are fed. It is sent what it wants to know of the decoder's outputs, and returns its results. So it does not know whose rows stand
beside its own. One that begins reads its source, or its prompt, in a session of its own; then its rows join the others, and each product
of a step is computed for all rows together. A row has the bits that it has alone.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..errors import InvalidValue, shown
from ..options import LARGEST
from .results import Hypothesis
from .session import Session

AT_ONCE = 16  # steps, where nobody waits for each token
LOTS = 4  # begin together with 1 / LOTS of what is computed at once: smaller lots leave less room idle, larger ones are read faster

Settled: TypeAlias = list[list[int]]  # of B sequences, the ids settled since the last step, of the first result of each


class Wants(NamedTuple):
    """A question to a session about outputs (rows, d): one of its methods, and what else that is given."""

    method: str  # "best", "scores" or "likeliest"
    given: tuple[int, ...] = ()

    def asked(self, session: Session, hidden: np.ndarray) -> tuple[np.ndarray, ...]:
        """Arrays (rows, ...)."""
        answer = getattr(session, self.method)(hidden, *self.given)
        return answer if isinstance(answer, tuple) else (answer,)


class Ahead(NamedTuple):
    """How a search would go on for so many steps, or until one of these ids is chosen.

    One that wants the best tokens: feeding each. One of beams: as `Session.beams_of_next`, with the beams' scores, and how many of a source
    there are.
    """

    steps: int
    ends: tuple[int, ...]
    scores: np.ndarray | None = None
    width: int = 1


class Step(NamedTuple):
    """order: row i becomes what row order[i] of this search was; without rows nothing is computed, and None is sent.

    tokens: (rows, T) what they are fed; T is 1 but in the first step of a session. wants: what is sent back, of the outputs at the last
    token. session: a new one, of these rows alone, which begins with this step. ahead: it may be sent (rows, n) of the best tokens, of n
    steps in a row, for one (rows,); or with beams, what follows an answer to `likeliest`.
    """

    settled: Settled
    order: np.ndarray = np.zeros(0, np.int64)
    tokens: np.ndarray = np.zeros((0, 1), np.int64)
    wants: Wants = Wants("best")
    session: Session | None = None
    ahead: Ahead | None = None


Steps: TypeAlias = Generator[Step, Any, list[list[Hypothesis]]]  # the coroutine; it returns B lists, best first


class Search:
    """A search that waits, is at work, or has ended, with what it has `found` then.

    rows: that it will have. tokens: the most that each of them holds.
    """

    def __init__(self, steps: Steps, rows: int = 1, tokens: int = 1):
        self.steps, self.rows, self.tokens = steps, rows, tokens
        self.step: Step | None = None
        self.found: list[list[Hypothesis]] = []

    @property
    def n_tokens(self) -> int:
        """The most that all its rows hold."""
        return self.rows * self.tokens

    def go_on(self, answer: tuple[np.ndarray, ...] | None = None) -> Iterator[tuple[Search, Settled]]:
        """Sends it an answer; gives itself and what it has settled, unless it has ended."""
        try:
            self.step = self.steps.send(answer)
        except StopIteration as end:
            self.step, self.rows, self.found = None, 0, end.value
        else:
            self.rows = len(self.step.order)
            yield self, self.step.settled

    def begin(self) -> Generator[tuple[Search, Settled], None, Session | None]:
        """Goes on in a session of its own, until that can be joined: it is given back. None: the search has ended."""
        session = None
        while self.step is not None:
            if self.step.session is not None:
                session = self.step.session
                yield from self.go_on(self.step.wants.asked(session, session.step(self.step.tokens)))
            elif not self.rows:
                yield from self.go_on()
            else:
                assert session is not None
                session.reorder(self.step.order)
                break
        return session if self.rows else None


def together(searches: Iterable[Search], batch_tokens: int | None = None, at_once: int = 1) -> Iterator[tuple[Search, Settled]]:
    """Runs searches to their ends; gives what they settle, as it comes, or after at most at_once steps.

    As many are at work as hold at most batch_tokens; None: all. Waiting ones join in their order. Those of one call must be of one model
    and memory.
    """
    waiting, working = iter(searches), list[Search]()
    session: Session | None = None
    answers: dict[Wants, tuple[np.ndarray, ...]] = {}
    coming = next(waiting, None)
    while working or coming is not None:
        order, first, joining = [np.zeros(0, np.int64)], 0, list[Search]()
        for search in working:
            assert search.step is not None
            last = first + search.rows
            yield from search.go_on(tuple(part[first:last] for part in answers[search.step.wants]))
            if search.step is not None and search.rows and search.step.session is None:
                order.append(first + search.step.order)
            elif search.step is not None:
                joining.append(search)
            first = last
        working = [search for search in working if search.step is not None and search not in joining]
        if session is not None:
            session.reorder(np.concatenate(order))
        while coming is not None and _have_room([*working, *joining, coming], batch_tokens):
            joining.append(coming)
            coming = next(waiting, None)
        for search in joining:
            if search.step is None:
                yield from search.go_on()
            if search.step is None:
                continue
            own = search.step.session
            if own is None or not own.has_only_sources or (working and session is not None and session.cache.rows_per_source > 1):
                own = yield from search.begin()  # beams share the keys of their source: those that join are to be beams, too
            if own is None:
                continue
            if session is None or not working:
                session = own
            else:
                session.join(own)
            working.append(search)
        if working:
            steps = [search.step for search in working if search.step is not None]
            assert session is not None
            tokens, aheads = np.concatenate([step.tokens for step in steps]), [step.ahead for step in steps if step.ahead is not None]
            n = min([at_once, *(ahead.steps for ahead in aheads)])
            ends = np.array([*{end for ahead in aheads for end in ahead.ends}], np.int64)
            if len(aheads) == len(steps) and all(ahead.scores is None for ahead in aheads):
                answers = {steps[0].wants: (session.best_of_next(tokens, n, ends),)}
            elif len(aheads) == len(steps) == 1:  # beams of several searches go on one step at a time
                (k,), (ahead,) = steps[0].wants.given, aheads
                assert ahead.scores is not None
                answers = {steps[0].wants: session.beams_of_next(tokens, n, ends, ahead.scores, ahead.width, k)}
            else:
                hidden = session.step(tokens)
                answers = {wants: wants.asked(session, hidden) for wants in {step.wants for step in steps}}


def _have_room(searches: Sequence[Search], batch_tokens: int | None) -> bool:
    return batch_tokens is None or len(searches) == 1 or sum(search.n_tokens for search in searches) <= batch_tokens


def alone(steps: Steps) -> Iterator[Settled]:
    """Runs one search; gives what it settles, step by step."""
    return (settled for _, settled in together([Search(steps)]))


def found_by(steps: Steps) -> list[list[Hypothesis]]:
    """What one search returns, run to its end."""
    search = Search(steps)
    for _ in together([search], at_once=AT_ONCE):
        pass
    return search.found


def in_lots(kinds: Sequence[Hashable], tokens: Sequence[int], n_copies: int, batch_tokens: int | None) -> Iterator[list[int]]:
    """Numbers of sequences, in the lots that begin together: of one kind and of like length, the longest first.

    tokens: the most that each holds, in each of n_copies rows.
    """
    order = sorted(range(len(kinds)), key=lambda row: (-tokens[row], kinds[row], row))
    for _, same in groupby(order, key=lambda row: kinds[row]):
        lot: list[int] = []
        for row in same:
            if lot and batch_tokens is not None and (len(lot) + 1) * tokens[lot[0]] * n_copies * LOTS > batch_tokens:
                yield lot
                lot = []
            lot.append(row)
        yield lot


def check_batch_tokens(value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise InvalidValue(f"batch_tokens: expected an integer of at least 1, got {shown(value)}")
