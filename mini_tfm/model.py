"""The Transformer of "Attention Is All You Need" (arXiv 1706.03762), top to bottom, in the paper's words and order.

    section 3.1   Encoder, Decoder and their layers        section 3.3   FeedForward
    section 3.2   attention.py                             section 3.4   Embedding, Output     section 3.5   its positions

Each layer stands beside its shapes: `shapes()` says what a model file must hold and how each weight begins. A layer holds no
weights. It takes them from the pass that goes through it (context.py), so the same code trains and runs: on plain arrays
nothing is recorded, on `Var`s everything is.

Legend: B batch, S source length, T target length, H heads, D head size, d d_model, V vocabulary, m memory rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import _core, ops
from .attention import Encoded, Layout, MultiHeadAttention, RelativeBias
from .autodiff import value_of
from .config import Config
from .context import Pass
from .errors import InvalidValue
from .files.reading import ram_bytes
from .layers import Linear, Norm, Shape, StepProduct
from .memory.base import Memory, Rows
from .memory.run import memory_parameters
from .positions import sinusoids
from .weights import Array, Kept, Pack, Part, Weight, Weights, arrays_of, precision_of

# Section 3.1: encoder and decoder stacks


class Sublayer:
    """LayerNorm(x + f(x)), or with pre-norm (arXiv 2002.04745) x + f(LayerNorm(x)). f adds the `residual` it is given.

    Two more places for the norm: x + LayerNorm(f(x)), "output", and "sandwich", x + LayerNorm(f(LayerNorm(x))).
    """

    def __init__(self, config: Config, name: str, f: Any):
        self.name, self.f, where = name, f, config.norm_position
        self.norm = Norm(config, name + "_norm")
        self.of_input = self.norm if where in ("pre", "sandwich") else None
        self.of_output = Norm(config, name + "_output_norm") if where == "sandwich" else self.norm if where == "output" else None
        self.of_sum = self.norm if where == "post" else None

    def shapes(self) -> Iterator[Shape]:
        yield from self.f.shapes()
        for norm in filter(None, (self.of_input, self.of_output, self.of_sum)):
            yield from norm.shapes()

    def __call__(self, x: Array, p: Pass, call: Callable[..., Array], *given: Any, skip: int = 0) -> Array:
        """call(x, p, *given): the method of f that is meant; it leaves out the first `skip` rows of x."""
        residual = x[:, skip:] if skip else x
        x = x if self.of_input is None else self.of_input(x, p)
        if p.dropout.p or self.of_output is not None:
            x = call(x, p, *given)
            x = x if self.of_output is None else self.of_output(x, p)
            x = ops.add(residual, p.dropout(x, self.name))
        else:
            x = call(x, p, *given, residual=residual)
        return x if self.of_sum is None else self.of_sum(x, p)


class EncoderLayer:
    def __init__(self, config: Config, number: int):
        name = f"encoder.{number}."
        self.attention = Sublayer(config, name + "attention", MultiHeadAttention(config, name + "attention", "encoder", number))
        self.feed_forward = Sublayer(config, name + "feed_forward", FeedForward(config, name + "feed_forward", config.d_ff))
        self.sublayers = [self.attention, self.feed_forward]

    def shapes(self) -> Iterator[Shape]:
        for sublayer in self.sublayers:
            yield from sublayer.shapes()

    def __call__(self, x: Array, p: Pass, layout: Layout) -> Array:
        x = self.attention(x, p, self.attention.f.to_itself, layout)
        return self.feed_forward(x, p, self.feed_forward.f)


class DecoderLayer:
    def __init__(self, config: Config, number: int):
        name = f"decoder.{number}."
        own: MultiHeadAttention | SSRU
        if config.decoder_mixer == "ssru":
            own = SSRU(config, name + "ssru", number)
        else:
            own = MultiHeadAttention(config, name + "attention", "decoder", number)
        self.attention = Sublayer(config, own.name, own)  # or what stands in its place
        self.cross = (
            Sublayer(config, name + "cross", MultiHeadAttention(config, name + "cross", "cross", number)) if config.has_encoder else None
        )
        self.feed_forward = Sublayer(config, name + "feed_forward", FeedForward(config, name + "feed_forward", config.decoder_d_ff))
        self.sublayers = [each for each in (self.attention, self.cross, self.feed_forward) if each is not None]

    def shapes(self) -> Iterator[Shape]:
        for sublayer in self.sublayers:
            yield from sublayer.shapes()

    def __call__(self, x: Array, p: Pass, layout: Layout, encoded: Encoded | None, skip: int) -> Array:
        """skip: rows in front that are keys alone here; their outputs are left out."""
        x = self.attention(x, p, self.attention.f.to_itself, layout, skip, skip=skip)
        if encoded is not None and self.cross is not None:
            x = self.cross(x, p, self.cross.f.to_encoder, layout, encoded)
        return self.feed_forward(x, p, self.feed_forward.f)


class SSRU:
    """A recurrence in the place of a decoder's self-attention: the "simpler simple recurrent unit" of Marian's fast models.

        f_t = sigmoid(x_t W_f + b_f)    c_t = f_t * c_{t-1} + (1 - f_t) * (x_t W)    SSRU(x)_t = max(0, c_t)

    c_0 = 0. From Kim et al., 2019 (ACL Anthology D19-5632), after SRU (arXiv 1709.02755). It has a state (B, d), not keys: a
    decoding step costs the same whatever came before, and no memory can show rows here.
    """

    def __init__(self, config: Config, name: str, layer: int):
        self.name, self.layer, self.both = name, layer, name + ".both"
        self.input = Linear(config, name + ".in", config.d_model, config.d_model, bias=False)
        self.forget = Linear(config, name + ".forget", config.d_model, config.d_model, bias=True)

    def shapes(self) -> Iterator[Shape]:
        yield from self.input.shapes()
        yield from self.forget.shapes()

    def products(self) -> Iterator[StepProduct]:
        yield StepProduct(self.both, (self.input, self.forget))

    step_products = products

    def to_itself(self, x: Array, p: Pass, layout: Layout, skip: int = 0, residual: Array | None = None) -> Array:
        """Of x (B, T, d), whose rows follow each other; residual is added to it. `skip` is 0: there are no rows of memories."""
        if (both := p.weights.get(self.both)) is not None:
            y = both.linear(x, p.value(self.both + ".bias"))
            inputs, forget = y[..., : self.input.d_out], y[..., self.input.d_out :]
        else:
            inputs, forget = self.input(x, p), self.forget(x, p)
        nothing = np.zeros((len(x), self.input.d_out), x.dtype)
        c = ops.recurrence(inputs, forget, nothing if p.cache is None else p.cache.state(self.layer, nothing))
        h = ops.activation(c, "relu")
        return h if residual is None else ops.add(residual, h)


class Stack:
    """What an encoder and a decoder have in common: the embedding, the layers, and unless it is post-norm a norm at the end."""

    def __init__(self, config: Config, name: str, layers: Sequence[Any]):
        self.name, self.layers = name, layers
        self.embedding = Embedding(config, name)
        attends = name == "encoder" or config.decoder_mixer == "attention"
        self.relative = RelativeBias(config, name) if config.positions == "relative" and attends else None
        self.norm = Norm(config, name + ".norm") if config.final_norm else None

    def shapes(self) -> Iterator[Shape]:
        """Without the table of token embeddings, which the stacks share."""
        yield from self.embedding.own_shapes()
        for part in (self.relative, *self.layers, self.norm):
            if part is not None:
                yield from part.shapes()

    def products(self) -> Iterator[StepProduct]:
        """All that the layers multiply with."""
        for layer in self.layers:
            for sublayer in layer.sublayers:
                yield from sublayer.f.products()

    def embed(self, tokens: np.ndarray, p: Pass, positions: np.ndarray | None = None, place: str = "") -> Array:
        """place: where the tokens stand, if not in the text."""
        return p.dropout(self.embedding(tokens, p, positions), self.name + ".embedding" + place)

    def in_front(self, rows: Sequence[Rows], p: Pass) -> list[Array]:
        """The rows of memories in front of the text, (B, m, d) each."""
        return [self.embed(each.tokens, p, place=f".front.{i}") if each.tokens is not None else each.values for i, each in enumerate(rows)]

    def last_norm(self, x: Array, p: Pass) -> Array:
        return x if self.norm is None else self.norm(x, p)

    def note(self, x: Array, p: Pass) -> None:
        if p.record is not None:
            p.record.hidden(self.name, x)


class Encoder(Stack):
    def __init__(self, config: Config):
        super().__init__(config, "encoder", [EncoderLayer(config, i) for i in range(config.n_encoder_layers)])

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray, p: Pass) -> Encoded:
        """(B, S) tokens, the first `lengths` (B,) of each row, with the memory of the pass."""
        x = self.embed(tokens, p)
        rows = p.run.begin("encoder", tokens)
        front, text = self.in_front(rows, p), _within(tokens, lengths)
        n_front = sum(each.shape[1] for each in front)
        x = np.concatenate([*front, x], axis=1) if front else x
        valid = np.concatenate([*(each.there for each in rows), text], axis=1) if front else text
        layout = Layout(np.arange(-n_front, tokens.shape[1]), text, n_front, valid)
        ends = [0, *itertools.accumulate(each.shape[1] for each in front)]

        def of_rows(x: Array) -> list[Array]:
            return [x[:, start:stop] for start, stop in itertools.pairwise(ends)]

        for number, layer in enumerate(self.layers):
            x = p.run.enter("encoder", number, x)
            self.note(x, p)
            x = layer(x, p, layout)
            p.run.leave("encoder", number, partial(of_rows, x))
        x = self.last_norm(x, p)
        self.note(x, p)
        p.run.end("encoder", of_rows(x))
        return Encoded(x, valid, n_front)


class Decoder(Stack):
    def __init__(self, config: Config):
        super().__init__(config, "decoder", [DecoderLayer(config, i) for i in range(config.n_decoder_layers)])

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray, encoded: Encoded | None, p: Pass) -> Array:
        """(B, T) input tokens (already shifted), seeing `encoded` and the memory of the pass -> (B, T, d).

        With a cache the tokens follow those it holds, none is padding, and the memory is read but not written.
        """
        if p.cache is not None:
            return self._next(tokens, encoded, p)
        rows = p.run.begin("decoder", tokens)
        front = self.in_front(rows, p)
        back = [r.values for r in rows if r.where == "around"]
        layout = _decoder_layout(tokens, lengths, rows)
        x = self.embed(tokens, p)
        x = np.concatenate([*front, x, *back], axis=1) if front else x
        n_back = x.shape[1] - layout.of_text.stop

        def of_rows(x: Array) -> list[Array]:
            return _outputs_of_rows(x, rows, x.shape[1] - n_back)

        for number, layer in enumerate(self.layers):
            # Rows that are written behind the text are read in front of it: of the last layer they are keys, nobody asks for outputs.
            unread = layer is self.layers[-1] and n_back == layout.n_front and not p.run.wants_mass()
            x = p.run.enter("decoder", number, x)
            self.note(x, p)
            x = layer(x, p, layout, encoded, layout.n_front if unread else 0)
            p.run.leave("decoder", number, partial(of_rows, x))
        x = self.last_norm(x, p)
        self.note(x, p)
        if rows:
            p.run.end("decoder", of_rows(x))
            x = x[:, x.shape[1] - n_back - tokens.shape[1] : x.shape[1] - n_back]
        p.run.finished(x, layout.text)
        return x

    def step_products(self) -> Iterator[StepProduct]:
        """All that a decoding step multiplies with, but for the output layer."""
        for layer in self.layers:
            for sublayer in layer.sublayers:
                yield from sublayer.f.step_products()

    def _next(self, tokens: np.ndarray, encoded: Encoded | None, p: Pass) -> Array:
        cache = p.cache
        assert cache is not None
        rows = p.run.begin("decoder", tokens) if cache.is_empty else []
        front = self.in_front(rows, p)
        cache.extend([each.there for each in rows], tokens.shape[1])

        def layers(x: Array) -> Array:
            positions = cache.positions if not front else np.arange(-cache.n_front, tokens.shape[1])
            text = np.ones(tokens.shape, bool)
            layout = Layout(positions, text, cache.n_front, cache.valid, True, cache.lengths, cache.key_positions, _n_causal(rows))
            for number, layer in enumerate(self.layers):
                x = layer(p.run.enter("decoder", number, x), p, layout, encoded, 0)
            return self.last_norm(x, p)

        if tokens.shape[1] == 1 and not front and not p.run.answers:
            return cache.step(lambda x: layers(self.embedding.normed(x, p)), self.embedding.summed(tokens, p, cache.positions))
        x = self.embed(tokens, p, cache.positions)
        return layers(np.concatenate([*front, x], axis=1) if front else x)[:, -tokens.shape[1] :]


def _within(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B, T) bool: what is no padding."""
    return np.arange(tokens.shape[1]) < lengths[:, None]


def _n_causal(rows: Sequence[Rows]) -> int:
    """How many of the rows in front are text, the last of them."""
    return sum(each.shape[1] for each in rows if each.tokens is not None)


def _decoder_layout(tokens: np.ndarray, lengths: np.ndarray, rows: Sequence[Rows]) -> Layout:
    n_front, n_back = sum(each.shape[1] for each in rows), sum(each.shape[1] for each in rows if each.where == "around")
    positions, text = np.arange(-n_front, tokens.shape[1] + n_back), _within(tokens, lengths)
    if n_back and (lengths < tokens.shape[1]).any():  # rows behind the text stand right behind it, whatever the batch's length
        positions = np.tile(positions, (len(tokens), 1))
        positions[:, -n_back:] += (lengths - tokens.shape[1])[:, None]
    there = [each.there for each in rows]
    back = [each.there for each in rows if each.where == "around"]
    valid = np.concatenate([*there, text, *back], axis=1) if n_front else text
    return Layout(positions, text, n_front, valid, causal=True, n_causal=_n_causal(rows))


def _outputs_of_rows(x: Array, given: Sequence[Rows], end_of_text: int) -> list[Array]:
    """Outputs at each member's rows: behind the text where it wrote there, else in front."""
    front, back, outputs = 0, end_of_text, []
    for rows in given:
        m = rows.shape[1]
        start = back if rows.where == "around" else front
        outputs.append(x[:, start : start + m])
        front, back = front + m, back + (m if rows.where == "around" else 0)
    return outputs


# Section 3.3: position-wise feed-forward networks


class FeedForward:
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 (equation 2), or with another activation f.

    Gated (arXiv 2002.05202): (f(x W_g + b_g) * (x W_1 + b_1)) W_2 + b_2.
    """

    def __init__(self, config: Config, name: str, d_ff: int | None):
        assert d_ff  # filled in by Config
        self.name, self.activation = name, config.activation
        self.inner = Linear(config, name + ".in", config.d_model, d_ff)
        self.gate = Linear(config, name + ".gate", config.d_model, d_ff) if config.gated else None
        self.outer = Linear(config, name + ".out", d_ff, config.d_model)

    def shapes(self) -> Iterator[Shape]:
        for linear in filter(None, (self.inner, self.gate, self.outer)):
            yield from linear.shapes()

    def products(self) -> Iterator[StepProduct]:
        yield StepProduct(self.inner.weight, (self.inner,), self.gate)
        yield StepProduct(self.outer.weight, (self.outer,))

    step_products = products

    def __call__(self, x: Array, p: Pass, residual: Array | None = None) -> Array:
        hidden = p.dropout.hidden(self.inner(x, p, activation=self.activation, gate=self.gate), self.name + ".hidden")
        return self.outer(hidden, p, residual=residual)


# Sections 3.4 and 3.5: embeddings and softmax, positional encoding

TOKENS = "embedding.weight"  # (V, d), of both stacks and, where it is tied, of the output layer
OUTPUT = "output.weight"  # (d, V), of an output layer that is not tied; and of any that is kept packed


class Embedding:
    """Token embeddings, multiplied by sqrt(d_model), and positions, where they are added: sinusoidal or learned.

    Some encoders add the embedding of a token's kind as well, and some models normalise the sum.
    """

    def __init__(self, config: Config, stack: str):
        self.config, self.learned = config, stack + ".positions.weight"
        self.scale = config.d_model**0.5 if config.embedding_scale else None
        self.types = stack + ".token_types.weight" if config.token_types and stack == "encoder" else None
        self.norm = Norm(config, stack + ".embedding_norm") if config.embedding_norm else None
        self._sinusoidal = np.zeros((0, config.d_model), np.float32)  # as many positions as were needed so far

    def own_shapes(self) -> Iterator[Shape]:
        """Of all but the table of tokens."""
        if self.config.positions == "learned":
            yield Shape(self.learned, (self.config.max_positions + self.config.position_offset, self.config.d_model), std=0.02)
        if self.types is not None:
            yield Shape(self.types, (self.config.token_types, self.config.d_model), std=0.02)
        if self.norm is not None:
            yield from self.norm.shapes()

    def __call__(self, tokens: np.ndarray, p: Pass, positions: np.ndarray | None = None) -> Array:
        """(B, T) -> (B, T, d). positions: (T,) that follow each other, or (B, T); None: from 0 on."""
        return self.normed(self.summed(tokens, p, positions), p)

    def summed(self, tokens: np.ndarray, p: Pass, positions: np.ndarray | None = None) -> Array:
        """The same before the norm."""
        x = ops.embedding(p.value(TOKENS), tokens)
        if self.scale is not None:
            x = x * x.dtype.type(self.scale)
        if self.types is not None:
            x = x + p.value(self.types)[0]
        if self.config.positions in ("sinusoidal", "learned") and tokens.size:
            x = x + self._at(np.arange(tokens.shape[1]) if positions is None else positions, p, x.dtype)
        return x

    def normed(self, x: Array, p: Pass) -> Array:
        return x if self.norm is None else self.norm(x, p)

    def feed(self, p: Pass, end: int) -> _core.Feed | None:
        """How `summed` makes of a token at a position below `end`; None where it is more than rows of two tables."""
        table, places, first = np.asarray(value_of(p.value(TOKENS))), None, self.config.position_offset
        if self.config.positions == "sinusoidal":
            places = self._table(first + end, table.dtype)[first:]
        elif self.config.positions == "learned":
            places = np.asarray(value_of(p.value(self.learned)))[first:]
        is_beyond = places is not None and end > len(places)
        if self.types is not None or is_beyond or not all(each is None or _is_plain(each) for each in (table, places)):
            return None
        return _core.Feed(table, self.scale, places)

    def _at(self, positions: np.ndarray, p: Pass, dtype: np.dtype) -> Array:
        first = self.config.position_offset
        last = first + int(positions.max()) + 1
        places = slice(first + int(positions[0]), last) if positions.ndim == 1 else first + positions
        if self.config.positions == "sinusoidal":
            return self._table(last, dtype)[places]
        if last > first + (most := self.config.max_positions):
            raise InvalidValue(
                f"tokens: expected at most max_positions = {most} positions, which the model has learned, got {last - first}; give a"
                f" shorter text or prompt, fewer max_new_tokens, or a Pipeline with a memory and a segment_length of at most {most}"
            )
        return p.value(self.learned)[places]

    def _table(self, n: int, dtype: np.dtype) -> np.ndarray:
        table = self._sinusoidal
        if len(table) < n or table.dtype != dtype:
            table = self._sinusoidal = sinusoids(max(n, 2 * len(table)), self.config.d_model, self.config.sinusoids, dtype)
        return table


def _is_plain(array: np.ndarray) -> bool:
    """Whether C can read it where it lies."""
    return array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative


SURPRISED_ROWS = 256  # whose logits are in RAM at once


class Output:
    """The output layer, whose softmax is the next token's distribution; tied to the embedding unless the config says otherwise."""

    PACKED = "output.packed"  # where a session keeps it

    def __init__(self, config: Config):
        self.is_tied, self.name = config.tie_embeddings, TOKENS if config.tie_embeddings else OUTPUT
        self.bias = "output.bias" if config.output_bias else None
        self.d, self.vocab_size, self.scale, self.cap = config.d_model, config.vocab_size, config.output_scale, config.output_cap

    def shapes(self) -> Iterator[Shape]:
        if not self.is_tied:
            yield Shape(self.name, (self.d, self.vocab_size), std=self.d**-0.5)
        if self.bias is not None:
            yield Shape(self.bias, (self.vocab_size,))

    def __call__(self, hidden: Array, weights: Mapping[str, Weight]) -> Array:
        """(..., d) -> logits (..., V); of a session's packed layer, as many as it has columns."""
        hidden, packed = self._scaled(hidden), self.packed(weights)
        if packed is not None:
            logits = _core.packed_linear(hidden, packed, self._bias(weights, packed.shape[1]))
        else:
            logits = weights[self.name].linear(hidden, self._bias(weights), transposed=self.is_tied)
        return logits if self.cap is None else self.cap * np.tanh(logits / self.cap)

    def narrow(self, weights: Weights, ids: np.ndarray) -> None:
        """Leaves of a session's packed layer the columns of `ids` (n,) alone, with the bits that they have."""
        weights[self.PACKED] = Weight(
            None, weights.pack([self.name], transposed=self.is_tied, columns=ids, dtype=self.packed(weights).dtype)
        )
        if self.bias is not None:
            weights[self.bias] = Weight(weights[self.bias].array[ids])

    def packed(self, weights: Mapping[str, Weight]) -> Any:
        """The PackedWeight of the layer's matrix (d, V), if a session has made one."""
        weight = weights.get(self.PACKED)
        return None if weight is None else weight.packed

    def best(self, hidden: np.ndarray, weights: Mapping[str, Weight]) -> tuple[np.ndarray, np.ndarray]:
        """The best score of each row of hidden (B, d), before the cap, and its id, by a session's packed layer: (B,), (B,)."""
        choice = self.choice(weights)
        scores, ids = _core.linear_top_k(self._scaled(hidden), choice.weight, 1, choice.bias)
        return scores[:, 0], ids[:, 0]

    def choice(self, weights: Mapping[str, Weight]) -> _core.Choice:
        """How `best` chooses."""
        packed = self.packed(weights)
        bias = self._bias(weights, packed.shape[1])
        if bias is not None:
            bias = np.require(np.asarray(value_of(bias)), value_of(bias).dtype.newbyteorder("="), ["C", "A"])
        return _core.Choice(packed, self.scale, bias)

    def likeliest(self, hidden: np.ndarray, weights: Mapping[str, Weight], k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The best k log-probabilities of each row of hidden (B, d), and their ids, by a session's packed layer: (B, k), (B, k).

        None where it takes all the logits: they are capped, or not packed.
        """
        packed = self.packed(weights)
        if packed is None or self.cap is not None:
            return None
        scores, ids, lse = _core.linear_top_k(self._scaled(hidden), packed, k, self._bias(weights, packed.shape[1]), lse=True)
        return scores - lse[:, None], ids

    def loss(self, hidden: Array, weights: Mapping[str, Weight], targets: np.ndarray, counts: np.ndarray, smoothing: float) -> Array:
        """The mean of the targets' negative log-likelihood (and section 5.4's label smoothing), in nats: a scalar.

        hidden (..., d), targets and counts, what each weighs in the mean, of its leading shape.
        """
        if self.cap is not None:
            logits = np.reshape(self(hidden, weights), (-1, self.vocab_size))
            return ops.cross_entropy(logits, np.reshape(targets, -1), np.reshape(counts, -1), smoothing)
        weight, is_transposed = weights[self.name].stored(self.is_tied)
        hidden, bias = self._scaled(hidden), self._bias(weights)
        return ops.output_loss(hidden, weight, targets, counts, bias=bias, label_smoothing=smoothing, transposed=is_transposed)

    def surprise(self, hidden: np.ndarray, weights: Mapping[str, Weight], targets: np.ndarray) -> np.ndarray:
        """-log p of targets (N,), in nats, given hidden (N, d): (N,). The logits of some rows at a time are in RAM."""
        found = np.zeros(len(hidden), hidden.dtype)
        for start in range(0, len(hidden), SURPRISED_ROWS):
            rows = slice(start, start + SURPRISED_ROWS)
            log_probs = _core.log_softmax(value_of(self(hidden[rows], weights)))
            found[rows] = -np.take_along_axis(log_probs, targets[rows, None], 1)[:, 0]
        return found

    def _scaled(self, hidden: Array) -> Array:
        return hidden if self.scale is None else hidden * hidden.dtype.type(self.scale)

    def _bias(self, weights: Mapping[str, Weight], n: int | None = None) -> Array | None:
        return None if self.bias is None else weights[self.bias].value[:n]


# All of it


class Model:
    """An architecture and its weights: the stacks, by name, and what memories ask of them.

    weights: arrays by name, as `weight_shapes` lists them, and the strategies' parameters as `memory.<name>.<parameter>`.
    generation: options of `generate` that such a model is made for, where they are not the usual ones.
    """

    def __init__(self, config: Config, weights: dict[str, np.ndarray], dtype: np.dtype, generation: Mapping[str, Any] | None = None):
        self.config, self.weights, self.dtype, self.generation = config, weights, dtype, dict(generation or {})
        self.encoder = Encoder(config) if config.has_encoder else None
        self.decoder = Decoder(config) if config.has_decoder else None
        self.output = Output(config)

    @property
    def precision(self) -> str | None:
        """What the model is packed in, "bfloat16" or "int8"; None: its weights are arrays."""
        return precision_of(self.weights)

    def pack(self, dtype: str) -> None:
        """Keeps all matrices in bfloat16 or int8, in place: half or a quarter of the RAM, and of the time that few rows take.

        bfloat16: weights and what they multiply are rounded to it, sums are float32. int8: a scale for each column of a matrix and
        256 of its rows, and as many for each row that it multiplies, which is quantised on the way. What a token looks up,
        norms, biases and attention stay float32. Such a model cannot be trained. Raises InvalidValue where it is packed already, has
        adapters, or a weight is not finite: the model is as it was.
        """
        if dtype not in PACKED:
            raise InvalidValue(f"dtype: expected {' or '.join(map(repr, PACKED))}, got {dtype!r}")
        if self.precision is not None:
            raise InvalidValue(f"model: is packed in {self.precision} already; load it again")
        if self.dtype != np.float32:
            raise InvalidValue(f"model: expected weights in float32, to pack them, got {self.dtype}")
        weights: Weights = Weights(self.weights)
        if any(weights.adapter(name) for name in self.weights):
            raise InvalidValue("model: has adapters; merge_lora() makes them part of the weights, which can be packed then")

        def packed(names: Sequence[str], gate: str | None) -> Any:
            for name in names if gate is None else (*names, gate):
                _check_finite(name, weights[name].array)
            return weights.pack(names, gate=gate, dtype=dtype, transposed=names == [TOKENS])

        self._keep(packed, self.output.name)

    def restore(self, kept: Mapping[str, Kept]) -> None:
        """Keeps the matrices that `kept_matrices` gave of a model that is packed; all other weights are there already.

        Raises InvalidValue naming a matrix that holds what no packed one does.
        """

        def packed(names: Sequence[str], gate: str | None) -> Any:
            whole, beside = Kept.side_by_side([kept[name] for name in names]), None if gate is None else kept[gate]
            try:
                return whole.packed(beside)
            except InvalidValue as error:
                raise InvalidValue(f"{', '.join(names if gate is None else (*names, gate))}: {error}") from error

        self._keep(packed, OUTPUT)

    def _keep(self, packed_of: Callable[[Sequence[str], str | None], Any], output: str) -> None:
        """Puts packed matrices in the place of arrays. packed_of: makes one of names side by side, and of a gate's."""
        weights = Weights(self.weights)
        parts: dict[str, Any] = {}
        for name, linears, gate in _products(self.encoder, self.decoder):
            names, widths = [linear.weight for linear in linears], [linear.d_out for linear in linears]
            packed = packed_of(names, None if gate is None else gate.weight)
            bias = weights.fused_bias([linear.bias for linear in linears], widths, self.dtype) if len(linears) > 1 else None
            pack = Pack(name, packed, bias)
            ends = list(itertools.accumulate(widths))
            parts |= {one: Part(pack, end - n, end) for one, end, n in zip(names, ends, widths, strict=True)}
            if gate is not None:
                parts[gate.weight] = Part(pack, 0, gate.d_out, of_gate=True)
        if self.decoder is not None:
            packed = packed_of([output], None)
            table = weights[self.output.name].array if self.output.is_tied else None
            parts[self.output.name] = Part(Pack(self.output.PACKED, packed), 0, self.config.vocab_size, table=table)
        self.weights.update(parts)

    def needs(self, stack: str) -> None:
        """Raises InvalidValue if the model has no such stack."""
        if not getattr(self.config, "has_" + stack):
            raise InvalidValue(f"this model has no {stack} (n_{stack}_layers is 0)")

    def add_memory_weights(self, memory: Memory | None, seed: int = 0) -> None:
        """Gives the strategies' parameters that the model does not have yet their initial values."""
        for name, param in memory_parameters(memory, self.config, self.dtype).items():
            if name not in self.weights:
                if 12 * math.prod(param.shape) > ram_bytes():  # drawn in float64, kept in float32
                    raise InvalidValue(
                        f"memory: {name} has {math.prod(param.shape)} numbers, more than this machine's RAM holds; make it smaller"
                    )
                rng = np.random.default_rng([seed, *name.encode()])
                value = rng.normal(0, param.init, param.shape) if isinstance(param.init, int | float) else param.init
                self.weights[name] = np.broadcast_to(np.asarray(value, self.dtype), param.shape).copy()
            elif self.weights[name].shape != tuple(param.shape):
                raise InvalidValue(
                    f"memory: {name} has shape {self.weights[name].shape} in this model, and {tuple(param.shape)} with the options"
                    " given; use the options it was trained with"
                )

    def fingerprint(self) -> str:
        """Names these weights: rows computed with others must not be mixed with theirs."""
        digest = hashlib.sha256(repr(self.config).encode())
        weights = {name: Weight(kept) for name, kept in self.weights.items()}
        for name, array in arrays_of(weights, sorted(weights)):
            digest.update(name.encode() + np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    @property
    def n_parameters(self) -> int:
        return sum(int(np.prod(Weight(w).shape)) for w in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of weights in RAM."""
        return sum(Weight(w).nbytes for w in self.weights.values())


PACKED = ("bfloat16", "int8")  # what a model's matrices can be kept in


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise InvalidValue(f"model.weights[{name!r}]: holds NaN or infinity; check the weights")


def _products(encoder: Encoder | None, decoder: Decoder | None) -> Iterator[StepProduct]:
    """All that packing concerns, but for the output layer."""
    for stack in filter(None, (encoder, decoder)):
        yield from stack.products()


def packed_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Names and shapes (d_in, d_out) of the matrices that a packed model keeps so, its output layer's among them, tied or not."""
    products = _products(Encoder(config) if config.has_encoder else None, Decoder(config) if config.has_decoder else None)
    shapes = {one.weight: (one.d_in, one.d_out) for _, linears, gate in products for one in (*linears, gate) if one is not None}
    return shapes | ({OUTPUT: (config.d_model, config.vocab_size)} if config.has_decoder else {})


def kept_matrices(weights: Mapping[str, Any]) -> dict[str, Kept]:
    """What a packed model keeps, by the names of `packed_shapes`; nothing of one that is not packed."""
    return {name if part.table is None else OUTPUT: part.kept() for name, part in weights.items() if isinstance(part, Part)}


def _shapes(config: Config) -> Iterator[Shape]:
    yield Shape(TOKENS, (config.vocab_size, config.d_model), std=config.d_model**-0.5)
    if config.has_encoder:
        yield from Encoder(config).shapes()
    if config.has_decoder:
        yield from Decoder(config).shapes()
    yield from Output(config).shapes()


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights: what a model file must hold."""
    return {name: shape for name, shape, *_ in _shapes(config)}


def initial_weights(config: Config, seed: int, dtype: Any) -> dict[str, np.ndarray]:
    """Every weight of the architecture by name, drawn from one seed in order of the names' appearance."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape, std, fill in _shapes(config):
        if std is None:
            weights[name] = np.full(shape, fill, dtype)
        else:
            weights[name] = (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(dtype)
    return weights
