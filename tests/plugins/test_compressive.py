"""Rows are compressed as the paper says, in the order they came, however a text is cut."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import Var, backward
from mini_tfm.data.batches import Batch
from mini_tfm.errors import InvalidValue
from mini_tfm.testing.trial import LENGTH, Reader, Trial, random_segments, small_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import GROUP, TOKENS, heads, inputs, model, read, softmax


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


# Its own loss: algorithm 2 of the paper

ATTENTION = "window:size=6+compressive:size=4,rate=3,how=conv,loss=attention"


def trained_once(**options):
    """A trainer that took one step on segments of 6 tokens of two streams, of which the second is shorter."""
    made = model()
    trainer = mt.Trainer(made, mt.memory(ATTENTION), learning_rate=0.0, weight_decay=0.0, **options)
    conv = made.weights["memory.compressive.decoder_conv"]
    conv[...] += 0.2 * np.random.default_rng(0).standard_normal(conv.shape)
    trainer.step(None, STREAMS, target_lengths=[[6, 6, 6, 6], [6, 6, 6, 0]])
    return trainer


STREAMS = np.stack([TOKENS, TOKENS[:, ::-1]], axis=1)[0].reshape(2, 4, 6)


def reconstruction(made, conv):
    """The mean over streams and segments of |attn(h, old) - attn(h, new)| / sqrt(queries), line by line."""

    def attn(q, rows):
        k, v = heads(made, rows, "k"), heads(made, rows, "v")
        return softmax(np.einsum("htd,hsd->hts", q, k[GROUP]) / np.sqrt(4)) @ v[GROUP]

    losses = []
    for tokens, n_segments in zip(STREAMS, (4, 3), strict=True):
        x, wait = inputs(made, tokens[:n_segments].reshape(1, -1)), []
        for t in range(n_segments):
            h = x[6 * t : 6 * t + 6]
            wait += [*x[6 * t - 6 : 6 * t]] if t else []  # the window drops what the segment before wrote
            full = len(wait) // 3 * 3
            old, wait = np.array(wait[:full]), wait[full:]
            if full:
                new = np.einsum("grd,rde->ge", old.reshape(-1, 3, 16), conv[0])
                far = attn(q := heads(made, h, "q"), old) - attn(q, new)
                losses.append(np.sqrt((far**2).sum() / 6))
            else:
                losses.append(0.0)
    return sum(losses) / 7


def test_the_loss_is_that_of_the_paper():
    trainer = trained_once()
    expected = reconstruction(trainer.model, trainer.model.weights["memory.compressive.decoder_conv"])
    assert expected > 0.1 and trainer.memory_loss == pytest.approx(expected, rel=1e-9)
    assert trainer.losses[0] == pytest.approx(mt.Trainer(trainer.model, mt.memory(ATTENTION)).evaluate(batch_of()), rel=1e-12)


def batch_of():
    return Batch(None, STREAMS, None, np.array([[6, 6, 6, 6], [6, 6, 6, 0]]))


def test_it_trains_the_convolution_and_nothing_else_does():
    """C's gradient is that of finite differences of the equations, and all others are those without the loss."""
    trainer, name = trained_once(), "memory.compressive.decoder_conv"
    conv, rng = trainer.model.weights[name], np.random.default_rng(1)
    for _ in range(3):
        direction = rng.standard_normal(conv.shape)
        slope = [reconstruction(trainer.model, conv + step * direction) for step in (1e-5, -1e-5)]
        assert (trainer.optimizer.grads[name] * direction).sum() == pytest.approx((slope[0] - slope[1]) / 2e-5, rel=1e-6)
    made = model()
    plain = mt.Trainer(made, mt.memory(ATTENTION.replace("loss=attention", "loss=task")), learning_rate=0.0)
    made.weights[name][...] = conv
    plain.step(None, STREAMS, target_lengths=[[6, 6, 6, 6], [6, 6, 6, 0]])
    assert plain.memory_loss == 0
    for other in made.weights.keys() - {name}:
        np.testing.assert_allclose(trainer.optimizer.grads[other], plain.optimizer.grads[other], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("bptt_segments", [None, 1, 2])
def test_computed_again_or_cut_it_is_the_same_loss(bptt_segments):
    """To the bit when segments are computed again. C's gradient is the same however soon others are cut: old rows are given."""
    kept, again = (trained_once(bptt_segments=bptt_segments, recompute=flag) for flag in (False, True))
    assert kept.memory_loss == again.memory_loss == trained_once().memory_loss
    assert np.array_equal(kept.optimizer.grad, again.optimizer.grad)
    name = "memory.compressive.decoder_conv"
    np.testing.assert_allclose(kept.optimizer.grads[name], trained_once().optimizer.grads[name], rtol=1e-12)


def test_parts_of_a_batch_add_up():
    whole, parts = trained_once(), trained_once(gradient_accumulation_steps=2)
    assert parts.memory_loss == pytest.approx(whole.memory_loss, rel=1e-12)
    np.testing.assert_allclose(parts.optimizer.grad, whole.optimizer.grad, rtol=1e-9, atol=1e-14)


def test_training_makes_it_smaller_and_use_does_without():
    made, memory = model(), mt.memory(ATTENTION)
    trainer = mt.Trainer(made, memory, learning_rate=1e-2, trainable="memory.*", schedule="constant")
    found = [trainer.step(None, STREAMS) and trainer.memory_loss for _ in range(30)]
    assert found[-1] < 0.8 * found[0]
    reader = Reader(made, memory, 2)
    for tokens in np.moveaxis(STREAMS, 1, 0):
        reader.read(tokens)
    assert reader.added is None and not any(name.startswith("segment.") for state in reader.run.states for name in state)


def test_what_it_cannot_be_used_with_is_told():
    with pytest.raises(InvalidValue, match="loss: expected task, or attention with how=conv"):
        mt.memory("compressive:loss=attention")
    with pytest.raises(InvalidValue, match="site: expected encoder or decoder with loss=attention"):
        mt.memory("compressive:how=conv,loss=attention,site=cross")
