"""What a pass over a segment carries through the layers: weights, the memory at work, dropout, the decoder's cache."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import ops
from ._core import Block
from .autodiff import value_of
from .memory.run import MemoryRun
from .weights import Array, Weights


@dataclass(frozen=True)
class Dropout:
    """Rates of dropout: p of embeddings and sublayers' outputs, of attention weights, of the feed-forward's hidden layer, of what
    adapters read.

    A mask is a function of (seed, step, first_row, segment, place) and of where in its array an element stands, of
    nothing else: a run can be repeated, and a segment computed twice draws the same. place: the name of a sublayer;
    first_row: where the rows at hand begin in the batch.
    """

    p: float = 0.0
    seed: int = 0
    attention: float = 0.0
    feed_forward: float = 0.0
    adapters: float = 0.0
    step: int = 0
    first_row: int = 0
    segment: int = 0

    def at(self, segment: int) -> Dropout:
        """The same in another segment."""
        return self if self is NO_DROPOUT else dataclasses.replace(self, segment=segment)

    def seed_of(self, place: str) -> int:
        drawn = hashlib.blake2b(f"{self.seed} {self.step} {self.first_row} {self.segment} {place}".encode(), digest_size=8)
        return int.from_bytes(drawn.digest(), "little") >> 1

    def __call__(self, x: Array, place: str) -> Array:
        return ops.dropout(x, self.p, self.seed_of(place)) if self.p else x

    def hidden(self, x: Array, place: str) -> Array:
        return ops.dropout(x, self.feed_forward, self.seed_of(place)) if self.feed_forward else x

    def adapted(self, x: Array, place: str) -> Array:
        return ops.dropout(x, self.adapters, self.seed_of(place + ".lora")) if self.adapters else x

    def weights(self, place: str) -> dict[str, Any]:
        """Options of `ops.attention`."""
        return {"dropout": self.attention, "seed": self.seed_of(place + ".weights")} if self.attention else {}


NO_DROPOUT = Dropout()


class Cache(Protocol):
    """Keys, values and states that a decoder keeps from step to step (generate/cache.py)."""

    n_front: int  # rows of memories in front of the text
    rows_per_source: int  # rows of the batch that share what is kept of the encoder's outputs
    positions: np.ndarray  # of the tokens announced last: (T,), or (B, T) where streams have come differently far

    @property
    def is_empty(self) -> bool: ...

    @property
    def lengths(self) -> np.ndarray | None:
        """(B,) keys of each stream, where they differ."""

    @property
    def key_positions(self) -> np.ndarray | None:
        """(B, keys), where streams have come differently far."""

    @property
    def valid(self) -> np.ndarray | None:
        """(B, keys) bool, the keys that are there; None: all."""

    def extend(self, front: Sequence[np.ndarray], n_tokens: int) -> None:
        """Announces new keys; front: (B, m) bool for each memory that puts rows in front, which of them are there."""

    def append(self, layer: int, k: Array, v: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Adds keys and values of what was announced; gives all, (rows, H, S, D), and the owners (B, S) of each stream's, or None."""

    def step(self, layers: Callable[[Array], Array], x: Array) -> Array:
        """layers(x) of one token of each stream, x (B, 1, d), which depend on x, positions and keys alone."""

    def bias_of_last(self, name: str, table_of: Callable[[int], np.ndarray]) -> np.ndarray:
        """What a bias by distance, of which table_of(n) gives (H, n), adds to the scores of the last query: (1 or B, H, 1, keys)."""

    def cross(self, layer: int, project: Callable[[], tuple[Array, Array]], valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The keys and values of the encoder's outputs of each source, projected once, and which of them are valid (sources, S)."""

    def state(self, layer: int, nothing: np.ndarray) -> np.ndarray:
        """What a recurrence in a layer has come to, (B, d), which it changes in place; `nothing` where nothing was decoded."""


class Record(Protocol):
    """Takes what is computed on the way, for those who want to look at it (inside.py). Passes with a memory have none."""

    def hidden(self, stack: str, x: Array) -> None:
        """What a layer of a stack is given or, last of all, what the stack gives."""

    def attention(self, site: str, q: Array, block: Block, scale: float, cap: float | None) -> None:
        """The queries of a layer, and the keys that they see."""


@dataclass(frozen=True)
class Pass:
    """One pass over a segment. The layers add where they are: their name, site and number."""

    weights: Weights
    run: MemoryRun
    dropout: Dropout = NO_DROPOUT
    cache: Cache | None = None
    record: Record | None = None

    def value(self, name: str) -> Array:
        """A vector or table: an array, or the Var of it."""
        return self.weights[name].value

    def frozen(self) -> Pass:
        """The same, with weights that get no gradient."""
        return dataclasses.replace(self, weights=Weights({name: value_of(weight) for name, weight in self.weights.kept.items()}))
