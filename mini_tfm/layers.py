"""The two layers that everything is made of, each beside its shapes: a linear layer and a norm.

A layer here knows its name and its shapes and holds no weights: it asks the pass for them. `shapes()` gives what a model
file must hold, and how each weight begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from . import ops
from .config import Config
from .context import Pass
from .weights import Array


class Shape(NamedTuple):
    """A weight's name and shape, and its initial values: normal with a standard deviation, or one number everywhere."""

    name: str
    shape: tuple[int, ...]
    std: float | None = None
    fill: float = 0.0


class StepProduct(NamedTuple):
    """A product of every decoding step, by the name that its packed weight has: with one matrix, or several side by side."""

    name: str
    linears: tuple[Linear, ...]


class Linear:
    """x W + b, W (d_in, d_out)."""

    def __init__(self, config: Config, name: str, d_in: int, d_out: int):
        self.weight, self.bias = name + ".weight", name + ".bias" if config.bias else None
        self.d_in, self.d_out = d_in, d_out

    def shapes(self) -> Iterator[Shape]:
        yield Shape(self.weight, (self.d_in, self.d_out), std=self.d_in**-0.5)
        if self.bias is not None:
            yield Shape(self.bias, (self.d_out,))

    def __call__(self, x: Array, p: Pass, activation: str | None = None, residual: Array | None = None) -> Array:
        bias = None if self.bias is None else p.value(self.bias)
        return p.weights[self.weight].linear(x, bias, activation=activation, residual=residual)


class Norm:
    """Layer norm (arXiv 1607.06450) or RMS norm (arXiv 1910.07467) of the last axis."""

    def __init__(self, config: Config, name: str):
        self.weight, self.bias = name + ".weight", name + ".bias" if config.norm == "layer" else None
        self.d, self.eps, self.kind = config.d_model, config.norm_eps, config.norm

    def shapes(self) -> Iterator[Shape]:
        yield Shape(self.weight, (self.d,), fill=1.0)
        if self.bias is not None:
            yield Shape(self.bias, (self.d,))

    def __call__(self, x: Array, p: Pass) -> Array:
        return ops.norm(x, p.value(self.weight), None if self.bias is None else p.value(self.bias), self.eps, self.kind)
