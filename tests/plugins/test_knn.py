"""knn and knn_lm give what their papers' equations give, in plain NumPy."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.memory import Stack
from mini_tfm.testing.trial import LENGTH, Reader, Tap, Trial, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import GROUP, HEADS, TOKENS, causal, heads, inputs, model, outputs, sigmoid, softmax


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("length", [4, 10])
@pytest.mark.parametrize("top_k, size", [(1, 100), (3, 100), (100, 100), (3, 7)])
def test_a_query_sees_the_nearest_keys_of_earlier_segments(top_k, size, length):
    made, memory = model(), mt.memory("knn", top_k=top_k, size=size)
    made.add_memory_weights(memory, seed=1)
    rng = np.random.default_rng(4)
    gate, scale = made.weights["memory.knn.gate"], made.weights["memory.knn.scale"]
    gate[...], scale[...] = rng.standard_normal(HEADS), 2 + rng.random(HEADS)
    x = inputs(made)
    q, k, v = (heads(made, x, part) for part in "qkv")
    for start, got in zip(range(0, len(x), length), outputs(made, memory, length), strict=True):
        rows = slice(start, start + length)
        expected = causal(made, x[rows])
        stored = slice(max(0, start - size), start)
        for h in range(HEADS) if start else ():
            for t in range(expected.shape[1]):
                near = unit(k[GROUP[h], stored]) @ unit(q[h, start + t])
                best = np.argsort(-near, kind="stable")[:top_k]
                found = softmax(scale[h] * near[best]) @ v[GROUP[h], stored][best]
                expected[h, t] = sigmoid(gate[h]) * found + (1 - sigmoid(gate[h])) * expected[h, t]
        np.testing.assert_allclose(got, expected, atol=1e-10)


@pytest.mark.parametrize("layer, number", [(-1, 1), (0, 0)])
def test_it_works_in_one_layer_alone(layer, number):
    seen, memory = [], mt.memory("knn", top_k=2, layer=layer)
    made = small_model("decoder-only")
    made.add_memory_weights(memory)
    memory.write = lambda state, site, at, new: seen.append(at)
    Reader(made, memory, 1).read(random_segments(1, 1)[0])
    assert seen == [number]


def test_a_stream_keeps_its_newest_rows_however_much_padding_there_is():
    made = small_model("decoder-only")
    made.add_memory_weights(memory := mt.memory("knn", top_k=2, size=6))
    together, alone = Reader(made, memory, 2), Reader(made, memory, 1)
    for tokens in random_segments(2, 4):
        together.read(tokens, [LENGTH, 1])
        alone.read(tokens[1:, :1])
    state = together.run.states[0]
    assert state["valid"].sum(axis=1).tolist() == [6, 4]
    np.testing.assert_allclose(state["keys0"][1, state["valid"][1]], alone.run.states[0]["keys0"][0], atol=1e-12)


def test_behind_a_window_it_holds_what_the_window_drops():
    stack = mt.memory("window:size=4+knn:top_k=2")
    made = small_model("decoder-only")
    made.add_memory_weights(stack)
    reader = Reader(made, stack, 1)
    for tokens in random_segments(1, 3):
        reader.read(tokens)
    assert reader.run.states[1]["valid"].sum() == 3 * LENGTH - 4


@pytest.mark.parametrize("top_k, share, temperature", [(1, 0.25, 1.0), (3, 0.6, 0.2), (100, 0.9, 30.0)])
def test_the_nearest_outputs_vote_for_what_followed_them(top_k, share, temperature):
    made, length = model(), 6
    plain, tap = Reader(made, None, 1), Tap(passes=False)
    tap.spec = mt.memory("knn_lm").spec
    with_it, told = Reader(made, mt.memory("knn_lm", top_k=top_k, share=share, temperature=temperature), 1), Reader(made, tap, 1)
    keys, followed = np.zeros((0, 16)), np.zeros(0, int)
    for start in range(0, TOKENS.shape[1], length):
        tokens = TOKENS[:, start : start + length]
        p, got = np.exp(plain.read(tokens)[0]), np.exp(with_it.read(tokens)[0])
        told.read(tokens)
        outs = tap.seen[-1][2][0]
        for t, h in enumerate(outs) if start else ():
            distance = ((keys - h) ** 2).sum(axis=1)
            nearest = np.argsort(distance, kind="stable")[:top_k]
            weights, p_knn = softmax(-distance[nearest] / temperature), np.zeros(24)
            for j, weight in zip(nearest, weights, strict=True):
                p_knn[followed[j]] += weight
            p[t] = share * p_knn + (1 - share) * p[t]
        np.testing.assert_allclose(got, p, atol=1e-10)
        keys, followed = np.concatenate([keys, outs]), np.concatenate([followed, tokens[0]])


def test_a_text_that_is_read_again_becomes_likelier():
    made = model()
    tokens = np.tile(np.random.default_rng(0).integers(3, 24, (1, 8)), (1, 2))
    with_it, plain = Reader(made, mt.memory("knn_lm", top_k=1, temperature=0.1), 1), Reader(made, None, 1)
    gains = []
    for start in range(0, 16, 4):
        some = tokens[:, start : start + 4]
        a, b = (reader.read(some)[0, np.arange(4), some[0]] for reader in (with_it, plain))
        gains.append((a - b).mean())
    assert gains[0] == 0 and min(gains[2:]) > 0.5


def test_log_probabilities_stay_numbers_in_float32():
    """However far the outputs are from each other, and where the model itself is certain."""
    made = small_model("decoder-only", np.float32)
    made.weights["decoder.norm.weight"][...] *= 100
    reader = Reader(made, mt.memory("knn_lm:top_k=4,temperature=0.001"), 2)
    for tokens in random_segments(2, 4):
        out = reader.read(tokens, [LENGTH, 2])
        assert np.isfinite(out).all() and out.dtype == np.float32


def test_rows_of_layers_are_left_to_the_others():
    """In front of a window, too: it keeps outputs alone."""
    reader = Reader(small_model("decoder-only"), mt.memory("knn_lm+window:size=4"), 1)
    reader.read(random_segments(1, 1)[0])
    assert reader.run.states[0]["valid"].sum() == LENGTH and reader.run.states[1]["decoder.1.valid"].sum() == 4


@pytest.mark.parametrize("name", ["knn:top_k=2", "knn_lm"])
def test_nothing_is_seen_before_something_was_read(name):
    trial = Trial(lambda: Stack([mt.memory(name)]), "decoder-only")
    first = random_segments(2, 1)[0]
    np.testing.assert_array_equal(trial.reader(2).read(first), trial.reader(2, without=True).read(first))


def test_they_need_what_a_model_has():
    with pytest.raises(InvalidValue, match="layer: expected -2 to 1 in this model, got 5"):
        made = small_model("decoder-only")
        made.add_memory_weights(memory := mt.memory("knn:layer=5"))
        Reader(made, memory, 1)
    with pytest.raises(InvalidValue, match=r"works at .'decoder'., but this model has only .'encoder'."):
        Reader(small_model("encoder-only"), mt.memory("knn_lm"), 1)
