"""product_keys: very many trained rows, of which each query finds the best few in the square root of the time (arXiv 1907.05242).

One layer has n * n values and, for each head, two sets of n half keys: the key of value (i, j) is c_i of the first, then c'_j of the
second. For a query in two halves q1, q2 (section 3.2), with the k best of each set:

    score(i, j) = q1 . c_i + q2 . c'_j, the k best of k * k pairs          which are the k best of all n * n
    out = attention + sum of softmax(scores) values

Differences from the paper: rows stand beside attention and are asked by its queries, where the paper puts them in place of a
feed-forward network with queries of its own; heads share the values, and each head's answer goes into its own part of the output;
queries have a root mean square of 1, where the paper has a batch norm.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Memory, MemorySpec, Param, Query, SideOutput, State, hookimpl, softmax, unit, value_of

SITES = ("encoder", "decoder", "cross")


class ProductKeys(Memory):
    """Trained rows: n * n values of one layer, of which each query of each head adds its `top_k` best to the output.

    layer: counted from the top if negative. site: None is the model's reading site. The head size must be even.
    """

    def __init__(self, *, n: int = 32, top_k: int = 8, layer: int = -1, site: str | None = None):
        for name, value in (("n", n), ("top_k", top_k)):
            if not isinstance(value, int) or value < 1:
                raise InvalidValue(f"{name}: expected a number of at least 1, got {shown(value)}")
        if top_k > n:
            raise InvalidValue(f"top_k: expected at most n = {n}, got {top_k}")
        if site not in (None, *SITES):
            raise InvalidValue(f"site: expected one of {', '.join(SITES)}, got {shown(site)}")
        self.n, self.top_k, self.site = n, top_k, site
        sites = frozenset(SITES if site is None else [site])
        self.spec = MemorySpec(sites=sites, layers=(layer,), needs=frozenset({"query"}))

    def sites(self, dims: Dims) -> Collection[str]:
        return {self.site or dims.reading_site}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        """keys (H, 2, n, D / 2) and values (n * n, D), which learn faster, as each is seldom asked for, as in the paper."""
        if dims.d_head % 2:
            raise InvalidValue(f"d_head: expected an even size, as queries are cut into halves, got {dims.d_head}")
        half = dims.d_head // 2
        keys = Param((dims.n_heads, 2, self.n, half), init=half**-0.5, weight_decay=False)
        return {"keys": keys, "values": Param((self.n**2, dims.d_head), lr_factor=4.0, weight_decay=False)}

    def read(self, state: State, site: str, layer: int, query: Query) -> SideOutput:
        batch, heads, length, d = query.heads.shape
        q = np.reshape(unit(query.heads) * d**0.5, (batch, heads, length, 2, d // 2))
        scores = np.einsum("bhtpx,hpnx->bhtpn", q, state.params["keys"])
        halves = _best(scores, self.top_k)  # (B, H, T, 2, k)
        of_half = np.take_along_axis(scores, halves, -1)
        pairs = of_half[..., 0, :, None] + of_half[..., 1, None, :]
        numbers = halves[..., 0, :, None] * self.n + halves[..., 1, None, :]
        pairs, numbers = np.reshape(pairs, (batch, heads, length, -1)), np.reshape(numbers, (batch, heads, length, -1))
        best = _best(pairs, self.top_k)
        weights = softmax(np.take_along_axis(pairs, best, -1))
        rows = state.params["values"][np.take_along_axis(numbers, best, -1)]
        return SideOutput(np.einsum("bhtk,bhtkd->bhtd", weights, rows), "add")


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """The numbers of the k largest along the last axis, best first."""
    return np.argsort(-value_of(scores), axis=-1, kind="stable")[..., :k]


@hookimpl
def register_memories(register):
    register("product_keys", ProductKeys)
