"""New.surprise: how unlikely the model found what each output predicts, who is told, and when it is computed."""

import dataclasses

import numpy as np
import paper
import pytest

import mini_tfm as mt
from mini_tfm import model as model_module
from mini_tfm.errors import PluginError
from mini_tfm.generate import Session
from mini_tfm.memory import Memory, MemorySpec, Stack
from mini_tfm.model import Output
from mini_tfm.stream import Stream
from mini_tfm.testing.trial import LENGTH, Reader, random_segments, small_model
from mini_tfm.text import ByteTokenizer

SEGMENTS = random_segments(2, 4)
TEXTS = np.concatenate(SEGMENTS, axis=1)


class Told(Memory):
    """Keeps what is written, with its layer."""

    def __init__(self, *needs):
        self.spec, self.told = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset(needs)), []

    def write(self, state, site, layer, new):
        self.told.append((layer, new))

    def surprises(self, layer=2):
        return np.concatenate([new.surprise for at, new in self.told if at == layer], axis=1)


@pytest.fixture
def products(monkeypatch):
    """The rows of each call of the output layer for surprises."""
    counts, plain = [], Output.surprise
    monkeypatch.setattr(Output, "surprise", lambda self, hidden, *others: counts.append(len(hidden)) or plain(self, hidden, *others))
    return counts


def read(memory, segments=SEGMENTS, lengths=None, model=None):
    reader = Reader(small_model("decoder-only") if model is None else model, memory, segments.shape[1])
    for tokens in segments:
        reader.read(tokens, lengths)
    return reader


def test_it_is_the_negative_log_probability_given_all_before():
    """Of each token, across segments: a window holds all of the text, which plain NumPy reads at once."""
    model, told = small_model("decoder-only"), Told("surprise")
    read(Stack([mt.memory("window:size=100"), told]), model=model)
    for text, found in zip(TEXTS, told.surprises(), strict=True):
        scores = paper.logits(model.config, model.weights, None, text.tolist())
        expected = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(text)), text]
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
def test_it_is_told_with_the_outputs_alone(kind):
    told = Told("surprise", "tokens")
    reader = Reader(small_model(kind), told, 2)
    log_probs = reader.read(SEGMENTS[0])
    assert [layer for layer, new in told.told if new.surprise is not None] == [2]
    assert [layer for layer, _ in told.told] == [0, 1, 2]
    new = told.told[-1][1]
    np.testing.assert_array_equal(new.targets, SEGMENTS[0])
    np.testing.assert_allclose(new.surprise, -np.take_along_axis(log_probs, SEGMENTS[0][..., None], 2)[..., 0], atol=1e-12)


def test_what_is_not_there_has_none():
    told = Told("surprise")
    read(told, SEGMENTS[:1], [LENGTH, 2])
    assert (told.surprises() > 0).tolist() == [[True] * 5, [True, True, False, False, False]]
    reader = Reader(small_model("decoder-only"), told := Told("surprise"), 2)
    reader.stream.open(None, np.array([5, 5]))  # what is to be predicted is not known
    reader.stream.decode(SEGMENTS[0], np.array([5, 5]))
    reader.stream.finish()
    assert told.told[-1][1].surprise is None


def test_nothing_that_comes_later_changes_it():
    changed = SEGMENTS.copy()
    changed[2, :, 3] = 3 + (changed[2, :, 3] - 2) % 20
    one, other = Told("surprise"), Told("surprise")
    for told, segments in ((one, SEGMENTS), (other, changed)):
        read(Stack([mt.memory("window:size=8"), told]), segments)
    np.testing.assert_array_equal(one.surprises()[:, :13], other.surprises()[:, :13])
    assert (one.surprises()[:, 13:15] != other.surprises()[:, 13:15]).all()


def test_it_costs_nothing_where_nobody_asks_and_one_product_where_several_do(products):
    for memory in (None, Told(), Told("hidden", "tokens", "mass"), mt.memory("window:size=4+blocks+knn_lm")):
        read(memory)
    assert not products
    first, second, third = Told("surprise"), Told("surprise"), Told("hidden")
    for each in (first, second):  # they pass all rows on
        each.write = lambda state, site, layer, new, each=each: Told.write(each, state, site, layer, new) or new
    read(Stack([first, second, third]))
    assert products == [2 * LENGTH] * 4
    np.testing.assert_array_equal(first.surprises(), second.surprises())
    assert len(third.told) == 12 and all(new.surprise is None for _, new in third.told)


def test_decoding_computes_none(products):
    reader = read(told := Told("surprise"))
    before, known = len(products), len(told.told)
    reader.stream.open(None, np.array([5, 5]))
    session = Session(reader.stream)
    for t in range(4):
        session.step(SEGMENTS[0][:, t : t + 1])
    assert len(products) == before and len(told.told) == known


def test_numbers_depend_on_nobody_else(monkeypatch):
    """Neither on the other streams, nor on how many rows have their logits at once: the same bits."""
    model, together = small_model("decoder-only", np.float32), Told("surprise")
    read(together, model=model)
    for b in range(2):
        read(alone := Told("surprise"), SEGMENTS[:, b : b + 1], model=model)
        np.testing.assert_array_equal(alone.surprises()[0], together.surprises()[b])
    monkeypatch.setattr(model_module, "SURPRISED_ROWS", 3)
    read(pieces := Told("surprise"), model=model)
    np.testing.assert_array_equal(pieces.surprises(), together.surprises())


@pytest.mark.parametrize(("fields", "precision"), [({"output_cap": 0.5}, None), ({}, "bfloat16"), ({}, "int8")])
def test_it_is_that_of_the_model_as_it_is_kept(fields, precision):
    model = small_model("decoder-only", np.float32, **fields)
    if precision is not None:
        model.pack(precision)
    stream = Stream(model, told := Told("surprise"), 2)
    stream.open(None, np.array([5, 5]), SEGMENTS[0])
    log_probs = stream.log_probs(stream.decode(SEGMENTS[0], np.array([5, 5])))
    stream.finish()
    np.testing.assert_allclose(told.surprises(), -np.take_along_axis(log_probs, SEGMENTS[0][..., None], 2)[..., 0], atol=1e-6)


def pipe_with(memory):
    sizes = {"vocab_size": 259, "d_model": 16, "n_heads": 2, "n_encoder_layers": 0, "n_decoder_layers": 2}
    config = mt.Config(**sizes, positions="rotary", segment_length=8)
    return mt.Pipeline(mt.Transformer(config, dtype=np.float64), ByteTokenizer(), memory)


def test_their_sum_is_the_score_of_a_text():
    score = pipe_with(told := Told("surprise")).score("the cat sleeps on the mat")
    assert told.surprises().sum() / np.log(2) == pytest.approx(score["bits"], rel=1e-12)


def test_what_is_generated_surprises_as_the_same_text_that_is_read():
    """A segment that is full is read back, and has its surprises then."""
    pipe = pipe_with(told := Told("surprise", "tokens"))
    pipe.generate("the cat", max_new_tokens=30, min_new_tokens=30)
    made = np.concatenate([new.targets for at, new in told.told if at == 2], axis=1)
    assert made.shape[1] == 32 and bytes((made[0, :7] - 3).astype(np.uint8)) == b"the cat"
    again = Stream(pipe.model, other := Told("surprise"), 1)
    for start in range(0, 32, 8):
        again.read(made[:, start : start + 8], np.array([8]))
    np.testing.assert_array_equal(other.surprises(), told.surprises())


def test_what_a_memory_says_of_dropped_rows_must_fit_them():
    drops = Told("surprise")
    drops.write = lambda state, site, layer, new: dataclasses.replace(new, surprise=np.zeros((2, 3)))
    with pytest.raises(
        PluginError, match=r"failed in write, site decoder, layer 0, segment 0: surprise: expected shape \(2, 5\), got \(2, 3\)"
    ):
        read(Stack([drops, Told("surprise")]))
