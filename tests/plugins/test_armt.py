"""armt against its paper's equations in plain NumPy; and what a memory adds to a layer's inputs is there wherever the layer runs."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue, PluginError
from mini_tfm.memory import Memory, MemorySpec, RecurrentMemory, Stack
from mini_tfm.testing.topics import trained
from mini_tfm.testing.trial import Reader, random_segments, small_model
from mini_tfm_plugins.armt import recalled

KEY, EPS = 3, 1e-5


def phi(x):
    """DPFP-3 of one vector."""
    both = np.maximum(np.concatenate([x, -x]), 0)
    return np.concatenate([[both[j] * both[j - i] for j in range(len(both))] for i in (1, 2, 3)])


def quotient(key, A, z, beside):
    """k A / (k z + eps), cut to three times the length of what stands beside it."""
    found = key @ A / (key @ z + EPS)
    return found * min(1, 3 * np.linalg.norm(beside) / max(np.linalg.norm(found), 1e-12))


class Noting(type(mt.memory("armt"))):
    """armt, which notes what it is given and what it answers."""

    def __init__(self, **options):
        super().__init__(tokens=2, d_key=KEY, **options)
        self.seen = []

    def enter(self, state, site, layer, inputs):
        added = super().enter(state, site, layer, inputs)
        self.seen.append(("enter", layer, inputs, added))
        return added

    def leave(self, state, site, layer, rows):
        super().leave(state, site, layer, rows)
        self.seen.append(("leave", layer, rows, state[f"{site}.{layer}.A"]))


@pytest.mark.parametrize("kind, site", [("encoder-decoder", "encoder"), ("encoder-decoder", "decoder"), ("decoder-only", "decoder")])
def test_what_is_recalled_and_written_are_the_papers(kind, site):
    model, memory = small_model(kind), Noting(site=site)
    memory.name = "armt"
    model.add_memory_weights(memory, seed=1)
    W_q, W_k, W_v, w_b = (model.weights[f"memory.armt.{name}"] for name in ("W_q", "W_k", "W_v", "w_b"))
    reader = Reader(model, memory, 2)
    for tokens in random_segments(2, 4):
        reader.read(tokens)
    A, z = np.zeros((2, 2, 6 * KEY, 8)), np.zeros((2, 2, 6 * KEY))  # by layer and stream
    assert [seen[:2] for seen in memory.seen[:4]] == [("enter", 0), ("leave", 0), ("enter", 1), ("leave", 1)]
    for what, layer, given, answer in memory.seen:
        for b in range(2):
            if what == "enter":
                for x, added in zip(given[b], answer[b], strict=True):
                    np.testing.assert_allclose(added, quotient(phi(x @ W_q[layer]), A[layer, b], z[layer, b], x), atol=1e-12)
                continue
            before, total = A[layer, b].copy(), z[layer, b].copy()
            for m in given[b]:
                k, beta = phi(m @ W_k[layer]), 1 / (1 + np.exp(-m @ w_b[layer]))
                v = m @ W_v[layer]
                A[layer, b] += np.outer(beta * k, v - quotient(k, before, total, v))
                z[layer, b] += np.clip(1 - k @ total / (k @ k + EPS), 0, 1) * k
            np.testing.assert_allclose(answer[b], A[layer, b], atol=1e-12)
    assert np.abs(A).max() > 0.01


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_few_numbers_a_key_in_a_model_that_never_met_it_do_not_overflow(kind):
    """Where z has nothing of a key that A has, the paper's quotient is of the order of 1 / eps, and is written again."""
    model, memory = trained(kind), mt.memory("armt:tokens=2,d_key=3")
    model.add_memory_weights(memory, seed=1)
    reader = Reader(model, memory, 64)
    for tokens in random_segments(64, 40):
        assert np.isfinite(reader.read(tokens)).all()
    lengths = [np.abs(array).max() for name, array in reader.run.states[0].items() if name.endswith(("A", "z"))]
    assert max(lengths) < 1e6


def test_what_is_recalled_is_the_papers_up_to_three_times_what_it_is_added_to():
    keys, beside = np.array([[[1.0, 0.0], [0.0, 1.0], [0.2, 0.1], [0.0, 0.0]]]), np.array([[[0.0, 3.0]] * 4])
    A, z = np.array([[[1.0, 2.0], [6.0, 8.0]]]), np.array([[2.0, 0.0]])
    found = recalled(keys, A, z, beside)[0]
    np.testing.assert_allclose(found[[0, 2]], [[0.5, 1.0], np.array([0.8, 1.2]) / 0.4], rtol=1e-4)
    np.testing.assert_allclose(found[[1, 3]], [[5.4, 7.2], [0.0, 0.0]], rtol=1e-4)


class Shifts(Memory):
    """Adds the same numbers to the inputs of the first layer."""

    spec = MemorySpec(layers=(0,))
    by = np.linspace(-1, 1, 8)

    def enter(self, state, site, layer, inputs):
        return np.broadcast_to(self.by.astype(inputs.dtype), inputs.shape)


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only", "encoder-only"])
def test_what_enters_the_first_layer_is_as_an_embedding_would_be(kind):
    """Reading and decoding."""
    fields = {"positions": "none", "tie_embeddings": False, "embedding_scale": False}
    model, shifted = (small_model(kind, **fields) for _ in range(2))
    shifted.weights["embedding.weight"] = shifted.weights["embedding.weight"] + Shifts.by
    reader, expected = Reader(model, Shifts(), 2), Reader(shifted, None, 2)
    for tokens in random_segments(2, 2):
        np.testing.assert_allclose(reader.read(tokens), expected.read(tokens), atol=1e-12)
    if kind != "encoder-only":
        np.testing.assert_allclose(reader.token_by_token(tokens), expected.token_by_token(tokens), atol=1e-12)


class Rows(RecurrentMemory):
    """Notes its rows at each layer and behind the last."""

    def __init__(self, site=None):
        super().__init__(tokens=2, site=site)
        self.left, self.ended = [], None

    def leave(self, state, site, layer, rows):
        self.left.append((layer, rows))

    def update(self, state, outputs):
        self.ended = outputs
        return outputs


@pytest.mark.parametrize("kind, site", [("encoder-decoder", "encoder"), ("encoder-decoder", "decoder"), ("decoder-only", "decoder")])
def test_a_layer_is_left_with_the_rows_that_end_gets_behind_the_norm(kind, site):
    memory, other = Rows(site), Rows(site)
    model = small_model(kind, norm="rms")
    model.add_memory_weights(Stack([memory, other]), seed=1)
    Reader(model, Stack([memory, other]), 2).read(random_segments(2, 1)[0], [5, 3])
    for each in (memory, other):
        assert [layer for layer, _ in each.left] == [0, 1]
        last = each.left[-1][1]
        scale = model.weights[f"{site}.norm.weight"]
        normed = last / np.sqrt((last**2).mean(axis=-1, keepdims=True) + model.config.norm_eps) * scale
        np.testing.assert_allclose(each.ended, normed, atol=1e-12)
    assert not np.array_equal(memory.left[0][1], other.left[0][1])


def test_what_cannot_be_added_is_told():
    class Wide(Shifts):
        def enter(self, state, site, layer, inputs):
            return inputs[:, :1]

    with pytest.raises(PluginError, match=r"failed in enter, site decoder, layer 0, segment 0: the result: expected shape \(1, 5, 8\)"):
        Reader(small_model("decoder-only"), Wide(), 1).read(random_segments(1, 1)[0])
    for options in ({"d_key": 0}, {"d_key": True}, {"d_key": 2.5}, {"tokens": 0}, {"site": "cross"}):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            mt.memory("armt", **options)
