"""A weight as a thing: kept as an array, as a Var while it is trained, packed for fast products, or both.

Products, look-ups, sizes, fingerprints and files ask a `Weight`, and need not know how it is kept. What a model holds are
plain arrays, which anyone may read and write; a pass wraps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from . import _core, ops
from .autodiff import is_traced, value_of

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first


class Weight:
    """A matrix (d_in, d_out), a table (rows, d) or a vector (d,) of a model.

    kept: an array or a Var of it; None where there is only the packed form. packed: a PackedWeight, by which products with
    plain arrays are computed.
    """

    __slots__ = ("kept", "packed")

    def __init__(self, kept: Array | None, packed: Any = None):
        self.kept, self.packed = kept, packed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape if self.kept is None else self.kept.shape

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that it takes."""
        return (0 if self.kept is None else value_of(self.kept).nbytes) + (0 if self.packed is None else self.packed.nbytes)

    @property
    def value(self) -> Array:
        """An array, or the Var of it: what operations take. What is only packed is unpacked, which takes time."""
        return self.packed.unpack() if self.kept is None else self.kept

    @property
    def array(self) -> np.ndarray:
        """The plain array."""
        return value_of(self.value)

    def checksum(self) -> int:
        """Of its numbers, in the time of reading them: tells whether it is what it was."""
        return _core.checksum(value_of(self.stored()[0]))

    def stored(self, transposed: bool = False) -> tuple[Array, bool]:
        """The matrix, or its transpose, as it lies in RAM, and whether what is wanted is the transpose of it.

        wanted: the matrix, or with `transposed` its transpose. A matrix that a file holds the other way round is never copied.
        """
        value = self.value
        if isinstance(value, np.ndarray) and value.ndim == 2 and value.flags.f_contiguous and not value.flags.c_contiguous:
            return value.T, not transposed
        return value, transposed

    def linear(
        self,
        x: Array,
        bias: Array | None = None,
        *,
        activation: str | None = None,
        residual: Array | None = None,
        gate: Weight | None = None,
        gate_bias: Array | None = None,
        transposed: bool = False,
    ) -> Array:
        """residual + activation(x W + bias): x (..., d_in), bias (d_out,) -> (..., d_out), residual of the same shape.

        gate: W_g, for residual + activation(x W_g + gate_bias) * (x W + bias). transposed: with W^T.
        """
        if self.packed is not None and not is_traced(x) and self.packed.gated == (gate is not None) and not transposed:
            more = {} if gate is None else {"gate_bias": gate_bias}
            return _core.packed_linear(x, self.packed, bias, activation=activation, residual=residual, **more)
        stored, is_transposed = self.stored(transposed)
        y = ops.linear(x, stored, bias, transposed=is_transposed)
        if gate is not None:
            y = gate.linear(x, gate_bias, activation=activation) * y
        elif activation is not None:
            y = ops.activation(y, activation)
        return y if residual is None else residual + y


class Weights(dict[str, Weight]):
    """The weights of a model by name, each wrapped when it is first asked for."""

    def __init__(self, kept: Mapping[str, Any]):
        super().__init__()
        self.kept = kept

    def __missing__(self, name: str) -> Weight:
        weight = self[name] = Weight(self.kept[name])
        return weight

    def pack(
        self,
        names: Sequence[str],
        *,
        gate: str | None = None,
        dtype: str | None = None,
        transposed: bool = False,
        columns: int | None = None,
    ) -> Any:
        """A PackedWeight of matrices side by side: dtype "float32", "bfloat16" or "int8" (None: their own).

        gate: the name of a second matrix. transposed: of W^T. columns: only the first so many of what a product gives.
        """
        (array, is_transposed), *more = (self[name].stored(transposed) for name in names)
        if more:
            arrays = [array, *(one if flag == is_transposed else one.T for one, flag in more)]
            array = np.concatenate(arrays, axis=0 if is_transposed else 1)
        if columns is not None:
            array = array[:columns] if is_transposed else array[:, :columns]
        beside = None
        if gate is not None:
            beside, flag = self[gate].stored(transposed)
            beside = np.ascontiguousarray(beside if flag == is_transposed else beside.T)
        return _core.pack(np.ascontiguousarray(array), dtype=dtype or str(array.dtype), transposed=is_transposed, gate=beside)
