"""What a search has found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

from .options import GenerationOptions


@dataclasses.dataclass
class Hypothesis:
    """A sequence that was generated. log_probs and top have one item a token, and one more for the eos that ended it.

    log_prob, length: the sum of the first, and their number, known without them. ended: whether an eos or a stop ended it, and not
    only the limit of new tokens.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    log_prob: float = 0.0
    length: int = 0
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        return self.log_prob / self.length**length_penalty if self.length else 0.0

    def followed_by(self, more: Hypothesis) -> Hypothesis:
        """One that was generated in two parts."""
        joined = {name: getattr(self, name) + getattr(more, name) for name in ("ids", "log_prob", "length", "log_probs", "top")}
        return Hypothesis(**joined, ended=more.ended)


Search: TypeAlias = Generator[list[list[int]], None, list[list[Hypothesis]]]  # see search.py


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns with `output_scores=True`: lists of a batch of B; with num_return_sequences above 1, of lists, best first.

    sequences: token ids, without the eos. sequences_scores: of beams the log-probability divided by length ** length_penalty (the
    eos counts), else the log-probability. log_probs: of each token, and one more of the eos where one ended the sequence. They are
    those of the scores that the options left. top_logprobs: [(id, log-probability), ...] beside each of them, best first.
    """

    sequences: list[Any]
    sequences_scores: list[Any]
    log_probs: list[Any]
    top_logprobs: list[Any]

    @classmethod
    def of(cls, found: list[list[Hypothesis]], options: GenerationOptions) -> Generated:
        def each(value: Callable[[Hypothesis], Any]) -> list[Any]:
            return [[value(one) for one in row] if options.num_return_sequences > 1 else value(row[0]) for row in found]

        power = options.length_penalty if options.num_beams > 1 else 0.0
        scores = each(lambda one: one.score(power))
        return cls(each(lambda one: one.ids), scores, each(lambda one: one.log_probs), each(lambda one: one.top))
