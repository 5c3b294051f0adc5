"""The rows that a memory keeps by their score are those of its paper, followed token by token in plain NumPy."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import Stack
from mini_tfm.testing.trial import Reader, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import GROUP, HEAD, inputs, model, read, softmax
from plain import heads as heads_of


class Kept:
    """The rows that a scorer keeps: `score(kept, mass, last, t)` are the scores of rows `kept` after the segment that ends before t.

    mass: the attention each of all rows has received, summed over heads and queries; last: in the last segment alone.
    """

    def __init__(self, made, score, size, length, recent=0, sinks=0):
        x = inputs(made)
        q, k = heads_of(made, x, "q"), heads_of(made, x, "k")
        n, kept, mass, self.after = len(x), [], np.zeros(len(x)), []
        for start in range(0, n, length):
            end, last = min(start + length, n), np.zeros(n)
            for t in range(start, end):
                seen = [*kept, *range(start, t + 1)]
                for h in range(len(q)):
                    last[seen] += softmax(k[GROUP[h]][seen] @ q[h, t] / np.sqrt(HEAD))
            mass += last
            rows = np.array([*kept, *range(start, end)])
            scores = score(rows, mass[rows], last[rows], end, k, start)
            scores = np.where((rows < sinks) | (rows >= end - recent), np.inf, scores)
            kept = sorted(rows[np.argsort(-scores, kind="stable")[:size]].tolist())
            self.after.append(kept)


def mean_mass(rows, mass, last, end, keys, start):
    return mass / (end - rows)


def sum_mass(rows, mass, last, end, keys, start):
    return mass


def last_attention(rows, mass, last, end, keys, start):
    return last / (end - np.maximum(rows, start))


def pooled(rows, *given):
    scores = last_attention(rows, *given)
    return np.array([scores[max(0, i - 1) : i + 2].max() for i in range(len(scores))])


def short_keys(rows, mass, last, end, keys, start):
    return -np.linalg.norm(keys[:, rows], axis=-1).sum(axis=0)


def distinct_keys(rows, mass, last, end, keys, start):
    total = 0
    for head in keys:
        directions = head[rows] / np.linalg.norm(head[rows], axis=-1, keepdims=True)
        anchor = directions.mean(axis=0)
        total = total - directions @ anchor / np.linalg.norm(anchor)
    return total


PAPERS = {
    "h2o:size=6,recent=2,sinks=1": (mean_mass, 2, 1),
    "h2o:size=6,recent=3,sinks=0,mean=false": (sum_mass, 3, 0),
    "tova:size=6": (last_attention, 0, 0),
    "tova:size=6,recent=2,sinks=1": (last_attention, 2, 1),
    "snapkv:size=6,recent=2,pool=3": (pooled, 2, 0),
    "knorm:size=6": (short_keys, 0, 0),
    "knorm:size=6,recent=1,sinks=2": (short_keys, 1, 2),
    "keydiff:size=6": (distinct_keys, 0, 0),
}


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("text", PAPERS)
def test_the_rows_that_stay_are_those_of_the_paper(text, length):
    score, recent, sinks = PAPERS[text]
    made = model()
    kept = Kept(made, score, 6, length, recent, sinks).after
    state = read(made, mt.memory(text), length).run.states[0]
    assert state["decoder.0.positions"].tolist() == [kept[-1]]
    assert kept[-1] != list(range(18, 24)), "no test of anything"


def test_each_stream_keeps_its_own_rows():
    made = model()
    tokens = np.random.default_rng(1).integers(3, 24, (2, 24))
    for text in PAPERS:
        together = read(made, mt.memory(text), 4, tokens).run.states[0]["decoder.0.positions"]
        for b in range(2):
            alone = read(made, mt.memory(text), 4, tokens[b : b + 1]).run.states[0]["decoder.0.positions"]
            assert together[b].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv", "knorm", "keydiff"])
def test_a_memory_that_holds_everything_is_a_window(name):
    reader, window = (Reader(small_model("decoder-only"), mt.memory(text), 2) for text in (f"{name}:size=100", "window:size=100"))
    for tokens in random_segments(2, 4):
        np.testing.assert_allclose(reader.read(tokens), window.read(tokens), atol=1e-12)


@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv", "knorm", "keydiff"])
def test_a_window_in_front_keeps_the_newest(name):
    """And what it drops is judged: the newest rows are in the window, each once."""
    stack = mt.memory(f"window:size=4,site=decoder+{name}:size=6,site=decoder" + (",recent=1" if name == "snapkv" else ""))
    reader = Reader(small_model("decoder-only"), stack, 1)
    for tokens in random_segments(1, 5):
        reader.read(tokens)
    window, kept = (state["decoder.0.positions"][0].tolist() for state in reader.run.states)
    assert window == [21, 22, 23, 24]
    assert len(kept) == 6 and max(kept) <= 20 and kept == sorted(set(kept))


def test_the_attention_that_rows_received_is_known_behind_it():
    """Rows that h2o drops bring their attention; those of knorm do, where it is asked for behind."""
    given = []

    class Behind(type(mt.memory("h2o"))):
        def absorb(self, state, evicted):
            given.append((evicted.valid, evicted.mass))
            return super().absorb(state, evicted)

    for name in ("h2o:size=6,sinks=1", "knorm:size=6,site=decoder"):
        given.clear()
        read(model(), Stack([mt.memory(name), Behind(size=8)]), 4)
        assert given and all((mass[valid] > 0).all() for valid, mass in given)


def test_keys_are_judged_where_there_are_keys():
    """By default in the encoder of an encoder-decoder, whose rows are the text that was read."""
    for kind, site in (("encoder-decoder", "encoder"), ("decoder-only", "decoder"), ("encoder-only", "encoder")):
        run = Reader(small_model(kind), mt.memory("knorm:size=4"), 1).run
        assert {name.partition(".")[0] for name in run.states[0]} == {site}


def test_neighbours_of_a_row_profit_from_it():
    memory = mt.memory("snapkv:size=3,recent=0,pool=3")
    scores = np.array([[1.0, 0.0, 0.0, 5.0, 0.0, 2.0]])
    assert memory.keep(scores, np.arange(6)[None]).tolist() == [[1, 1, 5, 5, 5, 2]]
