"""How tokens are chosen and when generation stops. Names and meanings follow Hugging Face's `generate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from ..errors import InvalidValue
from ..options import Options, option

Ids = tuple[int, ...]


def _token(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _tokens(value: Any) -> Ids:
    return tuple(_token(each) for each in (value if isinstance(value, tuple) and value else (value,)))


def _token_lists(value: Any) -> tuple[Ids, ...]:
    if not isinstance(value, tuple) or not value or not all(isinstance(each, tuple) and each for each in value):
        raise ValueError
    return tuple(map(_tokens, value))


def _biases(value: Any) -> tuple[tuple[Ids, float], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError
    for _, bias in pairs:
        if not isinstance(bias, int | float) or isinstance(bias, bool) or math.isnan(bias) or bias == math.inf:
            raise ValueError
    return tuple((_tokens(ids), float(bias)) for ids, bias in pairs)


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, tuple) and value else (value,)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    return texts


def _choices(value: Any) -> tuple[str | Ids, ...]:
    if not isinstance(value, tuple) or not value:
        raise ValueError
    return tuple(each if isinstance(each, str) and each else _tokens(each) if isinstance(each, tuple) else _refused() for each in value)


def _refused() -> Any:
    raise ValueError


def _early_stopping(value: Any) -> bool | str:
    return value if isinstance(value, bool) or value == "never" else _refused()


def _callable(value: Any) -> Callable[..., Any]:
    return value if callable(value) else _refused()


def _callable_or_false(value: Any) -> Callable[..., Any] | bool:
    return value if value is False else _callable(value)


def _callables(value: Any) -> tuple[Callable[..., Any], ...]:
    return tuple(map(_callable, value if isinstance(value, tuple) else (value,)))


def _model(value: Any) -> Any:
    return value if hasattr(value, "config") and hasattr(value, "weights") else _refused()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(Options):
    """The options of `generate`. Raises InvalidValue that lists every option at fault."""

    owner: ClassVar[str] = "generate"

    # How long, and when to stop

    max_new_tokens: int = option(64, "Maximum number of tokens to generate.", at_least=0, unit="TOKENS")
    min_new_tokens: int = option(0, "Minimum number of tokens before the end of sequence is allowed.", at_least=0, unit="TOKENS")
    max_length: int | None = option(
        None, "Instead of max_new_tokens: maximum length of bos, the decoder's prompt and the new tokens together.", at_least=1, cli=False
    )
    min_length: int = option(0, "The same for min_new_tokens: minimum length of them together.", at_least=0, cli=False)
    stop_at_eos: bool = option(True, "End a sequence at an eos token, which is not returned.", cli=False)
    eos_token_id: tuple[int, ...] | None = option(
        None, "A token that ends a sequence, or several; default: the model's.", read=_tokens, expected="a token id or several", unit="ID"
    )
    stop_strings: tuple[str, ...] | None = option(
        None,
        "End a sequence with the token that completes this text. The text is part of the result.",
        read=_texts,
        expected="text that is not empty, or several",
        unit="TEXT",
    )
    include_stop_strings: bool = option(True, "Leave a stop string in the result; without, the result ends before it.", cli=False)
    max_time: float | None = option(None, "End with the token at which this time is over.", above=0, unit="SECONDS")
    stopping_criteria: tuple[Callable[..., Any], ...] | None = option(
        None,
        "Functions of (ids (B, n), None) that tell for each sequence, or for all, whether it ends here.",
        read=_callables,
        expected="a function or several",
        cli=False,
    )

    # Several tokens at a time

    prompt_lookup_num_tokens: int = option(
        0,
        "Guess up to so many tokens at a time, by what followed the last few before, and check them in one step: the same tokens, sooner"
        " where the output quotes its source. Greedily, one sequence after the other; 0: none.",
        at_least=0,
        at_most=1 << 10,
        unit="TOKENS",
    )
    max_matching_ngram_size: int = option(2, "The most tokens by which a guess is looked up.", at_least=1, at_most=64, unit="TOKENS")

    assistant_model: Any | None = option(  # noqa: RUF009
        None,
        "A smaller model of the same vocabulary that guesses tokens, which are checked in one step (arXiv 2211.17192): the same tokens,"
        " sooner where it is much faster and often right. Greedily, one sequence after the other.",
        read=_model,
        expected="a Transformer",
        cli=False,
    )
    num_assistant_tokens: int = option(5, "How many tokens the assistant_model guesses at a time.", at_least=1, at_most=1 << 10, cli=False)

    # The cache

    cache_dtype: str | None = option(
        None,
        "Keep the keys and values of what was decoded, and of the source, in float32, or in bfloat16, in half the room, or in int8, in a"
        " little more than a quarter; default: bfloat16 for a model that was loaded in bfloat16 or int8.",
        choices=("float32", "bfloat16", "int8"),
    )

    # Beams

    num_beams: int = option(1, "Number of beams.", at_least=1, at_most=1 << 10, unit="BEAMS")
    length_penalty: float = option(
        1.0, "A beam's score is its log-probability divided by its length to this power: above 0 favours long ones.", unit="POWER"
    )
    early_stopping: bool | str = option(
        False,
        "When beam search ends: True: with as many finished sequences as beams; False: when the best beam, as it is, scores below them;"
        ' "never": when no beam can score above them any more.',
        read=_early_stopping,
        expected='True, False or "never"',
    )
    num_return_sequences: int = option(1, "Number of results: the best beams, or independent draws.", at_least=1, unit="RESULTS")
    num_beam_groups: int = option(
        1, "Divide the beams into groups that differ from each other (arXiv 1610.02424).", at_least=1, unit="GROUPS"
    )
    diversity_penalty: float = option(
        0.0, "Subtract this from a token's score for each beam of an earlier group that takes it at the same step.", at_least=0
    )

    # What may be said

    repetition_penalty: float = option(
        1.0, "Divide positive scores of tokens that were seen by this, and multiply negative ones (arXiv 1909.05858).", above=0
    )
    presence_penalty: float = option(0.0, "Subtract this from the score of each token that was generated before.")
    frequency_penalty: float = option(0.0, "Subtract this from a token's score for each time it was generated before.")
    no_repeat_ngram_size: int = option(0, "Let no sequence of so many tokens occur twice; 0: any may.", at_least=0, unit="TOKENS")
    encoder_no_repeat_ngram_size: int = option(
        0, "Let no sequence of so many tokens of the encoder's text occur; 0: any may.", at_least=0, unit="TOKENS"
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = option(
        None, "Sequences of tokens that must not occur.", read=_token_lists, expected="lists of token ids", unit="JSON"
    )
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = option(
        None,
        "Add a number to the score of the token that completes a sequence: {(id, ...): number, ...}.",
        read=_biases,
        expected="numbers by tuples of token ids",
        cli=False,
    )
    suppress_tokens: tuple[int, ...] | None = option(None, "Tokens that must not occur.", read=_tokens, expected="token ids", unit="ID")
    begin_suppress_tokens: tuple[int, ...] | None = option(
        None, "Tokens that must not come first.", read=_tokens, expected="token ids", unit="ID"
    )
    forced_bos_token_id: int | None = option(None, "The first token, where the decoder has only bos before.", at_least=0, unit="ID")
    src_lang: str | None = option(
        None, "Language of the text, as the model's tokenizer has it, such as en or eng_Latn; default: the tokenizer's.", unit="CODE"
    )
    tgt_lang: str | None = option(
        None, "Language to translate into: sets forced_bos_token_id or, for Marian, the token before the text.", unit="CODE"
    )
    forced_eos_token_id: tuple[int, ...] | None = option(
        None, "The last token, where the maximum length is reached.", read=_tokens, expected="a token id or several", unit="ID"
    )
    choices: tuple[str | tuple[int, ...], ...] | None = option(
        None, "Generate one of these, and then the end.", read=_choices, expected="a list of texts or lists of token ids", unit="TEXT"
    )
    regex: str | None = option(
        None, "Generate text that matches this regular expression as a whole, and then the end; needs outlines-core.", unit="PATTERN"
    )
    prefix_allowed_tokens_fn: Callable[..., Any] | None = option(  # noqa: RUF009
        None,
        "A function of (number of the sequence, ids (n,)) that gives the token ids which may come next.",
        read=_callable,
        expected="a function",
        cli=False,
    )
    shortlist: bool | Callable[..., Any] | None = option(  # noqa: RUF009
        None,
        "A function of (the source's ids (S,), n) that tells which of the first n ids may be generated, (n,) bool, as a"
        " `mini_tfm.text.shortlist.Shortlist` is; False: all, though the model comes with one.",
        read=_callable_or_false,
        expected="a function or False",
        cli=False,
    )
    logits_processor: tuple[Callable[..., Any], ...] | None = option(
        None,
        "Functions of (ids (B, n), scores (B, V)) that give other scores.",
        read=_callables,
        expected="a function or several",
        cli=False,
    )

    # Sampling

    do_sample: bool = option(False, "Sample instead of taking the most likely token.")
    temperature: float = option(
        1.0, "Divide the scores by this: below 1 sharpens, above 1 flattens.", above=0, hint="do_sample=False takes the most likely token"
    )
    top_k: int = option(0, "Sample from the k most likely tokens, and their equals; 0: all.", at_least=0, unit="TOKENS")
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens whose probabilities add up to this (arXiv 1904.09751).",
        above=0,
        at_most=1,
        unit="SHARE",
    )
    min_p: float = option(
        0.0, "Sample from tokens with this share of the best one's probability (arXiv 2407.01082).", at_least=0, at_most=1, unit="SHARE"
    )
    typical_p: float = option(
        1.0,
        "Sample from the tokens whose information is nearest the entropy, up to this probability (arXiv 2202.00666).",
        above=0,
        at_most=1,
        unit="SHARE",
    )
    epsilon_cutoff: float = option(
        0.0, "Sample from tokens of at least this probability (arXiv 2210.15191).", at_least=0, below=1, unit="SHARE"
    )
    eta_cutoff: float = option(
        0.0, "The same, with a smaller threshold where the entropy is large (arXiv 2210.15191).", at_least=0, below=1, unit="SHARE"
    )
    seed: int | None = option(None, "Sampling seed; without it every call differs.", at_least=0)

    # What is returned

    output_scores: bool = option(False, "Return a `Generated`, with scores, instead of token ids alone.", cli=False)
    top_logprobs: int = option(0, "So many of the best tokens of each step, in `Generated.top_logprobs`.", at_least=0, cli=False)
    output_attentions: bool = option(False, "The attention weights of each sequence, in the `Generated`, by one more pass.", cli=False)
    output_hidden_states: bool = option(False, "The states between the layers of each sequence, likewise.", cli=False)

    @classmethod
    def over(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """The options `given` and, where they say nothing or None, the `defaults` of a model. Raises what `of` does."""
        kept = {name: value for name, value in defaults.items() if given.get(name) is None}
        if given.get("stop_at_eos") is False:
            kept.pop("eos_token_id", None)
        if given.get("tgt_lang") is not None:
            kept.pop("forced_bos_token_id", None)
        return cls.of({**given, **kept})

    def __post_init__(self) -> None:
        super().__post_init__()
        if faults := list(self._conflicts()):
            raise InvalidValue(f"{self.owner}: " + "; ".join(faults))

    def _conflicts(self) -> Iterator[str]:
        """What one option says against another. An option that would be ignored is one of them."""
        if not self.do_sample:
            names = ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
            yield from self._ignored(names, "do_sample=True (--do-sample)")
        if self.num_beams == 1:
            yield from self._ignored(["length_penalty", "early_stopping", "num_beam_groups"], "num_beams (--num-beams) above 1")
            if self.num_return_sequences > 1 and not self.do_sample:
                yield (
                    f"num_return_sequences: expected 1 without beams and draws, got {self.num_return_sequences}; give num_beams or"
                    " do_sample=True"
                )
        elif self.num_return_sequences > self.num_beams:
            yield f"num_return_sequences: expected at most num_beams = {self.num_beams}, got {self.num_return_sequences}"
        if self.num_beams > 1 and self.num_beams % self.num_beam_groups:
            yield f"num_beam_groups: expected a divisor of num_beams = {self.num_beams}, got {self.num_beam_groups}"
        if self.num_beam_groups > 1 and self.do_sample:
            yield "num_beam_groups: expected 1 with do_sample=True: groups are made different by a penalty, not by draws"
        if self.num_beam_groups == 1:
            yield from self._ignored(["diversity_penalty"], "num_beam_groups (--num-beam-groups) above 1")
        if self.max_length is not None and self.max_new_tokens != _default("max_new_tokens"):
            yield f"max_length: expected None beside max_new_tokens = {self.max_new_tokens}; give one of them"
        elif self.max_length is None and self.min_new_tokens > self.max_new_tokens:
            yield f"min_new_tokens: expected at most max_new_tokens = {self.max_new_tokens}, got {self.min_new_tokens}"
        if not self.stop_at_eos:
            names = ["eos_token_id", "min_new_tokens", "min_length", "choices", "regex"]
            yield from self._ignored(names, "an end, that is, no stop_at_eos=False")
        if not self.prompt_lookup_num_tokens:
            yield from self._ignored(["max_matching_ngram_size"], "prompt_lookup_num_tokens")
        if self.assistant_model is None:
            yield from self._ignored(["num_assistant_tokens"], "assistant_model")
        elif self.prompt_lookup_num_tokens:
            yield f"prompt_lookup_num_tokens: expected 0 beside assistant_model, got {self.prompt_lookup_num_tokens}; give one of them"
        if (name := self.guesses_by) and (self.num_beams > 1 or self.do_sample or self.output_scores):
            yield f"{name}: expected none with beams, do_sample or output_scores: it is for greedy search"
        if self.stop_strings is None:
            yield from self._ignored(["include_stop_strings"], "stop_strings")
        if not self.output_scores:
            yield from self._ignored(["top_logprobs", "output_attentions", "output_hidden_states"], "output_scores=True")
        if self.tgt_lang is not None and self.forced_bos_token_id is not None:
            yield f"forced_bos_token_id: expected None beside tgt_lang, got {self.forced_bos_token_id}; give one of them"
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name)
            if forced is not None and {*_tokens(forced)} <= {*(self.suppress_tokens or ())}:
                yield f"{name}: {forced} is among suppress_tokens: no token would be left"

    @property
    def guesses_by(self) -> str | None:
        """The option that asks for guesses of several tokens (speculative.py)."""
        if self.assistant_model is not None:
            return "assistant_model"
        return "prompt_lookup_num_tokens" if self.prompt_lookup_num_tokens else None

    def _ignored(self, names: Iterable[str], needed: str) -> Iterator[str]:
        for name in names:
            if getattr(self, name) != _default(name):
                yield f"{name}: {getattr(self, name)!r} needs {needed}"

    def check_ids(self, n_ids: int) -> None:
        """Raises InvalidValue at a token id that a vocabulary of n_ids does not have."""
        lists: dict[str, Iterable[Any]] = {
            name: _flat(getattr(self, name))
            for name in (
                "eos_token_id",
                "bad_words_ids",
                "suppress_tokens",
                "begin_suppress_tokens",
                "forced_bos_token_id",
                "forced_eos_token_id",
                "choices",
            )
        }
        lists["sequence_bias"] = _flat([ids for ids, _ in self.sequence_bias or ()])
        faults = [
            f"{name}: expected ids from 0 to {n_ids - 1}, got {wrong[0]}"
            for name, ids in lists.items()
            if (wrong := [i for i in ids if type(i) is int and i >= n_ids])
        ]
        if faults:
            raise InvalidValue(f"{self.owner}: " + "; ".join(faults))


def _default(name: str) -> Any:
    return GenerationOptions.__dataclass_fields__[name].default


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _flat(each)
    elif value is not None:
        yield value
