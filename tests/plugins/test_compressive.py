"""Rows are compressed as the paper says, in the order they came, however a text is cut."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import Var, backward
from mini_tfm.testing.trial import LENGTH, Reader, Trial, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import inputs, model, read


def of(how, rows, conv):
    if how == "conv":
        return sum(row @ c for row, c in zip(rows, conv, strict=True))
    return rows.mean(axis=0) if how == "mean" else rows.max(axis=0)


@pytest.mark.parametrize("how", ["mean", "max", "conv"])
@pytest.mark.parametrize("rate", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 5, 24])
def test_the_two_queues_are_those_of_the_paper(how, rate, length):
    """The newest 6 rows as they are, then what each `rate` of the older ones were compressed to, of which the newest 4 stay."""
    made, memory = model(), mt.memory(f"window:size=6+compressive:size=4,rate={rate},how={how}")
    made.add_memory_weights(memory, seed=1)
    if how == "conv":
        conv = made.weights["memory.compressive.decoder_conv"]
        np.testing.assert_allclose(conv[0], np.broadcast_to(np.eye(16) / rate, (rate, 16, 16)))
        conv[...] = np.random.default_rng(0).standard_normal(conv.shape)
    x = inputs(made)
    window, compressed = read(made, memory, length).run.states
    np.testing.assert_allclose(window["decoder.0.hidden"][0], x[-6:], atol=1e-12)
    old = x[: len(x) - 6]
    expected = [of(how, old[i : i + rate], conv[0] if how == "conv" else None) for i in range(0, len(old) - rate + 1, rate)][-4:]
    there = compressed["decoder.0.valid"][0]
    np.testing.assert_allclose(compressed["decoder.0.hidden"][0][there], expected, atol=1e-12)
    waiting = compressed["decoder.0.wait.valid"][0]
    np.testing.assert_allclose(compressed["decoder.0.wait.hidden"][0][waiting], old[len(old) - len(old) % rate :], atol=1e-12)


def test_streams_of_other_lengths_are_cut_into_groups_of_their_own():
    together = Reader(small_model("decoder-only"), mt.memory("compressive:size=4,rate=3"), 2)
    alone = Reader(small_model("decoder-only"), mt.memory("compressive:size=4,rate=3"), 1)
    for tokens in random_segments(2, 5):
        together.read(tokens, [LENGTH, 2])
        alone.read(tokens[1:, :2])
    state, other = together.run.states[0], alone.run.states[0]
    rows = state["decoder.1.hidden"][1, state["decoder.1.valid"][1]]
    assert len(rows) == 3
    np.testing.assert_allclose(rows, other["decoder.1.hidden"][0, other["decoder.1.valid"][0]], atol=1e-12)


def test_the_past_draws_nearer():
    """Places count rows kept, back from the newest, which ends at token 23 of 25: 8 rows for 24 tokens."""
    reader = Reader(small_model("decoder-only"), memory := mt.memory("compressive:size=100,rate=3"), 1)
    for tokens in random_segments(1, 5):
        reader.read(tokens)
    view = memory.view(reader.run.states[0], "decoder", 0, None)
    assert view.positions[0].tolist() == list(range(16, 24))


def test_the_task_trains_the_convolution_through_the_rows():
    trial = Trial(lambda: mt.memory("window:size=4+compressive:size=4,rate=2,how=conv"), "decoder-only")
    found = {}
    for detach_at in (None, 3):
        w = {name: Var(weight) for name, weight in trial.model.weights.items()}
        backward(trial.loss(random_segments(1, 4), w, detach_at=detach_at))
        found[detach_at] = w["memory.compressive.decoder_conv"].grad
    assert np.abs(found[None]).max() > 1e-6
    assert not np.array_equal(found[None], found[3])
