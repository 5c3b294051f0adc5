"""h2o, tova, snapkv, knorm, keydiff: working memories that keep the rows which seem to matter most, and not the newest.

They differ in the score of a row. After each segment the `size` rows of highest score stay at every layer:

    h2o      the attention it has received so far                         (arXiv 2306.14048)
    tova     the attention it receives from the last queries              (arXiv 2401.06104)
    snapkv   the same, and its neighbours profit from it                  (arXiv 2404.14469)
    knorm    the shorter its key the better                               (arXiv 2406.11430)
    keydiff  the less its key is like the mean of all keys, the better    (arXiv 2504.15364)

Differences from the papers. All heads of a layer keep the same rows (as in TOVA; the others let each head choose), since a row is a
hidden row: their scores are summed over heads. Rows go once a segment, not once a token; with segments of one token the two are the
same. Positions are true ones. Every layer evicts; knorm's authors leave the first two out. Any memory can be told to protect the
first rows of the stream, which draw attention whatever they say (arXiv 2309.17453), and the newest.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Evicted, New, RowMemory, State, bank_key, hookimpl, unit, value_of


class Evicting(RowMemory):
    """What the five have in common. A subclass gives scores to `chosen`.

    size: rows at every layer. sinks, recent: the first rows of the stream, and the newest, that stay whatever their score. gradient:
    as for `window`.
    """

    def __init__(self, *, size: int, recent: int | None, sinks: int, site: str | None, gradient: str):
        super().__init__(size=size, site=site, gradient=gradient)
        for name, value in (("recent", recent), ("sinks", sinks)):
            if not isinstance(value, int) or value < 0:
                raise InvalidValue(f"{name}: expected a number of rows of at least 0, got {shown(value)}")
        assert recent is not None
        if recent + sinks >= size:
            raise InvalidValue(f"size: expected more than recent + sinks = {recent + sinks} rows, or there is no choice, got {size}")
        self.recent, self.sinks = recent, sinks

    def chosen(self, scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The priorities (B, N) of rows with these scores: protected rows come first."""
        newest = positions.max(axis=1, keepdims=True)
        return np.where((positions < self.sinks) | (positions > newest - self.recent), np.inf, scores)


class HeavyHitters(Evicting):
    """The rows that received most attention for their time in memory; the newest `recent` and the first `sinks` stay.

    recent: None is half of `size`, as in the paper; until then a row has had too few queries to be judged. mean: false compares
    sums, as the paper does, which favours old rows; true divides by the number of tokens since the row.
    """

    def __init__(
        self,
        *,
        size: int = 512,
        recent: int | None = None,
        sinks: int = 4,
        mean: bool = True,
        site: str | None = None,
        gradient: str = "rows",
    ):
        if recent is None and isinstance(size, int) and isinstance(sinks, int):
            recent = max(0, min(size // 2, size - sinks - 1))
        super().__init__(size=size, recent=recent, sinks=sinks, site=site, gradient=gradient)
        self.mean = mean
        self.spec = dataclasses.replace(self.spec, needs=frozenset({"mass"}))

    def keep(self, scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
        queries = positions.max(axis=1, keepdims=True) - positions + 1  # that could see a row of a decoder, with its own
        return self.chosen(scores / queries if self.mean else scores, positions)


class Tova(Evicting):
    """The rows that receive most attention from the last segment: a row's mean weight over the queries that could see it.

    With segments of one token this is the last query's attention, as in the paper.
    """

    def __init__(self, *, size: int = 512, recent: int = 0, sinks: int = 0, site: str | None = None, gradient: str = "rows"):
        super().__init__(size=size, recent=recent, sinks=sinks, site=site, gradient=gradient)
        self.spec = dataclasses.replace(self.spec, needs=frozenset({"mass"}))

    def keep(self, scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.chosen(scores, positions)

    def write(self, state: State, site: str, layer: int, new: New) -> Evicted | None:
        mass = bank_key(site, layer) + "mass"
        state[mass] = np.zeros_like(state[mass])  # what earlier segments thought does not count
        if site == "decoder" and new.mass is not None:  # elsewhere all rows have the same queries
            queries = np.cumsum(new.valid[:, ::-1], axis=1)[:, ::-1].astype(new.mass.dtype)  # (B, S) from each row on
            old = None if new.view_mass is None else new.view_mass / np.maximum(queries[:, :1], 1)
            new = dataclasses.replace(new, mass=new.mass / np.maximum(queries, 1), view_mass=old)
        return super().write(state, site, layer, new)


class SnapKV(Tova):
    """tova, but a row has the best score among itself and its `pool` - 1 neighbours, so that what belongs together stays together.

    The last segment is the paper's observation window, the newest `recent` rows of it stay. The paper compresses a prompt once;
    here every segment is the end of one.
    """

    def __init__(
        self, *, size: int = 512, recent: int = 32, sinks: int = 0, pool: int = 7, site: str | None = None, gradient: str = "rows"
    ):
        super().__init__(size=size, recent=recent, sinks=sinks, site=site, gradient=gradient)
        if not isinstance(pool, int) or pool < 1 or not pool % 2:
            raise InvalidValue(f"pool: expected an odd number of rows, got {shown(pool)}")
        self.pool = pool

    def keep(self, scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
        scores, side = np.where(positions >= 0, scores, 0), self.pool // 2  # rows are in order of position
        around = np.pad(scores, [(0, 0), (side, side)])
        return self.chosen(np.lib.stride_tricks.sliding_window_view(around, self.pool, axis=1).max(axis=-1), positions)


class ByKeys(Evicting):
    """Those that judge a row by its keys, at any time and without attention. A subclass says how: `judge`."""

    def __init__(self, *, size: int, recent: int, sinks: int, site: str | None, gradient: str):
        if site not in (None, "encoder", "decoder"):
            raise InvalidValue(f"site: expected encoder or decoder (at cross a row has keys of every layer), got {shown(site)}")
        super().__init__(size=size, recent=recent, sinks=sinks, site=site, gradient=gradient)
        self.spec = dataclasses.replace(self.spec, sites=frozenset({"encoder", "decoder"} if site is None else {site}))

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or ("encoder" if dims.layers["encoder"] else "decoder")}

    def judge(self, keys: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Scores (B, N) of rows with keys (B, Hkv, N, D), where valid (B, N)."""
        raise NotImplementedError

    def write(self, state: State, site: str, layer: int, new: New) -> Evicted | None:
        bank = bank_key(site, layer)
        hidden = np.concatenate([value_of(state[bank + "hidden"]), value_of(new.hidden)], axis=1)
        assert new.project is not None
        keys = value_of(new.project(hidden)[0])
        scores = self.judge(keys, np.concatenate([state[bank + "valid"], new.valid], axis=1))
        told = copy.copy(self)  # one memory may be at work in several runs at once
        told.keep = lambda _, positions: self.chosen(scores, positions)
        return super(ByKeys, told).write(state, site, layer, new)


class ShortKeys(ByKeys):
    """The rows with the shortest keys: they are the ones that queries attend to."""

    def __init__(self, *, size: int = 512, recent: int = 0, sinks: int = 0, site: str | None = None, gradient: str = "rows"):
        super().__init__(size=size, recent=recent, sinks=sinks, site=site, gradient=gradient)

    def judge(self, keys: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return -np.sqrt((keys * keys).sum(axis=-1)).sum(axis=1)


class DistinctKeys(ByKeys):
    """The rows whose keys are least like the mean of all keys, by their angle."""

    def __init__(self, *, size: int = 512, recent: int = 0, sinks: int = 0, site: str | None = None, gradient: str = "rows"):
        super().__init__(size=size, recent=recent, sinks=sinks, site=site, gradient=gradient)

    def judge(self, keys: np.ndarray, valid: np.ndarray) -> np.ndarray:
        keys = unit(keys) * valid[:, None, :, None]
        anchor = unit(keys.sum(axis=2, keepdims=True))  # that of the mean, as only its angle counts
        return -(keys * anchor).sum(axis=-1).sum(axis=1)


@hookimpl
def register_memories(register):
    for name, strategy in (("h2o", HeavyHitters), ("tova", Tova), ("snapkv", SnapKV), ("knorm", ShortKeys), ("keydiff", DistinctKeys)):
        register(name, strategy)
