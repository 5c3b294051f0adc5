"""What the contract promises of every memory, and that published memories can be written against it alone.

The kit (mini_tfm/testing) checks most of it on any strategy; here it is run on the published ones, and what needs a
number of its own is shown with one.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import Var, backward
from mini_tfm.memory import RowStore, Stack
from mini_tfm.testing import check_memory
from mini_tfm.testing.trial import LENGTH, Reader, Trial, random_segments, small_model
from mini_tfm.train import Trainer
from mini_tfm_plugins.eviction import HeavyHitters

sys.path.insert(0, str(Path(__file__).parent))
from strategies import PUBLISHED

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_memories_fit_the_contract(name):
    check_memory(PUBLISHED[name])


@pytest.mark.parametrize("name", [*mt.memory.__all__, *(name for name in vars(RowStore) if not name.startswith("_"))])
def test_a_name_of_the_contract_is_documented(name):
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("memory-contract.md", "write-a-memory.md"))
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), f"{name} is in neither page"


# A memory that holds everything is attention over everything


def decoder(positions, **changes):
    sizes = {"vocab_size": 24, "d_model": 16, "n_heads": 4, "n_encoder_layers": 0, "n_decoder_layers": 2, "d_ff": 32}
    relative = {"relative_buckets": 8, "relative_max_distance": 16}
    return mt.Transformer(mt.Config(**{**sizes, **relative, "positions": positions, **changes}), seed=3, dtype=np.float64)


def log_probs_in_chunks(model, memory, tokens, chunk):
    reader = Reader(model, memory, len(tokens))
    return np.concatenate([reader.read(tokens[:, i : i + chunk]) for i in range(0, tokens.shape[1], chunk)], axis=1)


TOKENS = np.random.default_rng(5).integers(3, 24, (2, 14))


@pytest.mark.parametrize("chunk", [1, 3, 5, 13])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "norm_position": "post"}], ids=["plain", "grouped"])
@pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
def test_a_window_as_long_as_the_text_equals_full_attention(positions, changes, chunk):
    model = decoder(positions, **changes)
    whole = log_probs_in_chunks(model, None, TOKENS, 14)
    np.testing.assert_allclose(log_probs_in_chunks(model, mt.memory("window", size=14), TOKENS, chunk), whole, atol=1e-10)
    assert np.max(np.abs(log_probs_in_chunks(model, mt.memory("window", size=2), TOKENS, chunk) - whole)) > 1e-4


@pytest.mark.parametrize("chunk", [3, 5])
@pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
def test_a_store_that_finds_everything_equals_dense_attention(positions, chunk):
    model = decoder(positions)
    whole = log_probs_in_chunks(model, None, TOKENS, 14)
    for top_k in (13, 14, 1000):
        np.testing.assert_allclose(log_probs_in_chunks(model, mt.memory("store", top_k=top_k), TOKENS, chunk), whole, atol=1e-10)
    assert np.max(np.abs(log_probs_in_chunks(model, mt.memory("store", top_k=1), TOKENS, chunk) - whole)) > 1e-4


@pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
def test_window_and_store_together_equal_dense_attention(positions):
    """What the window drops is in the store, and nothing is seen twice."""
    model = decoder(positions)
    whole = log_probs_in_chunks(model, None, TOKENS, 14)
    for size in (1, 4, 9):
        stack = mt.memory(f"window:size={size}+store:top_k=20")
        np.testing.assert_allclose(log_probs_in_chunks(model, stack, TOKENS, 3), whole, atol=1e-10)


@pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
def test_ragged_rows_are_remembered_where_they_stand(positions):
    """Rows of 14 and 9 tokens, cut at places of their own, both equal full attention."""
    model = decoder(positions)
    whole = log_probs_in_chunks(model, None, TOKENS, 14)
    reader, at = Reader(model, mt.memory("window", size=14), 2), np.zeros(2, int)
    for lengths in ([5, 2], [0, 4], [4, 0], [5, 3]):
        tokens = np.zeros((2, 5), np.int64)
        for b, n in enumerate(lengths):
            tokens[b, :n] = TOKENS[b, at[b] : at[b] + n]
        out = reader.read(tokens, lengths)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(out[b, :n], whole[b, at[b] : at[b] + n], atol=1e-10)
        at += lengths
    assert reader.run.start.tolist() == at.tolist() == [14, 9]


def test_sinks_stay_and_the_rest_slides():
    model = decoder("rotary")
    reader = Reader(model, mt.memory("window", size=6, sinks=2), 2)
    for i in range(0, 12, 3):
        reader.read(TOKENS[:, i : i + 3])
    assert reader.run.states[0]["decoder.1.positions"].tolist() == [[0, 1, 8, 9, 10, 11]] * 2


# Generation


@pytest.mark.parametrize("text", ["window:size=7,site=all", "recurrent:tokens=3", "recurrent:tokens=2,site=decoder", "store:top_k=3"])
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_token_by_token_equals_the_segment(text, kind):
    trial = Trial(lambda: mt.memory(text), kind)
    reader = trial.reader(2)
    for tokens in random_segments(2, 3):
        one_by_one = reader.copy().token_by_token(tokens)
        np.testing.assert_allclose(one_by_one, reader.read(tokens), atol=1e-10)


def test_rows_to_be_written_stand_behind_the_text_of_each_row():
    """Padding of a batch does not move them (regression)."""
    for kind in ("encoder-decoder", "decoder-only"):
        trial = Trial(lambda: mt.memory("recurrent", tokens=2, site="decoder"), kind)
        together, alone = trial.reader(2), trial.reader(1)
        for tokens in random_segments(2, 3):
            out = together.read(tokens, [LENGTH, 2])
            np.testing.assert_allclose(out[1:, :2], alone.read(tokens[1:, :2]), atol=1e-10)


# Training


def gradient(trial, segments, every):
    """Of all weights together, for gradients that stop after `every` segments."""
    w = {name: Var(weight) for name, weight in trial.model.weights.items()}
    reader, total = trial.reader(segments.shape[1], w), 0.0
    for t, tokens in enumerate(segments):
        if every and t and t % every == 0:
            reader.run.detach()
        hidden = reader.hidden(tokens)
        total = total + (hidden * hidden * np.cos(np.arange(hidden.size).reshape(hidden.shape))).sum()
    backward(total)
    return np.concatenate([(x.grad if x.grad is not None else np.zeros(x.shape)).ravel() for x in w.values()])


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_another_depth_of_truncation_gives_other_gradients(kind):
    segments = random_segments(2, 4)
    trial = Trial(lambda: mt.memory("recurrent", tokens=2), kind)
    one, two, four, full = (gradient(trial, segments, every) for every in (1, 2, 4, None))
    assert np.max(np.abs(one - two)) > 1e-3
    assert np.max(np.abs(two - full)) > 1e-3
    np.testing.assert_array_equal(four, full)
    for spec in ("window:size=8", "store:top_k=3"):
        cut, open_ = (Trial(lambda text=f"{spec},gradient={how}": mt.memory(text), kind) for how in ("none", "rows"))
        np.testing.assert_array_equal(gradient(cut, segments, 1), gradient(cut, segments, None))
        assert np.max(np.abs(gradient(open_, segments, 1) - gradient(open_, segments, None))) > 1e-3


def test_the_trainer_truncates_where_it_is_told():
    losses = []
    for bptt_segments in (1, 2, None):
        model = small_model("decoder-only", np.float32)
        trainer = Trainer(model, mt.memory("recurrent", tokens=2), learning_rate=1e-2, bptt_segments=bptt_segments)
        tokens = np.moveaxis(random_segments(2, 4), 0, 1)
        losses.append([trainer.step(None, tokens) for _ in range(3)])
    assert losses[0][0] == losses[1][0] == losses[2][0]  # the first loss is that of the same weights
    assert len({tuple(x) for x in losses}) == 3


@pytest.mark.parametrize("bptt_segments", [1, None])
def test_what_a_memory_starts_from_is_trained(bptt_segments):
    """However soon gradients stop (regression)."""
    model = small_model("decoder-only", np.float32)
    trainer = Trainer(model, mt.memory("recurrent", tokens=2), learning_rate=1e-2, bptt_segments=bptt_segments)
    before = model.weights["memory.recurrent.tokens"].copy()
    trainer.step(None, np.moveaxis(random_segments(2, 3), 0, 1))
    assert (model.weights["memory.recurrent.tokens"] != before).all()


def test_the_gate_moves():
    model = small_model("decoder-only", np.float32)
    trainer = Trainer(model, mt.memory("store", top_k=3, merge="gate", gradient="none"), learning_rate=1e-2, schedule="constant")
    tokens = np.moveaxis(random_segments(4, 4), 0, 1)
    gate = model.weights["memory.store.gate"]
    assert gate.tolist() == [0, 0]
    for _ in range(8):
        trainer.step(None, tokens)
    assert np.max(np.abs(gate)) > 0.1  # at the model's own rate it could have moved by 0.08 at most


def test_an_optional_gate_closes_a_memory():
    trial = Trial(lambda: mt.memory("store", top_k=3, merge="gate"), "decoder-only")
    trial.model.weights["memory.store.gate"][:] = -80
    reader, plain = trial.reader(2), trial.reader(2, without=True)
    for tokens in random_segments(2, 3):
        np.testing.assert_allclose(reader.read(tokens), plain.read(tokens), atol=1e-12)


# The published ones, against what their papers say


def test_the_mass_told_is_the_attention_of_the_queries_that_count():
    """Summed over heads and real queries: each query of each head gives 1 to its segment and its memory together."""
    told = []

    class Told(HeavyHitters):
        def write(self, state, site, layer, new):
            total = np.where(new.valid, new.mass, 0).sum(axis=1) + (0 if new.view_mass is None else new.view_mass.sum(axis=1))
            told.append((layer, total, new.mass.shape, new.valid.shape))
            return super().write(state, site, layer, new)

    reader = Reader(decoder("rotary"), Told(size=6), 2)
    for i in range(0, 12, 4):
        reader.read(TOKENS[:, i : i + 4], [4, 3])
    assert len(told) == 6
    for _, total, mass, valid in told:
        assert mass == valid
        np.testing.assert_allclose(total, [4 * 4, 3 * 4], atol=1e-9)


def test_mass_is_of_the_text_alone_where_memory_rows_join_the_sequence():
    """`recurrent` puts rows before and behind the text; the mass of `write` must be the text's (regression)."""
    shapes = []

    class Told(HeavyHitters):
        def write(self, state, site, layer, new):
            shapes.append((new.mass.shape, new.valid.shape))
            return super().write(state, site, layer, new)

    model = decoder("rotary")
    recurrent = mt.memory("recurrent:tokens=3")
    model.add_memory_weights(recurrent)
    log_probs_in_chunks(model, Stack([recurrent, Told(size=6)]), TOKENS, 4)
    assert all(mass == valid for mass, valid in shapes)


def test_a_memory_that_asks_for_mass_can_generate():
    """The cache grows, the mass does not (regression)."""
    trial = Trial(lambda: HeavyHitters(site="all"), "encoder-decoder")
    reader = trial.reader(2)
    for tokens in random_segments(2, 2):
        np.testing.assert_allclose(reader.copy().token_by_token(tokens), reader.read(tokens), atol=1e-10)
