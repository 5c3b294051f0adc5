"""LoRA (arXiv 2106.09685): small matrices beside the weights of linear layers, trained in their place.

A layer with an adapter computes x W + scale (x A^T) B^T + b, scale = alpha / r (section 4.1). A (r, d_in) begins as random numbers, B
(d_out, r) as zeros, so a model with new adapters is the model it was, bit for bit. They are weights like any other
(`weights.LORA`): whoever trains, saves or names weights finds them there, and the layers know nothing of them.

`checkpoint/peft.py` reads and writes folders of adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .config import Config
from .errors import InvalidType, InvalidValue, shown
from .files.reading import ram_bytes
from .model import Model, weight_shapes
from .options import plain
from .weights import LORA, LORA_SCALE, Weights, arrays_of

ALL_LINEAR = "all-linear"
USUAL = ("q", "v")  # of every attention, by our names: the paper's choice (section 4.2) for the same number of parameters
MAX_RANK = 1 << 16
_A_LAYER = re.compile(r"(?:en|de)coder\.\d+\..+")


def linear_layers(config: Config) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the layers that adapters are for, by name: those of attention and the feed-forward networks."""
    layers = {name.removesuffix(".weight"): shape for name, shape in weight_shapes(config).items() if _A_LAYER.fullmatch(name)}
    return {name: shape for name, shape in layers.items() if len(shape) == 2}


def adapted_layers(weights: Mapping[str, Any]) -> list[str]:
    """The layers that have an adapter."""
    return [name[len(LORA) : -len(".a")] for name in weights if name.startswith(LORA) and name.endswith(".a")]


def adapter_shapes(layers: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of adapters beside these layers."""
    shapes: dict[str, tuple[int, ...]] = {LORA_SCALE: (1,)}
    for layer, (d_in, d_out) in layers.items():
        shapes |= {f"{LORA}{layer}.a": (rank, d_in), f"{LORA}{layer}.b": (d_out, rank)}
    return shapes


def shape_faults(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What keeps tensors called lora.*, of these shapes, from being adapters of one rank of such a model."""
    given = {name: shape for name, shape in shapes.items() if name.startswith(LORA)}
    layers = linear_layers(config)
    ranks = [shape[0] for name, shape in given.items() if name.endswith(".a") and len(shape) == 2 and shape[0]]
    with_one = {layer for layer in layers if f"{LORA}{layer}.a" in given or f"{LORA}{layer}.b" in given}
    expected = adapter_shapes({layer: layers[layer] for layer in layers if layer in with_one}, ranks[0] if ranks else 1) if given else {}
    for name in (*expected, *(name for name in given if name not in expected)):
        if name not in expected:
            yield f"tensor {name!r} is no adapter of a layer of this architecture"
        elif name not in given:
            yield f"tensor {name!r} is missing"
        elif given[name] != expected[name]:
            yield f"tensor {name!r}: expected shape {expected[name]}, got {given[name]}"


def checked_scale(rank: Any, alpha: Any) -> tuple[int, float]:
    """The rank, and alpha / rank. Raises InvalidType, InvalidValue naming the argument."""
    rank, alpha = plain(rank), plain(alpha)
    if type(rank) is not int:
        raise InvalidType(f"rank: expected an integer from 1 to {MAX_RANK}, got {shown(rank)}")
    if not 1 <= rank <= MAX_RANK:
        raise InvalidValue(f"rank: expected an integer from 1 to {MAX_RANK}, got {shown(rank)}")
    if type(alpha) not in (int, float):
        raise InvalidType(f"alpha: expected a number above 0, got {shown(alpha)}")
    if not 0 < alpha <= 1e30:
        raise InvalidValue(f"alpha: expected a number above 0, at most 1e30, got {shown(alpha)}")
    return rank, alpha / rank


def check_none(model: Model) -> None:
    """Raises InvalidValue where the model has adapters already, for it has one set of them, or is packed."""
    check_not_packed(model)
    if layers := adapted_layers(model.weights):
        raise InvalidValue(
            f"model: has adapters already, beside {len(layers)} layers; merge_lora() makes them part of the weights, and a model loaded"
            " again has none"
        )


def check_not_packed(model: Model) -> None:
    """Raises InvalidValue for a model whose matrices are packed: nothing can be added to them, or trained."""
    if model.precision is not None:
        raise InvalidValue(
            f"model: is packed in {model.precision}; load what it was packed from in float32, merge or train that, and pack it then"
        )


def chosen_layers(config: Config, targets: Any, names: Mapping[str, str]) -> list[str]:
    """The layers that `targets` mean: see `Transformer.add_lora`. names: what the model's family calls each layer, where it has one.

    Raises InvalidType, InvalidValue naming every target that fits no layer.
    """
    called = {layer: (layer, names.get(layer, layer)) for layer in linear_layers(config)}
    if targets == ALL_LINEAR:
        return list(called)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InvalidValue(f"targets: {shown(targets)} is no regular expression: {error}") from error
        fitting = {targets: {layer for layer in called if any(map(pattern.fullmatch, called[layer]))}}
    else:
        targets = USUAL if targets is None else targets
        if not isinstance(targets, tuple | list) or not targets or not all(isinstance(one, str) and one for one in targets):
            raise InvalidType(f"targets: expected ends of layers' names, a regular expression, 'all-linear' or None, got {shown(targets)}")
        fitting = {one: {layer for layer in called if any(f".{name}".endswith(f".{one}") for name in called[layer])} for one in targets}
    if unknown := [shown(one) for one, found in fitting.items() if not found]:
        ends = ", ".join(dict.fromkeys(theirs.rpartition(".")[2] for _, theirs in called.values()))
        hint = f"; a text is a pattern of whole names, for ends of names give a tuple: ({unknown[0]},)" if isinstance(targets, str) else ""
        raise InvalidValue(f"targets: {', '.join(unknown)} fits no layer that an adapter can be beside; the names end in {ends}{hint}")
    return [layer for layer in called if any(layer in found for found in fitting.values())]


def add_adapters(model: Model, layers: list[str], rank: int, scale: float, seed: int) -> None:
    """Puts new adapters beside these layers: A from -1 to 1 over the root of d_in, as PEFT begins it, B of zeros."""
    shapes = linear_layers(model.config)
    chosen = {layer: shapes[layer] for layer in layers}
    wanted = sum(math.prod(shape) for shape in adapter_shapes(chosen, rank).values()) * model.dtype.itemsize
    if wanted > ram_bytes():
        raise InvalidValue(f"rank: adapters of rank {rank} take {wanted} bytes, more than this machine's RAM holds; choose a lower rank")
    made: dict[str, np.ndarray] = {LORA_SCALE: np.full(1, scale, model.dtype)}
    for layer, (d_in, d_out) in chosen.items():
        name = f"{LORA}{layer}"
        drawn = np.random.default_rng([seed, *name.encode()]).random((rank, d_in), np.float32)
        made |= {f"{name}.a": ((2 * drawn - 1) * d_in**-0.5).astype(model.dtype), f"{name}.b": np.zeros((d_out, rank), model.dtype)}
    model.weights.update(made)


def merged(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a model whose adapters are added to them; what has none is not copied."""
    return dict(arrays_of(Weights(weights), (name for name in weights if not name.startswith(LORA))))


def merge(model: Model) -> None:
    """Adds the adapters of a model to its weights, in place, and takes them away. An interrupt at any moment leaves the same sums.

    Without adapters the weights stay what they are. Raises InvalidValue for adapters beside matrices that are packed.
    """
    adapters = sorted(name for name in model.weights if name.startswith(LORA))  # their scale is the last, and A comes before B
    if not adapters:
        return
    check_not_packed(model)
    model.weights.update(merged(model.weights) | {name: np.zeros(1, model.dtype) for name in adapters if name == LORA_SCALE})
    for name in adapters:
        del model.weights[name]
