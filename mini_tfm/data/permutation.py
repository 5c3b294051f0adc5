"""Shuffling without a list: a permutation of any size, computed on demand.

A Feistel network whose round keys come from (seed, epoch) permutes the numbers of an even count of bits; what falls
outside of 0 to n - 1 is permuted again until it falls inside ("cycle walking", Black and Rogaway, CT-RSA 2002, method 2),
which keeps it one to one. At least one number in four falls inside, so a position takes four turns on average at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InvalidType, InvalidValue, shown

ROUNDS = 8  # four suffice for wide blocks; the few bits of a small corpus want more
LARGEST = 1 << 60
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the finalizer of splitmix64


class Permutation:
    """The numbers 0 to n - 1 in an order that is a pure function of (seed, epoch).

    Called with positions of any shape (integers from 0 to n - 1), gives the numbers there, int64 of the same shape.
    It holds eight keys, whatever n. Raises InvalidValue.
    """

    def __init__(self, n: int, seed: int, epoch: int = 0):
        for name, value, low, high in (("n", n, 1, LARGEST), ("seed", seed, 0, None), ("epoch", epoch, 0, None)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low or (high and value > high):
                raise InvalidValue(
                    f"{name}: expected an integer of at least {low}{f' and at most {high}' if high else ''}, got {shown(value)}"
                )
        self.n = int(n)
        self._half = np.uint64(max(1, -(-(self.n - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys = np.random.SeedSequence([int(seed), int(epoch)]).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: Any) -> np.ndarray:
        given = np.asarray(positions)
        if given.dtype.kind not in "iu":
            raise InvalidType(f"positions: expected integers, got {given.dtype}")
        if given.size and (given.min() < 0 or given.max() >= self.n):
            raise InvalidValue(f"positions: expected 0 to {self.n - 1}, got {given.min()} to {given.max()}")
        found = self._once(given.reshape(-1).astype(np.uint64))
        while len(outside := np.flatnonzero(found >= np.uint64(self.n))):
            found[outside] = self._once(found[outside])
        return found.astype(np.int64).reshape(given.shape)

    def _once(self, x: np.ndarray) -> np.ndarray:
        """The network itself, on numbers of twice `_half` bits."""
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            z = right + key
            z = (z ^ (z >> np.uint64(30))) * _MIX[0]
            z = (z ^ (z >> np.uint64(27))) * _MIX[1]
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & self._mask)
        return (left << self._half) | right
