"""The types that the compiled kernels and their twins share: what a call takes and gives besides arrays.

`Block` and `BlockGrad` are attention's, `PackedWeight` is what `pack` makes, `Feed` and `Choice` are a `Program`'s. The aliases say in
signatures what an array holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "BlockGrad", "Choice", "Feed", "PackedWeight"]

Real: TypeAlias = NDArray[Any]  # float32 or float64; all of one dtype in one call
Integers: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


class Config(TypedDict):
    """What `show_config` tells."""

    isa: str
    isas: list[str]
    isas_built: list[str]
    emulated: list[str]
    openmp: bool
    num_threads: int
    compiler: str | None


@dataclass(slots=True)
class Block:
    """Keys and values that queries (B, H, T, D) attend to, and who sees what.

    k, v         (B, Hkv, S, D); Hkv divides H, head h reads kv head h // (H // Hkv). Of queries of float32 they may be bfloat16, in
                 uint16, or int8 (B, Hkv, S, D + 4), where the last four bytes of a row are the float32 that its numbers are multiplied
                 by; where neither a gradient nor `attention_mass` is asked for.
    valid        (B, S) bool, or None: all rows.
    lengths      (B,) int64, rows at and after it are hidden; or None.
    index        (B, H, T, K) int64, each query's own rows of this bank, -1 = none; or None: every row.
                 Not together with causal or window; a bias then broadcasts to (B, H, T, K).
    bias         added to the scores: broadcastable to (B, H, T, S) with any strides, read where it lies; -inf hides.
    dbias        in backward: where the bias's gradient is accumulated, broadcastable like the bias, any strides: for a
                 view of a table, the same view of a table of zeros.
    needs_dbias  ask for the gradient without giving `dbias`: a dense one of the bias's shape is made.
    causal       query i sees key j only if j <= i + offset.
    prefix       with causal, and no window: all queries see keys j < prefix, too (prefix LM, arXiv 1910.10683, figure 3).
    offset       None: S - T, the last query sees the last key.
    window       w >= 1 or None: only j > i + offset - w, and if not causal also only j < i + offset + w.
    owners       (B, S) int64, or None: key j of stream b is that of row owners[b, j] of k and v, which then have any number of rows
                 (beams that share what they have in common). Under the same terms, and not with an index.
    """

    k: Any
    v: Any
    valid: Any = None
    lengths: Any = None
    index: Any = None
    bias: Any = None
    dbias: Any = None
    needs_dbias: bool = False
    causal: bool = False
    prefix: int = 0
    offset: int | None = None
    window: int | None = None
    owners: Any = None


SCALE_BYTES = 4  # behind a row of int8


def kept_width(dtype: Any, d: int) -> int:
    """The last axis of keys or values of d numbers that are kept in a dtype."""
    return d + SCALE_BYTES if dtype == np.int8 else d


class BlockGrad(NamedTuple):
    """Gradients of one Block: dk, dv (B, Hkv, S, D), None if not needed; dbias, None unless asked for."""

    dk: np.ndarray | None
    dv: np.ndarray | None
    dbias: np.ndarray | None


class PackedWeight(ABC):  # the compiled one is registered as a kind of it
    """A weight (d_in, d_out), and perhaps a gate of the same shape, as products are made with them. Made by pack().

    shape (d_in, d_out); dtype "float32", "float64", "bfloat16" or "int8"; gated; group: rows that share a scale in int8,
    else None; nbytes.
    """

    shape: tuple[int, int]
    dtype: str
    gated: bool
    group: int | None
    nbytes: int

    @abstractmethod
    def unpack(self) -> Any:
        """The weight (d_in, d_out) that products are made with, or (weight, gate), in float32 (float64 if it is that)."""

    @abstractmethod
    def kept(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """The numbers that are kept of the weight, and of its gate, the same for every instruction set: `repack` takes them.

        (values, scales) of each. values (d_out, d_in): int8; uint16, the bits of bfloat16; or the reals. scales (d_out, groups)
        float32 of int8: row i, column j of it is values * scales[i, j // group]. None of other kinds.
        """


class Feed(NamedTuple):
    """What a token becomes before the first layer: its row of table (V, d), times scale, plus the row of places (P, d) of its position."""

    table: Real
    scale: float | None = None
    places: Real | None = None


class Choice(NamedTuple):
    """How the next token is chosen by a hidden row (d,): the largest of scale * row @ weight + bias, weight (d, n), bias (n,).

    ids (n,): the tokens that the columns stand for; None: column i for token i.
    """

    weight: PackedWeight
    scale: float | None = None
    bias: Real | None = None
    ids: Integers | None = None
