"""prefix and product_keys: rows that are parameters, against their papers' equations in plain NumPy."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.testing.trial import Reader, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import GROUP, HEAD, HEADS, causal, heads, inputs, model, outputs, softmax


def test_a_prefix_is_in_one_softmax_with_the_segment():
    made, memory = model(), mt.memory("prefix:tokens=3")
    made.add_memory_weights(memory, seed=1)
    prefix_k, prefix_v = (made.weights[f"memory.prefix.decoder_{name}"][0] for name in ("keys", "values"))
    prefix_v[...] = np.random.default_rng(0).standard_normal(prefix_v.shape)
    x = inputs(made)
    for start, got in zip(range(0, len(x), 6), outputs(made, memory, 6), strict=True):
        q, k, v = (heads(made, x[start : start + 6], part) for part in "qkv")
        for h, g in enumerate(GROUP):
            for t in range(6):
                keys, values = np.concatenate([prefix_k[g], k[g, : t + 1]]), np.concatenate([prefix_v[g], v[g, : t + 1]])
                np.testing.assert_allclose(got[h, t], softmax(keys @ q[h, t] / np.sqrt(HEAD)) @ values, atol=1e-12)


def test_a_prefix_alone_learns_what_a_frozen_model_is_to_say():
    """Prompted by its rows alone: the model's own weights stay as they are."""
    made, memory = small_model("decoder-only", np.float32), mt.memory("prefix:tokens=4")
    trainer = mt.Trainer(made, memory, trainable="memory.*", learning_rate=0.05, schedule="constant")
    before = {name: value.copy() for name, value in made.weights.items()}
    tokens = np.full((4, 2, 5), 7)
    losses = [trainer.step(None, tokens) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in made.weights.items() if not np.array_equal(value, before[name])}
    assert moved == {"memory.prefix.decoder_keys", "memory.prefix.decoder_values"}


@pytest.mark.parametrize("site, there", [("all", ["cross", "decoder", "encoder"]), ("encoder", ["encoder"]), (None, ["cross"])])
def test_a_prefix_has_rows_where_it_takes_part(site, there):
    made = small_model("encoder-decoder")
    made.add_memory_weights(mt.memory("prefix", tokens=2, site=site))
    keys = {name: value.shape for name, value in made.weights.items() if name.endswith("_keys")}
    assert keys == {f"memory.prefix.{each}_keys": (2, 2, 2, 4) for each in there}


@pytest.mark.parametrize("n, top_k", [(5, 1), (5, 3), (4, 4)])
def test_the_best_products_of_half_keys_are_the_best_of_all(n, top_k):
    made, memory = model(), mt.memory("product_keys", n=n, top_k=top_k)
    made.add_memory_weights(memory, seed=1)
    keys, table = made.weights["memory.product_keys.keys"], made.weights["memory.product_keys.values"]
    table[...] = np.random.default_rng(0).standard_normal(table.shape)
    x = inputs(made)
    for start, got in zip(range(0, len(x), 6), outputs(made, memory, 6), strict=True):
        rows = x[start : start + 6]
        expected, q = causal(made, rows), heads(made, rows, "q")
        for h in range(HEADS):
            for t in range(6):
                query = q[h, t] / np.sqrt((q[h, t] ** 2).mean())
                scores = np.array([query @ np.concatenate([keys[h, 0, i], keys[h, 1, j]]) for i in range(n) for j in range(n)])
                best = np.argsort(-scores, kind="stable")[:top_k]
                expected[h, t] += softmax(scores[best]) @ table[best]
        np.testing.assert_allclose(got, expected, atol=1e-10)


def test_queries_are_cut_into_halves():
    made = mt.Transformer(mt.Config(vocab_size=24, d_model=6, n_heads=2, n_encoder_layers=0, n_decoder_layers=1, positions="none"))
    with pytest.raises(InvalidValue, match=r"memory 'product_keys'.*d_head: expected an even size.*, got 3"):
        made.add_memory_weights(mt.memory("product_keys"))


def test_trained_rows_stay_while_reading():
    for text in ("prefix", "product_keys"):
        made = small_model("decoder-only")
        made.add_memory_weights(memory := mt.memory(text))
        reader = Reader(made, memory, 1)
        for tokens in random_segments(1, 2):
            reader.read(tokens)
        assert not reader.run.states[0]
