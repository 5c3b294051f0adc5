"""What the options mean for one search: its eos tokens, its processors in Hugging Face's order, its ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ..config import Config
from ..errors import InvalidValue
from ..text.tokenizers import Tokenizer
from .options import GenerationOptions
from .penalties import (
    Allowed,
    Choices,
    CountPenalty,
    EncoderNoRepeatNGram,
    Forced,
    Given,
    Made,
    NoRepeatNGram,
    RepetitionPenalty,
    SequenceBias,
    Shortlisted,
    Suppressed,
)
from .regex import Matching
from .sampling import EpsilonCutoff, EtaCutoff, MinP, Processor, Temperature, TopK, TopP, Typical
from .stops import Criterion, Stop, StopStrings, no_tokenizer


@dataclasses.dataclass(frozen=True)
class Rules:
    """eos_ids: (n,) that end a sequence. stops: other ends. deadline: of `time.monotonic`, or None. numbers: of the sequences.

    sources: what the encoder has read of each, or None. among: (n,) the ids that the one sequence there is may have, ascending; None: all.
    """

    options: GenerationOptions
    eos_ids: np.ndarray
    processors: Sequence[Processor]
    stops: Sequence[Stop]
    deadline: float | None
    numbers: np.ndarray
    sources: Sequence[np.ndarray] | None = None
    among: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        options: GenerationOptions,
        config: Config,
        n_prompt: int,
        numbers: np.ndarray,
        *,
        n_ids: int,
        sources: Sequence[np.ndarray] | None = None,
        tokenizer: Tokenizer | None = None,
        before: Sequence[list[int]] | None = None,
        deadline: float | None = None,
        goes_on: bool = False,
        is_alone: bool = True,
    ) -> Rules:
        """For prompts of n_prompt tokens, bos included, and a vocabulary of n_ids.

        numbers: (B,) by which draws of the sequences differ and functions of a user know them. sources: what the encoder has
        read. before: what each has generated in earlier segments. goes_on: another search follows where this one ends
        without an end of its own. is_alone: no others join these.
        """
        options.check_ids(n_ids)
        for name in ("src_lang", "tgt_lang"):
            if getattr(options, name) is not None:  # a pipeline has made tokens of them
                raise no_tokenizer(name)
        eos = np.array(eos_ids_of(options, config), np.int64)
        before = [[] for _ in numbers] if before is None else before
        stops: list[Stop] = [Criterion(function) for function in options.stopping_criteria or ()]
        if options.stop_strings is not None:
            stops.append(StopStrings(_needed(tokenizer, "stop_strings"), options.stop_strings, n_prompt, before))
        allowed = list(_allowed(options, eos, n_prompt, numbers, tokenizer, before))
        shortlisted, among = _shortlisted(options, sources), None
        if (
            shortlisted is not None and is_alone and len(numbers) == options.num_beams == 1
        ):  # a beam's log-probabilities are those among all ids
            ids = np.flatnonzero(shortlisted.allowed(0, n_ids))
            among, shortlisted = (ids, None) if len(ids) else (None, shortlisted)
        processors = [*_penalties(options, eos, n_prompt, allowed, sources, shortlisted, goes_on), *cutoffs_of(options, len(eos))]
        if (processors or among is not None) and options.guesses_by:
            raise InvalidValue(f"generate: {options.guesses_by}: expected none beside options that change scores: it is for greedy search")
        return cls(options, eos, processors, stops, deadline, numbers, sources, among)

    @property
    def limit(self) -> int:
        """Most new tokens."""
        return self.options.max_new_tokens

    def process(self, ids: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        for processor in self.processors:
            scores = processor(ids, scores, rows)
        return scores

    def ends(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(B,) bool: which of ids (B, n) end with their last token, by other means than an eos; rows: see sampling.py."""
        ended = np.zeros(len(ids), bool)
        for stop in self.stops:
            ended |= stop(ids, rows)
        return ended

    def is_eos(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray((tokens[:, None] == self.eos_ids).any(axis=1))  # np.isin takes 20 times as long for so few

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def eos_ids_of(options: GenerationOptions, config: Config) -> list[int]:
    if not options.stop_at_eos:
        return []
    return [config.eos_id] if options.eos_token_id is None else list(dict.fromkeys(options.eos_token_id))


def deadline_of(options: GenerationOptions) -> float | None:
    return None if options.max_time is None else time.monotonic() + options.max_time


def _shortlisted(options: GenerationOptions, sources: Sequence[np.ndarray] | None) -> Shortlisted | None:
    if not options.shortlist:
        return None
    if sources is None:
        raise InvalidValue("generate: shortlist: needs a model with an encoder, and the source's token ids; or shortlist=False")
    return Shortlisted(options.shortlist, sources)  # type: ignore[arg-type]


def _penalties(
    options: GenerationOptions,
    eos: np.ndarray,
    n_prompt: int,
    allowed: Sequence[Allowed],
    sources: Sequence[np.ndarray] | None,
    shortlisted: Shortlisted | None,
    goes_on: bool,
) -> Iterator[Processor]:
    if options.sequence_bias:
        yield SequenceBias(options.sequence_bias)
    if options.repetition_penalty != 1:
        yield RepetitionPenalty(options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        yield CountPenalty(options.presence_penalty, options.frequency_penalty, n_prompt)
    if options.no_repeat_ngram_size:
        yield NoRepeatNGram(options.no_repeat_ngram_size)
    if options.encoder_no_repeat_ngram_size:
        if sources is None:
            raise InvalidValue("generate: encoder_no_repeat_ngram_size: needs a model with an encoder, and the source's token ids")
        yield EncoderNoRepeatNGram(options.encoder_no_repeat_ngram_size, sources)
    if shortlisted is not None:
        yield shortlisted
    if options.bad_words_ids:
        ends = {(int(token),) for token in eos}
        yield SequenceBias([(ids, -np.inf) for ids in options.bad_words_ids if ids not in ends])
    if options.min_new_tokens:
        yield Suppressed(eos, range(n_prompt + options.min_new_tokens))
    yield from allowed
    if options.forced_bos_token_id is not None:
        yield Forced([options.forced_bos_token_id], 1)
    if options.forced_eos_token_id is not None and not goes_on:
        yield Forced(options.forced_eos_token_id, n_prompt + options.max_new_tokens - 1)
    if options.suppress_tokens:
        yield Suppressed(options.suppress_tokens)
    if options.begin_suppress_tokens:
        begin = n_prompt + (n_prompt == 1 and options.forced_bos_token_id is not None)
        yield Suppressed(options.begin_suppress_tokens, range(begin, begin + 1))
    yield from map(Given, options.logits_processor or ())


def _allowed(
    options: GenerationOptions,
    eos: np.ndarray,
    n_prompt: int,
    numbers: np.ndarray,
    tokenizer: Tokenizer | None,
    before: Sequence[list[int]],
) -> Iterator[Allowed]:
    made = Made(n_prompt, before, options.forced_bos_token_id)
    if options.choices:
        if any(isinstance(choice, str) for choice in options.choices):
            raise no_tokenizer("choices")
        yield Allowed(Choices(options.choices, eos.tolist(), made), "choices")  # type: ignore[arg-type]
    if options.regex is not None:
        yield Allowed(Matching(options.regex, _needed(tokenizer, "regex"), eos.tolist(), made), "regex")
    if (function := options.prefix_allowed_tokens_fn) is not None:
        yield Allowed(lambda row, ids: function(int(numbers[row]), ids), "prefix_allowed_tokens_fn")


def _needed(tokenizer: Tokenizer | None, name: str) -> Tokenizer:
    if tokenizer is None:
        raise no_tokenizer(name)
    return tokenizer


def check_choices(options: GenerationOptions) -> None:
    """Raises InvalidValue where max_new_tokens would cut a choice off."""
    longest = max((len(choice) for choice in options.choices or () if not isinstance(choice, str)), default=0) + 1
    longest += options.forced_bos_token_id is not None
    if options.choices and longest > options.max_new_tokens:
        raise InvalidValue(
            f"generate: max_new_tokens: expected at least {longest}, the tokens of the longest choice and its end, got"
            f" {options.max_new_tokens}"
        )


def cutoffs_of(options: GenerationOptions, n_eos: int) -> Iterator[Processor]:
    """What tokens are drawn from; nothing is cut off where none is drawn."""
    if not options.do_sample:
        return
    keep = 1 if options.num_beams == 1 else n_eos + 1  # beams must be able to go on
    if options.temperature != 1:
        yield Temperature(options.temperature)
    if options.top_k:
        yield TopK(options.top_k, keep)
    if options.top_p < 1:
        yield TopP(options.top_p, keep)
    if options.min_p:
        yield MinP(options.min_p, keep)
    if options.typical_p < 1:
        yield Typical(options.typical_p, keep)
    if options.epsilon_cutoff:
        yield EpsilonCutoff(options.epsilon_cutoff, keep)
    if options.eta_cutoff:
        yield EtaCutoff(options.eta_cutoff, keep)
