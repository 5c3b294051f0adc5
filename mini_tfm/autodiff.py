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
import operator
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from .errors import InvalidType, InvalidValue

# Falls: parents are always older than children, so that whoever holds the least number in a heap is the newest.
_order = itertools.count(0, -1)


class Var(NDArrayOperatorsMixin):
    """An array that is differentiated through.

    value: the array. grad: after `backward`, the gradient of a leaf, in the shape and dtype of `value`;
    a leaf made with a `grad` array has the gradient ADDED to it (parameters: views of one flat arena).
    """

    # _rule(var, dy, waiting) hands gradients to the _parents, which may be plain values, too; None: a leaf.
    __slots__ = ("_order", "_owns_grad", "_parents", "_rule", "_saved", "grad", "value")

    def __init__(self, value: Any, grad: np.ndarray | None = None):
        self.value = np.asarray(value)
        if self.value.dtype.kind != "f":
            raise InvalidType(f"value: expected a floating-point array, got {self.value.dtype}")
        if grad is not None and (grad.shape != self.value.shape or grad.dtype != self.value.dtype):
            raise InvalidValue(f"grad: expected {self.value.shape} {self.value.dtype}, got {grad.shape} {grad.dtype}")
        self.grad = grad
        self._owns_grad = grad is not None
        self._parents: tuple[Any, ...] = ()
        self._rule: Callable | None = None
        self._saved: Any = None
        self._order = next(_order)

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    dtype = property(lambda self: self.value.dtype)
    T = property(lambda self: _transpose(self))

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
        return _new(self.value[index], _send_item, (self,), index)

    def reshape(self, *shape: Any) -> Any:
        return _new(self.value.reshape(*shape), _send_reshaped, (self,))

    def transpose(self, *axes: Any) -> Any:
        return _transpose(self, (axes[0] if len(axes) == 1 else axes) or None)

    def swapaxes(self, a: int, b: int) -> Any:
        return _new(self.value.swapaxes(a, b), _send_swapped, (self,), (a, b))

    def sum(self, axis: Any = None, keepdims: bool = False) -> Var:
        y: Any = np.add.reduce(self.value, axis=axis, keepdims=keepdims)  # type: ignore[call-overload]
        return _new(y, _send_spread, (self,), (axis, keepdims, 1))

    def mean(self, axis: Any = None, keepdims: bool = False) -> Var:
        return _mean(self, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Var:
        return _max(self, axis, keepdims)

    def detach(self) -> np.ndarray:
        """The plain array: gradients stop here."""
        return self.value

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        rules = _UFUNC_VJPS.get(ufunc)
        if method != "__call__" or kwargs:
            if method == "reduce" and ufunc in (np.add, np.maximum):
                return (_sum if ufunc is np.add else _max)(*inputs, **kwargs)
            given = f"{method} " + ", ".join(f"{name}=" for name in kwargs)
            raise InvalidType(f"np.{ufunc.__name__}: {given.strip()} is not differentiable; use a plain call that returns a new array")
        if rules is None:
            raise InvalidType(f"np.{ufunc.__name__}: no gradient is known; supported: {_supported()}")
        if len(inputs) == 1:
            y = ufunc(self.value)
            return _new(y, _send_unary, inputs, rules[0]) if rules else y
        a, b = inputs
        y = ufunc(a.value if type(a) is Var else a, b.value if type(b) is Var else b)
        return _new(y, _send_binary, inputs, rules) if rules else y  # comparisons and the like: no gradient, plain result

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        rule = _FUNCTIONS.get(function)
        if rule is None:
            raise InvalidType(f"np.{function.__name__}: no gradient is known; supported: {_supported()}")
        return rule(*args, **kwargs)


def value_of(x: Any) -> Any:
    """The plain array of a Var; anything else as it is."""
    return x.value if isinstance(x, Var) else x


def is_traced(*xs: Any) -> bool:
    for x in xs:  # noqa: SIM110  # a generator would take twice as long, and this is asked by every operation
        if isinstance(x, Var):
            return True
    return False


def record(value: np.ndarray, parents: Sequence[Any], vjp: Callable, *, fresh: bool = False) -> Var:
    """A new Var. `vjp(dy)` gives one gradient a parent, or None where there is none (or it was added already).

    fresh: what it gives are new arrays that nobody else holds, so that others may be added to them in place.
    """
    return _new(value, _send_fresh if fresh else _send_recorded, tuple(parents), vjp)


def gathered(x: Any) -> np.ndarray | None:
    """The gradient of `x` so far, if it may be added to in place: that of a parameter, for one, in its arena."""
    return x.grad if isinstance(x, Var) and x._owns_grad else None


def backward(*outputs: Var, grads: Sequence[np.ndarray | None] | None = None) -> None:
    """Sends gradients from `outputs` (default: ones) to every leaf below them; leaves keep theirs in `.grad`.

    What was remembered on the way is forgotten as it is used: a graph is walked once.
    """
    waiting: list[tuple[int, Var]] = []
    for output, dy in zip(outputs, grads or [None] * len(outputs), strict=True):
        _give(output, np.ones_like(output.value) if dy is None else np.asarray(dy), waiting)
    while waiting:
        node = heappop(waiting)[1]
        node._rule(node, node.grad, waiting)  # type: ignore[misc]
        node._rule = _spent
        node._parents = ()
        node._saved = node.grad = None


def _new(value: Any, rule: Callable, parents: tuple[Any, ...], saved: Any = None) -> Var:
    out = _blank(Var)
    out.value = value if type(value) is _ndarray else np.asarray(value)
    out.grad = None
    out._owns_grad = False
    out._rule = rule
    out._parents = parents
    out._saved = saved
    out._order = next(_order)
    return out


_blank, _ndarray = object.__new__, np.ndarray


def _give(x: Var, dx: Any, waiting: list[tuple[int, Var]]) -> None:
    """Adds `dx` to the gradient of `x`. The first gradient is kept without a copy, so it is never written to."""
    if dx.dtype is not x.value.dtype:
        dx = dx.astype(x.value.dtype, copy=False)
    grad = x.grad
    if grad is None:
        x.grad = dx
        if x._rule is not None:
            heappush(waiting, (x._order, x))
    elif x._owns_grad:
        x.grad += dx
    else:
        x.grad = grad + dx
        x._owns_grad = True


def _spent(node: Var, dy: np.ndarray, waiting: Any) -> None:
    raise InvalidValue("backward: this graph was already used and freed; add up the losses, then call backward once")


# How a gradient goes on.


def _send_recorded(node: Var, dy: np.ndarray, waiting: Any) -> None:
    for parent, dx in zip(node._parents, node._saved(dy), strict=True):
        if dx is not None and type(parent) is Var:
            _give(parent, dx, waiting)


def _send_fresh(node: Var, dy: np.ndarray, waiting: Any) -> None:
    for parent, dx in zip(node._parents, node._saved(dy), strict=True):
        if dx is not None and type(parent) is Var:
            first = parent.grad is None
            _give(parent, dx, waiting)
            parent._owns_grad |= first


def _send_unary(node: Var, dy: np.ndarray, waiting: Any) -> None:
    (x,) = node._parents
    _give(x, node._saved(dy, node.value, x.value), waiting)


def _send_binary(node: Var, dy: np.ndarray, waiting: Any) -> None:
    x, z = node._parents
    a, b = x.value if type(x) is Var else x, z.value if type(z) is Var else z
    if type(x) is Var:
        dx = node._saved[0](dy, node.value, a, b)
        _give(x, dx if dx.shape == a.shape else _unbroadcast(dx, a.shape), waiting)
    if type(z) is Var:
        dz = node._saved[1](dy, node.value, a, b)
        _give(z, dz if dz.shape == b.shape else _unbroadcast(dz, b.shape), waiting)


def _send_item(node: Var, dy: np.ndarray, waiting: Any) -> None:
    """Into the parent's gradient where it lies: many parts of an array cost no more than the array."""
    (x,), index = node._parents, node._saved
    fresh = x.grad is None
    if fresh:
        _give(x, np.zeros(x.value.shape, x.value.dtype), waiting)
    elif not x._owns_grad:
        x.grad = x.grad.copy()
    x._owns_grad = True
    for part in index if type(index) is tuple else (index,):
        if isinstance(part, _ROWS):
            np.add.at(x.grad, index, dy)  # an array may name a row twice
            return
    if fresh:
        x.grad[index] = dy
    else:
        x.grad[index] += dy


_ROWS = (list, np.ndarray)


def _send_reshaped(node: Var, dy: np.ndarray, waiting: Any) -> None:
    (x,) = node._parents
    _give(x, dy.reshape(x.value.shape), waiting)


def _send_transposed(node: Var, dy: np.ndarray, waiting: Any) -> None:
    axes = node._saved
    if axes is not None:
        axes = [axis % dy.ndim for axis in axes]
        axes = [axes.index(i) for i in range(dy.ndim)]
    _give(node._parents[0], dy.transpose(axes), waiting)


def _send_swapped(node: Var, dy: np.ndarray, waiting: Any) -> None:
    _give(node._parents[0], dy.swapaxes(*node._saved), waiting)


def _send_spread(node: Var, dy: np.ndarray, waiting: Any) -> None:
    """To everything that a sum over some axes was of, or a mean of n."""
    (x,), (axis, keepdims, n) = node._parents, node._saved
    dy = dy if n == 1 else dy / n
    if axis is not None and not keepdims:
        shape = list(x.value.shape)
        for i in axis if type(axis) is tuple else (axis,):
            shape[i] = 1
        dy = dy.reshape(shape)
    if x.grad is None:
        dx = np.empty(x.value.shape, dy.dtype)
        dx[...] = dy
        dy = dx
    _give(x, dy, waiting)


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
    # A tie goes to a. Where either is NaN, so is the result, and both get dy.
    np.maximum: (lambda dy, y, a, b: dy * ~(a < b), lambda dy, y, a, b: dy * ~(a >= b)),
    np.minimum: (lambda dy, y, a, b: dy * ~(a > b), lambda dy, y, a, b: dy * ~(a <= b)),
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


def _operator(name: str, ufunc: Any) -> None:
    """`x + y` and the like without the detour through NumPy, where the other side is a Var, an array or a number."""
    rules, operate = _UFUNC_VJPS[ufunc], getattr(operator, name)

    def forward(self: Var, other: Any) -> Any:
        if type(other) is Var:
            return _new(operate(self.value, other.value), _send_binary, (self, other), rules)
        if isinstance(other, _NUMBERS):
            return _new(operate(self.value, other), _send_binary, (self, other), rules)
        return ufunc(self, other)

    def reflected(self: Var, other: Any) -> Any:
        if isinstance(other, _NUMBERS):
            return _new(operate(other, self.value), _send_binary, (other, self), rules)
        return ufunc(other, self)

    setattr(Var, f"__{name}__", forward)
    setattr(Var, f"__r{name}__", reflected)


_NUMBERS = (np.ndarray, np.number, float, int)
for _name, _ufunc in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.divide,
    "pow": np.power,
    "matmul": np.matmul,
}.items():
    _operator(_name, _ufunc)


def _matmul_da(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if b.ndim == 1:
        return dy[..., None] * b
    return (dy[..., None, :] if a.ndim == 1 else dy) @ b.swapaxes(-1, -2)


def _matmul_db(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.ndim == 1:
        return a[:, None] * dy[..., None, :] if b.ndim > 1 else a * dy
    if b.ndim == 1:
        return np.sum(a * dy[..., None], axis=tuple(range(a.ndim - 1)))
    return a.swapaxes(-1, -2) @ dy


def _unbroadcast(dx: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums `dx` over the axes along which an input of `shape` was broadcast."""
    if more := dx.ndim - len(shape):
        dx = np.add.reduce(dx, axis=0 if more == 1 else tuple(range(more)))
    if dx.shape == shape:
        return dx
    stretched = tuple([i for i, n in enumerate(shape) if n == 1 and dx.shape[i] != 1])
    dx = np.add.reduce(dx, axis=stretched, keepdims=True) if stretched else dx
    return np.broadcast_to(dx, shape) if dx.shape != shape else dx


# Rules for functions.


def _plainly(function: str, options: dict[str, Any]) -> None:
    """Refuses options that would change the result unseen by its gradient. NumPy's own methods give defaults."""
    if named := [name for name, value in options.items() if value is not None and value is not np._NoValue]:
        raise InvalidType(f"np.{function}: {named[0]}= is not differentiable; call it with axis and keepdims alone")


def _sum(x: Var, axis: Any = None, keepdims: bool = False, **options: Any) -> Var:
    _plainly("sum", options)
    return x.sum(axis, keepdims)


def _mean(x: Var, axis: Any = None, keepdims: bool = False, **options: Any) -> Var:
    _plainly("mean", options)
    y = np.mean(x.value, axis=axis, keepdims=keepdims)
    return _new(y, _send_spread, (x,), (axis, keepdims, x.size // max(1, np.size(y))))


def _max(x: Var, axis: Any = None, keepdims: bool = False, **options: Any) -> Var:
    _plainly("max", options)
    full = np.max(x.value, axis=axis, keepdims=True)
    chosen = x.value == full
    share = chosen / chosen.sum(axis=axis, keepdims=True, dtype=x.dtype)  # ties share the gradient
    return record(full if keepdims else np.max(x.value, axis=axis), (x,), lambda dy: (np.reshape(dy, full.shape) * share,))


def _reshaped(function: Callable) -> Callable:
    """A rule for a function that only gives the elements another shape."""
    return lambda x, *args, **kwargs: _new(function(x.value, *args, **kwargs), _send_reshaped, (x,))


def _transpose(x: Var, axes: Any = None) -> Var:
    return _new(x.value.transpose(axes), _send_transposed, (x,), axes)


def _moveaxis(x: Var, source: Any, destination: Any) -> Var:
    return record(np.moveaxis(x.value, source, destination), (x,), lambda dy: (np.moveaxis(dy, destination, source),))


def _broadcast_to(x: Var, shape: Any, **_: Any) -> Var:
    return record(np.broadcast_to(x.value, shape), (x,), lambda dy: (_unbroadcast(dy, x.value.shape),))


def _cumsum(x: Var, axis: int | None = None) -> Var:
    if axis is None:
        return _cumsum(x.reshape(-1), 0)
    return record(np.cumsum(x.value, axis), (x,), lambda dy: (np.flip(np.cumsum(np.flip(dy, axis), axis), axis),))


def _concatenate(xs: Sequence[Any], axis: int = 0) -> Var:
    values = [x.value if type(x) is Var else x for x in xs]
    return _new(np.concatenate(values, axis), _send_parts, tuple(xs), axis)


def _send_parts(node: Var, dy: np.ndarray, waiting: Any) -> None:
    start, axis = 0, node._saved
    dy = dy if axis == 0 else dy.swapaxes(0, axis)
    for x in node._parents:
        if type(x) is Var:
            stop = start + x.value.shape[axis]
            dx = dy[start:stop]
            _give(x, dx if axis == 0 else dx.swapaxes(0, axis), waiting)
        else:
            stop = start + np.shape(x)[axis]
        start = stop


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
        raise InvalidValue(f"np.einsum: a label repeated in one operand is not differentiable, got {subscripts!r}")
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
    np.transpose: _transpose,
    np.swapaxes: lambda x, axis1, axis2: x.swapaxes(axis1, axis2),
    np.moveaxis: _moveaxis,
    np.broadcast_to: _broadcast_to,
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
