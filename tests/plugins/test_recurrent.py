"""Memory tokens: what carries from segment to segment is what the last layer made of them, and nothing else."""

import dataclasses

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import Var, backward
from mini_tfm.model import FeedForward
from mini_tfm.stream import Stream
from mini_tfm.testing.trial import LENGTH, Reader, Trial, random_segments, small_model

SEGMENTS = random_segments(2, 4)


def trial(kind, **options):
    return Trial(lambda: mt.memory("recurrent", tokens=3, **options), kind)


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_a_stream_begins_with_the_trained_rows(kind):
    t = trial(kind)
    state = t.reader(2).run.states[0]
    np.testing.assert_array_equal(state["tokens"], np.broadcast_to(t.model.weights["memory.recurrent.tokens"], (2, 3, 8)))


def test_in_an_encoder_the_next_memory_is_its_outputs_there():
    t = trial("encoder-decoder")
    reader, stream = t.reader(2), t.reader(2).stream
    stream.open(SEGMENTS[0], np.full(2, LENGTH), SEGMENTS[0])
    encoded = stream.encoded
    assert encoded.n_rows == 3 and encoded.hidden.shape[1] == LENGTH + 3
    reader.read(SEGMENTS[0])
    np.testing.assert_array_equal(reader.run.states[0]["tokens"], encoded.hidden[:, :3])


def test_residual_adds_the_outputs_and_keeps_the_size():
    plain, residual = trial("encoder-decoder").reader(2), trial("encoder-decoder", residual=True).reader(2)
    first = plain.run.states[0]["tokens"]
    plain.read(SEGMENTS[0])
    residual.read(SEGMENTS[0])
    total = first + plain.run.states[0]["tokens"]
    size = np.sqrt((total**2).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(residual.run.states[0]["tokens"], total / size, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_a_residual_memory_does_not_grow_with_the_stream(kind):
    """However much was read, its rows have one size, and a new segment changes them as much as an early one did."""
    reader, changes = trial(kind, residual=True).reader(2), []
    for number in range(300):
        before = reader.run.states[0]["tokens"]
        reader.read(SEGMENTS[number % len(SEGMENTS)])
        rows = reader.run.states[0]["tokens"]
        np.testing.assert_allclose((rows**2).mean(axis=-1), 1, atol=1e-4)
        changes.append(np.abs(rows - before).max())
    assert min(changes[-4:]) > 0.1 * max(changes[4:8])


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_it_remembers_what_was_read_and_only_by_its_rows(kind):
    """Another first segment changes the outputs of the third; with the rows put back it does not."""
    t = trial(kind)
    one, other = t.reader(2), t.reader(2)
    one.read(SEGMENTS[0])
    other.read(SEGMENTS[3])
    other.stream.last = one.stream.last
    swapped = other.copy()
    swapped.run.states[0]["tokens"] = one.run.states[0]["tokens"]
    for tokens in SEGMENTS[1:3]:
        a, b, c = (reader.read(tokens) for reader in (one, other, swapped))
    assert np.max(np.abs(a - b)) > 1e-6
    np.testing.assert_array_equal(a, c)


def test_a_decoders_text_does_not_see_the_rows_to_be_written():
    """The outputs of a first segment do not change when it is the last one, as when generating."""
    reader = trial("decoder-only").reader(2)
    np.testing.assert_allclose(reader.copy().token_by_token(SEGMENTS[0]), reader.read(SEGMENTS[0]), atol=1e-12)


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_the_gradient_reaches_the_first_of_five_segments(kind):
    """By central differences on an embedding that only the first segment holds."""
    t = trial(kind)
    segments = 3 + np.random.default_rng(2).integers(1, 20, (5, 1, LENGTH))
    segments[0, 0, 0] = 3  # id 3 is nowhere else
    target = np.cos(np.arange(LENGTH * 8)).reshape(1, LENGTH, 8)

    def last_loss(w):
        reader = t.reader(1, w)
        for tokens in segments:
            hidden = reader.hidden(tokens)
        return (hidden * target).sum()

    w = {name: Var(x) for name, x in t.model.weights.items()}
    backward(last_loss(w))
    got = w["embedding.weight"].grad[3]
    assert np.max(np.abs(got)) > 1e-7
    for axis in (0, 5):
        sides = []
        for step in (1e-4, -1e-4):
            moved = {**t.model.weights, "embedding.weight": t.model.weights["embedding.weight"].copy()}
            moved["embedding.weight"][3, axis] += step
            sides.append(float(last_loss(moved)))
        np.testing.assert_allclose(got[axis], (sides[0] - sides[1]) / 2e-4, rtol=1e-4, atol=1e-9)


def test_it_takes_part_at_one_site_only():
    model = small_model("encoder-decoder")
    memory = mt.memory("recurrent", tokens=2, site="decoder")
    model.add_memory_weights(memory)
    reader = Reader(model, memory, 1)
    reader.run.open(np.array([LENGTH]), SEGMENTS[0][:1])
    assert reader.run.begin("encoder") == []
    (rows,) = reader.run.begin("decoder")
    assert rows.where == "around" and rows.values.shape == (1, 2, 8)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative"])
@pytest.mark.parametrize("n_encoder_layers", [0, 1])
def test_the_last_layer_computes_no_rows_that_nobody_asks_for(monkeypatch, positions, n_encoder_layers, ragged):
    """Those in front, to be read, are keys alone there; whoever asks for the attention received gets theirs, too."""
    config = mt.Config(
        vocab_size=29, d_model=8, n_heads=2, n_encoder_layers=n_encoder_layers, n_decoder_layers=2, d_ff=16, positions=positions
    )
    model = mt.Transformer(config, seed=1, dtype=np.float64)
    lengths = np.array([LENGTH, LENGTH - 2 * ragged])
    rows, feed_forward = [], FeedForward.__call__
    monkeypatch.setattr(FeedForward, "__call__", lambda self, x, p, **more: rows.append(x.shape[1]) or feed_forward(self, x, p, **more))
    got = []
    for needs in ([], ["mass"]):
        memory = mt.memory("recurrent", tokens=3, site="decoder")
        memory.spec = dataclasses.replace(memory.spec, needs=frozenset(needs))
        model.add_memory_weights(memory)
        stream = Stream(model, memory, 2)
        for tokens in SEGMENTS:
            stream.open(tokens if n_encoder_layers else None, lengths, tokens)
            hidden = stream.decode(tokens, lengths)
            stream.finish()
            got.append((hidden, stream.run.states[0]["tokens"]))
    for (hidden, state), (all_hidden, all_state) in zip(got[: len(SEGMENTS)], got[len(SEGMENTS) :], strict=True):
        np.testing.assert_array_equal(hidden, all_hidden)
        np.testing.assert_array_equal(state, all_state)
    each = [LENGTH] * n_encoder_layers
    assert rows == [*each, LENGTH + 6, LENGTH + 3] * len(SEGMENTS) + (each + [LENGTH + 6] * 2) * len(SEGMENTS)
