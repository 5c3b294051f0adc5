"""MemoryRun: memories at work on a batch of streams. The only code that calls a strategy's methods.

The model asks it for rows at each site and hands it what was computed. It owns the states: streams that pause, are
reset, reordered, joined, detached or saved are handled here, the same for every strategy.

A row is a row of memory, a vector that is kept; a stream is a row of the batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from ..autodiff import Var, value_of
from ..config import Config
from ..errors import InvalidValue
from .base import SITES, Array, Dims, Memory, New, Param, Passage, Query, Rows, Segment, SideOutput, State, View
from .stack import Stack
from .validate import (
    attributed,
    check_begin,
    check_entering,
    check_evicted,
    check_log_probs,
    check_loss,
    check_parameters,
    check_passages,
    check_passed_on,
    check_sites,
    check_spec,
    check_state,
    check_view,
    fault,
    require,
    same_arrays,
)

Project = Callable[..., tuple[Array, Array]]  # rows (B, M, d) to a layer's keys and values; `frozen`: its weights get no gradient
Surprises = Callable[[np.ndarray, np.ndarray], np.ndarray]  # the decoder's outputs (N, d) and targets (N,) to -log p, in nats, (N,)


@dataclasses.dataclass(frozen=True)
class Projected:
    """A view, and its rows as a layer reads them: keys and values (B, Hkv, M, D) at their positions."""

    view: View
    keys: np.ndarray
    values: np.ndarray

    def is_of(self, view: View) -> bool:
        if view is self.view:
            return True
        names = ("positions", "places", "index")
        return same_arrays(view.bank, self.view.bank) and all(_equal(getattr(view, name), getattr(self.view, name)) for name in names)

    def reordered(self, index: np.ndarray, moved: Mapping[int, Array]) -> Projected | None:
        view = _reordered(self.view, index, moved)
        return None if view is None else Projected(view, self.keys[index], self.values[index])


class MadeOf(Protocol):
    """What rows are made of (fingerprint.py)."""

    def __call__(self, site: str, layer: int) -> str:
        """Names what the rows at a site and layer are made of."""

    def changed(self, places: Collection[tuple[str, int]]) -> bool:
        """Whether what rows at these sites and layers are made of has changed since it was last named or asked for."""

    def renew(self) -> None:
        """From here on it is what it is now."""


def members_of(memory: Memory | None) -> list[Memory]:
    if memory is None:
        return []
    return memory.members if isinstance(memory, Stack) else [memory]


def parameter_prefixes(memory: Memory | None) -> list[str]:
    """Where each member's parameters live among the model's weights: `memory.<name>.`."""
    seen: dict[str, int] = {}
    prefixes = []
    for member in members_of(memory):
        seen[member.name] = seen.get(member.name, 0) + 1
        again = f"{seen[member.name]}." if seen[member.name] > 1 else ""
        prefixes.append(f"memory.{member.name}.{again}")
    return prefixes


def model_dims(config: Config, dtype: Any, **more: Any) -> Dims:
    layers = {
        "encoder": config.n_encoder_layers,
        "decoder": config.n_decoder_layers if config.decoder_mixer == "attention" else 0,
        "cross": config.n_decoder_layers if config.has_encoder else 0,
    }
    heads = {site: config.heads(site) for site in SITES}
    sizes = config.d_model, *heads["decoder"][:3]
    told = {"vocab_size": config.vocab_size, "heads": heads, **more}
    dims = Dims(*sizes, layers, np.dtype(dtype), config.segment_length, **told)
    return dims.at(dims.reading_site)


def _with_own_heads(dims: Dims, sites: Iterable[str]) -> Dims:
    """With the heads of a memory's sites, where all have the same."""
    one, *others = sorted(sites)
    own = dims.at(one)
    return own if all(own.at(site) is own for site in others) else dims


def memory_parameters(memory: Memory | None, config: Config, dtype: Any) -> dict[str, Param]:
    """All trainable parameters of a memory, by their full names."""
    found: dict[str, Param] = {}
    for member, prefix in zip(members_of(memory), parameter_prefixes(memory), strict=True):
        dims = model_dims(config, dtype)
        if config.heads("encoder") != config.heads("decoder"):
            dims = _with_own_heads(dims, _sites_in_model(member, dims, config))
        with attributed(member, "parameters"):
            params = check_parameters(member.parameters(dims))
        found.update({prefix + name: param for name, param in params.items()})
    return found


def _has(member: Memory, method: str) -> bool:
    """Whether a strategy has a method of its own."""
    return getattr(type(member), method) is not getattr(Memory, method)


def has_losses(memory: Memory | None) -> bool:
    """Whether a member adds to the loss in training."""
    return any(_has(member, "loss") for member in members_of(memory))


class _Sites:
    """Which members take part where: computed once, read for every layer and step.

    begin: by site. enter, leave: by (site, layer). show: by (site, layer), as (member, it has a view, it reads). take: by (site,
    layer), the members that rows go through, the first of which has a `write`. The cross site has one bank, layer 0, and the
    decoder's outputs are one layer more than it has.
    """

    def __init__(self, members: list[Memory], sites: list[frozenset[str]], layers: Mapping[str, int]):
        self.begin: dict[str, list[int]] = {}
        self.enter: dict[tuple[str, int], list[int]] = {}
        self.leave: dict[tuple[str, int], list[int]] = {}
        self.show: dict[tuple[str, int], list[tuple[int, bool, bool]]] = {}
        self.take: dict[tuple[str, int], list[int]] = {}
        self.held: set[tuple[str, int]] = set()  # where a member takes rows and does not pass all of them on
        self.used: set[str] = set()
        self.made: set[tuple[str, int]] = set()  # where what the states hold was computed
        self.fed: dict[int, int] = {}  # members that show rows and get them from others alone, and the nearest of those
        for i, member in enumerate(members):
            for site in sites[i]:
                self._add(i, member, site, layers[site])
        # The decoder's outputs, one layer more, are rows that nobody shows.
        of_layers = [takers for (site, layer), takers in self.take.items() if layer < layers[site]]
        holders = [[i for i in takers if not members[i].spec.taps] for takers in of_layers]
        first = {takers[0] for takers in holders if takers}
        for takers in holders:
            fed = ((before, i) for before, i in itertools.pairwise(takers) if i not in first)
            self.fed.update({i: before for before, i in fed if _has(members[i], "view") or _has(members[i], "read")})

    def _add(self, i: int, member: Memory, site: str, n_layers: int) -> None:
        only, needs = member.spec.layers, member.spec.needs
        if _has(member, "begin"):
            self.begin.setdefault(site, []).append(i)
        shows = _has(member, "view"), "query" in needs and _has(member, "read")
        takes = _has(member, "write") or _has(member, "absorb")
        chosen = [layer for layer in range(n_layers) if only is None or layer in only or layer - n_layers in only]
        for method, places in (("enter", self.enter), ("leave", self.leave)):
            for layer in chosen if _has(member, method) else ():
                places.setdefault((site, layer), []).append(i)
        for layer in chosen if any(shows) else ():
            self.show.setdefault((site, layer), []).append((i, *shows))
        banks = [0] if site == "cross" else chosen
        if site == "decoder" and not {"hidden", "surprise"}.isdisjoint(needs):
            banks = [*banks, n_layers]
        for layer in banks if takes else ():
            # One that only absorbs takes nothing while no member before it writes and may drop rows.
            if _has(member, "write") or (site, layer) in self.held:
                self.take.setdefault((site, layer), []).append(i)
                if not member.spec.taps:
                    self.held.add((site, layer))
        if any(shows) or any(_has(member, method) for method in ("begin", "enter", "write")):
            self.used.add(site)
        self.made.update((site, layer) for layer in banks if takes)
        if _has(member, "end"):
            self.made.add((site, n_layers))


class MemoryRun:
    """`memory` (None, a strategy or a Stack) on `batch` streams of a model with `config`.

    weights: the model's and the strategies' parameters, arrays or Vars. projections: the `New.project` of a site and
    layer, for rows that are dropped when no layer is at work. surprises: tells how unlikely the model finds targets; None: nobody
    does. made_of: tells whether the weights are still the same; None: they are. Call, a segment: `open`, then what the model does
    (`begin`, `views`, `wrote`, `end`), then `close`.
    """

    def __init__(
        self,
        memory: Memory | None,
        config: Config,
        weights: Mapping[str, Array],
        batch: int,
        *,
        training: bool = False,
        fingerprint: Callable[[], str] = lambda: "",
        projections: Callable[[str, int], Project | None] = lambda site, layer: None,
        surprises: Surprises | None = None,
        made_of: MadeOf | None = None,
    ):
        self.memory, self.members = memory, members_of(memory)
        self.config, self.batch, self._projections, self._surprises = config, batch, projections, surprises
        self.made_of, self.has_read = made_of, False
        self.dims: list[Dims] = []
        for member in self.members:
            check_spec(member)
        for i, prefix in enumerate(parameter_prefixes(memory)):
            params = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            dtype = value_of(next(iter(weights.values()))).dtype
            behind = frozenset[str]().union(*(member.spec.needs for member in self.members[i + 1 :]))
            more = {"training": training, "params": params, "fingerprint": fingerprint, "row_fingerprint": made_of}
            self.dims.append(model_dims(config, dtype, needs_behind=behind, **more))
        sites = [_sites_in_model(member, dims, config) for member, dims in zip(self.members, self.dims, strict=True)]
        self.dims = [_with_own_heads(dims, own) for dims, own in zip(self.dims, sites, strict=True)]
        self._sites = _Sites(self.members, sites, self.dims[0].layers if self.dims else {})
        self.start = np.zeros(batch, np.int64)  # tokens of each stream before this segment
        self.decoded = np.zeros(batch, np.int64)  # of the decoder of an encoder-decoder, whose text may be longer or shorter
        self.number = 0
        self.states = [self._start(i, batch) for i in range(len(self.members))]
        # Rows that each member was offered at a site and layer: at least so many in every stream, at most so many in any.
        self._taken: dict[tuple[int, str, int], tuple[int, int]] = {}
        self.open(np.zeros(batch, np.int64))

    # One segment

    def open(self, lengths: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Begins a segment of (B,) `lengths` tokens; streams of length 0 pause and keep their state.

        targets: (B, T) what the decoder predicts, where it is known.
        """
        self._lengths = lengths
        self._targets = targets
        self._tokens: dict[str, np.ndarray] = {}  # what each stack reads
        self._output: tuple[Array, np.ndarray] | None = None
        self._before = [dict(state) for state in self.states]
        self._rows: dict[str, list[tuple[int, Rows]]] = {}
        self._mass: dict[tuple[str, int, int | None], np.ndarray] = {}
        self._attention: dict[tuple[str, int], Callable[[int], np.ndarray]] = {}
        # While a segment is decoded: what `view` gave, by member, site and layer; rows, by site, layer and number among its views.
        self._views: dict[tuple[int, str, int], list[tuple[int, View | SideOutput]]] = {}
        self._projected: dict[tuple[str, int, int], Projected] = {}
        self._is_open = bool(lengths.any())

    def close(self) -> Array | None:
        """Ends the segment: streams advance, paused ones get their old state back.

        In training: the sum of what the members add to the loss, over the streams; None where none does.
        """
        active = self._lengths > 0
        if self._output is not None:
            outputs, valid = self._output
            self.wrote("decoder", self.config.n_decoder_layers, outputs, valid, surprise=self._surprise(outputs, valid))
            self.decoded = self.decoded + np.where(active, valid.sum(axis=1), 0)
        added = self._loss(active)
        if not active.all():
            for state, before in zip(self.states, self._before, strict=True):
                for name in state:
                    state[name] = select_streams(active, state[name], before.get(name, np.zeros_like(state[name])))
        for state in self.states:
            for name in [name for name in state if name.startswith(State.OF_SEGMENT)]:
                del state[name]
        self.start = self.start + self._lengths
        self.number += 1
        self.has_read = self.has_read or bool(active.any())
        self._warn_of_idle()
        self.open(np.zeros(self.batch, np.int64))  # nothing of a segment is held between two
        return added

    def _surprise(self, outputs: Array, valid: np.ndarray) -> np.ndarray | None:
        """(B, T) -log p of what the decoder's outputs (B, T, d) predict; None where nobody asks, or it is not known."""
        takers = self._sites.take.get(("decoder", self.config.n_decoder_layers), ())
        if self._surprises is None or self._targets is None or not any("surprise" in self._needs(i) for i in takers):
            return None
        outputs, known = value_of(outputs), valid & (self._targets >= 0)
        found = np.zeros(valid.shape, outputs.dtype)
        found[known] = self._surprises(outputs[known], self._targets[known])
        return found

    def _loss(self, active: np.ndarray) -> Array | None:
        """What the members add to the loss of the streams that are `active` (B,) in this segment."""
        found = None
        for i, member in enumerate(self.members):
            if self.dims[i].training and _has(member, "loss"):
                of_streams = self._call(i, "loss", check=partial(check_loss, batch=self.batch, dims=self.dims[i]))
                if of_streams is not None:
                    added = np.sum(of_streams * active.astype(self.dims[i].dtype))
                    found = added if found is None else found + added
        return found

    def _warn_of_idle(self) -> None:
        """Warns of a member that gets its rows from one before it, where that one keeps all of them."""
        for i, before in self._sites.fed.items():
            member, source = self.members[i], self.members[before]
            any_taken = any(most for (at, *_), (_, most) in self._taken.items() if at == i)
            kept = max((least for (at, *_), (least, _) in self._taken.items() if at == before), default=0)
            most = source.spec.capacity if source.spec.capacity is not None else math.inf if _has(source, "drain") else 0
            if not any_taken and kept > most:
                warnings.warn(
                    f"memory {member.name!r} gets no row: {source.name!r} before it in the stack takes all and drops none; put"
                    f" {member.name!r} before it, as in {member.name}+{source.name}, or let it work at another site or layer",
                    UserWarning,
                    stacklevel=2,
                )

    def abandon(self) -> None:
        """Leaves a segment that failed: the states are what they were before it. Does nothing between segments."""
        if not self._is_open:
            return
        self.states = [State(before, state.dims) for before, state in zip(self._before, self.states, strict=True)]
        self.open(np.zeros(self.batch, np.int64))

    def begin(self, site: str, tokens: np.ndarray | None = None) -> list[Rows]:
        """Rows that join the sequence at `site`, where the stack reads (B, S) `tokens`: in the order of the members, text the last."""
        if tokens is not None:
            self._tokens[site] = tokens
        found = []
        for i in self._sites.begin.get(site, ()):
            check = partial(check_begin, site=site, batch=self.batch, dims=self.dims[i])
            rows = self._call(i, "begin", self._segment(i, site), site=site, check=check)
            if rows is not None:
                found.append((i, rows))
        found.sort(key=lambda each: each[1].tokens is not None)  # text stands right before the segment's
        self._rows[site] = found
        return [rows for _, rows in found]

    def end(self, site: str, outputs: list[Array]) -> None:
        """Outputs at the rows that `begin` gave, in its order."""
        for (i, _), output in zip(self._rows.get(site, ()), outputs, strict=True):
            self._call(i, "end", output, site=site)

    def enter(self, site: str, layer: int, inputs: Array) -> Array:
        """A layer's inputs (B, n, d), with what the members add to them."""
        for i in self._sites.enter.get((site, layer), ()):
            check = partial(check_entering, inputs=inputs, dims=self.dims[i])
            added = self._call(i, "enter", site, layer, inputs, site=site, layer=layer, check=check)
            inputs = inputs if added is None else inputs + added
        return inputs

    def leave(self, site: str, layer: int, outputs: Callable[[], list[Array]]) -> None:
        """A layer's `outputs` at the rows that `begin` gave, in its order."""
        if (members := self._sites.leave.get((site, layer))) is not None:
            for (i, _), output in zip(self._rows.get(site, ()), outputs(), strict=True):
                if i in members:
                    self._call(i, "leave", site, layer, output, site=site, layer=layer)

    def views(
        self, site: str, layer: int, query: Callable[[], Query], n_queries: int, *, decoding: bool = False
    ) -> list[tuple[int, View | SideOutput]]:
        """What the members want the `n_queries` queries of this layer to see, with the number of the member.

        decoding: the segment's tokens come one by one. Nothing is written meanwhile, so what `view` gave stays.
        """
        found: list[tuple[int, View | SideOutput]] = []
        asked: Query | None = None  # made once, and only if a member reads
        for i, has_view, reads in self._sites.show.get((site, layer), ()):
            if has_view:
                place = i, site, layer
                shown = self._views[place] if place in self._views else self._shown(i, "view", site, layer, n_queries, len(found))
                if decoding:
                    self._views[place] = shown
                found += shown
            if reads:
                asked = query() if asked is None else asked
                found += self._shown(i, "read", site, layer, n_queries, len(found), dataclasses.replace(asked, decoding=decoding))
        return found

    def _shown(
        self, i: int, method: str, site: str, layer: int, n_queries: int, number: int, query: Query | None = None
    ) -> list[tuple[int, View | SideOutput]]:
        """What member i shows by `method`, if it shows a row; `number` views were found at this layer before."""
        kept = self._projected.get((site, layer, number))
        known = None if kept is None else kept.view.bank
        merge, shape = self.members[i].spec.merge, (self.batch, n_queries)
        check = partial(check_view, default_merge=merge, shape=shape, dims=self.dims[i].at(site), known=known)
        segment = self._segment(i, site)
        argument = segment if query is None else dataclasses.replace(query, segment=segment)
        view = self._call(i, method, site, layer, argument, site=site, layer=layer, check=check)
        return [(i, view)] if _shows_rows(view) else []

    def projected(
        self, site: str, layer: int, number: int, view: View, project: Callable[[], tuple[Array, Array]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `project` gives, the keys and values of a view's rows; made once while a segment is decoded and the rows stay the same.

        number: of the view among those of the layer.
        """
        kept = self._projected.get((site, layer, number))
        if kept is None or not kept.is_of(view):
            kept = self._projected[site, layer, number] = Projected(view, *map(np.ascontiguousarray, project()))
        return kept.keys, kept.values

    def uses(self, site: str) -> bool:
        """Whether the memory needs the stack at `site` to run: a member takes part there, or wants attention measured."""
        if site == "decoder" and self.wants_mass() and "cross" in self._sites.used:
            return True  # attention to the rows of the cross site is the decoder's
        return site in self._sites.used

    def replaces(self, site: str) -> bool:
        """Whether at every layer of a site a member's rows, where it has some, stand in place of the segment's own."""
        at_site = [shown for (at, _), shown in self._sites.show.items() if at == site]
        replaced = [any(self.members[i].spec.merge == "replace" for i, *_ in shown) for shown in at_site]
        return bool(replaced) and all(replaced) and len(replaced) == self.dims[0].layers[site]

    @cached_property
    def answers(self) -> bool:
        """Whether a member is asked at every token that is decoded: it reads, or adds to the inputs of a layer of the decoder."""
        reads = (reads for (site, _), shown in self._sites.show.items() if site != "encoder" for *_, reads in shown)
        return any(reads) or any(site == "decoder" for site, _ in self._sites.enter)

    def merge(self, i: int, view: View | SideOutput) -> str:
        return view.merge or self.members[i].spec.merge

    def wants_mass(self, i: int | None = None) -> bool:
        """Whether any member, or member i (for itself or for one behind it), wants the attention that rows receive."""
        return any("mass" in self._needs(j) for j in (range(len(self.members)) if i is None else [i]))

    def _needs(self, i: int) -> frozenset[str]:
        """What member i needs of rows, for itself and for those behind it."""
        return frozenset(self.members[i].spec.needs) | self.dims[i].needs_behind

    def received(self, site: str, layer: int, i: int | None, mass: np.ndarray) -> None:
        """Attention received by the segment's own rows (i None) or by member i's view; cross layers add up."""
        key = (site, 0 if site == "cross" else layer, i)
        self._mass[key] = self._mass.get(key, 0) + mass

    def attended(self, site: str, layer: int, weights: Callable[[int], np.ndarray]) -> None:
        """Tells how to compute the attention of a layer for a member, until its rows are written."""
        self._attention[site, layer] = weights

    def wrote(
        self,
        site: str,
        layer: int,
        hidden: Array,
        valid: np.ndarray,
        project: Project | None = None,
        surprise: np.ndarray | None = None,
    ) -> None:
        """Offers what a layer computed (B, S, d) to those who are early, and to the first other member that takes rows; on what it drops.

        The first valid row of a stream stands at the segment's beginning: rows before it are of the segment before.
        """
        takers, attention = self._sites.take.get((site, layer)), self._attention.pop((site, layer), None)
        if not takers:
            return
        before = valid.argmax(axis=1) if valid.shape[1] else 0
        positions = (self.site_start(site) - before)[:, None] + np.arange(valid.shape[1])
        mass = self._mass.get((site, layer, None))
        targets = self._targets if site == "decoder" else None
        tokens = self._tokens.get("encoder" if site == "cross" else site)
        new = New(site, layer, hidden, valid, positions, tokens, mass, None, targets, surprise=surprise)
        for i in takers:
            if self.members[i].spec.early:
                self._offer(i, "write", new, project, attention)
        self._hand_on(new, takers, project, "write", attention)

    def finished(self, outputs: Array, valid: np.ndarray) -> None:
        """The decoder's outputs (B, T, d). They are offered when the segment closes: `logits` is asked before that."""
        self._output = outputs, valid

    def _hand_on(
        self,
        rows: New | None,
        takers: list[int],
        project: Project | None,
        method: str = "absorb",
        attention: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        """Rows go to the first of the members, and what that drops for them to the next. method: by which they take new ones."""
        for i in takers:
            if rows is None:
                return
            spec = self.members[i].spec
            by = "absorb" if spec.early else method
            left = self._offer(i, by, rows, project, attention if by == "write" else None)
            if not spec.taps:
                rows, method = left, "absorb"

    def _offer(
        self, i: int, method: str, new: New, project: Project | None, attention: Callable[[int], np.ndarray] | None = None
    ) -> New | None:
        """Member i writes or absorbs `new`."""
        place, spec = (i, new.site, new.layer), self.members[i].spec
        comes_again = spec.early and method == "write"
        (least, most), counts = self._taken.get(place, (0, 0)), new.valid.sum(axis=1)
        if not comes_again and new.layer < self.dims[i].layers[new.site]:
            self._taken[place] = least + int(counts.min() if len(counts) else 0), most + int(counts.max(initial=0))
        offered = self._as_asked_for(i, new, project, attention)
        arguments = (offered,) if method == "absorb" else (new.site, new.layer, offered)
        check = check_passed_on if spec.taps or comes_again else partial(check_evicted, batch=self.batch, dims=self.dims[i])
        return self._call(i, method, *arguments, site=new.site, layer=new.layer, check=check)

    def _as_asked_for(self, i: int, new: New, project: Project | None, attention: Callable[[int], np.ndarray] | None = None) -> New:
        """`new` with what member i and those behind it ask for, and without a gradient if it wants none."""
        plain, needs = self.members[i].spec.gradient == "none", self._needs(i)
        shown = "tokens" in needs

        def heads(rows: Array, frozen: bool = False) -> tuple[Array, Array]:
            assert project is not None
            k, v = project(rows, frozen=frozen)
            return (value_of(k), value_of(v)) if plain and not frozen else (k, v)

        return dataclasses.replace(
            new,
            hidden=value_of(new.hidden) if plain else new.hidden,
            tokens=new.tokens if shown else None,
            targets=new.targets if shown else None,
            mass=new.mass if "mass" in needs else None,
            surprise=new.surprise if "surprise" in needs else None,
            view_mass=self._mass.pop((new.site, new.layer, i), None),  # of the rows it has shown, which may now change
            project=heads if project is not None else None,
            attention=None if attention is None else partial(attention, i),
        )

    @property
    def changes_output(self) -> bool:
        """Whether any member has a say in the output distribution."""
        return any(_has(member, "logits") for member in self.members)

    def logits(self, hidden: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """log_probs (B, T, V) as the members change them, given the decoder's outputs (B, T, d)."""
        for i, member in enumerate(self.members):
            if _has(member, "logits"):
                log_probs = self._call(i, "logits", hidden, log_probs, check=partial(check_log_probs, before=log_probs))
        return log_probs

    def recall(self, tokens: np.ndarray) -> list[list[Passage]]:
        """What a prompt of tokens (B, T) would see of what was read, by stream: of the first member, then of the next."""
        self.forget_deleted()
        found: list[list[Passage]] = [[] for _ in range(self.batch)]
        for i, member in enumerate(self.members):
            if _has(member, "recall"):
                parts = self._call(i, "recall", tokens, check=partial(check_passages, batch=self.batch))
                found = [before + part for before, part in zip(found, parts, strict=True)]
        return found

    def drain(self) -> None:
        """The streams end: what a working memory holds goes to the memories behind it, all of it or nothing."""
        self.forget_deleted()
        before = [State(state, state.dims) for state in self.states]
        try:
            for i in range(len(self.members) - 1):
                for dropped in self._drained(i):
                    behind = [j for j in self._sites.take.get((dropped.site, dropped.layer), ()) if j > i]
                    self._hand_on(dropped, behind, self._projections(dropped.site, dropped.layer))
        except BaseException:  # an interrupt, too
            self.states = before
            raise

    def _drained(self, i: int) -> list[New]:
        """What member i gives up as the streams end."""
        check_each = partial(check_evicted, batch=self.batch, dims=self.dims[i])
        return [*filter(None, self._call(i, "drain", check=lambda rows: [*map(check_each, rows)]))]

    def flush(self) -> None:
        """Makes durable what was read, also the rows that a working memory still holds for a durable one behind it."""
        self.forget_deleted()
        for i in range(len(self.members) - 1):
            if any(_has(member, "write_ahead") for member in self.members[i + 1 :]):
                self._write_ahead(i)
        for i in range(len(self.members)):
            self._call(i, "flush")

    def _write_ahead(self, i: int) -> None:
        """What member i would give up if the streams ended now, to the next durable member; it keeps its rows."""
        state = self.states[i]
        self.states[i] = State(state, state.dims)  # to drain it, and put the old one back
        try:
            held = self._drained(i)
        finally:
            self.states[i] = state
        for rows in held:
            behind = (j for j in self._sites.take.get((rows.site, rows.layer), ()) if j > i and _has(self.members[j], "write_ahead"))
            if (j := next(behind, None)) is not None:
                offered = self._as_asked_for(j, rows, self._projections(rows.site, rows.layer))
                self._call(j, "write_ahead", offered, site=rows.site, layer=rows.layer)

    def forget_deleted(self) -> bool:
        """Begins all streams anew if rows of theirs were deleted, by whatever process; says whether it did."""
        found = [self._call(i, "deleted") for i, member in enumerate(self.members) if _has(member, "deleted")]
        if any(found):
            self.reset(np.ones(self.batch, bool))
        return any(found)

    def check_weights(self) -> None:
        """Raises InvalidValue if the states are of weights that the model no longer has. Those that hold nothing begin anew."""
        if self.made_of is None or not self._sites.made or not self.made_of.changed(self._sites.made):
            return
        if self.has_read:
            raise InvalidValue(
                "memory: the model's weights are not those that it was filled with, so its rows mean nothing to this model; forget them"
                " (Pipeline.reset) and read the text again"
            )
        self.made_of.renew()
        self.reset(np.ones(self.batch, bool))

    def site_start(self, site: str) -> np.ndarray:
        """(B,) position of the segment's first token at a site: how many tokens were before it there.

        An encoder-decoder's decoder has a text of its own: its segments may be longer or shorter than the encoder's.
        """
        return self.decoded if site == "decoder" and self.config.has_encoder else self.start

    # Streams

    def reset(self, streams: np.ndarray) -> None:
        """Empties the memory of the streams where (B,) bool `streams` is set: a new document begins there."""
        begun = [self._start(i, self.batch) for i in range(len(self.members))]  # one that fails leaves all as they were
        if not streams.all():
            for fresh, state in zip(begun, self.states, strict=True):
                empty = {name: fresh.get(name, np.zeros_like(value)) for name, value in state.items()}
                fresh.clear()
                fresh.update({name: select_streams(streams, empty[name], value) for name, value in state.items()})
        else:
            self.has_read = False
        start, decoded = np.where(streams, 0, self.start), np.where(streams, 0, self.decoded)
        self.states, self.start, self.decoded = begun, start, decoded
        self._taken = {}

    def reorder(self, index: np.ndarray) -> None:
        """Stream i becomes what stream index[i] was: beams, shuffled or shrinking batches. Within a segment, too."""
        if np.array_equal(index, np.arange(self.batch)):  # a long memory need not be copied
            return
        moved: dict[int, Array] = {}  # by the id of what was there: states share arrays, and what is projected names them
        held = [*self.states, *self._before, self._tokens, self._mass]
        was = [value for arrays in held for value in arrays.values()]  # so that no id is given again
        for arrays in held:
            for name, value in arrays.items():
                if id(value) not in moved:
                    moved[id(value)] = value[index]
                arrays[name] = moved[id(value)]
        self._projected = {place: kept for place, one in self._projected.items() if (kept := one.reordered(index, moved)) is not None}
        self._views = {place: shown for place, shown in self._views.items() if not shown}  # the others are asked for again
        del was
        self.start, self.decoded = self.start[index], self.decoded[index]
        self._lengths, self.batch = self._lengths[index], len(index)
        self._targets = None if self._targets is None else self._targets[index]
        if self._output is not None:
            outputs, valid = self._output
            self._output = outputs[index], valid[index]

    def join(self, other: MemoryRun) -> None:
        """Appends the streams of `other`, a run of the same memory and model, behind these.

        Where arrays differ along axis 1 the shorter is filled with zeros, as everywhere. Segments are counted from the
        larger number on. Raises InvalidValue for a run of another memory or model.
        """
        if other.config != self.config or [_identity(m) for m in other.members] != [_identity(m) for m in self.members]:
            raise InvalidValue("other: expected a run with the same memory and model, started in the same way")
        sizes = self.batch, other.batch
        mine, theirs = ([*run.states, *run._before, run._tokens, run._mass] for run in (self, other))
        for a, b in zip(mine, theirs, strict=True):
            for name in list(dict.fromkeys([*a, *b])):
                a[name] = _joined(a.get(name), b.get(name), sizes)
        self.start, self.decoded = np.concatenate([self.start, other.start]), np.concatenate([self.decoded, other.decoded])
        self._lengths = np.concatenate([self._lengths, other._lengths])
        self._targets = _joined(self._targets, other._targets, sizes)
        if self._output is not None or other._output is not None:
            (outputs, valid), (more, more_valid) = (run._output or (None, None) for run in (self, other))
            self._output = _joined(outputs, more, sizes), _joined(valid, more_valid, sizes)
        self._views, self._projected = {}, {}
        self.batch, self.number = sum(sizes), max(self.number, other.number)
        self.has_read = self.has_read or other.has_read

    def detach(self) -> None:
        """Gradients stop here."""
        for state in self.states:
            for name in state:
                state[name] = value_of(state[name])

    def traced(self) -> dict[tuple[int, str], Var]:
        """The Vars among the states, by (member, name)."""
        return {(i, name): x for i, state in enumerate(self.states) for name, x in state.items() if isinstance(x, Var)}

    def cut(self) -> None:
        """Between segments: each Var of the states becomes a leaf, whose gradient is for the Var that it was.

        States are kept from here on: none of their arrays can be written into, and what is a part of a larger array is
        copied, as the rest of the segment need not be kept.
        """
        for state in self.states:
            for name, x in state.items():
                value = value_of(x)
                if value.base is not None and value.nbytes < getattr(value.base, "nbytes", 0):
                    value = value.copy()
                value = value.view()
                value.flags.writeable = False
                state[name] = Var(value) if isinstance(x, Var) else value
        self._before, self._rows, self._output = [dict(state) for state in self.states], {}, None  # they hold on to the tape

    def copy(self) -> MemoryRun:
        """An independent run from here on; arrays are shared, as nobody writes into one."""
        twin = object.__new__(MemoryRun)
        twin.__dict__.update(self.__dict__)
        twin.states = [State(state, state.dims) for state in self.states]
        twin._before = [dict(before) for before in self._before]
        twin._taken = dict(self._taken)
        twin._tokens, twin._rows, twin._mass = dict(self._tokens), dict(self._rows), dict(self._mass)
        twin._attention = dict(self._attention)
        twin._views, twin._projected = dict(self._views), dict(self._projected)
        return twin

    def dump(self) -> dict[str, np.ndarray]:
        """Everything needed to go on later, as named arrays."""
        arrays = {f"{i}.{name}": value_of(value) for i, state in enumerate(self.states) for name, value in state.items()}
        return {**arrays, "start": self.start, "decoded": self.decoded, "number": np.array([self.number])}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `dump` gave."""
        unknown = [name for name in arrays if name not in ("start", "decoded", "number") and not name.partition(".")[0].isdecimal()]
        if unknown or not {"start", "number"} <= set(arrays):
            raise InvalidValue(f"arrays: expected the result of dump(), got {sorted(arrays)[:5]}")
        if len(arrays["start"]) != self.batch:
            raise InvalidValue(f"arrays: expected a dump of {self.batch} streams, got one of {len(arrays['start'])}")
        for i, state in enumerate(self.states):
            state.clear()
            state.update({name.removeprefix(f"{i}."): v for name, v in arrays.items() if name.startswith(f"{i}.")})
        self.start, self.number, self.has_read = arrays["start"], int(arrays["number"][0]), True
        # Dumps of 0.1.0 have no such count: there the decoder's tokens came after the encoder's segment.
        self.decoded = arrays.get("decoded", self.start + (self.config.segment_length or 0))

    def nbytes(self) -> int:
        """Bytes of state held in RAM."""
        return sum(value_of(value).nbytes for state in self.states for value in state.values())

    # Inside

    def _start(self, i: int, batch: int) -> State:
        member, dims = self.members[i], self.dims[i]
        with attributed(member, "start", step=self.number):
            arrays = member.start(batch, dims)
            require(isinstance(arrays, Mapping), "expected a mapping of arrays, got {}", type(arrays).__name__)
            for name, value in arrays.items():
                check_state(name, value, batch)
            return State(arrays, dims)

    def _call(
        self, i: int, method: str, *arguments: Any, site: str | None = None, layer: int | None = None, check: Callable | None = None
    ) -> Any:
        """Member i's `method` on its state and `arguments`: the only call of a strategy while a run is at work.

        The result and what has changed in the state are checked; whatever goes wrong is the member's fault.
        """
        member, state = self.members[i], self.states[i]
        before = dict(state)
        try:
            result = getattr(member, method)(state, *arguments)
            if check is not None:
                result = check(result)
            if len(state) != len(before) or not all(map(operator.is_, state.values(), before.values())):  # decoding, nothing changes
                for name, value in state.items():
                    if before.get(name) is not value:
                        check_state(name, value, self.batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and the like, too: a strategy ends nobody's program
            raise fault(member, method, site, layer, self.number, error) from error
        return result

    def _segment(self, i: int, site: str) -> Segment:
        tokens = self._tokens.get("decoder" if site == "cross" else site) if "tokens" in self.members[i].spec.needs else None
        return Segment(self.number, site, self.site_start(site), self._lengths, tokens)


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _reordered(view: View, index: np.ndarray, moved: Mapping[int, Array]) -> View | None:
    """What a view tells of its rows, for streams `index`; None if `moved`, arrays by the ids of what they were, lacks its bank."""
    kind, *arrays = view.bank
    if not all(id(array) in moved for array in arrays):
        return None
    names = ("positions", "places", "index")
    told: dict[str, Any] = {name: None if (value := getattr(view, name)) is None else value[index] for name in names}
    return dataclasses.replace(view, bank=(kind, *(moved[id(array)] for array in arrays)), **told)


def _shows_rows(view: View | SideOutput | None) -> bool:
    """A view in which no row of any stream is valid is as none."""
    return view is not None and (isinstance(view, SideOutput) or bool(view.valid.any()))


def _sites_in_model(member: Memory, dims: Dims, config: Config) -> frozenset[str]:
    """The member's sites that the model has. Raises InvalidValue if there is none, or a layer is not there."""
    with attributed(member, "sites"):
        wanted = check_sites(member.sites(dims), member.spec)
    found = frozenset(site for site in wanted if dims.layers[site])
    if not found:
        has = [site for site, count in dims.layers.items() if count]
        why = "" if config.decoder_mixer == "attention" else f" (a decoder with decoder_mixer={config.decoder_mixer!r} attends to no rows)"
        raise InvalidValue(f"memory {member.name!r}: works at {sorted(wanted)}, but this model has only {has}{why}")
    most = max(dims.layers[site] for site in found)
    if wrong := [layer for layer in member.spec.layers or () if not -most <= layer < most]:
        raise InvalidValue(f"memory {member.name!r}: layer: expected {-most} to {most - 1} in this model, got {wrong[0]}")
    return found


def _identity(member: Memory) -> tuple[type, str, str | None]:
    return type(member), member.name, member.text


def select_streams(chosen: np.ndarray, a: Array, b: Array) -> Array:
    """Streams of `a` where (B,) bool `chosen`, else of `b`; the shorter one along axis 1 is filled with zeros."""
    if a is b:
        return a
    a, b = _same_length(a, b)
    return np.where(chosen.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)


def _same_length(a: Array, b: Array) -> tuple[Array, Array]:
    if a.ndim < 2 or a.shape[1] == b.shape[1]:
        return a, b
    most = max(a.shape[1], b.shape[1])
    a, b = (np.pad(x, [(0, most - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]) for x in (a, b))
    return a, b


def _joined(a: Array, b: Array, sizes: tuple[int, int]) -> Array:
    """The streams of `a`, then those of `b`; zeros in place of one that is None."""
    if a is None and b is None:
        return None
    a = np.zeros((sizes[0], *b.shape[1:]), b.dtype) if a is None else a
    b = np.zeros((sizes[1], *a.shape[1:]), a.dtype) if b is None else b
    return np.concatenate(_same_length(a, b))
