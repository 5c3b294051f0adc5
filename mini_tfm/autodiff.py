"""Var and the tape: reverse-mode differentiation of plain NumPy code.

A `Var` wraps an array. NumPy functions called on it (through `__array_ufunc__`, NEP 13, and
`__array_function__`, NEP 18) compute as always and remember how to send a gradient back; `backward(loss)`
walks what was remembered, newest first. There is no tape object: the graph hangs on the result, and is
freed with it. Code that meets only plain arrays records nothing, so one function serves training and
inference.

    x = Var(np.ones((2, 3), np.float32))
    loss = np.tanh(x * 2).sum()
    backward(loss)
    x.grad                                # (2, 3), float32

`mini_tfm.ops` adds fused operations through the same `record`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from .errors import InvalidType, InvalidValue

_order = itertools.count()  # parents are always older than children: sorting by it is a topological order


class Var(NDArrayOperatorsMixin):
    """An array that is differentiated through.

    value: the array. grad: after `backward`, the gradient of a leaf, in the shape and dtype of `value`;
    a leaf made with a `grad` array has the gradient ADDED to it (parameters: views of one flat arena).
    """

    __slots__ = ("_order", "_owns_grad", "_parents", "_vjp", "grad", "value")

    def __init__(self, value: Any, grad: np.ndarray | None = None):
        self.value = np.asarray(value)
        if self.value.dtype.kind != "f":
            raise InvalidType(f"value: expected a floating-point array, got {self.value.dtype}")
        if grad is not None and (grad.shape != self.value.shape or grad.dtype != self.value.dtype):
            raise InvalidValue(f"grad: expected {self.value.shape} {self.value.dtype}, got {grad.shape} {grad.dtype}")
        self.grad = grad
        self._owns_grad = grad is not None
        self._parents: tuple[Any, ...] = ()
        self._vjp: Callable | None = None
        self._order = next(_order)

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    dtype = property(lambda self: self.value.dtype)
    T = property(lambda self: np.transpose(self))

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return f"Var({self.value!r})"

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise InvalidType(
            "a Var would silently lose its gradient in np.asarray or an unsupported call;"
            " use .value for the plain array, or a function listed in mini_tfm.autodiff"
        )

    def __getitem__(self, index: Any) -> Var:
        value = self.value[index]
        basic = not _has_array(index)

        def vjp(dy: np.ndarray) -> tuple[np.ndarray]:
            dx = np.zeros_like(self.value)
            if basic:
                dx[index] = dy
            else:
                np.add.at(dx, index, dy)  # an index array may name a row twice
            return (dx,)

        return record(value, (self,), vjp)

    def reshape(self, *shape: Any) -> Any:
        return np.reshape(self, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Any:
        return np.transpose(self, (axes[0] if len(axes) == 1 else axes) or None)

    def swapaxes(self, a: int, b: int) -> Any:
        return np.swapaxes(self, a, b)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Var:
        return np.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Var:
        return np.mean(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Var:
        return np.max(self, axis=axis, keepdims=keepdims)

    def detach(self) -> np.ndarray:
        """The plain array: gradients stop here."""
        return self.value

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "reduce" and ufunc in (np.add, np.maximum):
            return (np.sum if ufunc is np.add else np.max)(*inputs, **kwargs)
        rules = _UFUNC_VJPS.get(ufunc)
        if method != "__call__" or kwargs:
            given = f"{method} " + ", ".join(f"{name}=" for name in kwargs)
            raise InvalidType(f"np.{ufunc.__name__}: {given.strip()} is not differentiable; call it plainly, for a new array")
        values = [value_of(x) for x in inputs]
        y = ufunc(*values)
        if rules == ():  # comparisons and the like: no gradient, plain result
            return y
        if rules is None:
            raise InvalidType(f"np.{ufunc.__name__}: no gradient is known; supported: {_supported()}")
        parents = tuple((x, rule) for x, rule in zip(inputs, rules, strict=True) if isinstance(x, Var))

        def vjp(dy: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(_unbroadcast(rule(dy, y, *values), x.value.shape) for x, rule in parents)

        return record(y, tuple(x for x, _ in parents), vjp)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        rule = _FUNCTIONS.get(function)
        if rule is None:
            raise InvalidType(f"np.{function.__name__}: no gradient is known; supported: {_supported()}")
        return rule(*args, **kwargs)


def value_of(x: Any) -> Any:
    """The plain array of a Var; anything else as it is."""
    return x.value if isinstance(x, Var) else x


def is_traced(*xs: Any) -> bool:
    return any(isinstance(x, Var) for x in xs)


def record(value: np.ndarray, parents: Sequence[Any], vjp: Callable) -> Var:
    """A new Var. `vjp(dy)` gives one gradient a parent, or None where there is none (or it was added already)."""
    out = Var(value)
    out._parents, out._vjp = tuple(parents), vjp
    return out


def add_grad(x: Any, dx: np.ndarray | None) -> None:
    """Adds `dx` to the gradient of `x`. The first gradient is kept without a copy, so it is never written to."""
    if dx is None or not isinstance(x, Var):
        return
    if dx.dtype != x.value.dtype:
        dx = dx.astype(x.value.dtype)
    if x.grad is None:
        x.grad = dx
    elif x._owns_grad:
        x.grad += dx
    else:
        x.grad = x.grad + dx
        x._owns_grad = True


def backward(*outputs: Var, grads: Sequence[np.ndarray | None] | None = None) -> None:
    """Sends gradients from `outputs` (default: ones) to every leaf below them; leaves keep theirs in `.grad`."""
    nodes: dict[int, Var] = {}
    for output, dy in zip(outputs, grads or [None] * len(outputs), strict=True):
        add_grad(output, np.ones_like(output.value) if dy is None else np.asarray(dy))
        nodes[output._order] = output
    waiting = list(nodes.values())
    while waiting:
        for parent in waiting.pop()._parents:
            if isinstance(parent, Var) and parent._order not in nodes:
                nodes[parent._order] = parent
                waiting.append(parent)
    for order in sorted(nodes, reverse=True):
        node = nodes[order]
        if node._vjp is None:
            continue  # a leaf keeps its gradient
        dy, node.grad, node._owns_grad = node.grad, None, False
        if dy is not None:
            for parent, dx in zip(node._parents, node._vjp(dy), strict=True):
                add_grad(parent, dx)


# Rules for ufuncs: one function of (dy, y, *inputs) an input; () marks results that carry no gradient.

_UFUNC_VJPS: dict[Any, tuple[Callable, ...]] = {
    np.add: (lambda dy, y, a, b: dy, lambda dy, y, a, b: dy),
    np.subtract: (lambda dy, y, a, b: dy, lambda dy, y, a, b: -dy),
    np.multiply: (lambda dy, y, a, b: dy * b, lambda dy, y, a, b: dy * a),
    np.divide: (lambda dy, y, a, b: dy / b, lambda dy, y, a, b: -dy * y / b),
    np.power: (
        lambda dy, y, a, b: dy * b * np.power(a, np.subtract(b, 1)),
        lambda dy, y, a, b: dy * y * np.log(np.where(np.asarray(a) > 0, a, 1)),
    ),
    np.maximum: (lambda dy, y, a, b: dy * (a >= b), lambda dy, y, a, b: dy * (a < b)),
    np.minimum: (lambda dy, y, a, b: dy * (a <= b), lambda dy, y, a, b: dy * (a > b)),
    np.negative: (lambda dy, y, a: -dy,),
    np.exp: (lambda dy, y, a: dy * y,),
    np.log: (lambda dy, y, a: dy / a,),
    np.log1p: (lambda dy, y, a: dy / (1 + a),),
    np.expm1: (lambda dy, y, a: dy * (y + 1),),
    np.sqrt: (lambda dy, y, a: dy / (2 * y),),
    np.square: (lambda dy, y, a: 2 * dy * a,),
    np.tanh: (lambda dy, y, a: dy * (1 - y * y),),
    np.sin: (lambda dy, y, a: dy * np.cos(a),),
    np.cos: (lambda dy, y, a: -dy * np.sin(a),),
    np.absolute: (lambda dy, y, a: dy * np.sign(a),),
    np.matmul: (lambda dy, y, a, b: _matmul_da(dy, a, b), lambda dy, y, a, b: _matmul_db(dy, a, b)),
    **dict.fromkeys((np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal, np.isnan, np.isfinite, np.sign), ()),
}


def _matmul_da(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if b.ndim == 1:
        return dy[..., None] * b
    return (dy[..., None, :] if a.ndim == 1 else dy) @ np.swapaxes(b, -1, -2)


def _matmul_db(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.ndim == 1:
        return a[:, None] * dy[..., None, :] if b.ndim > 1 else a * dy
    if b.ndim == 1:
        return np.sum(a * dy[..., None], axis=tuple(range(a.ndim - 1)))
    return np.swapaxes(a, -1, -2) @ dy


def _unbroadcast(dx: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums `dx` over the axes along which an input of `shape` was broadcast."""
    if dx.shape == shape:
        return dx
    if dx.ndim > len(shape):
        dx = dx.sum(axis=tuple(range(dx.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and dx.shape[i] != 1)
    dx = dx.sum(axis=stretched, keepdims=True) if stretched else dx
    return np.broadcast_to(dx, shape) if dx.shape != shape else dx


def _has_array(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, np.ndarray | list) for part in parts)


# Rules for functions.


def _plainly(function: str, options: dict[str, Any]) -> None:
    """Refuses options that would change the result unseen by its gradient. NumPy's own methods give defaults."""
    if named := [name for name, value in options.items() if value is not None and value is not np._NoValue]:
        raise InvalidType(f"np.{function}: {named[0]}= is not differentiable; call it with axis and keepdims alone")


def _sum(x: Var, axis: Any = None, keepdims: bool = False, **options: Any) -> Var:
    _plainly("sum", options)
    shape = x.value.shape

    def vjp(dy: np.ndarray) -> tuple[np.ndarray]:
        dy = dy if keepdims or axis is None else np.expand_dims(dy, axis)
        return (np.broadcast_to(dy, shape),)

    return record(np.sum(x.value, axis=axis, keepdims=keepdims), (x,), vjp)


def _mean(x: Var, axis: Any = None, keepdims: bool = False, **options: Any) -> Var:
    _plainly("mean", options)
    total = _sum(x, axis, keepdims)
    return total * x.dtype.type(total.size / x.size)


def _max(x: Var, axis: Any = None, keepdims: bool = False, **options: Any) -> Var:
    _plainly("max", options)
    full = np.max(x.value, axis=axis, keepdims=True)
    chosen = x.value == full
    share = chosen / chosen.sum(axis=axis, keepdims=True, dtype=x.dtype)  # ties share the gradient
    y = full if keepdims else np.max(x.value, axis=axis)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray]:
        return (np.reshape(dy, full.shape) * share,)

    return record(y, (x,), vjp)


def _moved(function: Callable, inverse: Callable) -> Callable:
    """A rule for a function that only moves elements; `inverse(dy, shape of x, *args)` moves them back."""

    def rule(x: Var, *args: Any, **kwargs: Any) -> Var:
        shape = x.value.shape
        return record(function(x.value, *args, **kwargs), (x,), lambda dy: (inverse(dy, shape, *args, **kwargs),))

    return rule


def _reshaped(function: Callable) -> Callable:
    return _moved(function, lambda dy, shape, *args, **kwargs: dy.reshape(shape))


def _cumsum(x: Var, axis: int | None = None) -> Var:
    if axis is None:
        return _cumsum(x.reshape(-1), 0)
    return record(np.cumsum(x.value, axis), (x,), lambda dy: (np.flip(np.cumsum(np.flip(dy, axis), axis), axis),))


def _concatenate(xs: Sequence[Any], axis: int = 0) -> Var:
    values = [value_of(x) for x in xs]
    ends = np.cumsum([v.shape[axis] for v in values])[:-1]
    return record(np.concatenate(values, axis), xs, lambda dy: np.split(dy, ends, axis))


def _stack(xs: Sequence[Any], axis: int = 0) -> Var:
    values = [value_of(x) for x in xs]
    return record(np.stack(values, axis), xs, lambda dy: [np.take(dy, i, axis) for i in range(len(values))])


def _split(x: Var, sections: Any, axis: int = 0) -> list[Var]:
    length = x.shape[axis]
    ends = np.split(np.arange(length), sections)
    lead = (slice(None),) * (axis % x.ndim)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ends])]).tolist()
    return [x[(*lead, slice(a, b))] for a, b in itertools.pairwise(starts)]


def _where(condition: Any, a: Any, b: Any) -> Var:
    va, vb = value_of(a), value_of(b)
    condition = value_of(condition)

    def vjp(dy: np.ndarray) -> tuple[Any, Any]:
        da = _unbroadcast(np.where(condition, dy, 0), va.shape) if isinstance(a, Var) else None
        db = _unbroadcast(np.where(condition, 0, dy), vb.shape) if isinstance(b, Var) else None
        return da, db

    return record(np.where(condition, va, vb), (a, b), vjp)


def _take(x: Var, indices: Any, axis: int | None = None, **_: Any) -> Var:
    if axis is None:
        return np.reshape(x, (-1,))[np.asarray(indices)]
    return x[(slice(None),) * (axis % x.ndim) + (np.asarray(indices),)]


def _take_along_axis(x: Var, indices: np.ndarray, axis: int = -1) -> Var:
    grid = list(np.ogrid[tuple(slice(n) for n in x.shape)])  # the other axes of indices broadcast
    grid[axis % x.ndim] = indices
    return x[tuple(np.broadcast_arrays(*grid))]


def _pad(x: Var, pad_width: Any, mode: str = "constant", **kwargs: Any) -> Var:
    if mode != "constant":
        raise InvalidValue(f"np.pad: only mode='constant' is differentiable, got {mode!r}")
    widths = np.broadcast_to(np.asarray(pad_width), (x.ndim, 2))
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return record(np.pad(x.value, pad_width, **kwargs), (x,), lambda dy: (dy[inner],))


def _einsum(subscripts: str, *operands: Any, **_: Any) -> Var:
    if "." in subscripts or "->" not in subscripts:
        raise InvalidValue(f"np.einsum: give explicit subscripts with '->' and without '...', got {subscripts!r}")
    left, out = subscripts.replace(" ", "").split("->")
    terms = left.split(",")
    if any(len(set(term)) != len(term) for term in terms):
        raise InvalidValue(f"np.einsum: a label twice in one operand has no gradient here, got {subscripts!r}")
    values = [value_of(x) for x in operands]

    def grad(i: int, dy: np.ndarray) -> np.ndarray:
        others = [j for j in range(len(terms)) if j != i]
        known = set(out).union(*(terms[j] for j in others))
        kept = "".join(label for label in terms[i] if label in known)  # the rest was summed out alone
        spec = ",".join([out, *(terms[j] for j in others)]) + "->" + kept
        dx = np.einsum(spec, dy, *(values[j] for j in others), optimize=True)
        shape = [n if label in known else 1 for label, n in zip(terms[i], values[i].shape, strict=True)]
        return np.broadcast_to(dx.reshape(shape), values[i].shape)

    def vjp(dy: np.ndarray) -> list[np.ndarray | None]:
        return [grad(i, dy) if isinstance(x, Var) else None for i, x in enumerate(operands)]

    return record(np.einsum(subscripts, *values, optimize=True), operands, vjp)


_FUNCTIONS: dict[Any, Callable] = {
    np.sum: _sum,
    np.mean: _mean,
    np.max: _max,
    np.reshape: _reshaped(np.reshape),
    np.ravel: _reshaped(np.ravel),
    np.expand_dims: _reshaped(np.expand_dims),
    np.squeeze: _reshaped(np.squeeze),
    np.transpose: _moved(
        np.transpose, lambda dy, shape, axes=None: np.transpose(dy, None if axes is None else np.argsort(np.mod(axes, dy.ndim)))
    ),
    np.swapaxes: _moved(np.swapaxes, lambda dy, shape, a, b: np.swapaxes(dy, a, b)),
    np.moveaxis: _moved(np.moveaxis, lambda dy, shape, a, b: np.moveaxis(dy, b, a)),
    np.broadcast_to: _moved(np.broadcast_to, lambda dy, shape, *args, **kwargs: _unbroadcast(dy, shape)),
    np.cumsum: _cumsum,
    np.concatenate: _concatenate,
    np.stack: _stack,
    np.split: _split,
    np.where: _where,
    np.take: _take,
    np.take_along_axis: _take_along_axis,
    np.pad: _pad,
    np.einsum: _einsum,
    np.zeros_like: lambda x, **kwargs: np.zeros_like(x.value, **kwargs),
    np.ones_like: lambda x, **kwargs: np.ones_like(x.value, **kwargs),
    np.argmax: lambda x, **kwargs: np.argmax(x.value, **kwargs),
    np.argsort: lambda x, **kwargs: np.argsort(x.value, **kwargs),
    np.shape: lambda x: x.shape,
    np.ndim: lambda x: x.ndim,
}


def _supported() -> str:
    return ", ".join(sorted(f.__name__ for f in (*_UFUNC_VJPS, *_FUNCTIONS)))
