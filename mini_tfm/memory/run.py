"""MemoryRun: memories at work on a batch of streams. The only code that calls a strategy's methods.

The model asks it for rows at each site and tells it what was computed; it owns the states: rows of the
batch that pause, are reset, reordered, detached or saved are handled here, the same for every strategy.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..autodiff import Var, value_of
from ..config import Config
from ..errors import InvalidValue
from .base import MERGES, Array, Dims, Memory, New, Param, Query, Rows, Segment, Side, State, View
from .stack import Stack
from .validate import blamed, check_spec, expect, expect_array, real_array


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
    assert config.n_kv_heads and config.d_head  # filled in by Config
    return Dims(config.d_model, config.n_heads, config.n_kv_heads, config.d_head, layers, np.dtype(dtype), config.segment_length, **more)


def memory_parameters(memory: Memory | None, config: Config, dtype: Any) -> dict[str, Param]:
    """All trainable parameters of a memory, by their full names."""
    found: dict[str, Param] = {}
    for member, prefix in zip(members_of(memory), parameter_prefixes(memory), strict=True):
        with blamed(member, "parameters", None, None, 0):
            params = member.parameters(model_dims(config, dtype))
            expect(isinstance(params, Mapping), f"parameters: expected a mapping, got {type(params).__name__}")
            for name, param in params.items():
                expect(isinstance(name, str) and name, f"parameters: expected names, got {name!r}")
                _check_param(f"parameters[{name!r}]", param)
                found[prefix + name] = param
    return found


def _check_param(what: str, param: Any) -> None:
    expect(isinstance(param, Param), f"{what}: expected a Param, got {type(param).__name__}")
    shape = param.shape
    good = isinstance(shape, tuple) and all(isinstance(n, int | np.integer) and n >= 0 for n in shape)
    expect(good, f"{what}: shape: expected a tuple of sizes, got {shape!r}")
    if isinstance(param.init, np.ndarray):
        expect_array(f"{what}: init", param.init, shape, "f")
    else:
        expect(_is_factor(param.init), f"{what}: init: expected a standard deviation or an array, got {param.init!r}")
    expect(_is_factor(param.lr_factor), f"{what}: lr_factor: expected a number of at least 0, got {param.lr_factor!r}")
    expect(isinstance(param.weight_decay, bool), f"{what}: weight_decay: expected True or False, got {param.weight_decay!r}")


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


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
            check_spec(member)
            params = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            dtype = value_of(next(iter(weights.values()))).dtype
            dims = model_dims(config, dtype, training=training, params=params, fingerprint=fingerprint)
            if not any(dims.layers[site] for site in member.spec.sites):
                has = [site for site, count in dims.layers.items() if count]
                raise InvalidValue(f"memory {member.name!r}: works at {sorted(member.spec.sites)}, this model has only {has}")
            most = max(dims.layers[site] for site in member.spec.sites)
            if wrong := [layer for layer in member.spec.layers or () if not -most <= layer < most]:
                raise InvalidValue(f"memory {member.name!r}: layer: expected {-most} to {most - 1} in this model, got {wrong[0]}")
            self.dims.append(dims)
        self.start = np.zeros(batch, np.int64)  # tokens of each stream before this segment
        self.number = 0
        self.states = [self._start(i, batch) for i in range(len(self.members))]
        self.open(np.zeros(batch, np.int64))

    # One segment

    def open(self, lengths: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Begins a segment of (B,) `lengths` tokens; rows of length 0 pause and keep their state.

        targets: (B, T) what the decoder predicts, where it is known.
        """
        self._lengths = lengths
        self._targets = targets
        self._tokens: dict[str, np.ndarray] = {}  # what each stack reads
        self._output: tuple[Array, np.ndarray] | None = None
        self._before = [dict(state) for state in self.states]
        self._rows: dict[str, list[tuple[int, Rows]]] = {}
        self._mass: dict[tuple[str, int, int | None], np.ndarray] = {}

    def close(self) -> None:
        """Ends the segment: streams advance, paused rows get their old state back."""
        if self._output is not None:
            self._wrote_output(*self._output)
        active = self._lengths > 0
        if not active.all():
            for state, before in zip(self.states, self._before, strict=True):
                for name in state:
                    state[name] = select_rows(active, state[name], before.get(name, np.zeros_like(state[name])))
        self.start = self.start + self._lengths
        self.number += 1

    def begin(self, site: str, tokens: np.ndarray | None = None) -> list[Rows]:
        """Rows that join the sequence at `site`, where the stack reads (B, S) `tokens`, in the order of the members."""
        if tokens is not None:
            self._tokens[site] = tokens
        found = []
        for i, member in self._at(site, "begin"):
            with self._calling(i, "begin", site):
                rows = member.begin(self.states[i], self._segment(i, site))
                if rows is None:
                    continue
                expect(isinstance(rows, Rows), f"expected Rows or None, got {type(rows).__name__}")
                real_array("values", rows.values, (self.batch, None, self.dims[i].d_model), self.dims[i].dtype)
                places = ("front", "around") if site == "decoder" else ("front",)
                expect(rows.where in places, f"where: {rows.where!r} is not possible here")
            found.append((i, rows))
        self._rows[site] = found
        return [rows for _, rows in found]

    def end(self, site: str, outputs: list[Array]) -> None:
        """Outputs at the rows that `begin` gave, in its order."""
        for (i, _), output in zip(self._rows.get(site, ()), outputs, strict=True):
            with self._calling(i, "end", site):
                self.members[i].end(self.states[i], output)

    def views(self, site: str, layer: int, query: Callable[[], Query], n_queries: int) -> list[tuple[int, View | Side]]:
        """What the members want the `n_queries` queries of this layer to see, with the number of the member."""
        found: list[tuple[int, View | Side]] = []
        asked: Query | None = None  # made once, and only if anyone asks
        for i, member in self._at(site, "view", "read", layer=layer):
            for method in ("view", "read"):
                if method == "read" and "query" not in member.spec.needs:
                    continue
                if method == "read" and asked is None:
                    asked = query()
                with self._calling(i, method, site, layer):
                    if method == "view":
                        view: Any = member.view(self.states[i], site, layer, self._segment(i, site))
                    else:
                        assert asked is not None
                        view = member.read(self.states[i], site, layer, asked)
                    if view is not None:
                        found.append((i, self._checked(view, member, self.dims[i], n_queries)))
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

    def wrote(
        self, site: str, layer: int, hidden: Array, valid: np.ndarray, project: Callable[[Array], tuple[Array, Array]] | None = None
    ) -> None:
        """Offers what a layer computed (B, S, d) to the first member that takes rows, and on what it drops."""
        takers = [i for i, _ in self._at(site, "write", "absorb", layer=None if site == "cross" else layer)]
        self._offer(takers, site, layer, hidden, valid, project)

    def finished(self, outputs: Array, valid: np.ndarray) -> None:
        """The decoder's outputs (B, T, d). They are offered when the segment closes: `logits` is asked before that."""
        self._output = outputs, valid

    def _wrote_output(self, outputs: Array, valid: np.ndarray) -> None:
        takers = [i for i, member in self._at("decoder", "write", "absorb") if "hidden" in member.spec.needs]
        self._offer(takers, "decoder", self.config.n_decoder_layers, outputs, valid, None)

    def _offer(
        self,
        takers: list[int],
        site: str,
        layer: int,
        hidden: Array,
        valid: np.ndarray,
        project: Callable[[Array], tuple[Array, Array]] | None,
    ) -> None:
        while takers and type(self.members[takers[0]]).write is Memory.write:
            takers.pop(0)  # it absorbs what others drop, and nobody stands before it
        if not takers:
            return
        positions = self.site_start(site)[:, None] + np.arange(valid.shape[1])
        mass = self._mass.get((site, layer, None))
        targets = self._targets if site == "decoder" else None
        tokens = self._tokens.get("encoder" if site == "cross" else site)
        given = New(site, layer, hidden, valid, positions, tokens, mass, None, targets)
        own = self._for_member(given, self.members[takers[0]], project)
        own = dataclasses.replace(own, view_mass=self._mass.get((site, layer, takers[0])))
        with self._calling(takers[0], "write", site, layer):
            dropped = self._checked_rows(takers[0], self.members[takers[0]].write(self.states[takers[0]], site, layer, own))
        self._hand_on(dropped, takers[1:], project)

    def _hand_on(self, dropped: New | None, takers: list[int], project: Callable[[Array], tuple[Array, Array]] | None) -> None:
        """What one member dropped goes to the next, and what that drops for it to the one after."""
        for i in takers:
            if dropped is None:
                return
            dropped = self._for_member(dropped, self.members[i], project)
            with self._calling(i, "absorb", dropped.site, dropped.layer):
                dropped = self._checked_rows(i, self.members[i].absorb(self.states[i], dropped))

    def _checked_rows(self, i: int, dropped: Any) -> New | None:
        if dropped is None:
            return None
        dims = self.dims[i]
        expect(isinstance(dropped, New), f"expected Evicted or None, got {type(dropped).__name__}")
        real_array("hidden", dropped.hidden, (self.batch, None, dims.d_model), dims.dtype)
        shape = value_of(dropped.hidden).shape[:2]
        expect_array("valid", dropped.valid, shape, "b")
        expect_array("positions", dropped.positions, shape, "i")
        return dropped

    @staticmethod
    def _for_member(new: New, member: Memory, project: Callable[[Array], tuple[Array, Array]] | None) -> New:
        """`new` with what the member's spec asks for, and without a gradient if it wants none."""
        hidden, plain = new.hidden, member.spec.gradient == "none"
        if plain:
            hidden = value_of(hidden)

        def heads(rows: Array) -> tuple[Array, Array]:
            assert project is not None
            k, v = project(rows)
            return (value_of(k), value_of(v)) if plain else (k, v)

        shown = "tokens" in member.spec.needs
        return dataclasses.replace(
            new,
            hidden=hidden,
            tokens=new.tokens if shown else None,
            targets=new.targets if shown else None,
            project=heads if project is not None else None,
        )

    @property
    def changes_output(self) -> bool:
        """Whether any member has a say in the output distribution."""
        return any(type(member).logits is not Memory.logits for member in self.members)

    def logits(self, hidden: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """log_probs (B, T, V) as the members change them, given the decoder's outputs (B, T, d)."""
        for i, member in enumerate(self.members):
            if type(member).logits is Memory.logits:
                continue
            with self._calling(i, "logits"):
                changed = member.logits(self.states[i], hidden, log_probs)
                if changed is None:
                    continue
                expect(isinstance(changed, np.ndarray), f"expected an array or None, got {type(changed).__name__}")
                expect(changed.shape == log_probs.shape, f"expected shape {log_probs.shape}, got {changed.shape}")
                expect(changed.dtype.kind == "f" and not np.isnan(changed).any(), f"expected numbers, got {changed.dtype} or NaN")
                total = np.exp(changed.astype(np.float64)).sum(axis=-1)
                expect(np.allclose(total, 1, atol=1e-3), "expected log-probabilities, whose exponentials sum to 1")
                log_probs = changed.astype(log_probs.dtype, copy=False)
        return log_probs

    def drain(self) -> None:
        """The streams end: what a working memory holds goes to the memories behind it."""
        for i, member in enumerate(self.members[:-1]):
            with self._calling(i, "drain"):
                given_up = [self._checked_rows(i, dropped) for dropped in member.drain(self.states[i])]
            for dropped in filter(None, given_up):
                layer = None if dropped.site == "cross" else dropped.layer
                self._hand_on(dropped, [j for j, _ in self._at(dropped.site, "write", "absorb", layer=layer) if j > i], None)

    def flush(self) -> None:
        for i, member in enumerate(self.members):
            with self._calling(i, "flush"):
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
        # It may happen within a segment, too.
        self._lengths = self._lengths[index]
        self._before = [{name: value[index] for name, value in before.items()} for before in self._before]
        self._mass = {key: mass[index] for key, mass in self._mass.items()}
        self._tokens = {site: tokens[index] for site, tokens in self._tokens.items()}
        self._targets = None if self._targets is None else self._targets[index]

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
        return twin

    def dump(self) -> dict[str, np.ndarray]:
        """Everything needed to go on later, as named arrays."""
        arrays = {f"{i}.{name}": value_of(value) for i, state in enumerate(self.states) for name, value in state.items()}
        return {**arrays, "start": self.start, "number": np.array([self.number])}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `dump` gave."""
        unknown = [name for name in arrays if name not in ("start", "number") and not name.partition(".")[0].isdecimal()]
        if unknown or not {"start", "number"} <= set(arrays):
            raise InvalidValue(f"arrays: expected what dump() gave, got {sorted(arrays)[:5]}")
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
        with blamed(member, "start", None, None, self.number):
            arrays = member.start(batch, dims)
            expect(isinstance(arrays, Mapping), f"expected a mapping of arrays, got {type(arrays).__name__}")
            for name, value in arrays.items():
                _check_state(name, value, batch)
            return State(arrays, dims)

    @contextlib.contextmanager
    def _calling(self, i: int, method: str, site: str | None = None, layer: int | None = None) -> Iterator[None]:
        """Around a call of member i: what goes wrong is told as its fault, and its state stays one the library can handle."""
        state = self.states[i]
        before = dict(state)
        with blamed(self.members[i], method, site, layer, self.number):
            yield
            for name, value in state.items():
                if before.get(name) is not value:
                    _check_state(name, value, self.batch)

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

    def _segment(self, i: int, site: str) -> Segment:
        tokens = self._tokens.get("decoder" if site == "cross" else site) if "tokens" in self.members[i].spec.needs else None
        return Segment(self.number, site, self.site_start(site), self._lengths, tokens)

    def _checked(self, view: Any, member: Memory, dims: Dims, n_queries: int) -> View | Side:
        """The View or Side as the kernels take it; what they could not take is refused."""
        expect(isinstance(view, View | Side), f"expected a View, a Side or None, got {type(view).__name__}")
        merge = view.merge or member.spec.merge
        expect(merge in MERGES, f"merge: expected one of {', '.join(MERGES)}, got {merge!r}")
        if merge == "gate":
            expect(view.gate is not None, "gate: expected (H,) logits with merge='gate', got None")
            real_array("gate", view.gate, (dims.n_heads,), dims.dtype)
        if isinstance(view, Side):
            expect(merge != "joint", "merge: a Side cannot be 'joint', it has no scores")
            real_array("output", view.output, (self.batch, dims.n_heads, n_queries, dims.d_head), dims.dtype)
            if view.valid is not None:
                expect_array("valid", view.valid, (self.batch,), "b")
            return view
        kind = view.bank[0] if isinstance(view.bank, tuple) and view.bank else None
        if kind == "hidden" and len(view.bank) == 2:
            real_array("bank", view.bank[1], (self.batch, None, dims.d_model), dims.dtype)
            rows = value_of(view.bank[1]).shape[1]
        else:
            expect(kind == "kv" and len(view.bank) == 3, "bank: expected ('hidden', X) or ('kv', K, V)")
            rows = np.shape(value_of(view.bank[1]))[2] if np.ndim(value_of(view.bank[1])) == 4 else None
            for name, bank in zip(("K", "V"), view.bank[1:], strict=True):
                real_array(f"bank {name}", bank, (self.batch, dims.n_kv_heads, rows, dims.d_head), dims.dtype)
        expect_array("valid", view.valid, (self.batch, rows), "b")
        if view.positions is not None:
            expect_array("positions", view.positions, (self.batch, rows), "i")
        index, shown = view.index, rows
        if index is not None:
            expect(isinstance(index, np.ndarray), f"index: expected an array or None, got {type(index).__name__}")
            shape = (self.batch, None) if index.ndim == 2 else (self.batch, dims.n_heads, n_queries, None)
            expect_array("index", index, shape, "i")
            expect(index.size == 0 or (index.min() >= -1 and index.max() < rows), f"index: expected -1 to {rows - 1}, got {_range(index)}")
            index, shown = np.ascontiguousarray(index, np.int64), index.shape[-1] if index.ndim == 4 else rows
        if view.bias is not None:
            bias, full = value_of(view.bias), (self.batch, dims.n_heads, n_queries, shown)
            expect(isinstance(bias, np.ndarray), f"bias: expected an array or None, got {type(view.bias).__name__}")
            fits = bias.ndim <= 4 and all(n in (1, m) for n, m in zip(bias.shape[::-1], full[::-1], strict=False))
            expect(fits, f"bias: expected a shape that broadcasts to {full}, got {bias.shape}")
            expect(bias.dtype == dims.dtype, f"bias: expected {dims.dtype}, got {bias.dtype}")
            expect(not np.isnan(bias).any() and not np.isposinf(bias).any(), "bias: holds NaN or infinity (-infinity hides a row)")
        return dataclasses.replace(view, index=index)


def _range(index: np.ndarray) -> str:
    return f"{index.min()} to {index.max()}"


def _check_state(name: Any, value: Any, batch: int) -> None:
    array = value_of(value)
    expect(isinstance(name, str) and name, f"state: expected names, got {name!r}")
    expect(
        isinstance(array, np.ndarray) and array.ndim > 0 and len(array) == batch and array.dtype.kind in "fib",
        f"state[{name!r}]: expected an array of {batch} rows of numbers or bools, got {_described(array)}",
    )


def _described(value: Any) -> str:
    return f"shape {value.shape}, {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def select_rows(chosen: np.ndarray, a: Array, b: Array) -> Array:
    """Rows of `a` where (B,) bool `chosen`, else of `b`; the shorter one along axis 1 is filled with zeros."""
    if a is b:
        return a
    if a.ndim > 1 and a.shape[1] != b.shape[1]:
        most = max(a.shape[1], b.shape[1])
        a, b = (np.pad(x, [(0, most - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]) for x in (a, b))
    return np.where(chosen.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)
