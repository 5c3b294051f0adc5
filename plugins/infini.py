"""infini: Infini-attention (arXiv 2404.07143): a matrix a head holds all keys and values, in a size that never grows.

With sigma = ELU + 1, at each head, when a segment is read (section 2.1.2):

    answer = sigma(Q) M / (sigma(Q) z)                                   before the segment is added
    M += sigma(K)^T V                                                    rule=linear
    M += sigma(K)^T (V - sigma(K) M / (sigma(K) z))                      rule=delta: what M knows already is not added again
    z += the sum of sigma(K)

The one difference: heads that share keys share a matrix.
"""

from __future__ import annotations

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, New, State, hookimpl
from mini_tfm_plugins.fast_weights import FastWeights


class Infini(FastWeights):
    """Compressive memory: all keys and values in one matrix a head, mixed in by a trained gate; rule: linear or delta."""

    def __init__(self, *, rule: str = "delta", site: str | None = None, taps: bool = False):
        super().__init__(site=site, taps=taps)
        if rule not in ("linear", "delta"):
            raise InvalidValue(f"rule: expected linear or delta, got {shown(rule)}")
        self.rule = rule

    def weights(self, dims: Dims, layer: int) -> dict[str, np.ndarray]:
        heads, d = dims.n_kv_heads, dims.d_head
        return {"M": np.zeros((heads, d, d), dims.dtype), "z": np.zeros((heads, d, 1), dims.dtype)}

    def recall(self, state: State, bank: str, queries: np.ndarray) -> np.ndarray:
        return _answer(_sigma(queries), state[bank + "M"], state[bank + "z"])

    def learn(self, state: State, bank: str, keys: np.ndarray, values: np.ndarray, new: New) -> None:
        k, M, z = _sigma(keys) * new.valid[:, None, :, None], state[bank + "M"], state[bank + "z"]
        if self.rule == "delta":
            values = values - _answer(k, M, z)
        state[bank + "M"] = M + np.swapaxes(k, 2, 3) @ values
        state[bank + "z"] = z + np.sum(k, axis=2)[..., None]


def _sigma(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _answer(features: np.ndarray, M: np.ndarray, z: np.ndarray) -> np.ndarray:
    return features @ M / np.maximum(features @ z, 1e-6)  # an empty M gives 0


@hookimpl
def register_memories(register):
    register("infini", Infini)
