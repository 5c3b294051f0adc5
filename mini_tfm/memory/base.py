"""The memory contract: what a strategy may do, and the few shapes it speaks in.

A strategy declares WHICH rows a query may see besides the current segment. The library projects them,
attends to them together with the segment in compiled code, merges, and differentiates. A strategy never
sees another strategy, and calls nothing of the library but what is in this module.

Legend: B batch, S source length, T target length, H heads, D head size, d model size, M rows of a bank.

What happens in a segment, at each site ("encoder" self-attention, "decoder" self-attention, "cross"):

    begin(state, segment)              rows that join the sequence itself: memory tokens
      for each layer:
        view(state, site, layer, ...)  rows that do not depend on the query
        read(state, site, layer, q)    rows chosen by the query; only if "query" is in spec.needs
        --- the library attends ---
        write(state, site, layer, new) what the segment computed; returns what is dropped
    end(state, rows)                   outputs at the rows that begin() put in
    --- next segment ---

A query never sees what its own segment writes. At "cross" the rows are the encoder's outputs: `write` is
called once a segment, after the decoder is done, with layer 0; `view` and `read` once a decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first
Site = Literal["encoder", "decoder", "cross"]
SITES = ("encoder", "decoder", "cross")
MERGES: tuple[str, ...] = ("joint", "gate", "add", "replace")
NEEDS = ("query", "hidden", "mass", "tokens", "text")
CONTRACT_VERSION = 1


@dataclass(frozen=True)
class MemorySpec:
    """What a strategy uses, so that the library prepares nothing else.

    sites: where it takes part. layers: which layers there, counted from 0, negative from the top; None
    for all. needs: "query" (calls `read`), "mass" (attention each new row received), "tokens" (ids in
    `Segment` and `New`), "hidden" (`write` also gets the decoder's outputs, as one layer more: `layer` is
    the number of layers, rows are what `logits` is asked with). "text" is kept for later. merge: how rows
    join the segment, unless a View says otherwise: "joint" one softmax with it, "gate" own softmax mixed
    by a gate, "add" own softmax added, "replace" instead of it. gradient: "none" rows are detached when
    written, "rows"/"state" gradients flow through segments. capacity: rows at most, None without limit.
    version: of the contract it was written for.
    """

    sites: frozenset[str] = frozenset(SITES)
    layers: tuple[int, ...] | None = None
    needs: frozenset[str] = frozenset()
    merge: str = "joint"
    gradient: Literal["none", "rows", "state"] = "none"
    capacity: int | None = None
    version: int = CONTRACT_VERSION


@dataclass(frozen=True)
class Dims:
    """The model a memory is started for. `layers` counts the attention layers of each site."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    layers: Mapping[str, int]
    dtype: np.dtype
    segment_length: int | None = None
    training: bool = False
    params: Mapping[str, Array] = field(default_factory=dict)  # this strategy's trained parameters
    fingerprint: Callable[[], str] = lambda: ""  # names the weights: rows of other weights mean nothing here

    @property
    def reading_site(self) -> str:
        """Where the model meets earlier text by default: what a strategy's `site=None` stands for."""
        if self.layers["cross"]:
            return "cross"
        return "encoder" if self.layers["encoder"] else "decoder"


@dataclass(frozen=True)
class Param:
    """A trainable parameter of a strategy: (shape, init), with its own learning rate factor and decay.

    init: a float is the standard deviation of a normal distribution around 0; an array is the value.
    """

    shape: tuple[int, ...]
    init: float | np.ndarray = 0.02
    lr_factor: float = 1.0
    weight_decay: bool = True


class State(dict):
    """What a memory holds: arrays (or Vars), batch first. `params` and `dims` come with it.

    The library owns it: it selects, resets, reorders, detaches and saves rows of every array alike, so
    assign new arrays (`state["rows"] = ...`) and never write into one. Axis 1 may grow; new slots of
    other batch rows are filled with zeros, so keep a mask of what is valid.
    """

    def __init__(self, arrays: Mapping[str, Array], dims: Dims):
        super().__init__(arrays)
        self.dims = dims

    @property
    def params(self) -> Mapping[str, Array]:
        return self.dims.params


@dataclass(frozen=True)
class Segment:
    """The segment being read. start: (B,) tokens of the stream before it; length: (B,) its own tokens."""

    number: int
    site: str
    start: np.ndarray
    length: np.ndarray
    tokens: np.ndarray | None = None  # (B, S) ids that the site's stack reads, where "tokens" is needed

    @property
    def active(self) -> np.ndarray:
        """(B,) bool: rows that have anything in this segment; the others keep their state."""
        return self.length > 0


@dataclass(frozen=True)
class Rows:
    """Rows that join the sequence: values (B, m, d). where: "front", or "around" (decoder only): the same
    rows before the text, to be read, and after it, to be written; `end` gets the latter."""

    values: Array
    where: Literal["front", "around"] = "front"


@dataclass(frozen=True)
class New:
    """What a segment computed at a site and layer: the rows offered to `write`.

    hidden: (B, S, d) what the layer projects to keys and values. valid: (B, S) bool. positions: (B, S)
    tokens since the start of the stream. tokens: (B, S) the id each row was made from, if needed; targets:
    (B, S) the id each row of a decoder predicts, if needed and known. mass: (B, S) attention received,
    summed over heads and queries, if needed; view_mass: (B, M) the same for the rows of the strategy's own
    view (a joint one, without index). project: rows (B, M, d) to the layer's own keys and values, each
    (B, Hkv, M, D), without position; None at "cross", where every layer has its own.
    """

    site: str
    layer: int
    hidden: Array
    valid: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray | None = None
    mass: np.ndarray | None = None
    view_mass: np.ndarray | None = None
    targets: np.ndarray | None = None
    project: Callable[[Array], tuple[Array, Array]] | None = None


Evicted = New  # dropped rows have the same fields: what one memory drops is what the next is offered


@dataclass(frozen=True)
class Query:
    """What asks: heads (B, H, T, D), without position, a Var in training; and `hidden()`, the same queries
    in the space of hidden rows, (B, H, T, d), for choosing rows: heads W_k^T, so that `hidden . row` orders
    rows as their scores do (arXiv 2305.01625, section 2.3), a plain array always. positions: (B, T) tokens
    since the start of the stream."""

    heads: Array
    hidden: Callable[[], np.ndarray]
    positions: np.ndarray


@dataclass(frozen=True)
class View:
    """Rows to attend to.

    bank: ("hidden", X (B, M, d)), projected by the layer's own W_k and W_v; or ("kv", K, V), each
    (B, Hkv, M, D), without position. index: None for all, (B, K) or (B, H, T, K) rows of the bank, -1 for
    none. positions: (B, M) tokens since the start of the stream, or None if they have none. valid: (B, M)
    bool, never optional: no row is "empty because it is zero". bias: added to the scores, broadcastable to
    (B, H, T, M), or (B, H, T, K) with an index of four axes. merge: see MemorySpec; gate: (H,) logits, with
    merge="gate".
    """

    bank: tuple[Any, ...]
    valid: np.ndarray
    index: np.ndarray | None = None
    positions: np.ndarray | None = None
    bias: Array | None = None
    merge: str | None = None
    gate: Array | None = None


@dataclass(frozen=True)
class Side:
    """A strategy's own maths instead of rows: output (B, H, T, D); write it in NumPy and it is
    differentiated. merge: "add", "gate" (with gate (H,) logits) or "replace". valid: (B,) bool, the batch
    rows whose memory holds anything; the others attend as if there were none. None: all."""

    output: Array
    merge: str = "add"
    gate: Array | None = None
    valid: np.ndarray | None = None


class Memory:
    """Base of every strategy; every method is optional. Options are keyword arguments of `__init__`."""

    name: str = ""  # set by the library: the name it was asked for by
    origin: str = ""  # and the plugin, distribution and version it came from
    durable: bool = False  # set by a strategy whose `flush` makes rows outlive the process
    text: str | None = None  # and the text that makes it again, as in "window:size=512"
    spec: MemorySpec = MemorySpec()

    def sites(self, dims: Dims) -> Collection[str]:
        """Where the strategy takes part in this model, by default all of `spec.sites` that it has.

        Asked once, before `start`: at other sites no method is called, and a stack hands rows to the member behind.
        """
        return self.spec.sites

    def parameters(self, dims: Dims) -> dict[str, Param]:
        """Trainable parameters by name; read them as `state.params[name]` (`dims.params` in `start`)."""
        return {}

    def start(self, batch: int, dims: Dims) -> Mapping[str, Array]:
        """The state of `batch` empty memories."""
        return {}

    def begin(self, state: State, segment: Segment) -> Rows | None:
        """Rows put into the sequence at `segment.site`: "encoder" or "decoder"."""

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View | None:
        """Rows that do not depend on the query."""

    def read(self, state: State, site: str, layer: int, query: Query) -> View | Side | None:
        """Rows chosen by the query, or a result of the strategy's own."""

    def write(self, state: State, site: str, layer: int, new: New) -> Evicted | None:
        """Takes what the segment computed; returns what is dropped for it."""

    def absorb(self, state: State, evicted: Evicted) -> Evicted | None:
        """Takes what the memory before this one in a stack dropped; by default as if it were new."""
        return self.write(state, evicted.site, evicted.layer, evicted)

    def end(self, state: State, rows: Array) -> None:
        """Outputs (B, m, d) at the rows that `begin` put in."""

    def logits(self, state: State, hidden: np.ndarray, log_probs: np.ndarray) -> np.ndarray | None:
        """Changes the log-probabilities (B, T, V), given the decoder's outputs (B, T, d). Generation and scoring."""

    def drain(self, state: State) -> Iterable[Evicted]:
        """The stream ends: gives up the rows that a memory behind this one in a stack should have."""
        return ()

    def flush(self, state: State) -> None:
        """Makes durable what the state holds. Called while a pipeline reads; never in training or generation."""

    def documents(self) -> dict[str, int]:
        """Named documents this memory holds outside the process, and the rows of each."""
        return {}

    def reset(self, document: str) -> None:
        """Forgets a document named by `documents`."""


def bank_key(site: str, layer: int) -> str:
    """The prefix of a bank's arrays in a state; the cross site has one bank for every layer."""
    return "cross." if site == "cross" else f"{site}.{layer}."
