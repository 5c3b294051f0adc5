"""RowMemory: a bounded number of rows, kept by priority."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import numpy as np

from ...errors import InvalidValue, shown
from ..base import SITES, Array, Dims, Evicted, Memory, MemorySpec, New, Segment, State, View, bank_key


class RowMemory(Memory):
    """Short way for working memories: a bounded set of rows at every (site, layer).

    A subclass says which stay: `keep` gives each row a priority, and the `size` highest stay, in order of position. The
    others are returned as evicted. Options: `size` rows, `site` (None: the model's reading site; "all": every site),
    `gradient` ("none", or "rows": it flows through the rows into the segments that made them).
    """

    def __init__(self, *, size: int, site: str | None = None, gradient: Literal["none", "rows"] = "none"):
        if not isinstance(size, int) or size < 1:
            raise InvalidValue(f"size: expected a number of rows of at least 1, got {shown(size)}")
        if site not in (None, "all", *SITES):
            raise InvalidValue(f"site: expected {', '.join(SITES)} or all, got {shown(site)}")
        if gradient not in ("none", "rows"):
            raise InvalidValue(f"gradient: expected none or rows, got {shown(gradient)}")
        self.size, self.site = size, site
        self.spec = MemorySpec(sites=frozenset(SITES if site in (None, "all") else [site]), capacity=size, gradient=gradient)

    def keep(self, scores: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
        """Priorities (B, N), the highest stay, of rows at positions (B, N), -1 where there is no row.

        scores: (B, N) attention each row has received so far, with "mass" in `spec.needs`; else None. What is returned
        where there is no row is ignored.
        """
        raise NotImplementedError(f"{type(self).__name__}: write keep(scores, positions), which gives each row a priority")

    def sites(self, dims: Dims) -> Collection[str]:
        return self.spec.sites if self.site == "all" else {self.site or dims.reading_site}

    def start(self, batch: int, dims: Dims) -> dict[str, Array]:
        state: dict[str, Array] = {}
        sites = self.sites(dims)
        for site, count in dims.layers.items():
            for layer in range(count if site != "cross" else min(count, 1)) if site in sites else ():
                key = bank_key(site, layer)
                state[key + "hidden"] = np.zeros((batch, 0, dims.d_model), dims.dtype)
                state[key + "valid"] = np.zeros((batch, 0), bool)
                state[key + "positions"] = np.zeros((batch, 0), np.int64)
                for name, unknown in self._beside(dims, site).items():
                    state[key + name] = np.zeros((batch, 0), unknown.dtype)
        return state

    def _beside(self, dims: Dims, site: str) -> dict[str, np.generic]:
        """What is kept of a row beside itself, as this memory needs it or one behind it; and its value where it is not known."""
        needs, beside = self.spec.needs | dims.needs_behind, dict[str, np.generic]()
        if "mass" in needs:
            beside["mass"] = dims.dtype.type(0)
        if "tokens" in needs:
            beside["tokens"] = np.int64(-1)
            if site == "decoder":
                beside["targets"] = np.int64(-1)
        return beside

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View | None:
        key = bank_key(site, layer)
        if key + "valid" not in state or not state[key + "valid"].shape[1]:
            return None
        return View(("hidden", state[key + "hidden"]), state[key + "valid"], positions=state[key + "positions"])

    def write(self, state: State, site: str, layer: int, new: New) -> Evicted | None:
        key = bank_key(site, layer)
        if key + "valid" not in state:
            return None
        rows = {"hidden": new.hidden, "valid": new.valid, "positions": new.positions}
        for name, unknown in self._beside(state.dims, site).items():
            told = getattr(new, name)  # rows that a subclass has put together, say, have no token
            rows[name] = told if np.shape(told) == new.valid.shape else np.full(new.valid.shape, unknown)
        if "mass" in rows and new.view_mass is not None:
            state[key + "mass"] = state[key + "mass"] + new.view_mass
        rows = {name: np.concatenate([state[key + name], value], axis=1) for name, value in rows.items()}
        valid, positions = rows["valid"], rows["positions"]
        priority = np.asarray(self.keep(rows.get("mass"), np.where(valid, positions, -1)))
        if priority.shape != valid.shape or np.isnan(priority).any():
            got = "NaN" if priority.shape == valid.shape else f"shape {priority.shape}"
            raise InvalidValue(f"keep: expected a priority for each of {valid.shape} rows, got {got}")
        priority = np.where(valid, np.maximum(priority, np.finfo(np.float64).min), -np.inf)  # invalid rows go first
        # The `size` best of each stream, then back in order of position (invalid ones first).
        best = np.argsort(-priority, axis=1, kind="stable")
        stay, go = (_in_order(part, positions, valid) for part in (best[:, : self.size], best[:, self.size :]))
        for name, value in rows.items():
            state[key + name] = _pick(value, stay)
        return Evicted(site, layer, **{name: _pick(value, go) for name, value in rows.items()}) if go.shape[1] else None

    def drain(self, state: State) -> Iterable[Evicted]:
        for site, count in state.dims.layers.items():
            for layer in range(count):
                key = bank_key(site, layer)
                if state.get(key + "valid") is not None and state[key + "valid"].shape[1]:
                    names = ("hidden", "valid", "positions", *self._beside(state.dims, site))
                    yield Evicted(site, layer, **{name: state[key + name] for name in names})
                    for name in names:
                        state[key + name] = state[key + name][:, :0]


def _in_order(rows: np.ndarray, positions: np.ndarray, valid: np.ndarray) -> np.ndarray:
    place = np.where(np.take_along_axis(valid, rows, 1), np.take_along_axis(positions, rows, 1), -1)
    return np.take_along_axis(rows, np.argsort(place, axis=1, kind="stable"), 1)


def _pick(values: Array, rows: np.ndarray) -> Array:
    return values[np.arange(len(rows))[:, None], rows]
