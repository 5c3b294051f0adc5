"""The Transformer of "Attention Is All You Need" (arXiv 1706.03762), top to bottom, in the paper's words.

Legend: B batch, S source length, T target length, H heads, D head size, d d_model, V vocabulary, m memory rows.

The same code trains and runs: on plain arrays nothing is recorded, on `Var`s everything is. One attention
function serves the three sites (encoder, decoder, cross); at each, a `MemoryRun` may add rows to attend to.
Weights are a flat dict, `encoder.0.attention.q.weight` and so on; a linear layer computes x W + b, W (d_in, d_out).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import _core, ops
from ._core import Block
from .autodiff import value_of
from .config import Config
from .errors import InvalidType, InvalidValue
from .memory.base import Memory, Query, Side, View
from .memory.run import MemoryRun, memory_parameters

if TYPE_CHECKING:
    from .generate.cache import KVCache

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first
Weights = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The encoder's outputs: hidden (B, m + S, d), the m memory rows first; valid (B, m + S) bool."""

    hidden: Array
    valid: np.ndarray
    n_rows: int

    @property
    def text(self) -> Array:
        """(B, S, d): the outputs at the source tokens alone."""
        return self.hidden[:, self.n_rows :] if self.n_rows else self.hidden


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Rates of dropout: p of embeddings and sublayers' outputs, of attention weights, of the feed-forward's hidden layer.

    A mask is a function of (seed, step, first_row, segment, place) and of where in its array an element stands, of
    nothing else: a run can be repeated, and a segment computed twice draws the same. place: the name of a sublayer;
    first_row: where the rows at hand begin in the batch.
    """

    p: float = 0.0
    seed: int = 0
    attention: float = 0.0
    feed_forward: float = 0.0
    step: int = 0
    first_row: int = 0
    segment: int = 0

    def at(self, segment: int) -> Dropout:
        return dataclasses.replace(self, segment=segment)

    def seed_of(self, place: str) -> int:
        drawn = hashlib.blake2b(f"{self.seed} {self.step} {self.first_row} {self.segment} {place}".encode(), digest_size=8)
        return int.from_bytes(drawn.digest(), "little") >> 1

    def __call__(self, x: Array, place: str) -> Array:
        return ops.dropout(x, self.p, self.seed_of(place)) if self.p else x

    def hidden(self, x: Array, place: str) -> Array:
        return ops.dropout(x, self.feed_forward, self.seed_of(place)) if self.feed_forward else x

    def weights(self, place: str) -> dict[str, Any]:
        """Options of `ops.attention`."""
        return {"dropout": self.attention, "seed": self.seed_of(place + ".weights")} if self.attention else {}


NO_DROPOUT = Dropout()


class Transformer:
    """An encoder-decoder (or encoder-only, decoder-only) Transformer.

    config: the architecture. seed: of the initial weights, normal with standard deviation d_in ** -0.5.
    dtype: float32, or float64 where a test asks for it.
    """

    def __init__(self, config: Config, seed: int = 0, dtype: Any = np.float32, weights: dict[str, np.ndarray] | None = None):
        if not isinstance(config, Config):
            raise InvalidType(f"config: expected a Config, got {type(config).__name__}")
        self.config = config
        if dtype not in (np.float32, np.float64, "float32", "float64"):
            raise InvalidType(f"dtype: expected float32 or float64, got {dtype}")
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
            raise InvalidValue(f"seed: expected an integer of at least 0, got {seed!r}")
        self.dtype = np.dtype(dtype)
        self.weights = initial_weights(config, seed, self.dtype) if weights is None else weights

    # What users call

    def encode(self, tokens: Any, lengths: Any = None) -> np.ndarray:
        """(B, S) token ids, the first `lengths` (B,) of each row -> the encoder's outputs (B, S, d); 0 past the length."""
        self._needs("encoder")
        tokens, lengths = check_tokens("tokens", tokens, self.config.vocab_size, lengths)
        hidden = value_of(self.encode_segment(tokens, lengths, self.start_run(None, len(tokens))).hidden)
        return np.where((np.arange(tokens.shape[1]) < lengths[:, None])[..., None], hidden, 0)

    def logits(self, source: Any, target: Any, source_lengths: Any = None, target_lengths: Any = None) -> np.ndarray:
        """Teacher-forced scores (B, T, V): row t scores target[:, t], given the source and target[:, :t].

        The target is shifted inside: the decoder is fed `bos_id` and target[:, :-1]. source: (B, S) ids, or None
        for a decoder-only model.
        """
        self._needs("decoder")
        target, target_lengths = check_tokens("target", target, self.config.vocab_size, target_lengths)
        encoded, lengths = None, target_lengths
        run = self.start_run(None, len(target))
        if self.config.has_encoder:
            source, lengths = check_tokens("source", source, self.config.vocab_size, source_lengths)
            if len(source) != len(target):
                raise InvalidValue(f"target: expected {len(source)} rows, as source has, got {len(target)}")
        elif source is not None:
            raise InvalidValue("source: expected None, as this model has no encoder")
        run.open(lengths)
        if self.config.has_encoder:
            encoded = self.encode_segment(source, lengths, run)
        hidden = self.decode_segment(self.shift_right(target), target_lengths, encoded, run)
        return value_of(self.output_logits(hidden))

    def generate(self, source: Any, lengths: Any = None, **options: Any) -> list[list[int]]:
        """Token ids (B lists) for source (B, S): see `mini_tfm.generate.generate` for the options."""
        from .generate.session import generate

        return generate(self, source, lengths, **options)

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into `folder`; what it held before stays until all is written."""
        from .checkpoint.models import save_model

        save_model(folder, self)

    @property
    def n_parameters(self) -> int:
        return sum(w.size for w in self.weights.values())

    # The paper, section 3.1: encoder and decoder stacks

    def encode_segment(
        self, tokens: np.ndarray, lengths: np.ndarray, run: MemoryRun, w: Weights | None = None, dropout: Dropout = NO_DROPOUT
    ) -> Encoded:
        """The encoder over (B, S) tokens with the memory of `run`."""
        w = self.weights if w is None else w
        x = dropout(self._embed(w, "encoder", tokens), "encoder.embedding")
        rows = [r.values for r in run.begin("encoder", tokens)]
        ends = np.cumsum([r.shape[1] for r in rows], dtype=int).tolist()
        m = ends[-1] if ends else 0
        x = np.concatenate([*rows, x], axis=1) if rows else x
        valid = np.concatenate([np.ones((len(tokens), m), bool), np.arange(tokens.shape[1]) < lengths[:, None]], axis=1)
        sight = _Sight(valid, np.arange(-m, tokens.shape[1]), rows=m)
        for i in range(self.config.n_encoder_layers):
            name = f"encoder.{i}."
            attend = functools.partial(
                self._self_attention, w, name + "attention", site="encoder", layer=i, sight=sight, run=run, dropout=dropout
            )
            x = self._sublayer(w, name + "attention", x, attend, dropout)
            feed = functools.partial(self._feed_forward, w, name + "feed_forward", dropout)
            x = self._sublayer(w, name + "feed_forward", x, feed, dropout)
        x = self._last_norm(w, "encoder", x)
        run.end("encoder", _cut(x, ends))
        return Encoded(x, valid, m)

    def decode_segment(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        encoded: Encoded | None,
        run: MemoryRun,
        w: Weights | None = None,
        dropout: Dropout = NO_DROPOUT,
        cache: KVCache | None = None,
    ) -> Array:
        """The decoder over (B, T) input tokens (already shifted), seeing `encoded` and the memory -> (B, T, d).

        With a cache the tokens follow those it holds, and the memory is read but not written.
        """
        w = self.weights if w is None else w
        done = cache.length if cache else 0
        x = dropout(self._embed(w, "decoder", tokens, done), "decoder.embedding")
        given = run.begin("decoder", tokens) if done == 0 else []
        front = [r.values for r in given]
        back = [r.values for r in given if r.where == "around"] if cache is None else []
        x = np.concatenate([*front, x, *back], axis=1) if front else x
        m, n_back = sum(r.shape[1] for r in front), sum(r.shape[1] for r in back)
        at = np.arange(done - m if done == 0 else done, done + tokens.shape[1] + n_back)
        if n_back and (lengths < tokens.shape[1]).any():  # rows behind the text stand right behind it, whatever the batch's length
            at = np.tile(at, (len(tokens), 1))
            at[:, -n_back:] += (lengths - tokens.shape[1])[:, None]
        text = np.arange(tokens.shape[1]) < lengths[:, None] if cache is None else np.ones(tokens.shape, bool)
        always = functools.partial(np.ones, dtype=bool)
        valid = np.concatenate([always((len(tokens), m)), text, always((len(tokens), n_back))], axis=1)
        if cache:
            m, valid = cache.extend(m, valid)
        sight = _Sight(valid, at, rows=m, causal=True, written=text)
        for i in range(self.config.n_decoder_layers):
            name = f"decoder.{i}."
            # Rows that are written behind the text are read in front of it: of the last layer they are keys, nobody asks for outputs.
            last = i == self.config.n_decoder_layers - 1
            skip = m if last and cache is None and n_back == m and not run.wants_mass() else 0
            attend = functools.partial(self._self_attention, w, name + "attention", site="decoder", layer=i, sight=sight, run=run)
            attend = functools.partial(attend, dropout=dropout, cache=cache, skip=skip)
            x = self._sublayer(w, name + "attention", x, attend, dropout, skip)
            if encoded is not None:
                attend = functools.partial(
                    self._cross_attention, w, name + "cross", encoded=encoded, layer=i, sight=sight, run=run, dropout=dropout, cache=cache
                )
                x = self._sublayer(w, name + "cross", x, attend, dropout)
            feed = functools.partial(self._feed_forward, w, name + "feed_forward", dropout)
            x = self._sublayer(w, name + "feed_forward", x, feed, dropout)
        x = self._last_norm(w, "decoder", x)
        first = x.shape[1] - n_back - tokens.shape[1]
        if given and cache is None:
            run.end("decoder", _decoder_row_outputs(x, given, first, tokens.shape[1]))
        x = x[:, first : first + tokens.shape[1]] if x.shape[1] > tokens.shape[1] else x
        if cache is None:
            run.finished(x, text)
        return x

    def finish_segment(self, encoded: Encoded | None, run: MemoryRun) -> None:
        """Offers the encoder's outputs to the memory at the cross site, and closes the segment."""
        if encoded is not None and self.config.has_decoder:
            run.wrote("cross", 0, encoded.text, encoded.valid[:, encoded.n_rows :])
        run.close()

    def output_logits(self, hidden: Array, w: Weights | None = None) -> Array:
        """(..., d) -> (..., V): the output layer, tied to the input embedding unless the config says otherwise."""
        w = self.weights if w is None else w
        if self.config.tie_embeddings:
            return ops.linear(hidden, w["embedding.weight"], transposed=True)
        return ops.linear(hidden, w["output.weight"])

    # Sections 3.2 to 3.4: attention, feed-forward, embeddings

    def _sublayer(self, w: Weights, name: str, x: Array, sublayer: Callable[[Array], Array], dropout: Dropout, skip: int = 0) -> Array:
        """norm(x + f(x)), or with pre-norm x + f(norm(x)); f leaves out the first `skip` rows."""
        kept = x[:, skip:] if skip else x
        if self.config.norm_position == "pre":
            return kept + dropout(sublayer(self._norm(w, name + "_norm", x)), name)
        return self._norm(w, name + "_norm", kept + dropout(sublayer(x), name))

    def _norm(self, w: Weights, name: str, x: Array) -> Array:
        return ops.norm(x, w[name + ".weight"], w.get(name + ".bias"), self.config.norm_eps, self.config.norm)

    def _last_norm(self, w: Weights, stack: str, x: Array) -> Array:
        return self._norm(w, stack + ".norm", x) if self.config.norm_position == "pre" else x

    def _linear(self, w: Weights, name: str, x: Array) -> Array:
        return ops.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def _feed_forward(self, w: Weights, name: str, dropout: Dropout, x: Array) -> Array:
        hidden = ops.activation(self._linear(w, name + ".in", x), self.config.activation)
        return self._linear(w, name + ".out", dropout.hidden(hidden, name + ".hidden"))

    def _embed(self, w: Weights, stack: str, tokens: np.ndarray, first: int = 0) -> Array:
        """Token embeddings and, where they are added, positions `first`, `first` + 1, ..."""
        config = self.config
        x = ops.embedding(w["embedding.weight"], tokens)
        if config.embedding_scale:
            x = x * self.dtype.type(config.d_model**0.5)
        last = first + tokens.shape[1]
        if config.positions == "sinusoidal":
            x = x + _core.sinusoidal_positions(last, config.d_model, dtype=self.dtype)[first:]
        elif config.positions == "learned":
            if last > config.max_positions:
                raise InvalidValue(f"tokens: expected at most max_positions = {config.max_positions} positions, got {last}")
            x = x + w[stack + ".positions.weight"][first:last]
        return x

    def _self_attention(
        self,
        w: Weights,
        name: str,
        x: Array,
        *,
        site: str,
        layer: int,
        sight: _Sight,
        run: MemoryRun,
        dropout: Dropout,
        cache: KVCache | None = None,
        skip: int = 0,
    ) -> Array:
        """Of all rows of x but the first `skip`, which are keys alone."""
        q, k, v = (self._heads(w, f"{name}.{part}", x[:, skip:] if part == "q" and skip else x) for part in "qkv")
        at = sight.at[..., skip:]
        free_q, q, k = q, self._rotate(q, at), self._rotate(k, sight.at)
        if cache:
            k, v = cache.append(layer, k, v)
        blocks = [self._own_block(w, site, q, k, v, sight)]
        text, asking = slice(sight.rows, sight.rows + sight.text.shape[1]), sight.valid[:, -q.shape[2] :]
        out = self._with_memory(w, name, site, layer, q, free_q, at, blocks, run, dropout, asking, None if cache else text)
        if cache is None:
            project = lambda rows: (self._heads(w, name + ".k", rows), self._heads(w, name + ".v", rows))  # noqa: E731
            run.wrote(site, layer, x if x.shape[1] == sight.text.shape[1] else x[:, text], sight.text, project)
        return self._linear(w, name + ".o", _merge_heads(out))

    def _cross_attention(
        self,
        w: Weights,
        name: str,
        x: Array,
        *,
        encoded: Encoded,
        layer: int,
        sight: _Sight,
        run: MemoryRun,
        dropout: Dropout,
        cache: KVCache | None = None,
    ) -> Array:
        q = self._heads(w, name + ".q", x)
        project = lambda: tuple(self._heads(w, f"{name}.{part}", encoded.hidden) for part in "kv")  # noqa: E731
        k, v = cache.cross(layer, project) if cache else project()
        blocks, asking, at = [Block(k, v, valid=encoded.valid)], sight.valid[:, -x.shape[1] :], sight.at[..., -x.shape[1] :]
        out = self._with_memory(w, name, "cross", layer, q, q, at, blocks, run, dropout, asking, slice(encoded.n_rows, None))
        return self._linear(w, name + ".o", _merge_heads(out))

    def _own_block(self, w: Weights, site: str, q: Array, k: Array, v: Array, sight: _Sight) -> Block:
        """The segment's own keys. Rows in front are seen by every query, also where the text is causal."""
        n_queries, n_keys = q.shape[2], k.shape[2]
        if sight.causal and sight.at.ndim > 1 and self.config.positions == "relative":
            bias = self._dense_bias(w, site, sight.at, sight.at[:, -n_queries:], None)
        else:
            bias = self._distance_bias(w, site, n_queries, n_keys, n_keys - n_queries)
        return Block(k, v, valid=sight.valid, bias=bias, causal=sight.causal, prefix=sight.rows if sight.causal else 0)

    def _with_memory(
        self,
        w: Weights,
        name: str,
        site: str,
        layer: int,
        q: Array,
        free_q: Array,
        at: np.ndarray,
        blocks: list[Block],
        run: MemoryRun,
        dropout: Dropout,
        asking: np.ndarray,
        text: slice | None,
    ) -> Array:
        """Attention over the segment's own blocks and what the memory shows: joint, gated, added or instead.

        asking: (B, T) queries that count. text: which of the segment's keys are text, where the attention they
        receive is to be told.
        """
        scale = self.config.attention_scale or 1.0
        make_query = lambda: self._query(w, name, free_q, run.site_start(site)[:, None] + at)  # noqa: E731
        shown = run.views(site, layer, make_query, q.shape[2]) if run.members else []
        own = len(blocks)
        joint = [(i, v) for i, v in shown if isinstance(v, View) and run.merge(i, v) == "joint"]
        blocks = blocks + [self._view_block(w, name, site, view, at, run) for _, view in joint]
        out, lse = ops.attention_with_lse(q, blocks, scale, **dropout.weights(name))
        if text is not None and run.wants_mass():
            mass = np.concatenate([ops.attention_mass(q, block, lse, scale, asking) for block in blocks[:own]], axis=1)
            run.received(site, layer, None, mass[:, text])
            told: set[int] = set()  # a member that shows two views is told of the first
            for (i, view), block in zip(joint, blocks[own:], strict=True):
                if run.wants_mass(i) and view.index is None and i not in told:
                    told.add(i)
                    run.received(site, layer, i, ops.attention_mass(q, block, lse, scale, asking))
        for n, (i, more) in enumerate(shown):
            merge = run.merge(i, more)
            if merge == "joint":
                continue
            if isinstance(more, Side):
                other = more.output
                has = np.ones(1, bool) if more.valid is None else more.valid
            else:
                block = self._view_block(w, name, site, more, at, run)
                other = ops.attention(q, [block], scale, **dropout.weights(f"{name}.view.{n}"))
                has = np.asarray(more.valid.any(axis=1))
            if merge == "add":
                out = out + (other if has.all() else np.where(has[:, None, None, None], other, 0))
                continue
            if merge == "gate":
                open_ = ops.sigmoid(more.gate)[:, None, None]
                other = open_ * other + (1 - open_) * out
            # An empty memory must equal no memory.
            out = other if has.all() else np.where(has[:, None, None, None], other, out)
        return out

    def _view_block(self, w: Weights, name: str, site: str, view: View, at: np.ndarray, run: MemoryRun) -> Block:
        """A view as keys and values: projected by this layer, and given the positions it has."""
        valid, positions, index = view.valid, view.positions, view.index
        bank, bias = view.bank[1:], view.bias
        if index is not None and index.ndim == 2:
            rows = np.arange(len(index))[:, None]
            pick = np.maximum(index, 0)
            bank = tuple(x[rows, pick] if view.bank[0] == "hidden" else np.moveaxis(np.moveaxis(x, 1, 2)[rows, pick], 2, 1) for x in bank)
            valid = valid[rows, pick] & (index >= 0)
            positions = positions[rows, pick] if positions is not None else None
            if bias is not None and bias.shape[-1] > 1:
                bias = np.broadcast_to(bias, (len(index), self.config.n_heads, len(at), bias.shape[-1]))
                bias = np.take_along_axis(bias, np.broadcast_to(pick[:, None, None], (*bias.shape[:3], pick.shape[1])), -1)
            index = None
        if view.bank[0] == "hidden":
            k, v = self._heads(w, name + ".k", bank[0]), self._heads(w, name + ".v", bank[0])
        else:
            k, v = bank
        if site != "cross" and positions is not None:
            distance_from_start = positions - run.site_start(site)[:, None]  # (B, M), negative: before the segment
            k = self._rotate(k, distance_from_start)
            if self.config.positions == "relative":
                bias = self._dense_bias(w, site, distance_from_start, at, index) + (0 if bias is None else bias)
        return Block(k, v, valid=valid, index=index, bias=bias)

    def _query(self, w: Weights, name: str, q: Array, positions: np.ndarray) -> Query:
        heads, config = value_of(q), self.config

        def hidden() -> np.ndarray:
            b, h, t, _ = heads.shape
            groups = config.n_kv_heads
            wk = value_of(w[name + ".k.weight"]).reshape(config.d_model, groups, config.d_head)
            grouped = heads.reshape(b, groups, h // groups, t, config.d_head)
            return np.einsum("bghtx,dgx->bghtd", grouped, wk, optimize=True).reshape(b, h, t, config.d_model)

        return Query(q, hidden, np.broadcast_to(positions, (len(heads), heads.shape[2])))

    def _heads(self, w: Weights, name: str, x: Array) -> Array:
        """x W + b, (B, T, d) -> (B, heads, T, D)."""
        y = self._linear(w, name, x)
        y = np.reshape(y, (x.shape[0], x.shape[1], y.shape[2] // self.config.d_head, self.config.d_head))
        return np.swapaxes(y, 1, 2)

    def _rotate(self, x: Array, positions: np.ndarray) -> Array:
        return ops.rotary(x, positions, self.config.rotary_base) if self.config.positions == "rotary" else x

    def _distance_bias(self, w: Weights, site: str, n_queries: int, n_keys: int, offset: int) -> Any:
        """Relative-position bias of keys j on queries i at distance j - i - offset."""
        if self.config.positions != "relative":
            return None
        distance = np.arange(-(n_queries - 1), n_keys) - offset
        table = w[site + ".relative_bias.weight"][self._buckets(site, distance)]
        return ops.DistanceBias(np.transpose(table), n_queries, n_keys)

    def _dense_bias(self, w: Weights, site: str, key_at: np.ndarray, query_at: np.ndarray, index: np.ndarray | None) -> Array:
        """The same for rows at any positions key_at (B, M), query_at (T,) or (B, T): (B, H, T, M), or (B, H, T, K) for
        rows chosen by `index`."""
        table = w[site + ".relative_bias.weight"]
        if index is None:
            distance = key_at[:, None, :] - query_at[..., None]
            return np.transpose(table[self._buckets(site, distance)], (0, 3, 1, 2))
        chosen = key_at[np.arange(len(index))[:, None, None, None], np.maximum(index, 0)]
        heads = np.arange(index.shape[1])[:, None, None]
        asked_at = query_at[:, None] if query_at.ndim == 1 else query_at[:, None, :, None]
        return table[self._buckets(site, chosen - asked_at), np.broadcast_to(heads, index.shape)]

    def _buckets(self, site: str, distance: np.ndarray) -> np.ndarray:
        config = self.config
        return ops.relative_buckets(distance, config.relative_buckets, config.relative_max_distance, site == "encoder")

    # Around it

    def start_run(self, memory: Memory | None, batch: int, w: Weights | None = None, training: bool = False) -> MemoryRun:
        """`memory` at work on `batch` streams of this model."""
        return MemoryRun(memory, self.config, w or self.weights, batch, training=training, fingerprint=self.fingerprint)

    def add_memory_weights(self, memory: Memory | None, seed: int = 0) -> None:
        """Gives the strategies' parameters that the model does not have yet their initial values."""
        for name, param in memory_parameters(memory, self.config, self.dtype).items():
            if name not in self.weights:
                rng = np.random.default_rng([seed, *name.encode()])
                value = rng.normal(0, param.init, param.shape) if isinstance(param.init, int | float) else param.init
                self.weights[name] = np.broadcast_to(np.asarray(value, self.dtype), param.shape).copy()
            elif self.weights[name].shape != tuple(param.shape):
                raise InvalidValue(
                    f"memory: {name} has shape {self.weights[name].shape} in this model, and {tuple(param.shape)} with the options"
                    " given; use the options it was trained with"
                )

    def shift_right(self, target: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
        """The decoder's inputs for `target` (B, T): `first` (B,) or bos_id, then all but the last token."""
        start = np.full(len(target), self.config.bos_id) if first is None else first
        return np.concatenate([start[:, None], target[:, :-1]], axis=1)[:, : target.shape[1]].astype(np.int64)

    def fingerprint(self) -> str:
        """Names these weights: rows computed with others must not be mixed with theirs."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self.weights):
            digest.update(name.encode() + np.ascontiguousarray(self.weights[name]).data)
        return digest.hexdigest()[:16]

    def _needs(self, stack: str) -> None:
        if not getattr(self.config, "has_" + stack):
            raise InvalidValue(f"this model has no {stack} (n_{stack}_layers is 0)")


@dataclasses.dataclass(frozen=True)
class _Sight:
    """What self-attention sees: valid (B, keys); the queries' positions `at` (n,), or (B, n) where rows differ; `rows`
    memory rows in front; `written` (B, T) marks the text that a memory is offered (default: all but the rows)."""

    valid: np.ndarray
    at: np.ndarray
    rows: int
    causal: bool = False
    written: np.ndarray | None = None

    @property
    def text(self) -> np.ndarray:
        return self.valid[:, self.rows :] if self.written is None else self.written


def _merge_heads(x: Array) -> Array:
    b, h, t, d = x.shape
    return np.reshape(np.swapaxes(x, 1, 2), (b, t, h * d))


def _cut(x: Array, ends: Sequence[int]) -> list[Array]:
    return [x[:, start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def _decoder_row_outputs(x: Array, given: Sequence[Any], first: int, n_text: int) -> list[Array]:
    """Outputs at each member's rows: behind the text where it wrote there, else in front."""
    front, back, outputs = 0, first + n_text, []
    for rows in given:
        m = rows.values.shape[1]
        start = back if rows.where == "around" else front
        outputs.append(x[:, start : start + m])
        front, back = front + m, back + (m if rows.where == "around" else 0)
    return outputs


def initial_weights(config: Config, seed: int, dtype: Any) -> dict[str, np.ndarray]:
    """Every weight of the architecture by name, drawn from one seed in order of the names' appearance."""
    rng = np.random.default_rng(seed)
    return {name: _draw(rng, name, shape, dtype) for name, shape in weight_shapes(config).items()}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if name.endswith(".bias") and len(shape) == 1:
        return np.zeros(shape, dtype)
    if len(shape) == 1:  # the weight of a norm
        return np.ones(shape, dtype)
    d_in = shape[1] if name == "embedding.weight" else shape[0]
    scale = d_in**-0.5 if "positions" not in name and "relative" not in name else 0.02
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights: what a model file must hold."""
    d, heads = config.d_model, config.n_heads * config.d_head  # type: ignore[operator]
    kv = config.n_kv_heads * config.d_head  # type: ignore[operator]
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, d)}

    def linear(name: str, d_in: int, d_out: int) -> None:
        shapes[name + ".weight"] = (d_in, d_out)
        if config.bias:
            shapes[name + ".bias"] = (d_out,)

    def norm(name: str) -> None:
        shapes[name + ".weight"] = (d,)
        if config.norm == "layer":
            shapes[name + ".bias"] = (d,)

    for stack, count in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        if count and config.positions == "learned":
            shapes[stack + ".positions.weight"] = (config.max_positions, d)
        if count and config.positions == "relative":
            shapes[stack + ".relative_bias.weight"] = (config.relative_buckets, config.n_heads)
        for i in range(count):
            sites = ["attention"] + (["cross"] if stack == "decoder" and config.has_encoder else [])
            for site in sites:
                name = f"{stack}.{i}.{site}"
                for part, d_out in (("q", heads), ("k", kv), ("v", kv)):
                    linear(f"{name}.{part}", d, d_out)
                linear(name + ".o", heads, d)
                norm(name + "_norm")
            linear(f"{stack}.{i}.feed_forward.in", d, config.d_ff)  # type: ignore[arg-type]
            linear(f"{stack}.{i}.feed_forward.out", config.d_ff, d)  # type: ignore[arg-type]
            norm(f"{stack}.{i}.feed_forward_norm")
        if count and config.norm_position == "pre":
            norm(stack + ".norm")
    if not config.tie_embeddings:
        shapes["output.weight"] = (d, config.vocab_size)
    return shapes


def check_tokens(name: str, tokens: Any, vocab_size: int, lengths: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(B, S) ids as int64 and their (B,) lengths, or InvalidValue / InvalidType that names the argument."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # rows of different lengths
        raise InvalidValue(f"{name}: expected rows of one length; fill short ones with pad_id and give their lengths") from error
    if array.dtype.kind not in "iu" and array.size:
        raise InvalidType(f"{name}: expected integer token ids, got {array.dtype}")
    if array.ndim != 2:
        raise InvalidValue(f"{name}: expected shape (batch, tokens), got {array.shape}")
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        bad = array[(array < 0) | (array >= vocab_size)][0]
        raise InvalidValue(f"{name}: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}, got {bad}; is it the model's own tokenizer?")
    if lengths is None:
        return array.astype(np.int64), np.full(len(array), array.shape[1], np.int64)
    try:
        lengths = np.asarray(lengths)
    except ValueError as error:
        raise InvalidValue(f"{name} lengths: expected {len(array)} integers, got lists of different lengths") from error
    if lengths.dtype.kind not in "iu" or lengths.shape != (len(array),):
        raise InvalidValue(f"{name} lengths: expected {len(array)} integers, got {lengths.dtype} of shape {lengths.shape}")
    if len(lengths) and (lengths.min() < 0 or lengths.max() > array.shape[1]):
        raise InvalidValue(f"{name} lengths: expected 0 to {array.shape[1]}, got {lengths.min()} to {lengths.max()}")
    return array.astype(np.int64), lengths.astype(np.int64)
