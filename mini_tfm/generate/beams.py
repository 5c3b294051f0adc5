"""Beam search: the best whole sequences, and what Hugging Face's options make of it.

Beams of a sequence are searched in pools, one for each of `num_beam_groups`. At each step a pool's candidates are all its beams
with each token. Of the best of them, 1 + the number of eos ids for each beam (at least 2), those that end compete for a place among
the pool's finished ones, if they are among the best num_beams; the best of the others go on. So beams never run out
because many of them end. A beam is a row of the session: it is repeated, dropped and sorted by `Session.reorder`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from .results import Hypothesis
from .rules import Rules
from .scores import best_of, log_probabilities, nothing_left, rng_of, top_of
from .session import Session
from .steps import Ahead, Step, Steps, Wants


@dataclasses.dataclass
class Beam:
    """An unfinished sequence: row: the session's; score: its log-probability; ids: bos, the prompt and what follows."""

    row: int
    score: float
    ids: np.ndarray
    log_probs: tuple[float, ...] = ()
    top: tuple[Any, ...] = ()


@dataclasses.dataclass
class Pool:
    """Beams that compete with each other, and the best of those that have ended."""

    width: int
    length_penalty: float
    beams: list[Beam]
    ended: list[Hypothesis] = dataclasses.field(default_factory=list)

    def add(self, one: Hypothesis) -> None:
        self.ended.append(one)
        self.ended.sort(key=self.rank)  # a stable sort: of equal ones the older stays
        del self.ended[self.width :]

    def rank(self, one: Hypothesis) -> float:
        return -one.score(self.length_penalty)

    def is_done(self, rules: Rules, n: int) -> bool:
        """Whether no beam can, or may, join those that have ended, after n tokens."""
        if not self.beams:
            return True
        if len(self.ended) < self.width:
            return False
        options = rules.options
        length = rules.limit if options.early_stopping == "never" and options.length_penalty > 0 else n
        return options.early_stopping is True or self.beams[0].score / length**self.length_penalty <= -self.rank(self.ended[-1])


def beams(session: Session, prompt: np.ndarray, rules: Rules, copies: np.ndarray) -> Steps:
    """See search.py. Gives fewer results than asked for only where fewer sequences are possible."""
    options, size = rules.options, len(prompt)
    width, n_best = options.num_beams // options.num_beam_groups, options.num_return_sequences
    rngs = [rng_of(options, number, copy) for number, copy in zip(rules.numbers, copies, strict=True)]
    groups = range(options.num_beam_groups)
    prompt = prompt.astype(np.int64)
    pools = [[Pool(width, options.length_penalty, [Beam(i, 0.0, prompt[i])]) for _ in groups] for i in range(size)]
    found: list[list[Hypothesis]] = [[] for _ in range(size)]
    given = [0] * size
    left, wants = list(range(size)), _wants(rules)
    is_plain = wants.method == "likeliest" and not (rules.stops or rules.deadline is not None or options.output_scores)
    answer = yield Step([[] for _ in range(size)], np.arange(size), prompt, wants, session)
    n, live, scores = 0, list[Beam](), np.zeros(0)
    while n < rules.limit:
        if len(answer) == 4:  # steps in a row, in which nothing has ended
            _go_on(live, scores, *answer[2:])
            n, answer = n + answer[2].shape[1], answer[:2]
        n += 1
        step = _Step(answer, rules, [(i, beam) for i in left for pool in pools[i] for beam in pool.beams], n)
        settled: list[list[int]] = [[] for _ in range(size)]
        going = []
        for i in left:
            taken: Counter[int] = Counter()  # by earlier groups, at this step
            for pool in pools[i]:
                step.advance(i, pool, taken, rngs[i])
                if pool.is_done(rules, n):
                    pool.beams = []
            if any(pool.beams for pool in pools[i]):
                going.append(i)
                more = _shared(pools[i], prompt.shape[1], given[i])
            else:
                ended = sorted((one for pool in pools[i] for one in pool.ended), key=pools[i][0].rank)
                if not ended:
                    raise nothing_left(int(rules.numbers[i]), n)
                found[i], more = ended[:n_best], ended[0].ids[given[i] :]
            settled[i], given[i] = more, given[i] + len(more)
        if not going:
            yield Step(settled)
            break
        left, live = going, [beam for i in going for pool in pools[i] for beam in pool.beams]
        index = np.array([beam.row for beam in live])
        for row, beam in enumerate(live):
            beam.row = row
        ahead, scores = None, np.array([beam.score for beam in live])
        if is_plain and all(len(pool.beams) == width > len(pool.ended) for i in going for pool in pools[i]):
            ahead = Ahead(rules.limit - n, tuple(rules.eos_ids.tolist()), scores, width)
        answer = yield Step(settled, index, np.array([[beam.ids[-1]] for beam in live]), wants, ahead=ahead)
    return found


def _go_on(live: Sequence[Beam], scores: np.ndarray, parents: np.ndarray, chosen: np.ndarray) -> None:
    """Brings beams on by steps in a row, after which they have these scores: see `Session.beams_of_next`."""
    ids = np.stack([beam.ids for beam in live])
    for parent, token in zip(parents.T, chosen.T, strict=True):
        ids = np.concatenate([ids[parent], token[:, None]], axis=1)
    for beam, score, each in zip(live, scores.tolist(), ids, strict=True):
        beam.score, beam.ids = score, each


def _n_candidates(rules: Rules) -> int:
    """Of each beam, so that as many go on as there are."""
    return max(2, 1 + len(rules.eos_ids))


def _wants(rules: Rules) -> Wants:
    options = rules.options
    if rules.processors or options.do_sample or options.num_beam_groups > 1:
        return Wants("scores")
    return Wants("likeliest", (max(_n_candidates(rules) * options.num_beams, options.top_logprobs),))


class _Step:
    """One step of all beams of a session. answer: what `_wants` asked for. beams: each with the place of its sequence in the batch."""

    def __init__(self, answer: tuple[np.ndarray, ...], rules: Rules, beams: Sequence[tuple[int, Beam]], n: int):
        self.rules, self.n = rules, n
        self.n_candidates = _n_candidates(rules)
        self.out_of_time = rules.out_of_time()
        self.ids: np.ndarray | None = None  # of the candidates, best first; None: of all tokens
        self.log_probs: np.ndarray  # (rows, candidates)
        rows = np.array([beam.row for _, beam in beams])
        if len(answer) == 1:
            ids = np.stack([beam.ids for _, beam in beams])
            self.log_probs = rules.process(ids, log_probabilities(answer[0])[rows], np.array([i for i, _ in beams]))
        else:
            self.log_probs, self.ids = (part[rows] for part in answer)
        self.at = {id(beam): i for i, (_, beam) in enumerate(beams)}

    def advance(self, sequence: int, pool: Pool, taken: Counter[int], rng: np.random.Generator) -> None:
        """A pool's beams, each a token further, best first; those that end are finished. Adds to `taken` what its beams said."""
        if not pool.beams:
            return
        at = [self.at[id(beam)] for beam in pool.beams]
        options, log_probs = self.rules.options, self.log_probs[at]
        if taken and options.diversity_penalty:
            log_probs = log_probs.copy()
            log_probs[:, list(taken)] -= options.diversity_penalty * np.array(list(taken.values()), log_probs.dtype)
        scores = (np.array([[beam.score] for beam in pool.beams]) + log_probs).ravel()
        n_candidates = self.n_candidates * pool.width
        if options.do_sample:  # without replacement: arXiv 1903.06059
            chosen = best_of(scores + rng.gumbel(size=len(scores)), n_candidates)
            chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
        else:
            chosen = best_of(scores, n_candidates)
        chosen = chosen[scores[chosen] > -np.inf]
        parents, places = np.divmod(chosen, log_probs.shape[1])
        tokens = places if self.ids is None else self.ids[at][parents, places]
        parent_ids = np.stack([beam.ids for beam in pool.beams])[parents]
        ids = np.concatenate([parent_ids, tokens[:, None]], axis=1)
        is_eos = self.rules.is_eos(tokens)
        stops = is_eos | self.out_of_time
        if self.rules.stops and len(ids):
            stops |= self.rules.ends(ids, np.full(len(ids), sequence))
        ends = stops | (self.n == self.rules.limit)

        def made(rank: int) -> Beam:
            parent, place = parents[rank], chosen[rank]
            noted = self._noted(pool.beams[parent], at[parent], float(log_probs[parent, place % log_probs.shape[1]]))
            return Beam(pool.beams[parent].row, float(scores[place]), ids[rank], *noted)

        for rank in np.flatnonzero(ends[: pool.width]).tolist():
            beam, eos = made(rank), bool(is_eos[rank])
            said = beam.ids[len(beam.ids) - self.n :].tolist()
            pool.add(Hypothesis(said[:-1] if eos else said, beam.score, self.n, list(beam.log_probs), list(beam.top), bool(stops[rank])))
        taken.update(tokens[~is_eos][: pool.width].tolist())
        pool.beams = [made(rank) for rank in np.flatnonzero(~ends)[: pool.width].tolist()]

    def _noted(self, beam: Beam, at: int, log_prob: float) -> tuple[tuple[float, ...], tuple[Any, ...]]:
        options = self.rules.options
        if not options.output_scores:
            return (), ()
        top = top_of(self.log_probs[at], options.top_logprobs)
        if self.ids is not None:
            top = [(int(self.ids[at][place]), value) for place, value in top]
        return (*beam.log_probs, log_prob), (*beam.top, top) if options.top_logprobs else ()


def _shared(pools: Sequence[Pool], n_prompt: int, start: int) -> list[int]:
    """What all beams and all finished sequences have in common from there on: it is in the result, whichever wins."""
    texts = [beam.ids[n_prompt + start :].tolist() for pool in pools for beam in pool.beams]
    texts += [one.ids[start:] for pool in pools for one in pool.ended]
    return [first[0] for first in takewhile(lambda each: len(set(each)) == 1, zip(*texts, strict=False))]
