"""exchange: a long-term memory that knows which of its rows are read: promotes those, forgets the others, and keeps what is alike once.

Each row has a strength. It begins at 1, halves every `half_life` tokens, and grows by what the row is read: each query of each head reads
the `top_k` rows of largest score (as `store` does) by the softmax of their scores over the root of the head size. After a segment

    consolidate   a new row whose cosine with an older one is at least `same` takes its place, and adds its strength to its own
    forget        the `size` strongest rows stay, the others are dropped
    promote       the `promote` strongest of those above 1, which were read or came again, are shown to every query from now on, like
                  the rows of a window, until others are stronger

A promoted row is not shown a second time to the queries that find it. No paper has just this: forgetting is that of MemoryBank (arXiv
2305.10250): what is recalled is remembered longer; promoted rows are the heavy hitters of H2O (arXiv 2306.14048). Behind a window
(`window:size=256+exchange:size=4096`) rows go to and fro: dropped by the window, found, and back in the view of all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import (
    Dims,
    Evicted,
    Memory,
    MemorySpec,
    New,
    Query,
    Segment,
    State,
    View,
    bank_key,
    hookimpl,
    search,
    softmax,
    unit,
    value_of,
)

SITES = ("encoder", "decoder", "cross")
ROWS = ("hidden", "valid", "positions")


class Exchange(Memory):
    """Long-term memory that forgets what is not read: each query sees its `top_k` best rows, and all see the `promote` most read.

    size: rows at every layer. same: cosine from which two rows are one, above 1 for never. half_life: tokens in which the strength
    of a row halves. site: None is the model's reading site. gradient: as for `store`.
    """

    def __init__(
        self,
        *,
        size: int = 4096,
        top_k: int = 16,
        promote: int = 16,
        same: float = 0.999,
        half_life: float = 4096,
        site: str | None = None,
        gradient: str = "rows",
    ):
        for name, value, least in (("size", size, 1), ("top_k", top_k, 1), ("promote", promote, 0)):
            if not isinstance(value, int) or value < least:
                raise InvalidValue(f"{name}: expected a number of rows of at least {least}, got {shown(value)}")
        for name, value in (("same", same), ("half_life", half_life)):
            if not (isinstance(value, int | float) and value > 0):
                raise InvalidValue(f"{name}: expected a number above 0, got {shown(value)}")
        if site not in (None, *SITES):
            raise InvalidValue(f"site: expected one of {', '.join(SITES)}, got {shown(site)}")
        if gradient not in ("none", "rows"):
            raise InvalidValue(f"gradient: expected none or rows, got {shown(gradient)}")
        self.size, self.top_k, self.promote, self.same, self.half_life, self.site = size, top_k, promote, same, half_life, site
        sites = frozenset(SITES if site is None else [site])
        self.spec = MemorySpec(sites=sites, needs=frozenset({"query"}), gradient=gradient, capacity=size)

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or dims.reading_site}

    def start(self, batch: int, dims: Dims) -> Mapping[str, np.ndarray]:
        """Of each bank its rows, and beside each their strength before this segment, what they were read in it, whether promoted."""
        (site,) = self.sites(dims)
        empty = {
            "hidden": np.zeros((batch, 0, dims.d_model), dims.dtype),
            "valid": np.zeros((batch, 0), bool),
            "positions": np.zeros((batch, 0), np.int64),
            "strength": np.zeros((batch, 0), dims.dtype),
            "reads": np.zeros((batch, 0), dims.dtype),
            "promoted": np.zeros((batch, 0), bool),
        }
        banks = range(1 if site == "cross" else dims.layers[site])
        return {bank_key(site, layer) + name: value for layer in banks for name, value in empty.items()}

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View | None:
        """The promoted rows."""
        bank = bank_key(site, layer)
        promoted = state.get(bank + "promoted")
        if promoted is None or not promoted.any():
            return None
        index = np.argsort(~promoted, axis=1, kind="stable")[:, : promoted.sum(axis=1).max()]
        index = np.where(np.take_along_axis(promoted, index, 1), index, -1)
        return View(("hidden", state[bank + "hidden"]), state[bank + "valid"], index=index, positions=state[bank + "positions"])

    def read(self, state: State, site: str, layer: int, query: Query) -> View | None:
        """The rows that each query finds, but for the promoted, and who was read."""
        bank = bank_key(site, layer)
        hidden, valid = value_of(state[bank + "hidden"]), state[bank + "valid"]
        if not valid.any():
            return None
        queries = query.hidden()
        batch, heads, length, d = queries.shape
        flat = np.ascontiguousarray(queries.reshape(batch, heads * length, d))
        scores, index = (x.reshape(batch, heads, length, -1) for x in search(flat, hidden, min(self.top_k, hidden.shape[1]), valid))
        if query.valid is not None:
            index = np.where(query.valid[:, None, :, None], index, -1)
        there, stream = index >= 0, np.arange(batch)[:, None, None, None]
        weights = softmax(np.where(there, scores / state.dims.d_head**0.5, -1e9)) * there
        reads = state[bank + "reads"].copy()
        np.add.at(reads, (np.broadcast_to(stream, index.shape), index), weights)  # where there is no row the weight is 0
        state[bank + "reads"] = reads
        return self._shown(state, bank, np.where(there & ~state[bank + "promoted"][stream, index], index, -1))

    @staticmethod
    def _shown(state: State, bank: str, index: np.ndarray) -> View:
        """The rows of index (B, H, T, K), and no others, as all that a view has are projected."""
        found, stream = np.zeros(state[bank + "valid"].shape, np.int64), np.arange(len(index))[:, None, None, None]
        np.add.at(found, (np.broadcast_to(stream, index.shape), index), index >= 0)
        rows = np.argsort(found == 0, axis=1, kind="stable")[:, : (found > 0).sum(axis=1).max()]  # those found, in order
        numbers = np.cumsum(found > 0, axis=1) - 1
        hidden, valid, positions = (_pick(state[bank + name], rows) for name in ROWS)
        return View(("hidden", hidden), valid, index=np.where(index >= 0, numbers[stream, index], -1), positions=positions)

    def write(self, state: State, site: str, layer: int, new: New) -> Evicted | None:
        bank = bank_key(site, layer)
        fading = 0.5 ** (new.valid.sum(axis=1, keepdims=True) / self.half_life)
        old = (state[bank + "strength"] * fading + state[bank + "reads"]).astype(state.dims.dtype)
        rows = {name: np.concatenate([state[bank + name], getattr(new, name)], axis=1) for name in ROWS}
        rows["strength"] = np.concatenate([old, np.ones(new.valid.shape, old.dtype)], axis=1)
        self._consolidate(rows, new.valid.shape[1])
        # The strongest of each stream, then back in order of position (places without a row first).
        best = np.argsort(np.where(rows["valid"], -rows["strength"], np.inf), axis=1, kind="stable")
        most = min(self.size, int(rows["valid"].sum(axis=1).max(initial=0)))
        stay, go = ({name: _pick(rows[name], part) for name in rows} for part in (best[:, :most], best[:, most:]))
        order = np.argsort(np.where(stay["valid"], stay["positions"], -1), axis=1, kind="stable")
        for name, value in stay.items():
            state[bank + name] = _pick(value, order)
        state[bank + "reads"] = np.zeros_like(state[bank + "strength"])
        state[bank + "promoted"] = self._promoted(state[bank + "strength"], state[bank + "valid"])
        return Evicted(site, layer, *(go[name] for name in ROWS)) if go["valid"].any() else None

    def _consolidate(self, rows: dict[str, np.ndarray], n_new: int) -> None:
        """Of rows that are alike the newest stays, and is as strong as all of them."""
        valid, strength = rows["valid"], rows["strength"].copy()
        directions = unit(value_of(rows["hidden"]))
        n_old = valid.shape[1] - n_new
        alike = directions @ np.swapaxes(directions[:, n_old:], 1, 2) >= self.same  # (B, rows, new rows)
        earlier = np.arange(valid.shape[1])[:, None] < n_old + np.arange(n_new)
        alike &= earlier & valid[:, :, None] & valid[:, None, n_old:]
        replaced = alike.any(axis=2)
        for stream, row in np.argwhere(replaced):  # the oldest first: strength goes from each to the newest that is like it
            strength[stream, n_old + np.flatnonzero(alike[stream, row])[-1]] += strength[stream, row]
        rows["valid"], rows["strength"] = valid & ~replaced, strength

    def _promoted(self, strength: np.ndarray, valid: np.ndarray) -> np.ndarray:
        read = valid & (strength > 1)  # or came again
        best = np.argsort(np.where(read, -strength, np.inf), axis=1, kind="stable")[:, : self.promote]
        promoted = np.zeros_like(read)
        np.put_along_axis(promoted, best, True, 1)
        return promoted & read

    def drain(self, state: State) -> Iterable[Evicted]:
        (site,) = self.sites(state.dims)
        for layer in range(1 if site == "cross" else state.dims.layers[site]):
            bank = bank_key(site, layer)
            if state[bank + "valid"].any():
                yield Evicted(site, layer, *(state[bank + name] for name in ROWS))
            for name in (*ROWS, "strength", "reads", "promoted"):
                state[bank + name] = state[bank + name][:, :0]


def _pick(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return values[np.arange(len(rows))[:, None], rows]


@hookimpl
def register_memories(register):
    register("exchange", Exchange)
