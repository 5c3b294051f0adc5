"""The memory contract: the methods of a strategy, and the types they take and return.

A strategy declares WHICH rows a query may see besides the current segment. The library projects them, attends to them
together with the segment in compiled code, merges the results, and differentiates. A strategy never sees another one.

A row is one vector kept in memory; a bank is an array of rows; a stream is one row of the batch.
Legend: B streams, S source length, T target length, H heads, D head size, d model size, M rows of a bank.

What happens in a segment, at each site ("encoder" self-attention, "decoder" self-attention, "cross"):

    begin(state, segment)              rows that join the sequence itself: memory tokens
      for each layer:
        enter(state, site, layer, x)   what is added to the layer's inputs
        view(state, site, layer, ...)  rows chosen without the query
        read(state, site, layer, q)    rows chosen by the query; only if "query" is in spec.needs
        --- the library attends ---
        write(state, site, layer, new) what the segment computed; returns what is dropped
        leave(state, site, layer, x)   the layer's outputs at the rows that begin() put in
    end(state, rows)                   outputs at the rows that begin() put in
    loss(state)                        in training: what the strategy adds to the loss
    --- next segment ---

A query never sees what its own segment writes. At "cross" the rows are the encoder's outputs: `write` is called once a
segment, with layer 0, after the decoder is done; `view` and `read` are called once a decoder layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from ..config import Heads

Array: TypeAlias = Any  # an np.ndarray or a Var: NumPy's functions take both, its stubs know only the first
Site = Literal["encoder", "decoder", "cross"]
SITES = ("encoder", "decoder", "cross")
MERGES: tuple[str, ...] = ("joint", "gate", "add", "replace")
NEEDS = ("query", "hidden", "mass", "surprise", "tokens", "text")
CONTRACT_VERSION = 3


@dataclass(frozen=True)
class MemorySpec:
    """What a strategy needs; the library prepares nothing else.

    sites: where it may take part; `Memory.sites` chooses among them for one model.
    layers: which layers there, counted from 0, or from the top if negative; None for all.
    needs: "query" calls `read`. "mass" measures the attention that rows receive. "tokens" gives token ids in `Segment`
        and `New`. "hidden" calls `write` once more with the decoder's outputs, as one layer more: `layer` is the number
        of layers, and `logits` is later asked with such outputs. "surprise" does so, too, with `New.surprise`, which takes a product
        with the output layer. "text" means nothing: whoever has tokens may give text (`Rows.tokens`).
    merge: how rows join the segment, unless a View says otherwise. "joint": one softmax with it. "gate": a softmax of
        their own, mixed in by a gate. "add": a softmax of their own, added. "replace": instead of the segment.
    gradient: "none" detaches rows when they are written; "rows" and "state" let gradients flow through segments.
    capacity: most rows in any array of the state, None without limit. version: of the contract it was written for.
    taps: in a stack, rows that it is offered go on to the next member as if it were not there; it drops none.
    early: it is offered every new row by `write`, also where a member before it takes them, and drops none of them there. `absorb`
        then tells of the rows that no member before it holds any more: only these may be shown.
    """

    sites: frozenset[str] = frozenset(SITES)
    layers: tuple[int, ...] | None = None
    needs: frozenset[str] = frozenset()
    merge: str = "joint"
    gradient: Literal["none", "rows", "state"] = "none"
    capacity: int | None = None
    version: int = CONTRACT_VERSION
    taps: bool = False
    early: bool = False


@dataclass(frozen=True)
class Dims:
    """The model that a memory works in. `layers` counts the attention layers of each site.

    n_heads, n_kv_heads, d_head: of the memory's sites. Where an encoder has other heads than its decoder and a memory works in both,
    `at(site)` has those of each.

    needs_behind: what the memories behind it in a stack need of rows (`MemorySpec.needs`). It is given that too, with
    `New`, and the rows that it drops should have it.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    layers: Mapping[str, int]
    dtype: np.dtype
    segment_length: int | None = None
    training: bool = False
    params: Mapping[str, Array] = field(default_factory=dict)  # this strategy's trained parameters
    fingerprint: Callable[[], str] = lambda: ""  # names all weights; rows of other weights mean nothing here
    row_fingerprint: Callable[[str, int], str] | None = None  # names what the rows at a site and layer are made of, and nothing else
    needs_behind: frozenset[str] = frozenset()
    vocab_size: int = 0  # token ids are below it
    heads: Mapping[str, Heads] = field(default_factory=dict)  # by site; none: the same at all

    def at(self, site: str) -> Dims:
        """With the heads of a site."""
        heads = self.heads.get(site)
        if heads is None or (heads.n_heads, heads.n_kv_heads, heads.d_head) == (self.n_heads, self.n_kv_heads, self.d_head):
            return self
        return dataclasses.replace(self, n_heads=heads.n_heads, n_kv_heads=heads.n_kv_heads, d_head=heads.d_head)

    @property
    def reading_site(self) -> str:
        """Where the model attends to earlier text by default: the meaning of a strategy's option `site=None`."""
        if self.layers["cross"]:
            return "cross"
        return "encoder" if self.layers["encoder"] else "decoder"


@dataclass(frozen=True)
class Param:
    """A trainable parameter of a strategy.

    init: a float is the standard deviation of a normal distribution around 0, an array the value itself. lr_factor
    multiplies the learning rate.
    """

    shape: tuple[int, ...]
    init: float | np.ndarray = 0.02
    lr_factor: float = 1.0
    weight_decay: bool = True


class State(dict):
    """What a memory holds: arrays (or Vars) by name, one stream after another along axis 0. `params` and `dims` come with it.

    The library selects, resets, reorders, joins, detaches and saves the streams of every array alike. So assign new
    arrays (`state["rows"] = ...`) and never write into one. Axis 1 may grow; where streams differ in it the shorter are
    filled with zeros, so keep a mask of valid rows. Arrays whose name begins with `State.OF_SEGMENT` are removed when the
    segment ends: what was chosen for a prompt, say, and is used while the answer is decoded.
    """

    OF_SEGMENT = "segment."

    def __init__(self, arrays: Mapping[str, Array], dims: Dims):
        super().__init__(arrays)
        self.dims = dims

    @property
    def params(self) -> Mapping[str, Array]:
        return self.dims.params


@dataclass(frozen=True)
class Segment:
    """The segment being read. number: segments before it; start: (B,) tokens before it at the site; length: (B,) tokens in it."""

    number: int
    site: str
    start: np.ndarray
    length: np.ndarray
    tokens: np.ndarray | None = None  # (B, S) ids that the site's stack reads, with "tokens" in spec.needs

    @property
    def active(self) -> np.ndarray:
        """(B,) bool: streams with a token in this segment; the others keep their state."""
        return self.length > 0


@dataclass(frozen=True)
class Rows:
    """Rows that join the sequence: values (B, m, d), or tokens (B, m), which the library embeds as the model's own text.

    where: "front" of the text; or "around" it, in a decoder: the same rows before the text, to be read, and behind it,
    to be written. `end` gets the outputs at the latter. Tokens stand in front, right before the text and as if they were a part of
    it: in a decoder each sees those before it, where rows of values see each other.
    valid: (B, m) bool, which rows are there; None: all. Give as many rows in every segment, with `valid`, rather than other numbers.
    """

    values: Array | None = None
    where: Literal["front", "around"] = "front"
    tokens: np.ndarray | None = None
    valid: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, m)."""
        rows: Any = self.tokens if self.values is None else self.values
        return rows.shape[:2]

    @property
    def there(self) -> np.ndarray:
        """valid, as (B, m) bool."""
        return np.ones(self.shape, bool) if self.valid is None else self.valid


@dataclass(frozen=True)
class New:
    """What a segment computed at a site and layer: the rows offered to `write`.

    hidden: (B, S, d) inputs of the layer's key and value projections. valid: (B, S) bool, one run of each row: it may begin behind
    rows of the segment before, and end in front of rows of the next, where they overlap. positions: (B, S) tokens since
    the start of the stream. With "tokens" in spec.needs, tokens: (B, S) the id each row was made from; targets: (B, S)
    the id each row of a decoder predicts, where known. With "mass", mass: (B, S) accumulated attention (arXiv
    2306.14048): the weights each row received, summed over heads and queries; view_mass: (B, M) the same for the rows of the
    bank of the strategy's own joint view since it was last told. attention: computes the weights by head and query,
    (B, H, S, M + S), of the segment's own queries: to the M rows of that bank, then to the segment's; None at "cross" and in
    `absorb`. project: rows (B, M, d) to the layer's own keys and values, each (B, Hkv, M, D), without position; None at "cross",
    where every layer has its own, and of the decoder's outputs. `project(rows, frozen=True)` sends the gradient into the rows
    alone, not into the layer. With "surprise", surprise: (B, S) of the decoder's outputs alone, as no other rows have one while their
    segment is at work: -log p, in nats, of the target that each predicts from all before it; 0 where there is none.

    As `Evicted`, tokens and targets are -1 where they are not known, and None, as mass is, where the memory that dropped
    the rows does not say.
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
    project: Callable[..., tuple[Array, Array]] | None = None
    attention: Callable[[], np.ndarray] | None = None
    surprise: np.ndarray | None = None


Evicted = New  # the same fields: what one memory drops, the next is offered


@dataclass(frozen=True)
class Query:
    """The queries of a layer: heads (B, H, T, D), without position, a Var in training.

    hidden: gives the same queries in the space of hidden rows, (B, H, T, d), always a plain array: heads W_k^T, so that
    `hidden() . row` orders rows as their scores do (arXiv 2305.01625, section 2.3). positions: (B, T) tokens since the
    start of the stream. valid: (B, T) bool, which are no padding; None: all. segment: the one that they are of. While it is
    decoded there are several calls with the same one: the first has the prompt, each other one the token before it; and decoding
    is True: nothing of it will be written.
    """

    heads: Array
    hidden: Callable[[], np.ndarray]
    positions: np.ndarray
    valid: np.ndarray | None = None
    segment: Segment | None = None  # the library always tells it
    decoding: bool = False


@dataclass(frozen=True)
class View:
    """Rows to attend to.

    bank: ("hidden", X (B, M, d)), projected by the layer's own W_k and W_v; or ("kv", K, V), each (B, Hkv, M, D),
    without position. valid: (B, M) bool, never optional: a row of zeros is not an empty one. index: None for all rows,
    or (B, K) or (B, H, T, K) row numbers, -1 for none. positions: (B, M) tokens since the start of the stream, applied
    when a row is read; None for rows without one. places: positions of the rows that index names, of its shape, instead:
    where a row is read depends on the choice, or on the query. bias: added to the scores, broadcastable to (B, H, T, M), or
    to (B, H, T, K) with an index of four axes. merge: see MemorySpec. gate: (H,) logits, with merge="gate".

    While a segment is decoded, rows whose arrays are the same objects as a token before are not projected again.
    """

    bank: tuple[Any, ...]
    valid: np.ndarray
    index: np.ndarray | None = None
    positions: np.ndarray | None = None
    bias: Array | None = None
    merge: str | None = None
    gate: Array | None = None
    places: np.ndarray | None = None


@dataclass(frozen=True)
class Passage:
    """A piece of what was read that is recalled: its tokens (n,), and the position of the first, counted from the text's beginning.

    document: where it is kept outside the process, None where it is not. layers: how many hold a row of each token.
    """

    tokens: np.ndarray
    position: int
    document: str | None = None
    layers: int = 1


@dataclass(frozen=True)
class SideOutput:
    """A side output: the result (B, H, T, D) of a strategy's own maths instead of rows. NumPy code is differentiated.

    merge: "add", "gate" (with gate (H,) logits) or "replace". valid: (B,) bool, streams whose memory holds anything, None
    for all; the others attend as if there were no memory.
    """

    output: Array
    merge: str = "add"
    gate: Array | None = None
    valid: np.ndarray | None = None


class Memory:
    """Base of every strategy; every method is optional. Options are keyword arguments of `__init__`."""

    name: str = ""  # set by the library: the name it was made by
    origin: str = ""  # set by the library: the plugin, distribution and version it comes from
    text: str | None = None  # set by the library: the text that makes it again, as in "window:size=512"
    durable: bool = False  # set by a strategy whose `flush` makes rows outlive the process
    spec: MemorySpec = MemorySpec()

    def sites(self, dims: Dims) -> Collection[str]:
        """Where the strategy takes part in this model: some of `spec.sites`, by default all that the model has.

        Asked once a run, before `start`. At other sites no method is called, and a stack's new rows go to the member
        behind.
        """
        return self.spec.sites

    def parameters(self, dims: Dims) -> dict[str, Param]:
        """Trainable parameters by name; read them as `state.params[name]` (`dims.params` in `start`)."""
        return {}

    def start(self, batch: int, dims: Dims) -> Mapping[str, Array]:
        """The state of `batch` empty memories: arrays by name, each with `batch` rows along axis 0."""
        return {}

    def begin(self, state: State, segment: Segment) -> Rows | None:
        """Rows to put into the sequence at `segment.site`, "encoder" or "decoder"."""

    def enter(self, state: State, site: str, layer: int, inputs: Array) -> Array | None:
        """What is added to the inputs (B, n, d) of a layer, of the same shape: at the rows of `begin`, the text, and padding."""

    def leave(self, state: State, site: str, layer: int, rows: Array) -> None:
        """Takes a layer's outputs (B, m, d) at the rows that `begin` put in: in a decoder, those that are written. Not in generation."""

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View | None:
        """Rows chosen without the query."""

    def read(self, state: State, site: str, layer: int, query: Query) -> View | SideOutput | None:
        """Rows chosen by the query, or a side output."""

    def write(self, state: State, site: str, layer: int, new: New) -> Evicted | None:
        """Takes the rows that the segment computed; returns the rows dropped for them."""

    def absorb(self, state: State, evicted: Evicted) -> Evicted | None:
        """Takes the rows that the memory before it in a stack dropped; by default as if they were new."""
        return self.write(state, evicted.site, evicted.layer, evicted)

    def end(self, state: State, rows: Array) -> None:
        """Takes the outputs (B, m, d) at the rows that `begin` put in."""

    def loss(self, state: State) -> Array | None:
        """What the strategy adds to the loss that is trained on, one number a stream, (B,). In training alone, as a segment ends.

        Its mean over all streams and segments is added to the mean loss of the target tokens; scale it to weigh it. What `write` has
        put under `State.OF_SEGMENT` is still there. Where it is to train nothing, take `value_of`.
        """

    def logits(self, state: State, hidden: np.ndarray, log_probs: np.ndarray) -> np.ndarray | None:
        """The log-probabilities (B, T, V), changed, given the decoder's outputs (B, T, d). In generation and scoring."""

    def recall(self, state: State, tokens: np.ndarray) -> list[list[Passage]]:
        """For people: what a prompt of tokens (B, T) would see of what was read, the passages of each stream in their order."""
        return [[] for _ in tokens]

    def drain(self, state: State) -> Iterable[Evicted]:
        """Called when the streams end: gives up the rows that the memory behind it in a stack should have."""
        return ()

    def flush(self, state: State) -> None:
        """Makes the rows in the state durable. Called while a pipeline reads; never in training or generation."""

    def write_ahead(self, state: State, held: Evicted) -> None:
        """Rows that a member before it still holds: durable when the `flush` that follows returns. `absorb` brings them, later.

        May be called many times with the same rows, which their positions name.
        """

    def deleted(self, state: State) -> bool:
        """Whether what the streams remember was deleted outside the state since they began. All memories of the stack then begin anew."""
        return False

    def documents(self) -> dict[str, int]:
        """The documents that this memory holds outside the process, and the rows of each."""
        return {}

    def compact(self) -> tuple[int, int]:
        """Gives back the space of deleted documents outside the process: the bytes taken before and after."""
        return 0, 0

    def reset(self, document: str) -> None:
        """Forgets a document, also the rows of it that are still in a state: see `deleted`."""


def bank_key(site: str, layer: int | str) -> str:
    """The prefix of a bank's arrays in a state; the cross site has one bank for every layer."""
    return "cross." if site == "cross" else f"{site}.{layer}."
