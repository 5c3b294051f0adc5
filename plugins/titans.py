"""titans: a neural memory that learns while it reads (Titans, arXiv 2501.00663).

A function M of keys at each head: a matrix (`depth=1`) or a network of two layers (`depth=2`). Each token x_t takes a step of gradient
descent on how badly M knows its value, with momentum and with forgetting (section 3.1):

    loss(M; x_t) = |M(k_t) - v_t|^2 / 2
    S_t = eta_t S_(t-1) - theta_t (the gradient of loss(M; x_t))             surprise: what was, and what is now
    M_t = (1 - alpha_t) M_(t-1) + S_t
    the answer to q is M(q)

alpha, eta and theta / (1 - eta) are sigmoid(x_t W + b), a W and b each; queries and keys pass SiLU and are of length 1. As in the paper
(section 3.2), the gradients of `chunk` tokens are taken together, at the M that the first of them found; the recurrences of S and M
are exact.

Differences from the paper: theta is at most (1 - eta) / chunk, so that a gradient, with all that momentum makes of it, moves M to where the
loss is 0 and not beyond, and neither do `chunk` of them in the same direction: otherwise M grows without end. M answers the
queries of later segments alone, within a segment there is attention (the variant "memory as a gate"); keys and values are those of
attention; and there are no persistent rows: `prefix` has them.
"""

from __future__ import annotations

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, New, Param, State, hookimpl, sigmoid, silu
from mini_tfm_plugins.fast_weights import FastWeights, direction, rate_parameters, rates, softplus


class Titans(FastWeights):
    """Neural memory: a function a head, trained on each token while it reads, with momentum and forgetting.

    depth: 1 is a matrix, 2 a network with a hidden layer of twice the head's size. chunk: tokens whose gradients are taken together.
    """

    def __init__(self, *, depth: int = 1, chunk: int = 8, site: str | None = None, taps: bool = False):
        super().__init__(site=site, taps=taps)
        if depth not in (1, 2):
            raise InvalidValue(f"depth: expected 1 or 2, got {shown(depth)}")
        if not isinstance(chunk, int) or chunk < 1:
            raise InvalidValue(f"chunk: expected a number of tokens of at least 1, got {shown(chunk)}")
        self.depth, self.chunk = depth, chunk

    def parameters(self, dims: Dims) -> dict[str, Param]:
        layers, heads, d = dims.layers[self.place(dims)], dims.n_kv_heads, dims.d_head
        # They begin at alpha = 0.007, eta = 0.9, theta = 0.05 / chunk.
        params = {**super().parameters(dims), **rate_parameters(dims, layers, alpha=-5.0, eta=2.2, theta=0.0)}
        if self.depth == 2:
            params["M1"] = Param((layers, heads, d, 2 * d), init=d**-0.5)
            params["M2"] = Param((layers, heads, 2 * d, d), init=(2 * d) ** -0.5)
        return params

    def weights(self, dims: Dims, layer: int) -> dict[str, np.ndarray]:
        heads, d = dims.n_kv_heads, dims.d_head
        begin = [np.zeros((heads, d, d), dims.dtype)] if self.depth == 1 else [dims.params[name][layer] for name in ("M1", "M2")]
        moments = {f"S{i + 1}": np.zeros(M.shape, dims.dtype) for i, M in enumerate(begin)}
        return {**{f"M{i + 1}": M for i, M in enumerate(begin)}, **moments}

    def recall(self, state: State, bank: str, queries: np.ndarray) -> np.ndarray:
        q = direction(queries)
        return q @ state[bank + "M1"] if self.depth == 1 else silu(q @ state[bank + "M1"]) @ state[bank + "M2"]

    def gradients(self, state: State, bank: str, k: np.ndarray, v: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each matrix of M, the gradients of the losses of tokens k, v (B, H, n, D): outer products of the two factors of each."""
        M1 = state[bank + "M1"]
        if self.depth == 1:
            return [(k, k @ M1 - v)]
        M2, z = state[bank + "M2"], k @ M1
        hidden, share = silu(z), sigmoid(z)
        error = hidden @ M2 - v
        return [(k, (error @ np.swapaxes(M2, 2, 3)) * share * (1 + z * (1 - share))), (hidden, error)]

    def learn(self, state: State, bank: str, keys: np.ndarray, values: np.ndarray, new: New) -> None:
        k, there = direction(keys), np.broadcast_to(new.valid[:, None], keys.shape[:3]).astype(state.dims.dtype)
        keeping = -there * softplus(rates(state, "alpha", new))  # log(1 - alpha); padding changes nothing
        momentum = rates(state, "eta", new)
        holding = -there * softplus(-momentum)  # log(eta)
        theta = there * sigmoid(-momentum) * sigmoid(rates(state, "theta", new)) / self.chunk
        for first in range(0, k.shape[2], self.chunk):
            part = (slice(None), slice(None), slice(first, first + self.chunk))
            kept, of_moment, steps, held, steps_held = _shares(keeping[part], holding[part], theta[part], there[part])
            for i, (factor, error) in enumerate(self.gradients(state, bank, k[part], values[part])):
                M, S = (state[f"{bank}{name}{i + 1}"] for name in "MS")
                state[f"{bank}M{i + 1}"] = kept * M + of_moment * S - np.swapaxes(steps * factor, 2, 3) @ error
                state[f"{bank}S{i + 1}"] = held * S - np.swapaxes(steps_held * factor, 2, 3) @ error


def _shares(keeping: np.ndarray, holding: np.ndarray, theta: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, ...]:
    """How much of what is in M and S after n tokens, all arguments (B, H, n): log(1 - alpha), log(eta), theta, 1 where there is a token.

    Of M and S before, and of the gradient of each token: M = kept M + of_moment S - sum of steps_t gradient_t, and
    S = held S - sum of steps_held_t gradient_t. Shares of M and S are (B, H, 1, 1), those of the gradients (B, H, n, 1).
    """
    kept, held = np.cumsum(keeping, axis=2), np.cumsum(holding, axis=2)
    added = there * np.exp(kept[:, :, -1:] - kept)  # of each S_i, in the last M
    span = np.where(np.tri(kept.shape[2], dtype=bool), held[..., None] - held[:, :, None], 0)
    passed = np.exp(span) * np.tri(kept.shape[2], dtype=kept.dtype)  # of the gradient of t, in S_i
    steps = np.einsum("bhi,bhit->bht", added, passed) * theta
    of_moment = np.sum(added * np.exp(held), axis=2)[..., None, None]
    whole, moment = np.exp(kept[:, :, -1])[..., None, None], np.exp(held[:, :, -1])[..., None, None]
    return whole, of_moment, steps[..., None], moment, (passed[:, :, -1] * theta)[..., None]


@hookimpl
def register_memories(register):
    register("titans", Titans)
