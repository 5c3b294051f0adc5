"""Attention problems of every kind: who sees what, where the bias lies in memory, how many blocks."""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mini_tfm.reference import Block

MASKS = ("plain", "causal", "prefix", "offset", "window", "causal window", "lengths", "valid", "index", "masked index")
BIASES = ("full", "per head", "per key", "per query", "one", "transposed", "reversed", "expanded", "distance", "hiding")
FEATURES = (*MASKS, *(f"{bias} bias" for bias in BIASES), "blocks", "everything")


@dataclass
class Bias:
    """A table, and the view of it that broadcasts to (B, H, T, N)."""

    table: np.ndarray
    view: object

    def gradient(self, dscores):
        """What dscores (B, H, T, N) mean for the table: each element of the table gets all that was read from it."""
        places = np.broadcast_to(self.view(np.arange(self.table.size).reshape(self.table.shape)), dscores.shape)
        return np.bincount(places.reshape(-1), dscores.reshape(-1), self.table.size).reshape(self.table.shape)


@dataclass
class Case:
    q: np.ndarray
    scale: float
    blocks: list = field(default_factory=list)
    biases: list = field(default_factory=list)  # one a block, or None

    def ask_for_dbias(self, start):
        """Gives every block with a bias the same view of a table that starts as `start(shape)`: the tables."""
        tables = [None if bias is None else start(bias.table.shape) for bias in self.biases]
        for block, bias, table in zip(self.blocks, self.biases, tables, strict=True):
            block.dbias = None if bias is None else bias.view(table)
        return tables


def drawn_bias(kind, values, shape):
    _, heads, length, n = shape
    shapes = {"full": shape, "hiding": shape, "per head": (1, heads, 1, n), "per key": (n,), "per query": (length, 1), "one": ()}
    views = {"transposed": np.transpose, "reversed": lambda table: table[:, ::-1, ::-1]}
    if kind == "transposed":
        table = values.real(*shape[::-1])
    elif kind == "reversed":
        table = values.real(heads, length, n)
    elif kind == "expanded":
        table = values.real(max(n, 1))
        views[kind] = lambda table: as_strided(table, shape, (0, 0, 0, table.strides[0]))
    elif kind == "distance":  # T5: bias[h, i, j] = table[h, j - i + length - 1]
        table = values.real(heads, length + n)
        views[kind] = lambda table: as_strided(
            table[:, max(length - 1, 0) :], shape, (0, table.strides[0], -table.strides[1], table.strides[1])
        )
    else:
        table = np.asarray(values.real(*shapes[kind]))
    if kind == "hiding":
        table[values.mask(*shape, share=0.4)] = -np.inf
    return Bias(table.copy(), views.get(kind, lambda table: table))


def drawn_case(feature, values, batch=2, heads=2, kv_heads=1, length=5, source=6, d=4, size=1.0):
    """A case with one block that has the feature; "blocks": three plain ones; "everything": several, each with several."""
    case = Case(values.real(batch, heads, length, d, scale=size), float(d) ** -0.5 if d else 1.0)
    some = values.rng.choice
    for _ in range({"blocks": 3, "everything": some([1, 2, 3])}.get(feature, 1)):
        several = feature == "everything"
        wanted = {name for name in (*MASKS, *(f"{bias} bias" for bias in BIASES)) if several and some(2, p=[0.8, 0.2])} | {feature}
        s = int(some([0, 1, source, source + 3])) if several else source
        block = Block(values.real(batch, kv_heads, s, d), values.real(batch, kv_heads, s, d))
        n = s
        indexed = bool(wanted & {"index", "masked index"})
        if indexed:
            n = int(some([1, 2, 7]))
            block.index = values.integers(-1, s, batch, heads, length, n)
        elif wanted & {"causal", "prefix", "offset", "causal window"}:
            block.causal = True
        if "offset" in wanted:
            block.offset = int(values.rng.integers(-length - 1, s + 2))
        if not indexed and wanted & {"window", "causal window"}:
            block.window = int(some([1, 2, s // 2 + 1, s + 5]))
        elif not indexed and "prefix" in wanted:
            block.prefix = int(values.rng.integers(0, s + 1))
        if wanted & {"lengths", "masked index"}:
            block.lengths = values.integers(0, s + 1, batch)
        if wanted & {"valid", "masked index"}:
            block.valid = values.mask(batch, s)
        biases = [kind for kind in BIASES if f"{kind} bias" in wanted]
        bias = drawn_bias(str(some(biases)), values, (batch, heads, length, n)) if biases else None
        block.bias = None if bias is None else bias.view(bias.table)
        case.blocks.append(block)
        case.biases.append(bias)
    return case


def only_row(block, row):
    """The block with batch row `row` alone."""
    given = {name: getattr(block, name) for name in ("k", "v", "valid", "lengths", "index")}
    changes = {name: x[row : row + 1] for name, x in given.items() if x is not None}
    if np.ndim(block.bias) == 4 and len(block.bias) > 1:
        changes["bias"] = block.bias[row : row + 1]
    return replace(block, **changes)
