"""What a memory is told and keeps while a segment is decoded, and rows whose positions are chosen when they are read."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.attention import MultiHeadAttention
from mini_tfm.errors import PluginError
from mini_tfm.generate import Session
from mini_tfm.memory import Memory, MemorySpec, RetrievalMemory, State, View
from mini_tfm.testing.trial import Reader, Trial, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from strategies import Ceiling, Prompted

KINDS = ["decoder-only", "encoder-decoder"]


def filled(trial, memory, batch=2, count=3):
    reader = trial.reader(batch, memory=memory)
    for tokens in random_segments(batch, count):
        reader.read(tokens)
    return reader


# Positions chosen when rows are read


class AtOnce(Ceiling):
    """The same where a segment is one token: a position a row is enough."""

    def read(self, state, site, layer, query):
        view = RetrievalMemory.read(self, state, site, layer, query)
        return None if view is None else dataclasses.replace(view, positions=np.maximum(view.positions, query.positions - self.reach))


class AtTruePlaces(RetrievalMemory):
    """A store that says of each place what it says of the row."""

    def read(self, state, site, layer, query):
        view = super().read(state, site, layer, query)
        if view is None:
            return None
        stood_at = view.positions[np.arange(len(view.index))[:, None, None, None], np.maximum(view.index, 0)]
        return dataclasses.replace(view, places=stood_at)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}], ids=["plain", "grouped"])
@pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
def test_each_query_reads_rows_at_places_of_its_own(positions, changes):
    sizes = {"vocab_size": 24, "d_model": 16, "n_heads": 4, "n_encoder_layers": 0, "n_decoder_layers": 2, "d_ff": 32}
    config = mt.Config(**sizes, **changes, positions=positions, relative_buckets=8, relative_max_distance=16)
    model = mt.Transformer(config, seed=3, dtype=np.float64)
    tokens = np.random.default_rng(5).integers(3, 24, (2, 15))

    def in_chunks(memory, chunk):
        reader = Reader(model, memory, 2)
        return np.concatenate([reader.read(tokens[:, i : i + chunk]) for i in range(0, 15, chunk)], axis=1)

    few, same = in_chunks(mt.memory("store", top_k=2), 3), in_chunks(AtTruePlaces(top_k=2, site="decoder"), 3)  # heads find other rows
    np.testing.assert_allclose(same, few, atol=1e-12)
    whole = in_chunks(AtOnce(top_k=50, reach=5, site="decoder"), 1)
    np.testing.assert_allclose(in_chunks(Ceiling(top_k=50, reach=5, site="decoder"), 3), whole, atol=1e-10)
    clipped = np.max(np.abs(in_chunks(mt.memory("store", top_k=50), 3) - whole))
    assert clipped > 1e-4 if positions != "none" else clipped < 1e-10


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"index": None}, "places: expected None without an index"),
        ({"places": np.zeros((2, 1), int)}, r"places: expected shape \(2, 2\), got \(2, 1\)"),
        ({"places": np.zeros((2, 2))}, "places: expected integer, got float64"),
    ],
)
def test_places_that_fit_no_index_are_refused(changes, told):
    class Shows(Memory):
        spec = MemorySpec(sites=frozenset({"decoder"}))

        def view(self, state, site, layer, segment):
            view = View(("hidden", np.zeros((2, 3, 8))), np.ones((2, 3), bool), np.zeros((2, 2), int), places=np.zeros((2, 2), int))
            return dataclasses.replace(view, **changes)

    with pytest.raises(PluginError, match=told):
        Reader(small_model("decoder-only"), Shows(), 2).read(random_segments(2, 1)[0])


# What a choice is kept in


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_tells_its_segment(kind):
    told = []

    class Told(Memory):
        spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"query", "tokens"}))

        def read(self, state, site, layer, query):
            told.append(query.segment)

    reader, segments = Reader(small_model(kind), Told(), 2), random_segments(2, 2)
    for tokens in segments:
        reader.read(tokens)
    assert [segment.number for segment in told] == [0, 0, 1, 1]
    assert told[-1].site == "decoder" and told[-1].start.tolist() == [5, 5] and told[-1].length.tolist() == [5, 5]
    np.testing.assert_array_equal(told[-1].tokens[:, 1:], segments[1][:, :-1])  # a decoder reads what comes before


def test_a_choice_lasts_as_long_as_its_segment():
    reader = filled(Trial(Prompted, "decoder-only"), Prompted(), count=4)
    assert not any(name.startswith(State.OF_SEGMENT) for name in reader.run.states[0])
    reader.stream.open(None, np.full(2, 3))
    session, tokens = Session(reader.stream), random_segments(2, 5)[-1]
    session.step(tokens[:, :2])
    chosen = {name: value for name, value in session.stream.run.states[0].items() if name.startswith(State.OF_SEGMENT)}
    assert len(chosen) == 2 and all(value.shape == (2, 3) for value in chosen.values())
    session.step(tokens[:, 2:3])
    assert all(session.stream.run.states[0][name] is value for name, value in chosen.items())
    session.reorder(np.array([1, 0, 1]))
    for name, value in chosen.items():
        np.testing.assert_array_equal(session.stream.run.states[0][name], value[[1, 0, 1]])


# What is projected once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["window:size=8", "window:size=8,site=decoder", "window:size=8,sinks=2,site=decoder+store:top_k=2,site=decoder"]
)
def test_decoding_in_any_order_of_streams_equals_reading(kind, text):
    """Rows are projected once for many tokens, and streams change places meanwhile, as beams do."""
    trial = Trial(lambda: mt.memory(text), kind)
    reader = filled(trial, mt.memory(text), count=4)
    *_, tokens = random_segments(2, 5, seed=1)
    order = [np.array([1, 0]), np.array([0, 0]), np.array([1, 1, 0]), np.array([2, 0])]
    decoded = reader.copy()
    decoded.stream.open(tokens if trial.model.config.has_encoder else None, np.full(2, 5), tokens)
    session, inputs, which = Session(decoded.stream), decoded.stream.shifted(tokens), np.arange(2)
    for t, index in enumerate([*order, None]):
        out = session.stream.log_probs(session.step(inputs[which, t : t + 1])[:, None])[:, 0]
        np.testing.assert_allclose(out, reader.copy().read(tokens)[which, t], atol=1e-10)
        if index is not None:
            session.reorder(index)
            which = which[index]


def test_a_window_is_projected_once_for_an_answer(monkeypatch):
    counts = []
    plain = MultiHeadAttention.keys_and_values
    monkeypatch.setattr(MultiHeadAttention, "keys_and_values", lambda self, rows, p: counts.append(rows.shape[1]) or plain(self, rows, p))
    model = small_model("decoder-only")
    reader = Reader(model, mt.memory("window:size=8"), 2)
    for tokens in random_segments(2, 3):
        reader.read(tokens)
    counts.clear()
    reader.stream.open(None, np.full(2, 4))
    session, tokens = Session(reader.stream), random_segments(2, 4)[-1]
    for t in range(4):
        session.step(tokens[:, t : t + 1])
        session.reorder(np.array([1, 0]))
    assert counts.count(8) == len(model.decoder.layers)


def test_rows_that_are_other_ones_are_projected_again():
    """A strategy may show other rows for each token, also as an array of the same length."""

    class Turns(RetrievalMemory):
        def read(self, state, site, layer, query):
            held = list(self.held(state, f"{site}.{layer}."))
            if not held:
                return None
            (hidden, positions, valid), at = held[0], int(query.positions[0, -1])
            return View(("hidden", hidden + at), valid, positions=positions)

    trial = Trial(lambda: Turns(top_k=1), "decoder-only")
    reader = filled(trial, Turns(top_k=1))
    reader.stream.open(None, np.full(2, 3))
    session, tokens = Session(reader.stream), random_segments(2, 4)[-1]
    steps = [session.step(tokens[:, t : t + 1]) for t in range(3)]
    for t in range(1, 3):
        again = reader.copy()
        again.stream.open(None, np.full(2, 3))
        fresh = Session(again.stream)
        for s in range(t + 1):
            fresh.stream.run._projected.clear()
            out = fresh.step(tokens[:, s : s + 1])
        np.testing.assert_array_equal(out, steps[t])
    assert np.max(np.abs(steps[2] - steps[1])) > 1e-3
