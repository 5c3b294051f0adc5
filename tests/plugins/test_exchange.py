"""Who is read becomes strong, who is strong stays and is shown to all; followed row by row in plain NumPy."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import Stack
from mini_tfm.testing.trial import LENGTH, Reader, Tap, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import GROUP, HEAD, heads, inputs, model, read, softmax

TWICE = np.concatenate([random_segments(1, 3)[:, 0].ravel(), random_segments(1, 3)[:, 0].ravel()])[None, :24]


class ByHand:
    """The rows held after each segment: {position: strength}, and the promoted ones."""

    def __init__(self, made, tokens, length, *, size, top_k, promote, same, half_life):
        x = inputs(made, tokens)
        q, k = heads(made, x, "q"), heads(made, x, "k") - heads(made, np.zeros_like(x), "k")  # a key's bias prefers no row
        held, self.promoted = {}, []
        for start in range(0, len(x), length):
            rows, grown = sorted(held), dict.fromkeys(held, 0.0)
            for h, g in enumerate(GROUP) if rows else ():
                for t in range(start, min(start + length, len(x))):
                    scores = k[g][rows] @ q[h, t]
                    best = np.argsort(-scores, kind="stable")[:top_k]
                    for j, weight in zip(best, softmax(scores[best] / np.sqrt(HEAD)), strict=True):
                        grown[rows[j]] += weight
            new = range(start, min(start + length, len(x)))
            held = {j: strength * 0.5 ** (len(new) / half_life) + grown[j] for j, strength in held.items()} | dict.fromkeys(new, 1.0)
            for old in sorted(held):
                alike = [j for j in new if j > old and x[old] @ x[j] >= same * np.linalg.norm(x[old]) * np.linalg.norm(x[j])]
                if alike:
                    held[alike[-1]] += held.pop(old)
            strongest = sorted(held, key=lambda j: (-held[j], j))[:size]
            held = {j: held[j] for j in strongest}
            self.promoted = sorted(j for j in strongest[:promote] if held[j] > 1)
        self.held = held


CASES = {
    "all": {"size": 100, "top_k": 3, "promote": 0, "same": 2.0, "half_life": 1e9},
    "forgets": {"size": 7, "top_k": 2, "promote": 2, "same": 2.0, "half_life": 10.0},
    "consolidates": {"size": 9, "top_k": 3, "promote": 3, "same": 0.999, "half_life": 20.0},
    "consolidates what is hardly alike": {"size": 20, "top_k": 3, "promote": 3, "same": 0.5, "half_life": 20.0},
}


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_rows_grow_fade_and_go_as_by_hand(case, length):
    made = model()
    expected = ByHand(made, TWICE, length, **CASES[case])
    state = read(made, mt.memory("exchange", **CASES[case]), length, TWICE).run.states[0]
    valid = state["decoder.0.valid"][0]
    positions, strength = (state["decoder.0." + name][0, valid] for name in ("positions", "strength"))
    assert positions.tolist() == sorted(expected.held)
    np.testing.assert_allclose(strength, [expected.held[j] for j in positions.tolist()], atol=1e-9)
    assert state["decoder.0.positions"][0, state["decoder.0.promoted"][0]].tolist() == expected.promoted
    assert bool(expected.promoted) == (case != "all")


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
@pytest.mark.parametrize("promote", [0, 4])
def test_with_room_for_all_it_is_a_window_of_everything(kind, promote):
    """What is promoted is seen once."""
    exchange = mt.memory("exchange", size=100, top_k=100, promote=promote, same=2.0)
    reader, window = (Reader(small_model(kind), memory, 2) for memory in (exchange, mt.memory("window:size=100")))
    for tokens in random_segments(2, 4):
        np.testing.assert_allclose(reader.read(tokens), window.read(tokens), atol=1e-10)


def test_without_promotion_and_forgetting_it_is_the_store():
    """Of a text that says no token twice: a store shows a copy of a row only where there is no other."""
    exchange = mt.memory("exchange", size=100, top_k=3, promote=0, same=2.0)
    reader, store = (Reader(small_model("encoder-only"), memory, 2) for memory in (exchange, mt.memory("store:top_k=3")))
    once = np.stack([np.random.default_rng(b).permutation(np.arange(3, 23)) for b in range(2)], axis=1)
    for tokens in once.reshape(4, LENGTH, 2).swapaxes(1, 2):
        np.testing.assert_allclose(reader.read(tokens), store.read(tokens), atol=1e-10)


def test_a_promoted_row_is_seen_by_queries_that_do_not_find_it():
    made = small_model("decoder-only")
    with_it, without = (Reader(made, mt.memory("exchange", size=50, top_k=1, promote=n, same=2.0), 1) for n in (3, 0))
    segments = random_segments(1, 4)
    for number, tokens in enumerate(segments):
        out, other = with_it.read(tokens), without.read(tokens)
        assert np.allclose(out, other, atol=1e-9) == (number < 2), "after a second segment something was read"


def test_a_row_goes_to_and_fro():
    """Dropped by the window it is found, becomes strong, and is shown to all; what is forgotten goes to the memory behind."""
    tap = Tap(passes=False)
    stack = Stack([mt.memory("window:size=4"), mt.memory("exchange:size=6,top_k=2,promote=2,same=2"), tap])
    reader = Reader(small_model("decoder-only"), stack, 1)
    for tokens in random_segments(1, 6):
        reader.read(tokens)
    window, exchange = (state["decoder.1.positions"][0].tolist() for state in reader.run.states[:2])
    dropped = [position for _, layer, position, _ in tap.rows(0) if layer == 1]
    assert sorted(window + exchange + dropped) == list(range(6 * LENGTH))
    assert len(exchange) == 6 and reader.run.states[1]["decoder.1.promoted"].sum() == 2
    reader.run.drain()
    assert sorted(position for _, layer, position, _ in tap.rows(0) if layer == 1) == list(range(6 * LENGTH))
