"""gated_delta: the gated delta rule (Gated DeltaNet, arXiv 2412.06464): a matrix a head that forgets, and writes over what it knows.

At each head, for the keys k_t and values v_t of a segment's tokens x_t in turn (equation 10; rows here, columns there):

    M_t = alpha_t (M_(t-1) - beta_t k_t (k_t^T M_(t-1))) + beta_t k_t v_t^T        the answer to q is q^T M
    alpha_t = exp(-rate softplus(x_t W_a + b_a)),  beta_t = sigmoid(x_t W_b + b_b)

Queries and keys pass SiLU and are of length 1. Tokens are computed `CHUNK` at a time, which gives the same (section 3.3).

Differences from the paper: M answers the queries of later segments alone, for within a segment there is attention, and a trained gate
takes the place of the output's norm and gate, as in Infini-attention. Keys and values are those of attention: no convolution, no SiLU on
values.
"""

from __future__ import annotations

import numpy as np

from mini_tfm.memory import Dims, New, Param, State, hookimpl, sigmoid
from mini_tfm_plugins.fast_weights import FastWeights, direction, rate_parameters, rates, softplus

CHUNK = 8  # tokens; with more, rounding errors in the inverse of I + N grow where keys are alike


class GatedDelta(FastWeights):
    """Compressive memory: one matrix a head, which each token rewrites where its key points and otherwise lets fade."""

    def __init__(self, *, site: str | None = None, taps: bool = False):
        super().__init__(site=site, taps=taps)

    def parameters(self, dims: Dims) -> dict[str, Param]:
        layers = dims.layers[self.place(dims)]
        fresh = rate_parameters(dims, layers, alpha=-4.6, beta=0.0)  # alpha begins at 0.99, beta at a half
        return {**super().parameters(dims), **fresh, "log_rate": Param((layers, dims.n_kv_heads), init=0.0, weight_decay=False)}

    def weights(self, dims: Dims, layer: int) -> dict[str, np.ndarray]:
        return {"M": np.zeros((dims.n_kv_heads, dims.d_head, dims.d_head), dims.dtype)}

    def recall(self, state: State, bank: str, queries: np.ndarray) -> np.ndarray:
        return direction(queries) @ state[bank + "M"]

    def learn(self, state: State, bank: str, keys: np.ndarray, values: np.ndarray, new: New) -> None:
        there = new.valid[:, None]  # padding neither fades nor writes
        rate = np.exp(state.params["log_rate"][new.layer])[:, None]
        fading = -softplus(rates(state, "alpha", new)) * rate * there  # log(alpha)
        beta, k = there * sigmoid(rates(state, "beta", new)), direction(keys)
        for first in range(0, there.shape[2], CHUNK):
            part = slice(first, first + CHUNK)
            state[bank + "M"] = _after(state[bank + "M"], k[:, :, part], values[:, :, part], fading[:, :, part], beta[:, :, part])


def _after(M: np.ndarray, k: np.ndarray, v: np.ndarray, fading: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """M (B, H, D, D) after n tokens: k, v (B, H, n, D), log(alpha) and beta (B, H, n).

    With g_t the sum of log(alpha) up to t, M_t = e^(g_t) M_0 + sum over s <= t of e^(g_t - g_s) k_s u_s^T, where
    u_t = beta_t (v_t - alpha_t M_(t-1)^T k_t): a triangular system (I + N) u = beta (v - e^g k M_0).
    """
    g, n = np.cumsum(fading, axis=2)[..., None], k.shape[2]
    lower = np.tri(n, k=-1, dtype=bool)
    since = np.exp(np.where(lower, g - np.swapaxes(g, 2, 3), 0))  # e^(g_t - g_s) for s < t; what is above is not used
    N = np.where(lower, beta[..., None] * since * (k @ np.swapaxes(k, 2, 3)), 0)
    u = beta[..., None] * (v - np.exp(g) * (k @ M))
    power, reach = -N, 1
    while reach < n:  # (I + N)^-1 = (I - N)(I + N^2)(I + N^4)...: N^n is 0
        u, power, reach = u + power @ u, power @ power, 2 * reach
    end = g[:, :, -1:]
    return np.exp(end) * M + np.swapaxes(np.exp(end - g) * k, 2, 3) @ u


@hookimpl
def register_memories(register):
    register("gated_delta", GatedDelta)
