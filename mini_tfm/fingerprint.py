"""Fingerprint: names what the rows of a memory are made of, and tells when that has changed.

A row at layer l is what goes into the layer's key and value projections. It depends on the embeddings and on the layers below, and
on no other weight: not on the layer's own projections, the output layer or the layers above. What memories showed to those layers,
the strategies' parameters included, is part of what was read, as the text is; the tokenizer, too. None of these is named. A weight
with an adapter is what the two add up to, so the name stays when adapters that add nothing yet are put in, or trained ones merged.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from .config import Config
from .model import TOKENS, Decoder, Encoder
from .weights import Array, Weights, arrays_of

# Settings that say how weights are used; a field that is not here is told by the weights, or no row depends on it.
_OF_THE_STACK = ("norm", "norm_position", "norm_eps", "positions", "embedding_scale")
_OF_LAYERS = ("n_heads", "n_kv_heads", "d_head", "attention_scale", "activation")
_LATER_OF_THE_STACK = ("sinusoids", "position_offset")
_LATER_OF_LAYERS = ("rotary_dims", "rotary_scaling", "window", "local_layers", "local_rotary_base", "attention_cap")
_OF_DECODER_LAYERS = ("decoder_n_heads", "decoder_n_kv_heads", "decoder_d_head", "decoder_attention_scale")
_OF_POSITIONS = {"rotary": ("rotary_base",), "relative": ("relative_buckets", "relative_max_distance")}


class Fingerprint:
    """Of `weights` (arrays or Vars by name) in the architecture of `config`.

    Called with a site and a layer: a name, 16 hexadecimal digits, of what the rows there are made of. It does not depend on
    the dtype: values are named as float32.
    """

    def __init__(self, config: Config, weights: Mapping[str, Array]):
        self.config, self.weights = config, weights
        self._names: dict[tuple[str, int], str] = {}
        self._digests: dict[str, bytes] = {}
        self._seen: dict[str, Hashable] = {}

    def __call__(self, site: str, layer: int) -> str:
        if (site, layer) not in self._names:
            self._names[site, layer] = self._name(site, layer)
        return self._names[site, layer]

    def _name(self, site: str, layer: int) -> str:
        digest = hashlib.blake2b(repr(list(_settings(self.config, site, layer))).encode(), digest_size=8)
        names = _weights_below(self.config, site, layer)
        new = [name for name in names if name not in self._digests]
        self._seen |= {name: self._checksum(name) for name in new}
        for name, array in arrays_of(Weights(self.weights), new):
            values = np.ascontiguousarray(array, "<f4")
            self._digests[name] = hashlib.blake2b(repr((name, values.shape)).encode() + values.data, digest_size=16).digest()
        for name in names:
            digest.update(self._digests[name])
        return digest.hexdigest()

    def changed(self, places: Collection[tuple[str, int]]) -> bool:
        """Whether a weight that rows at `places`, sites with a layer, are made of is not what it was when it was last named or asked for.

        A checksum tells, in the time of reading them once; not of weights that nobody can write to.
        """
        now = {name: self._checksum(name) for name in {name for place in places for name in _weights_below(self.config, *place)}}
        return any(self._seen.setdefault(name, total) != total for name, total in now.items())

    def renew(self) -> None:
        """From here on the weights are what they are now."""
        self._names, self._digests, self._seen = {}, {}, {}

    def _checksum(self, name: str) -> Hashable:
        return Weights(self.weights)[name].checksum()  # wrapped anew: a caller may have put another array in its place


def _settings(config: Config, site: str, layer: int) -> Iterator[tuple[str, object]]:
    names: tuple[str, ...] = _OF_THE_STACK
    if site == "cross" or layer > 0:
        names += (*_OF_LAYERS, *_OF_POSITIONS.get(config.positions, ()))
    for name in names:
        yield name, getattr(config, name)
    told = config.later()  # so that a model without these has the name that it always had
    names = _LATER_OF_THE_STACK + (_LATER_OF_LAYERS if len(names) > len(_OF_THE_STACK) else ())
    names += ("continues_source",) if site == "decoder" else ()
    for name in names + (_OF_DECODER_LAYERS if site == "decoder" and layer > 0 else ()):
        if name in told:
            yield name, getattr(config, name)


@functools.lru_cache(256)
def _weights_below(config: Config, site: str, layer: int) -> tuple[str, ...]:
    """The names of the weights that the rows at a site and layer are made of."""
    stack = Decoder(config) if site == "decoder" else Encoder(config)
    parts: list[Any] = [stack.layers[layer].attention.norm] if site != "cross" and layer < len(stack.layers) else []
    if not parts:  # what the stack puts out
        layer, parts = len(stack.layers), [stack.norm]
    elif stack.layers[layer].attention.of_input is None:
        parts = []
    parts += [stack.relative if layer else None, *stack.layers[:layer]]
    shapes = [*stack.embedding.own_shapes(), *(shape for part in parts if part is not None for shape in part.shapes())]
    seen = _weights_below(config, "cross", 0) if site == "decoder" and layer and config.has_encoder else ()  # by the layers below
    return tuple(sorted({TOKENS, *seen, *(shape.name for shape in shapes)}))
