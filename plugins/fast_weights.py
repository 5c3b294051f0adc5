"""What infini, gated_delta and titans have in common: a small function of keys at every key head, instead of rows.

A segment's keys and values change the function; the queries of later segments ask it. Its size does not depend on what was read. The
keys, values and queries are the layer's own, without position. What it answers is mixed with the attention to the segment by a trained
gate of every layer and head: sigmoid(gate) answer + (1 - sigmoid(gate)) attention (arXiv 2404.07143, section 2.1.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Memory, MemorySpec, New, Param, Query, SideOutput, State, bank_key, silu, unit


class FastWeights(Memory):
    """A subclass says what the function is: `weights` at the start, `recall`, `learn`. The gradient flows through all segments.

    site: "encoder" or "decoder"; None is the encoder if there is one. At cross a row has keys of every layer, so there is none.
    taps: in a stack every row goes on to the next memory, too; false: none does.
    Arrays of the state are named `bank_key(site, layer)` + a name, and have the streams and the key heads as their first axes.
    """

    def __init__(self, *, site: str | None = None, taps: bool = False):
        if site not in (None, "encoder", "decoder"):
            raise InvalidValue(f"site: expected encoder or decoder (at cross a row has keys of every layer), got {shown(site)}")
        if not isinstance(taps, bool):
            raise InvalidValue(f"taps: expected true or false, got {shown(taps)}")
        sites = frozenset({"encoder", "decoder"} if site is None else {site})
        self.site, self.spec = site, MemorySpec(sites=sites, needs=frozenset({"query"}), gradient="state", taps=taps)

    def weights(self, dims: Dims, layer: int) -> dict[str, np.ndarray]:
        """The arrays (Hkv, ...) of an empty function."""
        raise NotImplementedError

    def recall(self, state: State, bank: str, queries: np.ndarray) -> np.ndarray:
        """What the function gives for queries (B, Hkv, N, D), of the same shape."""
        raise NotImplementedError

    def learn(self, state: State, bank: str, keys: np.ndarray, values: np.ndarray, new: New) -> None:
        """Changes the function by keys and values (B, Hkv, S, D), of which `new.valid` (B, S) are tokens."""
        raise NotImplementedError

    def place(self, dims: Dims) -> str:
        """The one site where it works."""
        return self.site or ("encoder" if dims.layers["encoder"] else "decoder")

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.place(dims)}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        # A gate at the model's learning rate and decay stays where it starts (arXiv 2404.07143, section 3).
        return {"gate": Param((dims.layers[self.place(dims)], dims.n_heads), init=0.0, lr_factor=10.0, weight_decay=False)}

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        site, state = self.place(dims), {}
        for layer in range(dims.layers[site]):
            for name, value in self.weights(dims, layer).items():
                state[bank_key(site, layer) + name] = np.broadcast_to(value, (batch, *value.shape))
            state[bank_key(site, layer) + "used"] = np.zeros(batch, bool)
        return state

    def read(self, state: State, site: str, layer: int, query: Query) -> SideOutput:
        batch, _, _, d_head = query.heads.shape
        bank, of_key_heads = bank_key(site, layer), (batch, state.dims.n_kv_heads, -1, d_head)
        found = self.recall(state, bank, np.reshape(query.heads, of_key_heads))
        return SideOutput(np.reshape(found, query.heads.shape), "gate", state.params["gate"][layer], state[bank + "used"])

    def write(self, state: State, site: str, layer: int, new: New) -> None:
        assert new.project is not None
        bank, new = bank_key(site, layer), _tokens_first(new)
        self.learn(state, bank, *new.project(new.hidden), new)
        state[bank + "used"] = state[bank + "used"] | new.valid.any(axis=1)


def _tokens_first(new: New) -> New:
    """Rows that a window drops begin with padding where the streams differ in length; what tokens are taken together must not."""
    if not (new.valid[:, 1:] & ~new.valid[:, :-1]).any():
        return new
    rows = np.arange(len(new.valid))[:, None], np.argsort(~new.valid, axis=1, kind="stable")
    return dataclasses.replace(new, hidden=new.hidden[rows], valid=new.valid[rows], positions=new.positions[rows])


def direction(x: np.ndarray) -> np.ndarray:
    """Queries or keys as arXiv 2412.06464 (section 3.4) and 2501.00663 (section 4.4) take them: SiLU, then of length 1."""
    return unit(silu(x))


def rates(state: State, name: str, new: New) -> np.ndarray:
    """x W + b of each token and key head, (B, Hkv, S), by the parameters `name` and `name`_bias of `new`'s layer."""
    rate = np.einsum("bsd,dh->bhs", new.hidden, state.params[name][new.layer])
    return rate + state.params[name + "_bias"][new.layer][:, None]


def rate_parameters(dims: Dims, layers: int, **biases: float) -> dict[str, Param]:
    """Those of `rates`, by name; the biases are where they begin."""
    params = {}
    for name, bias in biases.items():
        params[name] = Param((layers, dims.d_model, dims.n_kv_heads))
        params[name + "_bias"] = Param((layers, dims.n_kv_heads), np.full((layers, dims.n_kv_heads), bias), weight_decay=False)
    return params


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)); its negative at -x is log(sigmoid(x))."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
