"""Weights packed for products with plain arrays, kept as long as the model's are what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from .layers import StepProduct
from .model import Model
from .weights import Weight, Weights

WORTH_PACKING = 256  # tokens read at once, from which packing an encoder's weights pays even if they are never read again

# Of each model, by part: what the weights were, and what was packed of them
_kept: WeakKeyDictionary[Model, dict[str, tuple[Any, dict[str, Any]]]] = WeakKeyDictionary()


def with_packed(
    model: Model,
    part: str,
    products: Sequence[StepProduct],
    more_of: Callable[[Weights], dict[str, Any]] = lambda weights: {},
    more_state: Any = (),
) -> Weights:
    """The weights of a model that is not packed, and packed ones for these products of a part of it.

    They are kept for the next call, as long as the weights are what they were: a checksum tells, in the time of reading them once,
    or none for a mapped file. more_of: packs more by name; more_state: tells whether that is what it was.
    """
    weights = Weights(model.weights)
    names = [linear.weight for product in products for linear in (*product.linears, product.gate) if linear is not None]
    state = more_state, [(name, weights[name].checksum()) for name in names]
    parts = _kept.setdefault(model, {})
    kept, packed = parts.get(part, (None, {}))
    if kept != state:
        more = more_of(weights)
        packed = {
            name: weights.pack([linear.weight for linear in linears], gate=None if gate is None else gate.weight)
            for name, linears, gate in products
        } | more
        parts[part] = state, packed
    for name, one in packed.items():
        weights[name] = Weight(model.weights.get(name), one, weights.adapter(name))
    for name, linears, _ in products:
        bias = weights.fused_bias([one.bias for one in linears], [one.d_out for one in linears], model.dtype) if len(linears) > 1 else None
        if bias is not None:
            weights[name + ".bias"] = Weight(bias)
    return weights


def encoder_weights(model: Model) -> Weights:
    """The model's weights, those that the encoder multiplies with packed too. Packing takes about as long as reading a hundred tokens."""
    assert model.encoder is not None
    return Weights(model.weights) if model.precision is not None else with_packed(model, "encoder", list(model.encoder.products()))


def weights_to_encode(model: Model, n_tokens: int) -> Weights:
    """Those by which an encoder that reads so many tokens is done first: packed ones have the same bits."""
    return encoder_weights(model) if n_tokens >= WORTH_PACKING else Weights(model.weights)
