"""What a search has found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..inside import Inside
from .options import GenerationOptions


@dataclasses.dataclass
class Hypothesis:
    """A sequence that was generated. log_probs and top have one item a token, and one more for the eos that ended it.

    log_prob, length: the sum of the first, and their number, known without them. ended: whether an eos or a stop ended it, and not
    only the limit of new tokens. inside: what the model computed for it, once it is whole and if that is asked for.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    log_prob: float = 0.0
    length: int = 0
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    ended: bool = False
    inside: Inside | None = None

    def score(self, length_penalty: float) -> float:
        return self.log_prob / self.length**length_penalty if self.length else 0.0

    def followed_by(self, more: Hypothesis) -> Hypothesis:
        """One that was generated in two parts."""
        joined = {name: getattr(self, name) + getattr(more, name) for name in ("ids", "log_prob", "length", "log_probs", "top")}
        return Hypothesis(**joined, ended=more.ended)


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns with `output_scores=True`: lists of a batch of B; with num_return_sequences above 1, of lists, best first.

    sequences: token ids, without the eos. sequences_scores: of beams the log-probability divided by length ** length_penalty (the
    eos counts), else the log-probability. log_probs: of each token, and one more of the eos where one ended the sequence. They are
    those of the scores that the options left. top_logprobs: [(id, log-probability), ...] beside each of them, best first.

    With output_attentions and output_hidden_states, else None: lists of arrays, one a layer, as `Inside` has them of the whole
    sequence without the batch. S counts the source's tokens, and T what the decoder was fed: bos, a decoder's prompt, and all tokens
    but the last, an eos included; so of an encoder-decoder row t is of the query that chose token t.
    """

    sequences: list[Any]
    sequences_scores: list[Any]
    log_probs: list[Any]
    top_logprobs: list[Any]
    encoder_attentions: list[Any] | None = None
    decoder_attentions: list[Any] | None = None
    cross_attentions: list[Any] | None = None
    encoder_hidden_states: list[Any] | None = None
    decoder_hidden_states: list[Any] | None = None

    @classmethod
    def of(cls, found: list[list[Hypothesis]], options: GenerationOptions) -> Generated:
        def each(value: Callable[[Hypothesis], Any]) -> list[Any]:
            return [[value(one) for one in row] if options.num_return_sequences > 1 else value(row[0]) for row in found]

        def layers(name: str) -> list[Any]:
            return each(lambda one: [layer[0] for layer in getattr(one.inside, name)])

        power = options.length_penalty if options.num_beams > 1 else 0.0
        scores = each(lambda one: one.score(power))
        names = ["encoder_attentions", "decoder_attentions", "cross_attentions"] if options.output_attentions else []
        names += ["encoder_hidden_states", "decoder_hidden_states"] if options.output_hidden_states else []
        looks = {name: layers(name) for name in names}
        return cls(each(lambda one: one.ids), scores, each(lambda one: one.log_probs), each(lambda one: one.top), **looks)
