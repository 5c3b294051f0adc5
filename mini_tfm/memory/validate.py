"""Checks of all that a strategy declares and returns, before it reaches the kernels; and errors that name the strategy at fault."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..autodiff import value_of
from ..errors import InvalidValue, MiniTfmError, PluginError, shown
from .base import CONTRACT_VERSION, MERGES, NEEDS, SITES, Dims, Memory, MemorySpec, New, Param, Passage, Rows, SideOutput, View

GRADIENTS: tuple[str, ...] = ("none", "rows", "state")
KINDS = {"f": "floating point", "b": "bool", "i": "integer"}


class _AnySize:
    """In an expected shape: an axis of any length."""

    def __repr__(self) -> str:
        return "any"


ANY = _AnySize()


# Errors that name the strategy


def owner(member: Memory) -> str:
    """The plugin, distribution and version a strategy comes from."""
    return member.origin or f"{type(member).__module__}.{type(member).__qualname__}"


def fault(member: Memory, method: str, site: str | None, layer: int | None, step: int | None, error: BaseException) -> MiniTfmError:
    """`error`, raised in a strategy's method, as one that names the strategy, its version, the method and the place.

    An error that the strategy means for the user (a folder not writable, a store of another width) keeps its kind.
    """
    place = "".join(f", {word} {value}" for word, value in (("site", site), ("layer", layer), ("segment", step)) if value is not None)
    prefix = f"memory {member.name or type(member).__name__!r} ({owner(member)}) failed in {method}{place}: "
    if isinstance(error, Refused):
        return PluginError(prefix + str(error))
    if isinstance(error, MiniTfmError):
        return with_message(error, prefix + str(error))
    return PluginError(f"{prefix}{type(error).__name__}: {error}")


@contextlib.contextmanager
def attributed(member: Memory, method: str, site: str | None = None, layer: int | None = None, step: int | None = 0) -> Iterator[None]:
    """Turns any error inside, but an interrupt, into the strategy's `fault`, with the cause kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise fault(member, method, site, layer, step, error) from error


def with_message(error: MiniTfmError, message: str) -> MiniTfmError:
    """An error of the same kind with another message. A plugin's own subclass may take other arguments: ours take a message."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == MiniTfmError.__module__)
    return kind(message)


class Refused(InvalidValue):
    """A strategy returned something that the contract does not allow."""


def require(condition: Any, message: str, *arguments: Any) -> None:
    """Raises Refused unless `condition` holds. The message is formatted only then: these checks run for every layer and step."""
    if not condition:
        raise Refused(message.format(*arguments) if arguments else message)


# Declarations


def check_spec(member: Memory) -> None:
    """Raises PluginError if the strategy's `spec` is not one of this contract."""
    spec, who = member.spec, f"memory {member.name!r} ({owner(member)})"
    if not isinstance(spec, MemorySpec):
        raise PluginError(f"{who}: spec: expected a MemorySpec, got {type(spec).__name__}")
    for field, allowed in (("sites", SITES), ("needs", NEEDS)):
        value = getattr(spec, field)
        if not _is_set_of(value, allowed):
            raise PluginError(f"{who}: spec.{field}: expected a set of {', '.join(allowed)}, got {shown(value)}")
    for field, words in (("merge", MERGES), ("gradient", GRADIENTS)):
        value = getattr(spec, field)
        if not isinstance(value, str) or value not in words:
            raise PluginError(f"{who}: spec.{field}: expected one of {', '.join(words)}, got {shown(value)}")
    layers = spec.layers
    if layers is not None and not (isinstance(layers, tuple) and all(type(layer) is int for layer in layers)):
        raise PluginError(f"{who}: spec.layers: expected None or a tuple of layer numbers, got {shown(layers)}")
    for field in ("taps", "early"):
        if not isinstance(value := getattr(spec, field), bool):
            raise PluginError(f"{who}: spec.{field}: expected True or False, got {shown(value)}")
    if not spec.sites:
        raise PluginError(f"{who}: spec.sites: expected at least one of {', '.join(SITES)}, got none")
    if not isinstance(spec.version, int) or spec.version > CONTRACT_VERSION:
        raise PluginError(f"{who}: written for contract {spec.version}, this library has {CONTRACT_VERSION}: upgrade mini-tfm")


def _is_set_of(value: Any, allowed: tuple[str, ...]) -> bool:
    return isinstance(value, frozenset | set | tuple | list) and all(isinstance(x, str) and x in allowed for x in value)


def check_sites(sites: Any, spec: MemorySpec) -> frozenset[str]:
    """The result of `sites`, checked."""
    allowed = tuple(site for site in SITES if site in spec.sites)
    require(_is_set_of(sites, allowed), "sites: expected a set of those in spec.sites ({}), got {!r}", ", ".join(allowed), sites)
    return frozenset(sites)


def check_passed_on(dropped: Any) -> None:
    """The result of `write` or `absorb` of a member that taps, or of `write` of one that is early."""
    require(dropped is None, "expected None with spec.taps or spec.early, where others get all rows, got {}", type(dropped).__name__)


def check_parameters(params: Any) -> Mapping[str, Param]:
    """The result of `parameters`, checked."""
    require(isinstance(params, Mapping), "parameters: expected a mapping, got {}", type(params).__name__)
    for name, param in params.items():
        require(isinstance(name, str) and name, "parameters: expected names, got {!r}", name)
        _check_param(f"parameters[{name!r}]", param)
    return dict(params)


def _check_param(what: str, param: Any) -> None:
    require(isinstance(param, Param), "{}: expected a Param, got {}", what, type(param).__name__)
    shape = param.shape
    good = isinstance(shape, tuple) and all(isinstance(n, int | np.integer) and n >= 0 for n in shape)
    require(good, "{}: shape: expected a tuple of sizes, got {!r}", what, shape)
    if isinstance(param.init, np.ndarray):
        check_array(f"{what}: init", param.init, tuple(int(n) for n in shape), "f")
    else:
        require(_is_factor(param.init), "{}: init: expected a standard deviation or an array, got {!r}", what, param.init)
    require(_is_factor(param.lr_factor), "{}: lr_factor: expected a number of at least 0, got {!r}", what, param.lr_factor)
    require(isinstance(param.weight_decay, bool), "{}: weight_decay: expected True or False, got {!r}", what, param.weight_decay)


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


# Results


def check_array(name: str, value: Any, shape: tuple[Any, ...], kind: str, dtype: Any = None) -> None:
    """Checks that `value` is an array or Var of `shape` and of the dtype's kind ("f", "b" or "i"), finite if real.

    dtype: also exactly this one. Numbers that meet the model's must have its dtype, or all that follows would change.
    """
    array = value_of(value)
    require(isinstance(array, np.ndarray), "{}: expected an array, got {}", name, type(value).__name__)
    fits = array.ndim == len(shape) and all(n is ANY or n == m for n, m in zip(shape, array.shape, strict=True))
    require(fits, "{}: expected shape {}, got {}", name, shape, array.shape)
    if array.dtype.kind != kind:
        raise Refused(f"{name}: expected {KINDS[kind]}, got {array.dtype}")
    if kind == "f":
        require(np.isfinite(array).all(), "{}: holds NaN or infinity", name)
    require(dtype is None or array.dtype == dtype, "{}: expected {}, as the model has, got {}", name, dtype, array.dtype)


def check_state(name: Any, value: Any, batch: int) -> None:
    """Checks an array of the state: numbers or bools, streams along axis 0."""
    array = value_of(value)
    require(isinstance(name, str) and name, "state: expected names, got {!r}", name)
    if not (isinstance(array, np.ndarray) and array.ndim > 0 and len(array) == batch and array.dtype.kind in "fib"):
        got = f"shape {array.shape}, {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise Refused(f"state[{name!r}]: expected an array of numbers or bools, {batch} streams along axis 0, got {got}")


def check_begin(rows: Any, site: str, batch: int, dims: Dims) -> Rows | None:
    """The result of `begin`, checked."""
    if rows is None:
        return None
    require(isinstance(rows, Rows), "expected Rows or None, got {}", type(rows).__name__)
    require((rows.values is None) != (rows.tokens is None), "expected values or tokens, got {}", "none" if rows.values is None else "both")
    if rows.tokens is None:
        check_array("values", rows.values, (batch, ANY, dims.d_model), "f", dims.dtype)
    else:
        check_array("tokens", rows.tokens, (batch, ANY), "i")
        least, most = rows.tokens.min(initial=0), rows.tokens.max(initial=0)
        require(least >= 0 and most < dims.vocab_size, "tokens: expected 0 to {}, got {} to {}", dims.vocab_size - 1, least, most)
    if rows.valid is not None:
        check_array("valid", rows.valid, rows.shape, "b")
    places = ("front", "around") if site == "decoder" and rows.tokens is None else ("front",)
    require(rows.where in places, "where: {!r} is not possible here", rows.where)
    return rows


def check_evicted(evicted: Any, batch: int, dims: Dims) -> New | None:
    """Rows that `write`, `absorb` or `drain` returned, checked."""
    if evicted is None:
        return None
    require(isinstance(evicted, New), "expected Evicted or None, got {}", type(evicted).__name__)
    check_array("hidden", evicted.hidden, (batch, ANY, dims.d_model), "f", dims.dtype)
    shape = value_of(evicted.hidden).shape[:2]
    check_array("valid", evicted.valid, shape, "b")
    check_array("positions", evicted.positions, shape, "i")
    wanted = {"mass": ("mass", "f"), "tokens": ("tokens", "i"), "targets": ("tokens", "i"), "surprise": ("surprise", "f")}
    for name, (need, kind) in wanted.items():  # only what a memory behind it looks at
        if need in dims.needs_behind and (value := getattr(evicted, name)) is not None:
            check_array(name, value, shape, kind)
    return evicted


def check_passages(found: Any, batch: int) -> list[list[Passage]]:
    """The result of `recall`, checked."""
    whole = isinstance(found, list) and len(found) == batch and all(isinstance(part, list) for part in found)
    require(whole, "expected a list of {} lists, one a stream, got {}", batch, shown(found))
    for passage in (passage for part in found for passage in part):
        require(isinstance(passage, Passage), "expected Passages, got {}", type(passage).__name__)
        check_array("tokens", passage.tokens, (ANY,), "i")
    return found


def check_log_probs(changed: Any, before: np.ndarray) -> np.ndarray:
    """The result of `logits`, checked, in the dtype of the log-probabilities `before`."""
    if changed is None:
        return before
    require(isinstance(changed, np.ndarray), "expected an array or None, got {}", type(changed).__name__)
    require(changed.shape == before.shape, "expected shape {}, got {}", before.shape, changed.shape)
    require(changed.dtype.kind == "f" and not np.isnan(changed).any(), "expected numbers, got {} or NaN", changed.dtype)
    total = np.exp(changed.astype(np.float64)).sum(axis=-1)
    require(np.allclose(total, 1, atol=1e-3), "expected log-probabilities, whose exponentials sum to 1")
    return changed.astype(before.dtype, copy=False)


def check_loss(loss: Any, batch: int, dims: Dims) -> Any:
    """The result of `loss`, checked."""
    if loss is not None:
        check_array("the result", loss, (batch,), "f", dims.dtype)
    return loss


def check_entering(added: Any, inputs: Any, dims: Dims) -> Any:
    """The result of `enter`, checked."""
    if added is not None:
        check_array("the result", added, inputs.shape, "f", dims.dtype)
    return added


def check_view(
    view: Any, default_merge: str, shape: tuple[int, int], dims: Dims, known: tuple[Any, ...] | None = None
) -> View | SideOutput | None:
    """The result of `view` or `read`, checked, with its index as the kernels take it. shape: (streams, queries).

    known: a bank that was checked before; the same arrays are not read again.
    """
    if view is None:
        return None
    require(isinstance(view, View | SideOutput), "expected a View, a SideOutput or None, got {}", type(view).__name__)
    merge = view.merge or default_merge
    require(merge in MERGES, "merge: expected one of {}, got {!r}", ", ".join(MERGES), merge)
    if merge == "gate":
        require(view.gate is not None, "gate: expected (H,) logits with merge='gate', got None")
        check_array("gate", view.gate, (dims.n_heads,), "f", dims.dtype)
    batch, n_queries = shape
    if isinstance(view, SideOutput):
        require(merge != "joint", "merge: a SideOutput cannot be 'joint', it has no scores")
        check_array("output", view.output, (batch, dims.n_heads, n_queries, dims.d_head), "f", dims.dtype)
        if view.valid is not None:
            check_array("valid", view.valid, (batch,), "b")
        return view
    rows = _check_bank(view.bank, batch, dims) if known is None or not same_arrays(view.bank, known) else value_of(known[1]).shape[-2]
    check_array("valid", view.valid, (batch, rows), "b")
    if view.positions is not None:
        check_array("positions", view.positions, (batch, rows), "i")
    shown = rows
    if view.index is not None:
        view = dataclasses.replace(view, index=_checked_index(view.index, rows, shape, dims))
        shown = view.index.shape[-1] if view.index.ndim == 4 else rows
    if view.places is not None:
        require(view.index is not None, "places: expected None without an index, which names the rows that they are of")
        check_array("places", view.places, view.index.shape, "i")
    if view.bias is not None:
        _check_bias(view.bias, (batch, dims.n_heads, n_queries, shown), dims)
    return view


def same_arrays(bank: Any, other: tuple[Any, ...]) -> bool:
    """Whether a bank has the arrays of another. As no strategy writes into an array, it then has the same rows."""
    return isinstance(bank, tuple) and len(bank) == len(other) and bank[0] == other[0] and all(map(operator.is_, bank[1:], other[1:]))


def _check_bank(bank: Any, batch: int, dims: Dims) -> Any:
    """The number of rows in it."""
    kind = bank[0] if isinstance(bank, tuple) and bank else None
    if kind == "hidden" and len(bank) == 2:
        check_array("bank", bank[1], (batch, ANY, dims.d_model), "f", dims.dtype)
        return value_of(bank[1]).shape[1]
    require(kind == "kv" and len(bank) == 3, "bank: expected ('hidden', X) or ('kv', K, V)")
    keys = value_of(bank[1])
    rows = np.shape(keys)[2] if np.ndim(keys) == 4 else ANY
    for name, values in (("K", bank[1]), ("V", bank[2])):
        check_array(f"bank {name}", values, (batch, dims.n_kv_heads, rows, dims.d_head), "f", dims.dtype)
    return rows


def _checked_index(index: Any, rows: int, shape: tuple[int, int], dims: Dims) -> np.ndarray:
    require(isinstance(index, np.ndarray), "index: expected an array or None, got {}", type(index).__name__)
    batch, n_queries = shape
    check_array("index", index, (batch, ANY) if index.ndim == 2 else (batch, dims.n_heads, n_queries, ANY), "i")
    if index.size and not -1 <= index.min() <= index.max() < rows:
        raise Refused(f"index: expected -1 to {rows - 1}, got {index.min()} to {index.max()}")
    return np.ascontiguousarray(index, np.int64)


def _check_bias(bias: Any, full: tuple[int, ...], dims: Dims) -> None:
    array = value_of(bias)
    require(isinstance(array, np.ndarray), "bias: expected an array or None, got {}", type(bias).__name__)
    fits = array.ndim <= 4 and all(n in (1, m) for n, m in zip(array.shape[::-1], full[::-1], strict=False))
    require(fits, "bias: expected a shape that broadcasts to {}, got {}", full, array.shape)
    require(array.dtype == dims.dtype, "bias: expected {}, got {}", dims.dtype, array.dtype)
    require(not np.isnan(array).any() and not np.isposinf(array).any(), "bias: holds NaN or infinity (-infinity hides a row)")
