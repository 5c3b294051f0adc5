"""RetrievalMemory: every row is kept, each query attends to the few that are found for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Literal

import numpy as np

from ...errors import InvalidValue, shown
from ..base import SITES, Array, Dims, Memory, MemorySpec, New, Param, Query, State, View, bank_key
from ..nearest import BestRows

CHUNK_ROWS = 1024  # rows held together: adding to a long memory copies at most so many


class RetrievalMemory(Memory):
    """Short way for long-term memories: keeps all rows, and shows each query the `top_k` that are found for it.

    A subclass may say how: `search`. Options: `top_k` rows, `site` (None: the model's reading site), `layer` (None: all),
    `merge` ("joint": one softmax with the segment; "gate": mixed in by a trained gate a head; "replace": instead of the
    segment, arXiv 2305.01625), `gradient` ("none": their
    scores carry it, the rows do not, as in the papers; "rows": it flows through those found into the segments that made
    them).
    """

    def __init__(
        self,
        *,
        top_k: int,
        site: str | None = None,
        layer: int | None = None,
        merge: str = "joint",
        gradient: Literal["none", "rows"] = "none",
    ):
        if not isinstance(top_k, int) or top_k < 1:
            raise InvalidValue(f"top_k: expected a number of rows of at least 1, got {shown(top_k)}")
        if site not in (None, *SITES):
            raise InvalidValue(f"site: expected one of {', '.join(SITES)}, got {shown(site)}")
        if merge not in ("joint", "gate", "replace"):
            raise InvalidValue(f"merge: expected joint, gate or replace, got {shown(merge)}")
        if gradient not in ("none", "rows"):
            raise InvalidValue(f"gradient: expected none or rows, got {shown(gradient)}")
        self.top_k, self.site = top_k, site
        sites, layers = frozenset(SITES if site is None else [site]), None if layer is None else (layer,)
        self.spec = MemorySpec(sites=sites, layers=layers, needs=frozenset({"query"}), merge=merge, gradient=gradient)

    def search(self, state: State, bank: str, queries: np.ndarray, k: int) -> View | None:
        """The rows that each of queries (B, H, T, d) attends to; by default the k of largest inner product, exactly.

        One bank of hidden rows serves all heads and, at the cross site, all layers (arXiv 2305.01625, section 2.3).
        """
        best = BestRows(queries, k)
        for hidden, positions, valid in self.held(state, bank):
            best.search(hidden, positions, valid)
        return best.view()

    def count(self, state: State, bank: str) -> int:
        """Rows to search in; with none, `search` is not called."""
        return sum(valid.shape[1] for _, _, valid in self.held(state, bank))

    def held(self, state: State, bank: str) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]:
        """The rows of a bank in RAM, a chunk at a time: hidden (B, M, d), positions (B, M), valid (B, M)."""
        number = 0
        while f"{bank}{number}.valid" in state:
            hidden, positions, valid = (state[f"{bank}{number}.{name}"] for name in ("hidden", "positions", "valid"))
            yield hidden, positions, valid
            number += 1

    def banks(self, dims: Dims) -> list[str]:
        """The names of the banks in this model."""
        (site,) = self.sites(dims)
        return [bank_key(site, layer) for layer in range(1 if site == "cross" else dims.layers[site])]

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or dims.reading_site}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        # A gate at the model's learning rate and decay stays where it starts (arXiv 2404.07143, section 3).
        gate = Param((dims.n_heads,), init=0.0, lr_factor=10.0, weight_decay=False)
        return {"gate": gate} if self.spec.merge == "gate" else {}

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        filled = np.flatnonzero(new.valid.any(axis=0))
        if not len(filled):
            return
        some = slice(filled[0], filled[-1] + 1)  # in between all are valid, but for streams that are shorter
        bank, rows = bank_key(site, layer), {name: getattr(new, name)[:, some] for name in ("hidden", "valid", "positions")}
        last = sum(1 for _ in self.held(state, bank)) - 1
        if last >= 0 and state[f"{bank}{last}.valid"].shape[1] < CHUNK_ROWS:
            rows = {name: np.concatenate([state[f"{bank}{last}.{name}"], value], axis=1) for name, value in rows.items()}
        else:
            last += 1
        for name, value in rows.items():
            state[f"{bank}{last}.{name}"] = value

    def read(self, state: State, site: str, layer: int, query: Query) -> View | None:
        bank = bank_key(site, layer)
        found = self._search_valid(state, bank, query) if self.count(state, bank) else None
        return None if found is None else dataclasses.replace(found, gate=state.params.get("gate"))

    def _search_valid(self, state: State, bank: str, query: Query) -> View | None:
        """`search`, with the queries that are no padding: the others see no row, and choose none."""
        queries, valid = query.hidden(), query.valid
        if valid is None or valid.all():
            return self.search(state, bank, queries, self.top_k)
        most = int(valid.sum(axis=1).max())
        order = np.argsort(~valid, axis=1, kind="stable")[:, :most]  # of each stream, its queries that are valid
        there = np.take_along_axis(valid, order, 1)
        order = np.where(there, order, order[:, :1])  # and, up to as many as another stream has, its first one again
        found = self.search(state, bank, np.take_along_axis(queries, order[:, None, :, None], 2), self.top_k) if most else None
        if found is None or found.index is None or found.index.ndim != 4:
            return found
        index = np.full((*queries.shape[:3], found.index.shape[3]), -1)
        np.put_along_axis(index, order[:, None, ::-1, None], found.index[:, :, ::-1], 2)
        index[np.broadcast_to(~valid[:, None], index.shape[:3])] = -1
        return dataclasses.replace(found, index=index)
