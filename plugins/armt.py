"""armt: an associative memory at every layer, which memory tokens write and all tokens read (ARMT, arXiv 2407.04841).

`tokens` trained rows join each segment, as those of `recurrent` do. What a layer makes of them goes into a matrix A of that layer, and
what A recalls is added to the inputs of the same layer in later segments. With phi = DPFP-3 (section 3.1), sigma the sigmoid:

    x <- x + phi(x W_q) A / (phi(x W_q) z + eps)                                   before the layer, for every row (equation 1)
    k = phi(m W_k), v = m W_v, beta = sigma(m w_b)                                  of each memory row m, after the layer
    A <- A + sum of beta k (x) (v - k A / (k z + eps))                              (equations 2, 3: the delta rule)
    z <- z + sum of gamma k, gamma = clip(1 - k z / |k|^2, 0, 1)

Differences from the paper: gamma carries a gradient, which the authors cut; in a decoder the rows stand in front of the text, too, as
the contract has them; and what is recalled is at most LIMIT times as long as what it is added to, or taken from. All rows of a segment
are written at once, as in the authors' code.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Param, RecurrentMemory, State, bank_key, hookimpl, sigmoid, value_of

EPS = 1e-5
LIMIT = 3.0
NU = 3  # of DPFP


class Armt(RecurrentMemory):
    """Associative memory at every layer: `tokens` trained rows write, all tokens read; `d_key` numbers a key before phi."""

    def __init__(self, *, tokens: int = 8, d_key: int = 32, site: str | None = None):
        super().__init__(tokens=tokens, site=site)
        if not isinstance(d_key, int) or isinstance(d_key, bool) or d_key < 1:
            raise InvalidValue(f"d_key: expected a number of at least 1, got {shown(d_key)}")
        self.d_key, self.spec = d_key, dataclasses.replace(self.spec, capacity=None)

    def parameters(self, dims: Dims) -> dict[str, Param]:
        (site,), d = self.sites(dims), dims.d_model
        n = dims.layers[site]
        return {
            **super().parameters(dims),
            "W_q": Param((n, d, self.d_key), init=d**-0.5),
            "W_k": Param((n, d, self.d_key), init=d**-0.5),
            "W_v": Param((n, d, d), init=0.02),
            "w_b": Param((n, d), init=d**-0.5),
        }

    def start(self, batch: int, dims: Dims) -> dict[str, np.ndarray]:
        (site,), state = self.sites(dims), super().start(batch, dims)
        for layer in range(dims.layers[site]):
            state[bank_key(site, layer) + "A"] = np.zeros((batch, 2 * NU * self.d_key, dims.d_model), dims.dtype)
            state[bank_key(site, layer) + "z"] = np.zeros((batch, 2 * NU * self.d_key), dims.dtype)
        return state

    def update(self, state: State, outputs: np.ndarray) -> np.ndarray:
        return state["tokens"]  # each segment begins with the trained rows: what was read is in A

    def enter(self, state: State, site: str, layer: int, inputs: np.ndarray) -> np.ndarray:
        bank = bank_key(site, layer)
        return recalled(dpfp(inputs @ state.params["W_q"][layer]), state[bank + "A"], state[bank + "z"], inputs)

    def leave(self, state: State, site: str, layer: int, rows: np.ndarray) -> None:
        bank, params = bank_key(site, layer), state.params
        A, z = state[bank + "A"], state[bank + "z"]
        k, v = dpfp(rows @ params["W_k"][layer]), rows @ params["W_v"][layer]
        beta = sigmoid(rows @ params["w_b"][layer])[..., None]
        gamma = 1 - (k @ z[..., None]) / (np.sum(k * k, axis=2, keepdims=True) + EPS)  # at most 1: no number is below 0
        gamma = gamma * (value_of(gamma) > 0)
        state[bank + "A"] = A + np.swapaxes(beta * k, 1, 2) @ (v - recalled(k, A, z, v))
        state[bank + "z"] = z + np.sum(gamma * k, axis=1)


def recalled(keys: np.ndarray, A: np.ndarray, z: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """keys A / (keys z + eps), at most LIMIT times as long as `beside`: keys (B, n, K), A (B, K, d), z (B, K), beside (B, n, d).

    A key with k z >= |k|^2 adds to A and nothing to z, also in numbers where z is 0. A later key of these numbers alone has a quotient
    of the order of 1 / eps, which would be written, in its turn, and grow without end.
    """
    found, share = keys @ A, keys @ z[..., None] + EPS
    least = length(found) / (LIMIT * length(beside))
    is_far = value_of(least) > value_of(share)
    return found / (share * ~is_far + least * is_far)


def length(x: np.ndarray) -> np.ndarray:
    """(B, n, d) -> (B, n, 1), not quite 0 where x is, as the gradient there is not finite."""
    return np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-30)


def dpfp(x: np.ndarray) -> np.ndarray:
    """DPFP (arXiv 2102.11174, section 5.3) of x (..., d): (..., 2 NU d) products of relu([x, -x]) with itself, shifted by 1 to NU."""
    both = np.concatenate([x, -x], axis=-1)
    both = both * (value_of(both) > 0)
    n = both.shape[-1]
    return np.concatenate([both * np.concatenate([both[..., n - i :], both[..., : n - i]], axis=-1) for i in range(1, NU + 1)], axis=-1)


@hookimpl
def register_memories(register):
    register("armt", Armt)
