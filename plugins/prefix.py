"""prefix: trained keys and values that every query sees (prefix tuning, arXiv 2101.00190; cartridges, arXiv 2506.06266).

At each layer `tokens` keys and values are parameters, in one softmax with the segment. Trained alone, with the model frozen
(`Trainer(trainable="memory.*")`), they are a task, or a text, in a few rows. Nothing is written into them while reading.

Differences from the papers: rows are trained as they are, not through a network (2101.00190, section 4.3), and begin at random, not as
the keys and values of a text's first tokens (2506.06266), which a memory does not have before it has read; they have no
position.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mini_tfm.errors import InvalidValue, shown
from mini_tfm.memory import Dims, Memory, MemorySpec, Param, Segment, State, View, hookimpl

SITES = ("encoder", "decoder", "cross")


class Prefix(Memory):
    """Trained rows: `tokens` keys and values at every layer, the same for all texts.

    site: None is the model's reading site, "all" every site.
    """

    def __init__(self, *, tokens: int = 16, site: str | None = None):
        if not isinstance(tokens, int) or tokens < 1:
            raise InvalidValue(f"tokens: expected a number of rows of at least 1, got {shown(tokens)}")
        if site not in (None, "all", *SITES):
            raise InvalidValue(f"site: expected {', '.join(SITES)} or all, got {shown(site)}")
        self.tokens, self.site = tokens, site
        self.spec = MemorySpec(sites=frozenset(SITES if site in (None, "all") else [site]))

    def sites(self, dims: Dims) -> Collection[str]:
        return self.spec.sites if self.site == "all" else {self.site or dims.reading_site}

    def parameters(self, dims: Dims) -> dict[str, Param]:
        """`<site>_keys` and `<site>_values`, (layers, Hkv, tokens, D): keys in directions of their own, values that say little yet."""
        found = {}
        for site in sorted(self.sites(dims)):
            if layers := dims.layers[site]:
                shape = (layers, dims.at(site).n_kv_heads, self.tokens, dims.at(site).d_head)
                found[f"{site}_keys"] = Param(shape, init=1.0, weight_decay=False)
                found[f"{site}_values"] = Param(shape, init=0.02, weight_decay=False)
        return found

    def view(self, state: State, site: str, layer: int, segment: Segment) -> View:
        batch = len(segment.length)
        rows = (state.params[f"{site}_{name}"][layer] for name in ("keys", "values"))
        keys, values = (np.broadcast_to(x, (batch, *x.shape)) for x in rows)
        return View(("kv", keys, values), np.ones((batch, self.tokens), bool))


@hookimpl
def register_memories(register):
    register("prefix", Prefix)
