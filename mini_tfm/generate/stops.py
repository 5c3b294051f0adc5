"""When a sequence ends, other than at an eos token: a text that was generated, and what functions of a user say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InvalidType, InvalidValue
from ..text.tokenizers import Tokenizer

# Of ids (B, n), what the decoder was fed and what it has just said, and which of the search's sequences they are, (B,): (B,) bool
Stop = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Criterion:
    """A user's function of (ids, None), which answers for each sequence, or for all at once."""

    def __init__(self, function: Callable[[np.ndarray, None], Any]):
        self.function = function

    def __call__(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        answer = np.asarray(self.function(ids.copy(), None))
        if answer.dtype != bool or answer.shape not in ((), (len(ids),)):
            raise InvalidType(
                f"generate: stopping_criteria: expected True or False, or {len(ids)} of them, got {answer.dtype} of shape {answer.shape}"
            )
        return np.broadcast_to(answer, len(ids))


class StopStrings:
    """Ends a sequence with the token that completes one of some texts, which may begin and end within tokens.

    n_prompt: ids that are not looked at, as they were not generated. before: ids that each sequence generated before them, which are.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], n_prompt: int, before: Sequence[list[int]]):
        self.tokenizer, self.texts, self.n_prompt, self.before = tokenizer, texts, n_prompt, before
        self.targets = [text.encode("utf-8") for text in texts]
        self.longest = max(map(len, self.targets))
        self._bytes = functools.cache(tokenizer.bytes_of)
        self._is_completed = self._completed_bytes if _is_of_bytes(tokenizer) else self._completed_text

    def __call__(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        made = zip(rows.tolist(), ids[:, self.n_prompt :].tolist(), strict=True)
        return np.array([self._is_completed(self.before[row] + new) for row, new in made], bool)

    def _completed_bytes(self, made: list[int]) -> bool:
        pieces, size, last = [], 0, self._bytes(made[-1])
        for token in reversed(made[:-1]):
            if size >= self.longest:
                break
            pieces.append(self._bytes(token))
            size += len(pieces[-1])
        before = b"".join(reversed(pieces))
        return _is_completed(before, before + last, self.targets)

    def _completed_text(self, made: list[int]) -> bool:
        made = made[-self.longest - 1 :]
        return _is_completed(self.tokenizer.decode(made[:-1]), self.tokenizer.decode(made), self.texts)


def _is_of_bytes(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.bytes_of(0)
    except InvalidValue:
        return False
    return True


def _is_completed(before: Any, after: Any, targets: Sequence[Any]) -> bool:
    return any(after.find(target, max(0, len(before) - len(target) + 1)) >= 0 for target in targets)


class BeforeStop:
    """Text that comes in pieces, up to the first of some stop strings. What may still become one is held back."""

    def __init__(self, texts: Sequence[str]):
        self.texts, self._held, self._found = texts, "", False

    def push(self, piece: str) -> str:
        """What is certain to come before a stop string."""
        if self._found:
            return ""
        self._held += piece
        if starts := [start for text in self.texts if (start := self._held.find(text)) >= 0]:
            self._found = True
            return self._take(min(starts))
        begun = [n for text in self.texts for n in range(1, len(text)) if self._held.endswith(text[:n])]
        return self._take(len(self._held) - max(begun, default=0))

    def finish(self) -> str:
        """The rest, where no stop string came."""
        return "" if self._found else self._take(len(self._held))

    def _take(self, n: int) -> str:
        given, self._held = self._held[:n], self._held[n:]
        return given


def no_tokenizer(name: str) -> InvalidValue:
    return InvalidValue(f"generate: {name}: texts need a tokenizer; use Pipeline.generate, or give token ids where they will do")
