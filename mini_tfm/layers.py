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
    """A product of every decoding step, by the name that its packed weight has: with one matrix, or several side by side.

    gate: the matrix of a second product of the same shape, of which the activation scales the first.
    """

    name: str
    linears: tuple[Linear, ...]
    gate: Linear | None = None


class Linear:
    """x W + b, W (d_in, d_out). bias: whether it has a b; None: the last part of its name says so (see `Config.bias`)."""

    def __init__(self, config: Config, name: str, d_in: int, d_out: int, *, bias: bool | None = None):
        has_bias = config.has_bias(name.rpartition(".")[2]) if bias is None else bias
        self.weight, self.bias = name + ".weight", name + ".bias" if has_bias else None
        self.d_in, self.d_out = d_in, d_out

    def shapes(self) -> Iterator[Shape]:
        yield Shape(self.weight, (self.d_in, self.d_out), std=self.d_in**-0.5)
        if self.bias is not None:
            yield Shape(self.bias, (self.d_out,))

    def __call__(
        self, x: Array, p: Pass, activation: str | None = None, residual: Array | None = None, gate: Linear | None = None
    ) -> Array:
        """residual + activation(x W + b), or with a gate residual + activation(gate(x)) * (x W + b)."""
        weight, bias = p.weights[self.weight], None if self.bias is None else p.value(self.bias)
        dropped = p.dropout.adapted
        if gate is None:
            return weight.linear(x, bias, activation=activation, residual=residual, dropped=dropped)
        beside, gate_bias = p.weights[gate.weight], None if gate.bias is None else p.value(gate.bias)
        return weight.linear(x, bias, activation=activation, residual=residual, gate=beside, gate_bias=gate_bias, dropped=dropped)


class Norm:
    """Layer norm (arXiv 1607.06450) or RMS norm (arXiv 1910.07467) of the last axis, of d_model numbers or of d."""

    def __init__(self, config: Config, name: str, *, kind: str | None = None, d: int | None = None):
        self.d, self.eps, self.kind = d or config.d_model, config.norm_eps, kind or config.norm
        self.weight, self.bias = name + ".weight", name + ".bias" if self.kind == "layer" else None

    def shapes(self) -> Iterator[Shape]:
        yield Shape(self.weight, (self.d,), fill=1.0)
        if self.bias is not None:
            yield Shape(self.bias, (self.d,))

    def __call__(self, x: Array, p: Pass) -> Array:
        return ops.norm(x, p.value(self.weight), None if self.bias is None else p.value(self.bias), self.eps, self.kind)
