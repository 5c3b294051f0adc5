"""From the outputs at the tokens of a text to the one vector of the text: Sentence-BERT's pooling (arXiv 1908.10084)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .errors import InvalidType, InvalidValue, shown

MODES = ("cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last")
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"identity": lambda x: x, "tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A layer behind the pooling: weight (d_in, d_out), bias (d_out,) or None, activation "identity", "tanh" or "relu"."""

    weight: np.ndarray
    bias: np.ndarray | None = None
    activation: str = "tanh"


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a model that was trained to embed texts does it. Raises InvalidValue naming the field at fault.

    modes: of the outputs at a text's tokens the first ("cls"), the last, the largest or mean of each number, the sum over the root
    of the length ("mean_sqrt_len"), the mean weighted by 1, 2, 3... ; of several, their vectors side by side. dense: layers
    behind it. normalize: whether vectors get length 1. max_tokens: of a text, the rest is cut off. lowercase: text is. prompts:
    what is put before a text, by name; default_prompt: the name of the one that is there when none is asked for.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    dense: tuple[Dense, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if not isinstance(self.modes, tuple) or not self.modes or not set(self.modes) <= set(MODES):
            faults.append(f"modes: expected some of {', '.join(MODES)}, got {shown(self.modes)}")
        for name in ("normalize", "lowercase"):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name}: expected True or False, got {shown(getattr(self, name))}")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            faults.append(f"max_tokens: expected an integer of at least 1 or None, got {shown(self.max_tokens)}")
        if not isinstance(self.prompts, Mapping) or not all(isinstance(text, str) for pair in self.prompts.items() for text in pair):
            faults.append(f"prompts: expected texts by name, got {shown(self.prompts)}")
        elif self.default_prompt is not None and self.default_prompt not in self.prompts:
            faults.append(f"default_prompt: expected one of {', '.join(self.prompts) or 'no prompts'}, got {shown(self.default_prompt)}")
        for layer in self.dense:
            if layer.activation not in ACTIVATIONS:
                faults.append(f"dense: activation: expected one of {', '.join(ACTIVATIONS)}, got {shown(layer.activation)}")
        if faults:
            raise InvalidValue("pooling: " + "; ".join(faults))

    def width(self, d_model: int) -> int:
        """Numbers of a vector. Raises InvalidValue where a layer does not fit what comes before it."""
        d = d_model * len(self.modes)
        for number, layer in enumerate(self.dense):
            if layer.weight.ndim != 2 or len(layer.weight) != d or (layer.bias is not None and layer.bias.shape != layer.weight.shape[1:]):
                raise InvalidValue(
                    f"pooling: dense[{number}]: expected a weight ({d}, d_out) and a bias (d_out,), got {layer.weight.shape}"
                )
            d = layer.weight.shape[1]
        return d

    def prompt(self, name: str | None) -> str:
        """What is put before a text. Raises InvalidValue for a name that there is not."""
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if not isinstance(name, str):
            raise InvalidType(f"prompt: expected the name of a prompt or None, got {type(name).__name__}")
        if name not in self.prompts:
            raise InvalidValue(f"prompt: expected one of {', '.join(self.prompts) or '(this model has none)'}, got {shown(name)}")
        return self.prompts[name]

    def vectors(self, outputs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B, T, d) outputs, the first `lengths` (B,) of each row, at least one -> (B, width) vectors, not normalised."""
        rows, n = np.arange(len(outputs)), lengths[:, None].astype(outputs.dtype)
        valid = (np.arange(outputs.shape[1]) < lengths[:, None])[..., None]
        parts = []
        for mode in self.modes:
            if mode == "cls":
                parts.append(outputs[:, 0])
            elif mode == "last":
                parts.append(outputs[rows, lengths - 1])
            elif mode == "max":
                parts.append(np.where(valid, outputs, -np.inf).max(axis=1))
            elif mode == "weighted_mean":
                places = np.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype)[:, None]
                parts.append(np.where(valid, outputs * places, 0).sum(axis=1) / (n * (n + 1) / 2))
            else:
                parts.append(np.where(valid, outputs, 0).sum(axis=1) / (n if mode == "mean" else np.sqrt(n)))
        found = np.concatenate(parts, axis=1)
        for layer in self.dense:
            found = found @ layer.weight
            found = ACTIVATIONS[layer.activation](found if layer.bias is None else found + layer.bias)
        return found.astype(outputs.dtype, copy=False)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """(N, d) vectors at length 1; zeros stay zeros."""
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(axis=1, keepdims=True)), 1e-12)


def to_dict(pooling: Pooling) -> dict[str, Any]:
    """Plain data, ready for JSON; the arrays of `dense` are not in it."""
    about = {field.name: getattr(pooling, field.name) for field in dataclasses.fields(pooling)}
    return {**about, "modes": list(pooling.modes), "prompts": dict(pooling.prompts), "dense": [layer.activation for layer in pooling.dense]}
