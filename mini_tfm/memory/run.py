"""MemoryRun: memories at work on a batch of streams. The only code that calls a strategy's methods.

The model asks it for rows at each site and tells it what was computed; it owns the states: rows of the
batch that pause, are reset, reordered, detached or saved are handled here, the same for every strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..autodiff import value_of
from ..config import Config
from ..errors import InvalidValue
from .base import MERGES, Array, Dims, Memory, New, Param, Query, Rows, Segment, Side, State, View
from .manager import blamed, expect, expect_array
from .stack import Stack


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
        "decoder": config.n_decoder_layers,
        "cross": config.n_decoder_layers if config.has_encoder else 0,
    }
    assert config.n_kv_heads and config.d_head  # filled in by Config  # noqa: S101
    return Dims(
        config.d_model, config.n_heads, config.n_kv_heads, config.d_head, layers, np.dtype(dtype), config.segment_length, **more
    )


def memory_parameters(memory: Memory | None, config: Config, dtype: Any) -> dict[str, Param]:
    """All trainable parameters of a memory, by their full names."""
    found: dict[str, Param] = {}
    for member, prefix in zip(members_of(memory), parameter_prefixes(memory), strict=True):
        with blamed(member, "parameters", None, None, 0):
            params = member.parameters(model_dims(config, dtype))
            expect(isinstance(params, Mapping), f"parameters: expected a mapping, got {type(params).__name__}")
            for name, param in params.items():
                expect(isinstance(param, Param), f"parameters[{name!r}]: expected a Param, got {type(param).__name__}")
                found[prefix + name] = param
    return found


class MemoryRun:
    """`memory` (None, a strategy or a Stack) on `batch` streams of a model with `config`.

    weights: the model's and the strategies' parameters, arrays or Vars. Call, a segment: `open`, then what
    the model does (`begin`, `views`, `wrote`, `end`), then `close`.
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
    ):
        self.memory, self.members = memory, members_of(memory)
        self.config, self.batch = config, batch
        self.dims: list[Dims] = []
        for member, prefix in zip(self.members, parameter_prefixes(memory), strict=True):
            params = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            dtype = value_of(next(iter(weights.values()))).dtype
            dims = model_dims(config, dtype, training=training, params=params, fingerprint=fingerprint)
            if not any(dims.layers[site] for site in member.spec.sites):
                has = [site for site, count in dims.layers.items() if count]
                raise InvalidValue(f"memory {member.name!r}: works at {sorted(member.spec.sites)}, this model has only {has}")
            self.dims.append(dims)
        self.states = [self._start(i, batch) for i in range(len(self.members))]
        self.start = np.zeros(batch, np.int64)  # tokens of each stream before this segment
        self.number = 0
        self.open(np.zeros(batch, np.int64))

    # One segment

    def open(self, lengths: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Begins a segment of (B,) `lengths` tokens; rows of length 0 pause and keep their state."""
        self._lengths = lengths
        self._tokens = tokens
        self._before = [dict(state) for state in self.states]
        self._rows: dict[str, list[tuple[int, Rows]]] = {}
        self._mass: dict[tuple[str, int, int | None], np.ndarray] = {}

    def close(self) -> None:
        """Ends the segment: streams advance, paused rows get their old state back."""
        active = self._lengths > 0
        if not active.all():
            for state, before in zip(self.states, self._before, strict=True):
                for name in state:
                    state[name] = select_rows(active, state[name], before.get(name, np.zeros_like(state[name])))
        self.start = self.start + self._lengths
        self.number += 1

    def begin(self, site: str) -> list[Rows]:
        """Rows that join the sequence at `site`, in the order of the members."""
        found = []
        for i, member in self._at(site, "begin"):
            with blamed(member, "begin", site, None, self.number):
                rows = member.begin(self.states[i], self._view_of_segment(site))
                if rows is None:
                    continue
                expect(isinstance(rows, Rows), f"expected Rows or None, got {type(rows).__name__}")
                expect_array("values", rows.values, (self.batch, None, self.dims[i].d_model), "f")
                expect(rows.where == "front" or (rows.where == "around" and site == "decoder"), f"where: {rows.where!r} is not possible here")
            found.append((i, rows))
        self._rows[site] = found
        return [rows for _, rows in found]

    def end(self, site: str, outputs: list[Array]) -> None:
        """Outputs at the rows that `begin` gave, in its order."""
        for (i, _), output in zip(self._rows.get(site, ()), outputs, strict=True):
            with blamed(self.members[i], "end", site, None, self.number):
                self.members[i].end(self.states[i], output)

    def views(self, site: str, layer: int, query: Callable[[], Query]) -> list[tuple[int, View | Side]]:
        """What the members want this layer to see, with the number of the member."""
        found: list[tuple[int, View | Side]] = []
        segment = self._view_of_segment(site)
        for i, member in self._at(site, "view", "read", layer=layer):
            for method in ("view", "read"):
                if method == "read" and "query" not in member.spec.needs:
                    continue
                with blamed(member, method, site, layer, self.number):
                    if method == "view":
                        view: Any = member.view(self.states[i], site, layer, segment)
                    else:
                        view = member.read(self.states[i], site, layer, query())
                    if view is not None:
                        self._check(view, member, self.dims[i])
                        found.append((i, view))
        return found

    def uses(self, site: str) -> bool:
        """Whether any member takes part at `site`."""
        return bool(self._at(site, "begin", "view", "read", "write"))

    def merge(self, i: int, view: View | Side) -> str:
        return view.merge or self.members[i].spec.merge

    def wants_mass(self, i: int | None = None) -> bool:
        members = self.members if i is None else [self.members[i]]
        return any("mass" in member.spec.needs for member in members)

    def received(self, site: str, layer: int, i: int | None, mass: np.ndarray) -> None:
        """Attention received by the segment's own rows (i None) or by member i's view; cross layers add up."""
        key = (site, 0 if site == "cross" else layer, i)
        self._mass[key] = self._mass.get(key, 0) + mass

    def wrote(self, site: str, layer: int, hidden: Array, valid: np.ndarray) -> None:
        """Offers what a layer computed (B, S, d) to the first member that takes rows, and on what it drops."""
        takers = [i for i, _ in self._at(site, "write", layer=None if site == "cross" else layer)]
        if not takers:
            return
        positions = self.site_start(site)[:, None] + np.arange(valid.shape[1])
        given: New | None = New(
            site, layer, hidden, valid, positions, self._tokens, self._mass.get((site, layer, None)), None
        )
        for place, i in enumerate(takers):
            if given is None:
                return
            member = self.members[i]
            if member.spec.gradient == "none":
                given = dataclasses.replace(given, hidden=value_of(given.hidden))
            method = "absorb" if place else "write"
            with blamed(member, method, site, layer, self.number):
                if place:
                    given = member.absorb(self.states[i], given)
                else:
                    own = dataclasses.replace(given, view_mass=self._mass.get((site, layer, i)))
                    given = member.write(self.states[i], site, layer, own)
                if given is not None:
                    expect(isinstance(given, New), f"expected Evicted or None, got {type(given).__name__}")
                    expect_array("hidden", given.hidden, (self.batch, None, self.dims[i].d_model), "f")
                    shape = value_of(given.hidden).shape[:2]
                    expect_array("valid", given.valid, shape, "b")
                    expect_array("positions", given.positions, shape, "i")

    def logits(self, hidden: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        for i, member in enumerate(self.members):
            if type(member).logits is not Memory.logits:
                with blamed(member, "logits", None, None, self.number):
                    changed = member.logits(self.states[i], hidden, log_probs)
                    if changed is not None:
                        expect(np.shape(changed) == log_probs.shape, f"expected shape {log_probs.shape}, got {np.shape(changed)}")
                        log_probs = changed
        return log_probs

    def flush(self) -> None:
        for i, member in enumerate(self.members):
            with blamed(member, "flush", None, None, self.number):
                member.flush(self.states[i])

    def site_start(self, site: str) -> np.ndarray:
        """(B,) stream position of the first token at a site: an encoder-decoder's decoder is a segment ahead."""
        ahead = site == "decoder" and self.config.has_encoder
        return self.start + self._lengths if ahead else self.start

    # Rows of the batch

    def reset(self, rows: np.ndarray) -> None:
        """Forgets the streams where (B,) bool `rows` is set: a new document begins there."""
        for i, state in enumerate(self.states):
            fresh = self._start(i, self.batch)
            for name in state:
                state[name] = select_rows(rows, fresh.get(name, np.zeros_like(state[name])), state[name])
        self.start = np.where(rows, 0, self.start)

    def reorder(self, index: np.ndarray) -> None:
        """Row i becomes what row index[i] was: beams, shuffled or shrinking batches."""
        for state in self.states:
            for name in state:
                state[name] = state[name][index]
        self.start, self.batch = self.start[index], len(index)

    def detach(self) -> None:
        """Gradients stop here."""
        for state in self.states:
            for name in state:
                state[name] = value_of(state[name])

    def copy(self) -> MemoryRun:
        """An independent run from here on; arrays are shared, as nobody writes into one."""
        twin = object.__new__(MemoryRun)
        twin.__dict__.update(self.__dict__)
        twin.states = [State(state, state.dims) for state in self.states]
        return twin

    def dump(self) -> dict[str, np.ndarray]:
        """Everything needed to go on later, as named arrays."""
        arrays = {f"{i}.{name}": value_of(value) for i, state in enumerate(self.states) for name, value in state.items()}
        return {**arrays, "start": self.start, "number": np.int64(self.number)[None]}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `dump` gave."""
        if len(arrays["start"]) != self.batch:
            raise InvalidValue(f"arrays: expected a dump of {self.batch} streams, got one of {len(arrays['start'])}")
        for i, state in enumerate(self.states):
            state.clear()
            state.update({name.removeprefix(f"{i}."): v for name, v in arrays.items() if name.startswith(f"{i}.")})
        self.start, self.number = arrays["start"], int(arrays["number"][0])

    def nbytes(self) -> int:
        """Bytes of state held in RAM."""
        return sum(value_of(value).nbytes for state in self.states for value in state.values())

    # Inside

    def _start(self, i: int, batch: int) -> State:
        member, dims = self.members[i], self.dims[i]
        with blamed(member, "start", None, None, 0):
            arrays = member.start(batch, dims)
            expect(isinstance(arrays, Mapping), f"expected a mapping of arrays, got {type(arrays).__name__}")
            for name, value in arrays.items():
                array = value_of(value)
                expect(
                    isinstance(array, np.ndarray) and array.ndim > 0 and len(array) == batch,
                    f"state[{name!r}]: expected an array of {batch} rows, got {getattr(array, 'shape', type(array).__name__)}",
                )
            return State(arrays, dims)

    def _at(self, site: str, *methods: str, layer: int | None = None) -> list[tuple[int, Memory]]:
        """Members that take part at `site` (and layer) and have a method of their own among `methods`."""
        found = []
        for i, member in enumerate(self.members):
            count = self.dims[i].layers[site]
            layers = member.spec.layers
            here = layer is None or layers is None or layer in layers or layer - count in layers
            own = any(getattr(type(member), method) is not getattr(Memory, method) for method in methods)
            if site in member.spec.sites and here and own:
                found.append((i, member))
        return found

    def _view_of_segment(self, site: str) -> Segment:
        return Segment(self.number, site, self.site_start(site), self._lengths, self._tokens)

    def _check(self, view: Any, member: Memory, dims: Dims) -> None:
        """Refuses a View or Side that the kernels could not take."""
        expect(isinstance(view, View | Side), f"expected a View, a Side or None, got {type(view).__name__}")
        merge = view.merge or member.spec.merge
        expect(merge in MERGES, f"merge: expected one of {', '.join(MERGES)}, got {merge!r}")
        if merge == "gate":
            expect(view.gate is not None, "gate: expected (H,) logits with merge='gate', got None")
            expect_array("gate", view.gate, (dims.n_heads,), "f")
        if isinstance(view, Side):
            expect(merge != "joint", "merge: a Side cannot be 'joint', it has no scores")
            expect_array("output", view.output, (self.batch, dims.n_heads, None, dims.d_head), "f")
            return
        kind = view.bank[0] if isinstance(view.bank, tuple) and view.bank else None
        if kind == "hidden":
            expect_array("bank", view.bank[1], (self.batch, None, dims.d_model), "f")
            rows = value_of(view.bank[1]).shape[1]
        else:
            expect(kind == "kv" and len(view.bank) == 3, "bank: expected ('hidden', X) or ('kv', K, V)")
            rows = np.shape(value_of(view.bank[1]))[2] if np.ndim(value_of(view.bank[1])) == 4 else None
            for name, bank in zip(("K", "V"), view.bank[1:], strict=True):
                expect_array(f"bank {name}", bank, (self.batch, dims.n_kv_heads, rows, dims.d_head), "f")
        expect_array("valid", view.valid, (self.batch, rows), "b")
        if view.positions is not None:
            expect_array("positions", view.positions, (self.batch, rows), "i")
        if view.index is not None:
            index = view.index
            expect(isinstance(index, np.ndarray) and index.dtype.kind == "i", "index: expected an integer array")
            fits = index.shape[0] == self.batch and (index.ndim == 2 or (index.ndim == 4 and index.shape[1] == dims.n_heads))
            expect(fits, f"index: expected (B, K) or (B, H, T, K) with B = {self.batch}, H = {dims.n_heads}, got {index.shape}")
            expect(index.size == 0 or (index.min() >= -1 and index.max() < rows), f"index: expected -1 to {rows - 1}")


def select_rows(chosen: np.ndarray, a: Array, b: Array) -> Array:
    """Rows of `a` where (B,) bool `chosen`, else of `b`; the shorter one along axis 1 is filled with zeros."""
    if a is b:
        return a
    if a.ndim > 1 and a.shape[1] != b.shape[1]:
        most = max(a.shape[1], b.shape[1])
        a, b = (np.pad(x, [(0, most - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]) for x in (a, b))
    return np.where(chosen.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)


def _replace(new: New, **changes: Any) -> New:
    import dataclasses

    return dataclasses.replace(new, **changes)
