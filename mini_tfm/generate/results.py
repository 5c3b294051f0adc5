"""What a search has found."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, TypeAlias


@dataclasses.dataclass
class Hypothesis:
    """A sequence that was generated. log_probs and top have one item a token, and one more for the eos that ended it.

    ended: whether an eos or a stop ended it, and not only the limit of new tokens.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    score: float = 0.0
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    ended: bool = False


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
    def of(cls, found: list[list[Hypothesis]], is_nested: bool) -> Generated:
        def each(name: str) -> list[Any]:
            return [[getattr(one, name) for one in row] if is_nested else getattr(row[0], name) for row in found]

        return cls(each("ids"), each("score"), each("log_probs"), each("top"))
