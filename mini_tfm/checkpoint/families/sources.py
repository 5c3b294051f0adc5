"""Where our weights are in somebody else's tensors: a table for each family, used to load and to save."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...config import Config
from ...errors import InvalidValue
from ...model import weight_shapes
from ..safetensors import BFLOAT16, Entry, widen_bfloat16

READABLE = (np.dtype("f4"), np.dtype("f2"), BFLOAT16, np.dtype("f8"))


@dataclass(frozen=True)
class Source:
    """A tensor of theirs, or a part of one, that holds a weight of ours.

    transposed: theirs is (d_out, d_in), as PyTorch's linear layers have it. part: (start, stop) of its d_out. plus: is added to it.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    plus: float = 0.0
    row: bool = False  # theirs is (1, n), ours (n,)

    @property
    def _axis(self) -> int:
        return 0 if self.transposed else -1

    def shape(self, ours: tuple[int, ...], whole: int | None) -> tuple[int, ...]:
        """Theirs, of a weight of shape `ours`; whole: d_out of all its parts together."""
        theirs = list(ours[::-1] if self.transposed else ours)
        if whole is not None:
            theirs[self._axis] = whole
        return (1, *theirs) if self.row else tuple(theirs)

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Our weight, a view of the tensor where it is float32."""
        if tensor.dtype == BFLOAT16:
            tensor = widen_bfloat16(tensor)
        elif tensor.dtype.itemsize == 2:
            tensor = tensor.astype(np.float32)
        if self.part is not None:
            start, stop = self.part
            tensor = tensor[start:stop] if self.transposed else tensor[..., start:stop]
        if self.row:
            tensor = tensor[0]
        if self.plus:
            tensor = tensor + tensor.dtype.type(self.plus)
        return tensor.T if self.transposed else tensor

    def write(self, weight: np.ndarray) -> np.ndarray:
        weight = weight.T if self.transposed else weight[None] if self.row else weight
        return weight - weight.dtype.type(self.plus) if self.plus else weight


class Table(Protocol):
    """What a family's module says of its tensors."""

    @property
    def PREFIXES(self) -> Sequence[str]:
        """What may stand before every name, in files of models with another head; the first is what we write."""

    @property
    def BARE(self) -> Sequence[str]:
        """Names that never have a prefix."""

    @property
    def UNUSED(self) -> Sequence[str]:
        """Regular expressions of what may be there and is not needed."""

    def sources(self, config: Config) -> dict[str, Source]:
        """Our names of all weights, and where each is."""


def linear(ours: str, theirs: str, bias: bool = True) -> dict[str, Source]:
    """A linear layer as PyTorch has it."""
    return {f"{ours}.weight": Source(f"{theirs}.weight", True)} | ({f"{ours}.bias": Source(f"{theirs}.bias")} if bias else {})


def norm(ours: str, theirs: str, bias: bool = True) -> dict[str, Source]:
    return {f"{ours}.weight": Source(f"{theirs}.weight")} | ({f"{ours}.bias": Source(f"{theirs}.bias")} if bias else {})


def prefixed(table: Table, names: Iterable[str]) -> dict[str, str]:
    """Their names as the table has them, by the names in a file: without the prefix that many of them have, and with new endings."""
    names = list(names)
    found = [prefix for prefix in table.PREFIXES if prefix and any(name.startswith(prefix) for name in names)]
    short = {name: next((name.removeprefix(prefix) for prefix in found if name.startswith(prefix)), name) for name in names}
    old: Mapping[str, str] = getattr(table, "RENAMED", {})
    return {name: next((one.removesuffix(end) + old[end] for end in old if one.endswith(end)), one) for name, one in short.items()}


def check_tensors(table: Table, config: Config, entries: Mapping[str, Entry], where: str) -> None:
    """Before a tensor is read: raises InvalidValue naming the file and every tensor missing, too much, or of another shape."""
    shapes, sources = weight_shapes(config), table.sources(config)
    assert shapes.keys() == sources.keys(), sorted(shapes.keys() ^ sources.keys())
    whole: dict[str, int] = {}
    for source in sources.values():
        if source.part is not None:
            whole[source.name] = max(whole.get(source.name, 0), source.part[1])
    names = prefixed(table, entries)
    found = {theirs: entries[name] for name, theirs in names.items()}
    faults, needed = [], set()
    for ours, source in sources.items():
        if source.name in needed:
            continue
        needed.add(source.name)
        expected = source.shape(shapes[ours], whole.get(source.name))
        entry = found.get(source.name)
        if entry is None:
            faults.append(f"tensor {source.name!r} is missing")
        elif tuple(entry.shape) != expected:
            faults.append(f"tensor {source.name!r}: expected shape {expected}, got {tuple(entry.shape)}")
        elif entry.dtype not in READABLE:
            faults.append(f"tensor {source.name!r}: expected float32, float16 or bfloat16, got {entry.dtype}")
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in table.UNUSED) or r"(?!)")
    faults += [f"tensor {name!r} is not one of this architecture" for name in found if name not in needed and not unused.fullmatch(name)]
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InvalidValue(f"{where}: " + "; ".join(faults[:20]) + more)


def weights_of(table: Table, config: Config, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by our names and in our layout; float32 ones are not copied."""
    names = {theirs: name for name, theirs in prefixed(table, tensors).items()}
    return {ours: source.read(tensors[names[source.name]]) for ours, source in table.sources(config).items()}


def tensors_of(table: Table, config: Config, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our weights by their names and in their layout: what `weights_of` reads back."""
    parts: dict[str, list[tuple[Source, np.ndarray]]] = {}
    for ours, source in table.sources(config).items():
        parts.setdefault(source.name, []).append((source, np.asarray(weights[ours])))
    prefix, tensors = table.PREFIXES[0] if table.PREFIXES else "", {}
    for name, given in parts.items():
        if given[0][0].part is None:
            array = given[0][0].write(given[0][1])
        else:
            given.sort(key=lambda one: one[0].part or (0, 0))
            array = np.concatenate([source.write(weight) for source, weight in given], axis=given[0][0]._axis)
        tensors[name if name in table.BARE else prefix + name] = np.ascontiguousarray(array)
    return tensors
