"""What a strategy says and returns, checked before anything is computed with it, and told as its fault."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..autodiff import value_of
from ..errors import InvalidValue, MiniTfmError, PluginError
from .base import CONTRACT_VERSION, MERGES, NEEDS, SITES, Memory, MemorySpec

GRADIENTS: tuple[str, ...] = ("none", "rows", "state")


def check_spec(made: Memory) -> None:
    """Raises PluginError if the strategy's `spec` says what the contract does not know."""
    spec, who = made.spec, f"memory {made.name!r} ({owner(made)})"
    if not isinstance(spec, MemorySpec):
        raise PluginError(f"{who}: spec: expected a MemorySpec, got {type(spec).__name__}")
    for field, allowed in (("sites", SITES), ("needs", NEEDS)):
        value = getattr(spec, field)
        if not isinstance(value, frozenset | set | tuple | list) or not all(isinstance(x, str) and x in allowed for x in value):
            raise PluginError(f"{who}: spec.{field}: expected a set of {', '.join(allowed)}, got {value!r}")
    for field, words in (("merge", MERGES), ("gradient", GRADIENTS)):
        value = getattr(spec, field)
        if not isinstance(value, str) or value not in words:
            raise PluginError(f"{who}: spec.{field}: expected one of {', '.join(words)}, got {value!r}")
    layers = spec.layers
    if layers is not None and not (isinstance(layers, tuple) and all(type(layer) is int for layer in layers)):
        raise PluginError(f"{who}: spec.layers: expected None or a tuple of layer numbers, got {layers!r}")
    if not spec.sites:
        raise PluginError(f"{who}: spec.sites: expected at least one of {', '.join(SITES)}, got none")
    if not isinstance(spec.version, int) or spec.version > CONTRACT_VERSION:
        raise PluginError(f"{who}: written for contract {spec.version}, this library has {CONTRACT_VERSION}: upgrade mini-tfm")


def owner(made: Memory) -> str:
    """The plugin, distribution and version a strategy comes from."""
    return made.origin or f"{type(made).__module__}.{type(made).__qualname__}"


@contextlib.contextmanager
def blamed(made: Memory, method: str, site: str | None, layer: int | None, step: int) -> Iterator[None]:
    """Any error inside is the strategy's: told with its name, version, method and place, the cause kept.

    What it tells the user on purpose (a folder not writable, a store of another width) keeps its kind.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = "".join(f", {word} {value}" for word, value in (("site", site), ("layer", layer)) if value is not None)
        who = f"memory {made.name or type(made).__name__!r} ({owner(made)}) failed in {method}{place}, segment {step}: "
        if isinstance(error, MiniTfmError) and not isinstance(error, _Nonsense):
            raise retold(error, who + str(error)) from error
        told = str(error) if isinstance(error, _Nonsense) else f"{type(error).__name__}: {error}"
        raise PluginError(who + told) from error


def retold(error: MiniTfmError, message: str) -> MiniTfmError:
    """An error of the same kind with more to say; a plugin's own kind may not be made of a message, ours are."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == MiniTfmError.__module__)
    return kind(message)


class _Nonsense(InvalidValue):
    """A return value that the contract does not allow."""


def expect(condition: Any, what: str) -> None:
    """Refuses a strategy's return value."""
    if not condition:
        raise _Nonsense(what)


def expect_array(name: str, value: Any, shape: tuple[int | None, ...], kind: str) -> None:
    """`value` is an array or Var of `shape` (None: any) and dtype kind ("f", "b" or "i"), finite where real."""

    array = value_of(value)
    expect(isinstance(array, np.ndarray), f"{name}: expected an array, got {type(value).__name__}")
    want = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=True))
    expect(fits, f"{name}: expected shape {want}, got {array.shape}")
    kinds = {"f": "floating point", "b": "bool", "i": "integer"}
    expect(array.dtype.kind == kind, f"{name}: expected {kinds[kind]}, got {array.dtype}")
    if kind == "f":
        expect(np.isfinite(array).all(), f"{name}: holds NaN or infinity")


def real_array(name: str, value: Any, shape: tuple[int | None, ...], dtype: np.dtype) -> None:
    """The same for numbers that meet the model's: they must have its dtype, or all that follows would change."""

    expect_array(name, value, shape, "f")
    expect(value_of(value).dtype == dtype, f"{name}: expected {dtype}, as the model has, got {value_of(value).dtype}")
