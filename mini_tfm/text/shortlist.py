"""Lexical shortlists: the tokens that a translation may have, by those of its source (arXiv 1412.2007 calls them candidate lists)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InvalidValue

NAMES = ("always", "offsets", "tokens")


class Shortlist:
    """Some tokens for every source, and more for each token in it: an option of `generate`, and what Marian's models are made for.

    always (n,): ids that any translation may have. offsets (V + 1,), tokens (m,): tokens[offsets[i] : offsets[i + 1]] are those for
    token i of a source. Raises InvalidValue naming the array at fault.
    """

    def __init__(self, always: np.ndarray, offsets: np.ndarray, tokens: np.ndarray):
        for name, array in zip(NAMES, (always, offsets, tokens), strict=True):
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu" or array.min(initial=0) < 0:
                raise InvalidValue(f"shortlist: {name}: expected one axis of integers of at least 0")
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(tokens) or (offsets[1:] < offsets[:-1]).any():
            raise InvalidValue(f"shortlist: offsets: expected numbers that ascend from 0 to {len(tokens)}, that of its tokens")
        self.always, self.offsets, self.tokens = always, offsets.astype(np.int64), tokens

    def __call__(self, source: np.ndarray, n: int) -> np.ndarray:
        """(S,) ids of a source -> (n,) bool: which of the first n ids its translation may have."""
        ids = np.unique(source)
        found = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in ids[ids < len(self.offsets) - 1]]
        allowed = np.zeros(n, bool)
        for some in (self.always, *found):
            allowed[some[some < n]] = True
        return allowed

    def arrays(self) -> dict[str, np.ndarray]:
        """What a model's file keeps: `of` makes it again."""
        return {"shortlist." + name: np.asarray(getattr(self, name), np.int64 if name == "offsets" else np.int32) for name in NAMES}

    @classmethod
    def of(cls, arrays: Mapping[str, Any], where: str) -> Shortlist | None:
        """That of a model's file `where`; None where it has none. Raises InvalidValue naming the file."""
        if not any("shortlist." + name in arrays for name in NAMES):
            return None
        try:
            return cls(*(arrays.get("shortlist." + name) for name in NAMES))  # type: ignore[arg-type]
        except InvalidValue as error:
            raise InvalidValue(f"{where}: {error}") from error
