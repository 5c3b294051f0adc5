"""What a memory is told of the attention its rows and the segment's received: by head and query, and summed."""

import dataclasses

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import Memory, MemorySpec, Rows, Stack, View
from mini_tfm.testing.trial import Found, Newest, Reader, small_model

TOKENS = np.random.default_rng(2).integers(3, 24, (3, 2, 5))


class Listens(Memory):
    """Keeps rows of all segments, and shows them whole or by an index; notes what it is told."""

    name = "listens"

    def __init__(self, index=None, front=0):
        needs = {"mass", "query"} if index == 4 else {"mass"}
        self.spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset(needs))
        self.index, self.front, self.told = index, front, []

    def begin(self, state, segment):
        return Rows(np.ones((len(segment.length), self.front, 8)), "around") if self.front else None

    def start(self, batch, dims):
        return {f"{layer}.{name}": np.zeros((batch, 0, *more), kind) for layer in range(2) for name, more, kind in
                (("hidden", (8,), float), ("valid", (), bool), ("positions", (), int))}  # fmt: skip

    def shown(self, state, layer):
        hidden, valid, positions = (state[f"{layer}.{name}"] for name in ("hidden", "valid", "positions"))
        return View(("hidden", hidden), valid, positions=positions) if valid.shape[1] else None

    def view(self, state, site, layer, segment):
        view = self.shown(state, layer)
        if view is None or self.index == 4:
            return None
        return view if self.index is None else dataclasses.replace(view, index=np.array([[3, 0, 1], [2, -1, 4]]))

    def read(self, state, site, layer, query):
        view = self.shown(state, layer)
        if view is None:
            return None
        shape = (*query.heads.shape[:3], 2)
        return dataclasses.replace(view, index=np.random.default_rng(1).integers(-1, view.valid.shape[1], shape))

    def write(self, state, site, layer, new):
        self.told.append((layer, new.attention(), new.mass, new.view_mass, new.valid))
        for name in ("hidden", "valid", "positions"):
            state[f"{layer}.{name}"] = np.concatenate([state[f"{layer}.{name}"], getattr(new, name)], axis=1)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize(("index", "front"), [(None, 0), (None, 2), (2, 0), (4, 0)])
def test_by_head_and_query_it_adds_up(index, front, positions):
    """A row of weights adds up to 1, less what other rows got; over heads and queries they are the masses."""
    memory = Listens(index, front)
    reader = Reader(small_model("decoder-only", positions=positions), memory, 2)
    for tokens in TOKENS:
        reader.read(tokens, [5, 3])
    assert len(memory.told) == 6
    for number, (_, weights, mass, view_mass, valid) in enumerate(memory.told):
        held = 5 * (number // 2)
        assert weights.shape == (2, 2, 5, held + 5) and (weights >= 0).all()
        at = np.tril(np.ones((5, 5), bool)) & valid[:, None, None]
        assert not weights[..., held:][~np.broadcast_to(at, weights[..., held:].shape)].any()
        queries = weights * valid[:, None, :, None]
        if front:
            assert (weights.sum(axis=3)[valid[:, None].repeat(2, 1)] < 1).all()  # memory tokens got the rest
        else:
            np.testing.assert_allclose(weights.sum(axis=3)[valid[:, None].repeat(2, 1)], 1, rtol=1e-12)
            np.testing.assert_allclose(queries[..., held:].sum(axis=(1, 2)), mass, atol=1e-12)
            if held:
                np.testing.assert_allclose(queries[..., :held].sum(axis=(1, 2)), view_mass, atol=1e-12)
    last = memory.told[-1][1][..., :10]
    if index == 2:
        assert (last[0].sum(axis=(0, 1)) > 0).tolist() == [True, True, False, True] + [False] * 6


def test_it_is_what_the_kernel_computes_with():
    """A segment's attention without a memory is what `look_inside` shows."""
    memory = Listens()
    reader = Reader(model := small_model("decoder-only"), memory, 2)
    reader.read(TOKENS[0])
    inside = model.look_inside(inputs=np.concatenate([np.ones((2, 1), int), TOKENS[0][:, :-1]], axis=1))
    for (_, weights, *_), expected in zip(memory.told, inside.decoder_attentions, strict=True):
        np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_who_absorbs_is_told_none():
    told = []

    class Absorbs(Found):
        def absorb(self, state, evicted):
            told.append(evicted.attention)
            return super().absorb(state, evicted)

    reader = Reader(small_model("decoder-only"), Stack([Newest("decoder"), Absorbs("decoder")]), 2)
    for tokens in TOKENS:
        reader.read(tokens)
    assert told and set(told) == {None}


def test_in_training_it_is_plain():
    memory = Listens()
    mt.Trainer(small_model("decoder-only"), memory).step(None, TOKENS.swapaxes(0, 1))
    assert memory.told and all(type(weights) is np.ndarray for _, weights, *_ in memory.told)


class TovaByHead(Memory):
    """Each head keeps the 3 rows that its last query attends to most (arXiv 2401.06104), of rows that some head keeps."""

    name, spec = "by_head", MemorySpec(sites=frozenset({"decoder"}))
    SIZE = 3

    def start(self, batch, dims):
        kinds = {"hidden": ((dims.d_model,), dims.dtype), "valid": ((), bool), "positions": ((), int), "kept": ((dims.n_heads,), bool)}
        return {
            f"{i}.{name}": np.zeros((batch, 0, *more), kind) for i in range(dims.layers["decoder"]) for name, (more, kind) in kinds.items()
        }

    def view(self, state, site, layer, segment):
        hidden, valid, positions, kept = (state[f"{layer}.{name}"] for name in ("hidden", "valid", "positions", "kept"))
        if not valid.shape[1]:
            return None
        hides = np.where(kept, 0, -np.inf).astype(state.dims.dtype).transpose(0, 2, 1)[:, :, None]
        return View(("hidden", hidden), valid, positions=positions, bias=hides)

    def write(self, state, site, layer, new):
        weights, stream = new.attention(), np.arange(len(new.valid))
        asked = weights[stream, :, np.maximum(new.valid.sum(axis=1) - 1, 0)].transpose(0, 2, 1)  # (B, M + S, H)
        mine = {"kept": np.repeat(new.valid[:, :, None], state.dims.n_heads, axis=2)}
        names = ("hidden", "valid", "positions", "kept")
        rows = {n: np.concatenate([state[f"{layer}.{n}"], mine.get(n, getattr(new, n, None))], axis=1) for n in names}
        scores = np.where(rows["kept"] & rows["valid"][..., None], asked, -1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.SIZE]
        kept = np.zeros_like(rows["kept"])
        np.put_along_axis(kept, best, True, 1)
        rows["kept"] = kept & (scores >= 0)
        rows["valid"] = rows["kept"].any(axis=2)
        order = np.argsort(~rows["valid"], axis=1, kind="stable")[:, : rows["valid"].sum(axis=1).max()]
        state.update({f"{layer}.{n}": x[stream[:, None], order] for n, x in rows.items()})


def test_each_head_can_evict_rows_of_its_own():
    """What a head has dropped gets no weight from it, and still does from others."""
    memory, told = TovaByHead(), []
    write = memory.write
    memory.write = lambda state, site, layer, new: told.append((layer, new.attention(), dict(state))) or write(state, site, layer, new)
    reader = Reader(small_model("decoder-only"), memory, 2)
    for tokens in np.concatenate([TOKENS, TOKENS]):
        reader.read(tokens, [5, 3])
    differ = 0
    for layer, weights, state in told[2:]:
        kept = state[f"{layer}.kept"].transpose(0, 2, 1)
        assert (kept.sum(axis=2) == 3).all()
        among_old = weights[..., : kept.shape[2]]
        assert not among_old[np.broadcast_to(~kept[:, :, None], among_old.shape)].any()
        assert (among_old[np.broadcast_to(kept[:, :, None], among_old.shape)] > 0).all()
        differ += (kept[:, 0] != kept[:, 1]).any()
    assert differ
