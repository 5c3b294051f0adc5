"""compressive: old rows, `rate` of them as one (Compressive Transformers, arXiv 1911.05507).

The paper's memory is two queues: the newest rows as they are, and behind them what they were compressed to. The first queue is a
window; so it is written `window:size=512+compressive:size=512,rate=4`. Of each `rate` rows that the window drops one is made:

    mean, max   over the rows, number by number
    conv        the sum of C_j x_j over the rows, C_j trained: a convolution over time whose stride is its width; it begins as the mean

Places are counted in rows kept, as in the paper, so the past draws nearer by `rate`. Up to `rate` - 1 rows wait, unseen, until there are
enough of them.

C is trained by the task, through the rows (`gradient=rows`, as far as the trainer's `bptt_segments` lets it), or, with
`loss=attention`, by the attention-reconstruction loss of the paper's algorithm 2 and by nothing else: what the segment's queries h get
from the rows that are compressed, old, is to be what they get from those made of them, new. Summed over layers:

    attn(h, m) = softmax((h Q) (m K)^T / sqrt(D)) (m V)        L = |attn(h, old) - attn(h, new)| / sqrt(queries)

h, old and the layer's Q, K, V get no gradient from it. Differences from the paper: its norm is not divided by the root of the number of
queries, which only scales it. Dilated convolutions and most-used are not there; `h2o` keeps the most used rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Array, Dims, New, Param, Query, RowMemory, Segment, State, View, bank_key, hookimpl, softmax, value_of


class Compressive(RowMemory):
    """Working memory behind a window: of each `rate` rows one row, of which the newest `size` stay.

    how: mean, max or conv, which is trained. loss: what trains it: task, or attention, the paper's own loss, for which the site is
    an encoder or decoder. site, gradient: as for `window`.
    """

    def __init__(
        self,
        *,
        size: int = 512,
        rate: int = 4,
        how: str = "mean",
        loss: str = "task",
        site: str | None = None,
        gradient: str = "rows",
    ):
        super().__init__(size=size, site=site, gradient=gradient)
        if not isinstance(rate, int) or not 1 <= rate <= size:
            raise InvalidValue(f"rate: expected a number of rows from 1 to size = {size}, got {shown(rate)}")
        if how not in ("mean", "max", "conv"):
            raise InvalidValue(f"how: expected mean, max or conv, got {shown(how)}")
        if loss not in ("task", "attention") or (loss == "attention" and how != "conv"):
            raise InvalidValue(f"loss: expected task, or attention with how=conv, which it trains, got {shown(loss)} with how={how}")
        if loss == "attention" and site not in (None, "encoder", "decoder"):
            raise InvalidValue(
                f"site: expected encoder or decoder with loss=attention (at cross every layer has its own), got {shown(site)}"
            )
        self.rate, self.how, self.by_attention = rate, how, loss == "attention"
        if self.by_attention:
            sites = frozenset({"encoder", "decoder"} if site is None else {site})
            self.spec = dataclasses.replace(self.spec, sites=sites, needs=frozenset({"query"}))

    def sites(self, dims: Dims) -> Collection[str]:
        if not self.by_attention:
            return super().sites(dims)
        return {self.site or ("encoder" if dims.layers["encoder"] else "decoder")}

    def keep(self, scores: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
        return positions

    def parameters(self, dims: Dims) -> dict[str, Param]:
        """`<site>_conv` (banks, rate, d, d): C_j of each layer; at cross all layers share a bank."""
        if self.how != "conv":
            return {}
        begin, found = np.eye(dims.d_model) / self.rate, {}
        for site in sorted(self.sites(dims)):
            if banks := min(dims.layers[site], 1) if site == "cross" else dims.layers[site]:
                shape = (banks, self.rate, dims.d_model, dims.d_model)
                found[f"{site}_conv"] = Param(shape, np.broadcast_to(begin, shape), weight_decay=False)
        return found

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        """Also the rows that wait: `wait.hidden`, `wait.valid` and `wait.positions` of each bank, up to `rate` - 1 of them."""
        state = super().start(batch, dims)
        for name in [name for name in state if name.endswith((".hidden", ".valid", ".positions"))]:
            bank, _, what = name.rpartition(".")
            state[f"{bank}.wait.{what}"] = state[name]
        return state

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View | None:
        view = super().view(state, site, layer, segment)
        if view is None:
            return None
        behind = np.cumsum(view.valid[:, ::-1], axis=1)[:, ::-1]  # rows from each one to the newest, itself included
        newest = np.where(view.valid, view.positions, 0).max(axis=1, keepdims=True)
        return dataclasses.replace(view, positions=newest + 1 - behind)

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        wait, names = bank_key(site, layer) + "wait.", ("hidden", "valid", "positions")
        if wait + "valid" not in state or not new.valid.any():
            return
        rows = {name: np.concatenate([state[wait + name], getattr(new, name)], axis=1) for name in names}
        order, batch = np.argsort(~rows["valid"], axis=1, kind="stable"), np.arange(len(new.valid))[:, None]
        rows = {name: value[batch, order] for name, value in rows.items()}  # places without a row are behind the rows now
        there = rows["valid"].sum(axis=1, keepdims=True)
        full = there // self.rate  # (B, 1) groups
        most = int(full.max())
        left = full * self.rate + np.arange(self.rate - 1)  # (B, rate - 1) the rows that wait from now on
        for name in names:
            state[wait + name] = rows[name][batch, np.minimum(left, order.shape[1] - 1)]
        state[wait + "valid"] = left < there
        hidden, positions = (rows[name][:, : most * self.rate] for name in ("hidden", "positions"))
        groups, valid = np.reshape(hidden, (len(batch), most, self.rate, hidden.shape[2])), np.arange(most) < full
        if self.how == "conv":
            conv = state.params[f"{site}_conv"][layer]
            made = np.einsum("bgrd,rde->bge", groups, value_of(conv) if self.by_attention else conv)
            if self.by_attention and state.dims.training and most:
                self._compare(state, new, groups, valid, conv)
        else:
            made = np.mean(groups, axis=2) if self.how == "mean" else np.max(groups, axis=2)
        super().write(state, site, layer, New(site, layer, made, valid, positions[:, self.rate - 1 :: self.rate]))

    # The loss of its own

    def read(self, state: State, site: str, layer: int, query: Query) -> None:
        """Keeps the segment's queries until its rows are written; with loss=attention alone."""
        if state.dims.training:
            there = np.ones(query.positions.shape, bool) if query.valid is None else query.valid
            state[f"{QUERIES}{layer}.heads"], state[f"{QUERIES}{layer}.valid"] = value_of(query.heads), there

    def _compare(self, state: State, new: New, groups: Array, valid: np.ndarray, conv: Array) -> None:
        """Adds to the loss how far attention to what groups (B, G, rate, d) become is from attention to them, where valid (B, G)."""
        queries, there = (state[f"{QUERIES}{new.layer}.{name}"] for name in ("heads", "valid"))
        old = value_of(groups)
        one = np.einsum("bgrd,rde->bge", old, conv)
        was = _attention(queries, new, np.reshape(old, (len(old), -1, old.shape[3])), np.repeat(valid, self.rate, axis=1))
        far = (_attention(queries, new, one, valid) - value_of(was)) * there[:, None, :, None]
        squares = np.sum(far * far, axis=(1, 2, 3)) / np.maximum(there.sum(axis=1), 1).astype(old.dtype)
        there_is = valid.any(axis=1).astype(old.dtype)
        added = np.sqrt(squares + 1e-12) * there_is  # where nothing changes, the root has no gradient
        state[LOSS] = state[LOSS] + added if LOSS in state else added

    def loss(self, state: State) -> Array | None:
        return state.get(LOSS)


QUERIES, LOSS = f"{State.OF_SEGMENT}queries.", f"{State.OF_SEGMENT}loss"


def _attention(queries: np.ndarray, new: New, rows: Array, valid: np.ndarray) -> Array:
    """What queries (B, H, T, D) get from rows (B, M, d) where valid (B, M), by the layer's keys and values, which get no gradient."""
    assert new.project is not None
    keys, values = new.project(rows, frozen=True)
    batch, heads, length, d_head = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, d_head)  # the query heads that share a key head, one behind the other
    hidden = np.where(valid, 0, -1e9).astype(queries.dtype)[:, None, None]
    weights = softmax(np.einsum("bgtx,bgmx->bgtm", grouped, keys) / np.sqrt(d_head, dtype=queries.dtype) + hidden)
    return np.reshape(np.einsum("bgtm,bgmx->bgtx", weights, values), (batch, heads, length, d_head))


@hookimpl
def register_memories(register):
    register("compressive", Compressive)
