"""Attention: section 3.2 of "Attention Is All You Need" (arXiv 1706.03762).

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V                                  (equation 1)

    MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O                               (section 3.2.2)
    where head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)

`MultiHeadAttention` below is the second line. The first is `ops.attention_with_lse`, one compiled kernel over blocks of keys
and values: the segment's own, and those that a memory shows, all in one softmax.

Legend: B batch, T queries, S keys, H heads, D head size (the paper's d_k), d d_model, M rows of a memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from . import ops
from ._core import Block
from .autodiff import is_traced, value_of
from .config import Config
from .context import Pass
from .layers import Linear, Norm, Shape, StepProduct
from .memory.base import Query, SideOutput, View
from .positions import rotary_frequencies
from .weights import Array


@dataclass(frozen=True)
class Encoded:
    """The encoder's outputs: hidden (B, m + S, d), the m memory rows first; valid (B, m + S) bool."""

    hidden: Array
    valid: np.ndarray
    n_rows: int

    @property
    def text(self) -> Array:
        """(B, S, d): the outputs at the source tokens alone."""
        return self.hidden[:, self.n_rows :] if self.n_rows else self.hidden


@dataclass(frozen=True)
class Layout:
    """What stands where in a stack's sequence: `n_front` rows of memories, the text, in a decoder more rows behind it.

    positions: of the queries, (T,), or (B, T) where streams differ; the text's first token is at 0. text: (B, tokens) bool, what
    is no padding. valid: (B, keys) bool, or None: all keys are there. causal: a query sees no key behind its own, other than
    the rows in front, without the last `n_causal` of them, which are text. lengths, key_positions: (B,) keys of each stream and
    (B, keys) where they stand, where streams differ.
    """

    positions: np.ndarray
    text: np.ndarray
    n_front: int = 0
    valid: np.ndarray | None = None
    causal: bool = False
    lengths: np.ndarray | None = None
    key_positions: np.ndarray | None = None
    n_causal: int = 0
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what all layers need, made by the first

    @property
    def of_text(self) -> slice:
        """The text among the keys."""
        return slice(self.n_front, self.n_front + self.text.shape[1])

    def last(self, n: int) -> np.ndarray:
        """The positions of the last n queries, (n,) or (B, n)."""
        return self.positions[..., self.positions.shape[-1] - n :]

    def within(self, window: int) -> np.ndarray:
        """(B, keys) bool: keys of streams that differ which the one query of each sees through a window."""
        assert self.key_positions is not None
        near = self.key_positions > self.positions - window
        return near if self.valid is None else near & self.valid

    def counted(self, batch: int, n_queries: int) -> np.ndarray:
        """(B, T) bool: the queries that are no padding."""
        return np.ones((batch, n_queries), bool) if self.valid is None else self.valid[:, -n_queries:]


class MultiHeadAttention:
    """Section 3.2.2, at one site ("encoder", "decoder" or "cross") and layer. Its rows in a memory are those of that place."""

    def __init__(self, config: Config, name: str, site: str, layer: int):
        self.config, self.name, self.site, self.layer = config, name, site, layer
        self.n_heads, self.n_kv_heads, self.d_head, self.scale = config.heads(site)
        d, heads, kv_heads = config.d_model, self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        self.q, self.k, self.v = (
            Linear(config, f"{name}.{part}", d, n) for part, n in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        )
        self.o, self.qkv = Linear(config, name + ".o", heads, d), name + ".qkv"
        self.q_norm, self.k_norm = (
            Norm(config, f"{name}.{part}_norm", kind="rms", d=self.d_head) if config.qk_norm else None for part in "qk"
        )
        is_local = site == "decoder" and config.is_local(layer)
        self.window, self.cap = config.window if is_local else None, config.attention_cap
        self.frequencies = rotary_frequencies(config, is_local) if config.positions == "rotary" and site != "cross" else None
        self.relative = RelativeBias(config, site) if config.positions == "relative" and site != "cross" else None

    def shapes(self) -> Iterator[Shape]:
        for linear in (self.q, self.k, self.v, self.o):
            yield from linear.shapes()
        for norm in filter(None, (self.q_norm, self.k_norm)):
            yield from norm.shapes()

    def step_products(self) -> Iterator[StepProduct]:
        """What a decoding step multiplies with: W^Q, W^K and W^V as one matrix. Keys of the encoder's outputs are made once."""
        yield StepProduct(self.qkv, (self.q, self.k, self.v)) if self.site != "cross" else StepProduct(self.q.weight, (self.q,))
        yield StepProduct(self.o.weight, (self.o,))

    def products(self) -> Iterator[StepProduct]:
        """All that it multiplies with; keys of the encoder's outputs, too."""
        yield from self.step_products()
        if self.site == "cross":
            yield from (StepProduct(one.weight, (one,)) for one in (self.k, self.v))

    def to_itself(self, x: Array, p: Pass, layout: Layout, skip: int = 0, residual: Array | None = None) -> Array:
        """Self-attention of all rows of x (B, T, d) but the first `skip`, which are keys alone; residual is added to it."""
        q, k, v = self._projected(x, p, skip)
        queries, keys = self._rotate(q, layout.positions[..., skip:]), self._rotate(k, layout.positions)
        owners = None
        if p.cache is not None:
            keys, v, owners = p.cache.append(self.layer, keys, v)
        own = Block(
            keys,
            v,
            valid=layout.valid if self.window is None or layout.lengths is None else layout.within(self.window),
            owners=owners,
            lengths=layout.lengths,
            bias=self._bias(p, layout, queries.shape[2], keys.shape[2]),
            causal=layout.causal,
            prefix=layout.n_front - layout.n_causal if layout.causal and self.window is None else 0,
            window=self.window if layout.lengths is None else None,
        )
        out = self._with_memory(p, queries, q, own, layout, None if p.cache else layout.of_text)
        if p.cache is None and p.run.members:
            text = x if x.shape[1] == layout.text.shape[1] else x[:, layout.of_text]
            p.run.wrote(self.site, self.layer, text, layout.text, partial(self.rows_projected, p))
        return self.o(_concatenated(out), p, residual=residual)

    def to_encoder(self, x: Array, p: Pass, layout: Layout, encoded: Encoded, residual: Array | None = None) -> Array:
        """Cross-attention of x (B, T, d) to the encoder's outputs; residual is added to it."""
        q = self._normed(self.q_norm, self._split(self.q(x, p)), p)
        project = lambda: self.keys_and_values(encoded.hidden, p)  # noqa: E731
        k, v, valid = p.cache.cross(self.layer, project, encoded.valid) if p.cache is not None else (*project(), encoded.valid)
        if p.cache is not None and (m := p.cache.rows_per_source) > 1:
            # Beams of one source are queries of one row: its keys are read once for all of them.
            beams = q.reshape(len(q) // m, m, *q.shape[1::2]).swapaxes(1, 2) if q.shape[2] == 1 else None
            if beams is not None:
                out = _concatenated(ops.attention(beams, [Block(k, v, valid=valid)], self.scale, cap=self.cap))
                return self.o(out.reshape(len(q), 1, -1), p, residual=residual)
            k, v, valid = (np.repeat(x, m, axis=0) for x in (k, v, valid))
        out = self._with_memory(p, q, q, Block(k, v, valid=valid), layout, slice(encoded.n_rows, None))
        return self.o(_concatenated(out), p, residual=residual)

    # Heads and positions

    def _split(self, y: Array) -> Array:
        """Into heads: (B, T, heads D) -> (B, heads, T, D)."""
        return y.reshape(*y.shape[:2], y.shape[2] // self.d_head, self.d_head).swapaxes(1, 2)

    def _projected(self, x: Array, p: Pass, skip: int) -> tuple[Array, Array, Array]:
        """Queries, of all rows of x but the first `skip`, keys and values, in heads."""
        if (qkv := p.weights.get(self.qkv)) is not None:
            bias = p.weights.get(self.qkv + ".bias")
            y = self._split(qkv.linear(x, None if bias is None else bias.value))
            n, m = self.q.d_out // self.d_head, self.k.d_out // self.d_head
            return self._normed(self.q_norm, y[:, :n, skip:], p), self._normed(self.k_norm, y[:, n : n + m], p), y[:, n + m :]
        return self._normed(self.q_norm, self._split(self.q(x[:, skip:] if skip else x, p)), p), *self.keys_and_values(x, p)

    def keys_and_values(self, rows: Array, p: Pass) -> tuple[Array, Array]:
        """Of rows (B, M, d), each (B, Hkv, M, D), without position."""
        return self._normed(self.k_norm, self._split(self.k(rows, p)), p), self._split(self.v(rows, p))

    def rows_projected(self, p: Pass, rows: Array, frozen: bool = False) -> tuple[Array, Array]:
        """The same for a memory (`New.project`). frozen: the gradient goes into the rows alone."""
        return self.keys_and_values(rows, p.frozen() if frozen else p)

    def _normed(self, norm: Norm | None, heads: Array, p: Pass) -> Array:
        return heads if norm is None else norm(heads, p)

    def _rotate(self, x: Array, positions: np.ndarray) -> Array:
        return x if self.frequencies is None else ops.rotary(x, positions, self.frequencies)

    def _bias(self, p: Pass, layout: Layout, n_queries: int, n_keys: int) -> Any:
        """Of the segment's own keys. Every layer's is the same: where no gradient is recorded, it is made once."""
        if self.relative is None:
            return None
        if (made := layout.shared.get(n_queries)) is not None:
            return made
        if p.cache is not None and n_queries == 1:
            relative = self.relative
            bias: Any = p.cache.bias_of_last(relative.name, lambda n: value_of(relative.by_distance(p, 1, n).table))
        elif layout.causal and layout.positions.ndim > 1:
            bias = self.relative.between(p, layout.positions, layout.positions[:, -n_queries:])
        else:
            bias = self.relative.by_distance(p, n_queries, n_keys)
        if not is_traced(p.value(self.relative.name)):
            bias = layout.shared[n_queries] = bias.strided(bias.table) if isinstance(bias, ops.DistanceBias) else bias
        return bias

    # The rows of memories

    def _with_memory(self, p: Pass, q: Array, free_q: Array, own: Block, layout: Layout, text: slice | None) -> Array:
        """Attention over the segment's own block and what the memory shows: (B, H, T, D).

        q, free_q: queries with and without position. text: the keys whose attention a memory may ask for; None: nobody asks.
        """
        run, dropout, n_queries = p.run, p.dropout.weights, q.shape[2]
        if not run.members:
            if p.record is not None:
                p.record.attention(self.site, q, own, self.scale, self.cap)
            return ops.attention(q, [own], self.scale, cap=self.cap, **dropout(self.name))
        at = layout.last(n_queries)
        shown = [
            (i, view, run.merge(i, view))
            for i, view in run.views(
                self.site, self.layer, lambda: self._query(p, free_q, at, layout), n_queries, decoding=p.cache is not None
            )
        ]
        joint = [
            (i, view, self._block_of(p, view, at, n))
            for n, (i, view, merge) in enumerate(shown)
            if isinstance(view, View) and merge == "joint"
        ]
        blocks = [own, *(block for _, _, block in joint)]
        out, lse = ops.attention_with_lse(q, blocks, self.scale, cap=self.cap, **dropout(self.name))
        if text is not None and run.wants_mass():
            counted = layout.counted(q.shape[0], n_queries)
            self._report_attention(p, own, text, joint, lambda block: ops.attention_mass(q, block, lse, self.scale, counted, cap=self.cap))
        if text is not None and self.site != "cross":
            first = layout.n_front + n_queries - own.k.shape[2]  # of the queries, that of the text's first token
            asking = slice(first, first + layout.text.shape[1])
            run.attended(self.site, self.layer, partial(self._weights, q, own, joint, lse, text, asking))
        for n, (_, view, merge) in enumerate(shown):
            if isinstance(view, SideOutput):
                has = np.ones(1, bool) if view.valid is None else view.valid
                out = _combined(out, view.output, has[:, None, None, None], view, merge)
            elif merge != "joint":
                other = ops.attention(q, [self._block_of(p, view, at, n)], self.scale, cap=self.cap, **dropout(f"{self.name}.view.{n}"))
                out = _combined(out, other, _has_rows(view), view, merge)
        return out

    def _report_attention(
        self, p: Pass, own: Block, text: slice, joint: list[tuple[int, View, Block]], received: Callable[[Block], np.ndarray]
    ) -> None:
        """Reports to the memories how much attention their rows, and the segment's own, have received."""
        run = p.run
        run.received(self.site, self.layer, None, received(own)[:, text])
        seen: set[int] = set()  # of a member that shows two views, the first is reported
        for i, view, block in joint:
            if run.wants_mass(i) and i not in seen and not self._are_copied(view):
                seen.add(i)
                run.received(self.site, self.layer, i, _of_bank(view, received(block)))

    def _weights(
        self, q: Array, own: Block, joint: list[tuple[int, View, Block]], lse: np.ndarray, text: slice, asking: slice, member: int
    ) -> np.ndarray:
        """The attention (B, H, S, M + S) of the queries `asking` to a member's own rows and to the text (see `New.attention`)."""
        mine = [(view, block) for i, view, block in joint if i == member and not self._are_copied(view)][:1]
        weights = partial(ops.attention_weights, q, lse=lse, scale=self.scale, cap=self.cap)
        parts = [*(_of_bank(view, weights(block)) for view, block in mine), weights(own)[..., text]]
        return np.concatenate(parts, axis=3)[:, :, asking]

    def _block_of(self, p: Pass, view: View, at: np.ndarray, number: int) -> Block:
        """A view as keys and values: projected by this layer, and given the positions it has. number: among the layer's views."""
        project = lambda: self._at_their_places(p, view)  # noqa: E731
        k, v = project() if p.cache is None else p.run.projected(self.site, self.layer, number, view, project)
        view = _with_chosen_rows(view, self.n_heads, at.shape[-1])
        index, valid, bias = view.index, view.valid, view.bias
        if self.relative is not None and (stand_at := self._from_start(p, view)) is not None:
            if index is not None and view.places is None:
                stand_at = stand_at[np.arange(len(index))[:, None, None, None], np.maximum(index, 0)]
            bias = self.relative.between(p, stand_at, at) + (0 if bias is None else bias)
        if index is not None and self._are_copied(view):
            index = _index_of_copies(index, valid, self.n_kv_heads)
            valid = np.ones((len(index), k.shape[2]), bool)
        return Block(k, v, valid=valid, index=index, bias=bias)

    def _at_their_places(self, p: Pass, view: View) -> tuple[Array, Array]:
        """The keys and values of a view's rows, keys with their positions."""
        kind, *bank = _chosen_of_bank(view)
        k, v = self.keys_and_values(bank[0], p) if kind == "hidden" else bank
        if self.frequencies is None or (stand_at := self._from_start(p, view)) is None:
            return k, v
        if not self._are_copied(view):
            if view.index is not None and view.index.ndim == 2 and view.places is None:
                stand_at = np.take_along_axis(stand_at, np.maximum(view.index, 0), 1)
            return self._rotate(k, stand_at), v
        assert view.index is not None
        batch, groups = len(view.index), self.n_kv_heads
        pick = np.maximum(view.index, 0).reshape(batch, groups, -1)
        rows = np.arange(batch)[:, None, None], np.arange(groups)[:, None], pick
        each = k[rows].reshape(batch * groups, 1, -1, self.d_head)
        return self._rotate(each, stand_at.reshape(batch * groups, -1)).reshape(batch, groups, -1, self.d_head), v[rows]

    def _from_start(self, p: Pass, view: View) -> np.ndarray | None:
        """Where a view's rows stand, from the segment's start on, negative before it: (B, M), or of the places of its index."""
        stand_at = view.positions if view.places is None else view.places
        if self.site == "cross" or stand_at is None:
            return None
        return stand_at - p.run.site_start(self.site).reshape(-1, *[1] * (stand_at.ndim - 1))

    def _are_copied(self, view: View) -> bool:
        """Whether one row stands at several positions, so that it takes several keys."""
        return view.places is not None and view.places.ndim == 4 and self.frequencies is not None

    def _query(self, p: Pass, q: Array, at: np.ndarray, layout: Layout) -> Query:
        heads, config = value_of(q), self.config
        batch, n_heads, length, d_head = heads.shape

        def hidden() -> np.ndarray:
            groups = self.n_kv_heads
            wk = p.weights[self.k.weight].array.reshape(config.d_model, groups, d_head)
            if self.k_norm is not None:  # but for the length of a key, which only the key itself knows
                wk = wk * value_of(p.value(self.k_norm.weight))
            grouped = heads.reshape(batch, groups, n_heads // groups, length, d_head)
            return np.einsum("bghtx,dgx->bghtd", grouped, wk, optimize=True).reshape(batch, n_heads, length, config.d_model)

        valid = None if layout.valid is None else layout.counted(batch, length)
        return Query(q, hidden, np.broadcast_to(p.run.site_start(self.site)[:, None] + at, (batch, length)), valid)


class RelativeBias:
    """A bias by bucketed distance of key and query, one table for all layers of a stack (arXiv 1910.10683, section 2.1)."""

    def __init__(self, config: Config, stack: str):
        self.config, self.name, self.bidirectional = config, stack + ".relative_bias.weight", stack == "encoder"
        self.n_heads = config.heads(stack).n_heads

    def shapes(self) -> Iterator[Shape]:
        yield Shape(self.name, (self.config.relative_buckets, self.n_heads), std=0.02)

    def by_distance(self, p: Pass, n_queries: int, n_keys: int) -> ops.DistanceBias:
        """Of keys that stand one behind the other, the last key at the last query."""
        distance = np.arange(-(n_queries - 1), n_keys) - (n_keys - n_queries)
        return ops.DistanceBias(np.transpose(p.value(self.name)[self._buckets(distance)]), n_queries, n_keys)

    def between(self, p: Pass, key_at: np.ndarray, query_at: np.ndarray) -> Array:
        """Of keys at any positions, key_at (B, M), query_at (T,) or (B, T): (B, H, T, M); of key_at (B, H, T, K), the same shape."""
        table = p.value(self.name)
        if key_at.ndim == 2:
            return np.transpose(table[self._buckets(key_at[:, None, :] - query_at[..., None])], (0, 3, 1, 2))
        heads = np.arange(key_at.shape[1])[:, None, None]
        asked_at = query_at[:, None] if query_at.ndim == 1 else query_at[:, None, :, None]
        return table[self._buckets(key_at - asked_at), np.broadcast_to(heads, key_at.shape)]

    def _buckets(self, distance: np.ndarray) -> np.ndarray:
        return ops.relative_buckets(distance, self.config.relative_buckets, self.config.relative_max_distance, self.bidirectional)


def _concatenated(heads: Array) -> Array:
    """Concat(head_1, ..., head_h): (B, H, T, D) -> (B, T, H D)."""
    b, h, t, d = heads.shape
    return heads.swapaxes(1, 2).reshape(b, t, h * d)


def _combined(out: Array, other: Array, has: np.ndarray, view: View | SideOutput, merge: str) -> Array:
    """`out` with what a view gives by itself: added, gated, or instead. has: bool of as many axes, where the memory has rows."""
    if merge == "add":
        return out + (other if has.all() else np.where(has, other, 0))
    if merge == "gate":
        gate = ops.sigmoid(view.gate)[:, None, None]
        other = gate * other + (1 - gate) * out
    return other if has.all() else np.where(has, other, out)  # an empty memory must equal no memory


def _has_rows(view: View) -> np.ndarray:
    """(B, 1, 1, 1) bool, with an index of four axes (B, H, T, 1): where there is a valid row to attend to."""
    if view.index is None:
        return np.asarray(view.valid.any(axis=1))[:, None, None, None]
    stream = np.arange(len(view.index)).reshape(-1, *[1] * (view.index.ndim - 1))
    there = (view.index >= 0) & (view.valid[stream, np.maximum(view.index, 0)] if view.valid.shape[1] else False)
    return there.any(axis=-1, keepdims=True).reshape(len(there), *(there.shape[1:3] if there.ndim == 4 else (1, 1)), 1)


def _chosen_of_bank(view: View) -> tuple[Any, ...]:
    """A view's bank; of one whose index (B, K) is the same for all heads and queries, just the rows that it names."""
    if view.index is None or view.index.ndim != 2:
        return view.bank
    rows, pick = np.arange(len(view.index))[:, None], np.maximum(view.index, 0)
    kind, *bank = view.bank
    return kind, *(x[rows, pick] if kind == "hidden" else np.moveaxis(np.moveaxis(x, 1, 2)[rows, pick], 2, 1) for x in bank)


def _with_chosen_rows(view: View, n_heads: int, n_queries: int) -> View:
    """A view without an index (B, K): what is told of all rows of its bank, of the rows alone that `_chosen_of_bank` gives."""
    index = view.index
    if index is None or index.ndim != 2:
        return view
    rows, pick = np.arange(len(index))[:, None], np.maximum(index, 0)
    bias = view.bias
    if bias is not None and bias.shape[-1] > 1:
        bias = np.broadcast_to(bias, (len(index), n_heads, n_queries, bias.shape[-1]))
        bias = np.take_along_axis(bias, np.broadcast_to(pick[:, None, None], (*bias.shape[:3], pick.shape[1])), -1)
    positions = view.places
    if positions is None and view.positions is not None:
        positions = view.positions[rows, pick]
    valid = view.valid[rows, pick] & (index >= 0)
    return dataclasses.replace(view, valid=valid, index=None, positions=positions, bias=bias, places=None)


def _of_bank(view: View, of_shown: np.ndarray) -> np.ndarray:
    """Numbers (B, ..., K) of the rows that a view's index (B, K) names, as those of all rows of its bank; others as they are."""
    if view.index is None or view.index.ndim != 2:
        return of_shown
    found, pick = np.zeros((*of_shown.shape[:-1], view.valid.shape[1]), of_shown.dtype), np.maximum(view.index, 0)
    pick = np.broadcast_to(pick.reshape(len(pick), *[1] * (of_shown.ndim - 2), -1), of_shown.shape)
    np.add.at(found, (*np.indices(of_shown.shape, sparse=True)[:-1], pick), of_shown)
    return found


def _index_of_copies(index: np.ndarray, valid: np.ndarray, n_kv_heads: int) -> np.ndarray:
    """The index (B, H, T, K) of rows that were copied, each for its place: of a kv head, one head's behind the other's."""
    batch, n_heads, *places = index.shape
    there = (index >= 0) & valid[np.arange(batch)[:, None, None, None], np.maximum(index, 0)]
    copies = np.arange(math.prod(index.shape[1:]) // n_kv_heads).reshape(n_heads // n_kv_heads, *places)
    return np.where(there, np.tile(copies, (n_kv_heads, 1, 1)), -1)
