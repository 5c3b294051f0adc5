"""A weight as a thing: kept as an array, as a Var while it is trained, packed for fast products, or both.

Products, look-ups, sizes, fingerprints and files ask a `Weight`, and need not know how it is kept. What a model holds are
plain arrays, which anyone may read and write; a pass wraps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import _core, ops
from .autodiff import is_traced, value_of
from .errors import InvalidValue
from .files.reading import forget_pages, mapping_of

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first


LORA = "lora."  # the names of adapters: lora.<layer>.a (r, d_in), lora.<layer>.b (d_out, r)
LORA_SCALE = LORA + "scale"  # (1,): alpha / r, of all adapters of a model; not trained


class Adapter(NamedTuple):
    """What low-rank adaptation (LoRA, arXiv 2106.09685, equation 3) adds to a product x W: scale (x A^T) B^T.

    layer: its name. a: A (r, d_in), b: B (d_out, r), arrays or, while they are trained, Vars.
    """

    layer: str
    a: Array
    b: Array
    scale: Any

    @property
    def is_trained(self) -> bool:
        return is_traced(self.a, self.b)

    def __call__(self, x: Array, dropped: Callable[[Array, str], Array] | None) -> Array:
        """x (..., d_in) -> (..., d_out). dropped: x with dropout, at a place."""
        x = x if dropped is None else dropped(x, self.layer)
        return ops.linear(ops.linear(x, self.a, transposed=True) * self.scale, self.b, transposed=True)

    def added_to(self, weight: Array) -> Array:
        """W + scale A^T B^T (d_in, d_out), which lies in RAM as W does, and has the same bits either way."""
        with ops.bfloat16_products(False):
            if _lies_transposed(weight):
                return weight + np.transpose(ops.linear(self.b, self.a) * self.scale)
            return weight + ops.linear(np.transpose(self.a), self.b, transposed=True) * self.scale


class Kept(NamedTuple):
    """The numbers of a packed matrix (d_in, d_out), the same for every instruction set: see `_core.PackedWeight.kept`.

    values: (d_out, d_in), int8, or uint16, the bits of bfloat16. scales: (d_out, groups) float32 of int8, else None.
    """

    values: np.ndarray
    scales: np.ndarray | None

    def packed(self, gate: Kept | None = None) -> Any:
        """The PackedWeight of it, and of a gate. Raises InvalidValue for numbers that no packed weight has."""
        for values in (self.values, *(() if gate is None else (gate.values,))):
            if values.dtype == np.uint16 and values.size and (values & 0x7FFF).max() >= 0x7F80:
                raise InvalidValue("expected finite values, got NaN or infinity")
        beside = None if gate is None else gate.values, None if gate is None else gate.scales
        packed = _core.repack(self.values, self.scales, gate=beside[0], gate_scales=beside[1])
        forget_pages(self.values)
        return packed

    @staticmethod
    def side_by_side(matrices: Sequence[Kept]) -> Kept:
        """Several of one d_in as one, their columns one behind the other."""
        first, *more = matrices
        if not more:
            return first
        scales = None if first.scales is None else np.concatenate([one.scales for one in matrices])
        return Kept(np.concatenate([one.values for one in matrices]), scales)


@dataclass(frozen=True, eq=False)
class Pack:
    """Matrices of a model side by side in one packed weight, with their biases: all that there is of them.

    name: by which a pass finds it, see `StepProduct`. bias: (d_out,) of all of them together; None: a pass gives each its own.
    """

    name: str
    packed: Any
    bias: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix (d_in, d_out) that is kept in a pack, in the place of its array: columns [start, stop), perhaps of the gate.

    table: the array itself, (d_out, d_in), where rows of it are looked up, too; else the pack is all that there is.
    """

    pack: Pack
    start: int
    stop: int
    of_gate: bool = False
    table: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.pack.packed.shape[0], self.stop - self.start) if self.table is None else self.table.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the values; what they are kept in is `pack.packed.dtype`."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Its share of the pack, and the table."""
        packed = self.pack.packed
        share = packed.nbytes * (self.stop - self.start) // (packed.shape[1] * (2 if packed.gated else 1))
        return share + (0 if self.table is None else self.table.nbytes)

    def kept(self) -> Kept:
        """What is kept of it in the pack."""
        values, scales = self.pack.packed.kept()[self.of_gate]
        return Kept(values[self.start : self.stop], None if scales is None else scales[self.start : self.stop])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values that products are made with, or the table."""
        if self.table is not None:
            return self.table if dtype is None else self.table.astype(dtype, copy=False)
        return self.cut_from(self.pack.packed.unpack(), dtype)

    def cut_from(self, unpacked: Any, dtype: Any = None) -> np.ndarray:
        """The values, copied from what the pack gives."""
        whole = unpacked[self.of_gate] if self.pack.packed.gated else unpacked
        return np.ascontiguousarray(whole[:, self.start : self.stop], dtype)

    def linear(self, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray | None:
        """x W + bias; None where the pack cannot give it alone."""
        if self.pack.packed.gated or self.table is not None:
            return None
        y = _core.packed_linear(x, self.pack.packed)[..., self.start : self.stop]
        return np.ascontiguousarray(y) if bias is None else y + bias


def _lies_transposed(value: Array) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.flags.f_contiguous and not value.flags.c_contiguous


def precision_of(weights: Mapping[str, Any]) -> str | None:
    """What the matrices of a model are packed in, "bfloat16" or "int8"; None: they are arrays."""
    return next((value.pack.packed.dtype for value in weights.values() if isinstance(value, Part)), None)


class Weight:
    """A matrix (d_in, d_out), a table (rows, d) or a vector (d,) of a model.

    kept: an array or a Var of it, or the Part of a pack that it is. packed: a PackedWeight, by which products with plain arrays are
    computed. kept is None where there is that alone. adapter: what is added to `kept`, None for nothing; a packed form has it in it.
    """

    __slots__ = ("adapter", "kept", "packed")

    def __init__(self, kept: Array | None, packed: Any = None, adapter: Adapter | None = None):
        self.kept, self.packed, self.adapter = kept, packed, adapter

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape if self.kept is None else self.kept.shape

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that it takes."""
        if isinstance(self.kept, Part):
            return self.kept.nbytes
        return (0 if self.kept is None else value_of(self.kept).nbytes) + (0 if self.packed is None else self.packed.nbytes)

    @property
    def value(self) -> Array:
        """An array, or the Var of it: what operations take. What is only packed is unpacked, and an adapter is added, which takes time."""
        value = self.packed.unpack() if self.kept is None else np.asarray(self.kept) if isinstance(self.kept, Part) else self.kept
        return value if self.adapter is None else self.adapter.added_to(value)

    @property
    def array(self) -> np.ndarray:
        """The plain array."""
        return value_of(self.value)

    def checksum(self) -> Hashable:
        """Tells whether it is what it was: of its numbers, in the time of reading them; of what nobody can write to, which one it is.

        That is a part of a pack, or an array in a file mapped for reading: while its mapping lives, nothing else has its address.
        """
        if isinstance(self.kept, Part):
            return self.kept
        stored = value_of(self.stored()[0])
        if (mapping := mapping_of(stored)) is not None:
            return mapping, stored.ctypes.data, stored.shape, stored.strides, stored.dtype
        return _core.checksum(stored)

    def stored(self, transposed: bool = False) -> tuple[Array, bool]:
        """The matrix, or its transpose, as it lies in RAM, and whether what is wanted is the transpose of it.

        wanted: the matrix, or with `transposed` its transpose. A matrix that a file holds the other way round is never copied.
        """
        return _as_it_lies(self.value, transposed)

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
        dropped: Callable[[Array, str], Array] | None = None,
    ) -> Array:
        """residual + activation(x W + bias): x (..., d_in), bias (d_out,) -> (..., d_out), residual of the same shape.

        gate: W_g, for residual + activation(x W_g + gate_bias) * (x W + bias). transposed: with W^T. dropped: dropout of what an
        adapter that is trained reads. Such a one is a product of its own; any other is added to W first, so that a model computes
        the same bits before and after its adapters are merged.
        """
        if self.packed is not None and not is_traced(x) and self.packed.gated == (gate is not None) and not transposed:
            more = {} if gate is None else {"gate_bias": gate_bias}
            return _core.packed_linear(x, self.packed, bias, activation=activation, residual=residual, **more)
        part = self.kept if isinstance(self.kept, Part) and activation is residual is gate is None else None
        if part is not None and not (is_traced(x) or transposed) and (y := part.linear(x, bias)) is not None:
            return y
        if self.adapter is not None and self.adapter.is_trained and not transposed:
            stored, is_transposed = _as_it_lies(self.kept, False)
            y = ops.linear(x, stored, bias, transposed=is_transposed) + self.adapter(x, dropped)
        else:
            stored, is_transposed = self.stored(transposed)
            y = ops.linear(x, stored, bias, transposed=is_transposed)
        if gate is not None:
            y = gate.linear(x, gate_bias, activation=activation, dropped=dropped) * y
        elif activation is not None:
            y = ops.activation(y, activation)
        return y if residual is None else residual + y


def _as_it_lies(value: Array, transposed: bool) -> tuple[Array, bool]:
    """See `Weight.stored`."""
    return (value.T, not transposed) if _lies_transposed(value) else (value, transposed)


def arrays_of(weights: Mapping[str, Weight], names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These names with their arrays, in this order. A pack is unpacked once for all of its parts, and let go behind the last of them."""
    names = list(names)
    parts = {name: kept for name in names if isinstance(kept := weights[name].kept, Part) and kept.table is None}
    left, unpacked = Counter(part.pack for part in parts.values()), {}
    for name in names:
        if (part := parts.get(name)) is None:
            yield name, weights[name].array
            continue
        if part.pack not in unpacked:
            unpacked[part.pack] = part.pack.packed.unpack()
        yield name, part.cut_from(unpacked[part.pack])
        left[part.pack] -= 1
        if not left[part.pack]:
            del unpacked[part.pack]


class Weights(dict[str, Weight]):
    """The weights of a model by name, each wrapped when it is first asked for, with the adapter beside it."""

    def __init__(self, kept: Mapping[str, Any]):
        super().__init__()
        self.kept = kept
        for pack in {value.pack for value in kept.values() if isinstance(value, Part)}:
            self[pack.name] = Weight(kept.get(pack.name), pack.packed)
            if pack.bias is not None:
                self[pack.name + ".bias"] = Weight(pack.bias)

    def __missing__(self, name: str) -> Weight:
        weight = self[name] = Weight(self.kept[name], adapter=self.adapter(name))
        return weight

    def fused_bias(self, biases: Sequence[str | None], widths: Sequence[int], dtype: Any) -> np.ndarray | None:
        """Biases side by side, of matrices that are packed so: (sum of widths,); None where there are none."""
        if not any(biases):
            return None
        each = zip(biases, widths, strict=True)
        return np.concatenate([np.zeros(n, dtype) if name is None else self[name].array for name, n in each])

    def adapter(self, name: str) -> Adapter | None:
        """Of the layer whose weight has this name; None where there is none."""
        layer = name.removesuffix(".weight")
        if (a := self.kept.get(f"{LORA}{layer}.a")) is None:
            return None
        return Adapter(layer, a, self.kept[f"{LORA}{layer}.b"], value_of(self.kept[LORA_SCALE])[0])

    def pack(
        self,
        names: Sequence[str],
        *,
        gate: str | None = None,
        dtype: str | None = None,
        transposed: bool = False,
        columns: int | np.ndarray | None = None,
    ) -> Any:
        """A PackedWeight of matrices side by side: dtype "float32", "bfloat16" or "int8" (None: their own).

        gate: the name of a second matrix. transposed: of W^T. columns: only the first so many of what a product gives, or those of
        these numbers (n,).
        """
        (array, is_transposed), *more = (self[name].stored(transposed) for name in names)
        if more:
            arrays = [array, *(one if flag == is_transposed else one.T for one, flag in more)]
            array = np.concatenate(arrays, axis=0 if is_transposed else 1)
        if columns is not None:
            chosen = columns if isinstance(columns, np.ndarray) else slice(columns)
            array = array[chosen] if is_transposed else array[:, chosen]
        beside = None
        if gate is not None:
            beside, flag = self[gate].stored(transposed)
            beside = np.ascontiguousarray(beside if flag == is_transposed else beside.T)
        packed = _core.pack(np.ascontiguousarray(array), dtype=dtype or str(array.dtype), transposed=is_transposed, gate=beside)
        for name in names if gate is None else (*names, gate):
            forget_pages(value_of(self[name].kept))  # the packed copy is read from now on
        return packed
