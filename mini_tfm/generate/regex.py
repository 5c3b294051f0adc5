"""Text that matches a regular expression: its automaton over the bytes of tokens, which the outlines-core package builds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InvalidValue
from ..text.tokenizers import Tokenizer
from .penalties import Made


class Matching:
    """What may follow so that all that is generated matches a pattern, and then an eos."""

    def __init__(self, pattern: str, tokenizer: Tokenizer, eos_ids: Sequence[int], made: Made):
        self.eos_ids, self.made = list(eos_ids), made
        self.index = _index(pattern, tokenizer, self.eos_ids[0])

    def __call__(self, row: int, ids: np.ndarray) -> list[int]:
        state = self.index.get_initial_state()
        for token in self.made(row, ids):
            state = self.index.get_next_state(state, token)
        tokens = [token for token in self.index.get_allowed_tokens(state) if token != self.eos_ids[0]]
        return tokens + (self.eos_ids if self.index.is_final_state(state) else [])


@functools.lru_cache(maxsize=16)
def _index(pattern: str, tokenizer: Tokenizer, eos_id: int) -> Any:
    """The automaton. Made once: it takes a second for a vocabulary of 32,000."""
    try:
        from outlines_core import Index
    except ImportError as error:
        raise InvalidValue(f"generate: regex: needs outlines-core ({error}): pip install 'mini-tfm[regex]'") from error
    try:
        return Index(pattern, _vocabulary(tokenizer, eos_id))
    except ValueError as error:
        told = " ".join(str(error).split())
        raise InvalidValue(f"generate: regex: {pattern!r} cannot be kept to with this tokenizer: {told}") from error


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, eos_id: int) -> Any:
    from outlines_core import Vocabulary

    ids_of: dict[bytes, list[int]] = {}
    for token in range(tokenizer.vocab_size):
        spelled = tokenizer.bytes_of(token)
        if spelled and token != eos_id:
            ids_of.setdefault(spelled, []).append(token)
    return Vocabulary(eos_id, ids_of)
