"""compressive: old rows, `rate` of them as one (Compressive Transformers, arXiv 1911.05507).

The paper's memory is two queues: the newest rows as they are, and behind them what they were compressed to. The first queue is a
window; so it is written `window:size=512+compressive:size=512,rate=4`. Of each `rate` rows that the window drops one is made:

    mean, max   over the rows, number by number
    conv        the sum of C_j x_j over the rows, C_j trained: a convolution over time whose stride is its width; it begins as the mean

Places are counted in rows kept, as in the paper, so the past draws nearer by `rate`. Up to `rate` - 1 rows wait, unseen, until there are
enough of them.

Differences from the paper: its attention-reconstruction loss, which alone trains its conv, cannot be said in the contract, as a memory
has no loss. Here the gradient of the task goes into C through the rows (`gradient=rows`, as far as the trainer's `bptt_segments`
lets it). Dilated convolutions and most-used are not there; `h2o` keeps the most used rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, New, Param, RowMemory, Segment, State, View, bank_key, hookimpl


class Compressive(RowMemory):
    """Working memory behind a window: of each `rate` rows one row, of which the newest `size` stay.

    how: mean, max or conv, which is trained. site, gradient: as for `window`.
    """

    def __init__(self, *, size: int = 512, rate: int = 4, how: str = "mean", site: str | None = None, gradient: str = "rows"):
        super().__init__(size=size, site=site, gradient=gradient)
        if not isinstance(rate, int) or not 1 <= rate <= size:
            raise InvalidValue(f"rate: expected a number of rows from 1 to size = {size}, got {shown(rate)}")
        if how not in ("mean", "max", "conv"):
            raise InvalidValue(f"how: expected mean, max or conv, got {shown(how)}")
        self.rate, self.how = rate, how

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
        made = self._compressed(state, site, layer, np.reshape(hidden, (len(batch), most, self.rate, hidden.shape[2])))
        super().write(state, site, layer, New(site, layer, made, np.arange(most) < full, positions[:, self.rate - 1 :: self.rate]))

    def _compressed(self, state: State, site: str, layer: int, groups: np.ndarray) -> np.ndarray:
        """One row of each group: groups (B, G, rate, d) to (B, G, d)."""
        if self.how == "conv":
            return np.einsum("bgrd,rde->bge", groups, state.params[f"{site}_conv"][layer])
        return np.mean(groups, axis=2) if self.how == "mean" else np.max(groups, axis=2)


@hookimpl
def register_memories(register):
    register("compressive", Compressive)
