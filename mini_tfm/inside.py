"""What a model computes on the way to its result: the weights of each attention, and the states between the layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ._core import Block
from .attention import Encoded
from .autodiff import value_of
from .context import Pass
from .kernels import weights_of
from .memory.run import MemoryRun
from .model import Model
from .weights import Array, Weights


@dataclass(frozen=True)
class Inside:
    """Lists of arrays of B sequences, without a memory; those of a stack that did not run are empty.

    States: what each layer of a stack was given, and last what the stack gives, its norm included; (B, S, d) of an encoder and
    (B, T, d) of a decoder, n_layers + 1 of them. Attentions: the weights of each layer and head, (B, H, S, S) of an encoder's
    self-attention, (B, H, T, T) of a decoder's, (B, H, T, S) of its cross-attention; a row adds up to 1, or is 0 where a query sees
    nothing. Queries and states past a length mean nothing.
    """

    encoder_hidden_states: list[np.ndarray] = field(default_factory=list)
    encoder_attentions: list[np.ndarray] = field(default_factory=list)
    decoder_hidden_states: list[np.ndarray] = field(default_factory=list)
    decoder_attentions: list[np.ndarray] = field(default_factory=list)
    cross_attentions: list[np.ndarray] = field(default_factory=list)

    def hidden(self, stack: str, x: Array) -> None:
        (self.encoder_hidden_states if stack == "encoder" else self.decoder_hidden_states).append(value_of(x))

    def attention(self, site: str, q: Array, block: Block, scale: float, cap: float | None) -> None:
        at = {"encoder": self.encoder_attentions, "decoder": self.decoder_attentions, "cross": self.cross_attentions}
        at[site].append(weights_of(value_of(q), block, scale, cap))


def inside(
    model: Model,
    source: np.ndarray | None,
    source_lengths: np.ndarray | None,
    inputs: np.ndarray | None,
    input_lengths: np.ndarray | None,
    encoded: Encoded | None = None,
) -> Inside:
    """Of one pass: the encoder reads source (B, S), the decoder is fed inputs (B, T). None: that stack does not run.

    encoded: what an encoder has made of a source before.
    """
    found, weights = Inside(), Weights(model.weights)
    batch = len(source if source is not None else inputs if inputs is not None else ())
    p = Pass(weights, MemoryRun(None, model.config, weights.kept, batch), record=found)
    if model.encoder is not None and source is not None and source_lengths is not None:
        encoded = model.encoder(source, source_lengths, p)
    if model.decoder is not None and inputs is not None and input_lengths is not None:
        model.decoder(inputs, input_lengths, encoded, p)
    return found
