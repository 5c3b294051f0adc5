"""Working memory: which rows stay, where, and what is dropped."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import Segment, Stack
from mini_tfm.memory.run import members_of
from mini_tfm.testing.trial import LENGTH, Reader, Tap, random_segments, small_model

SEGMENTS = random_segments(2, 5)


def positions_after(text, lengths, kind="decoder-only", key="decoder.0."):
    """Positions held by each stream after segments of these lengths."""
    reader = Reader(small_model(kind), mt.memory(text), 2)
    for tokens, n in zip(SEGMENTS, lengths, strict=False):
        reader.read(tokens, n)
    state = reader.run.states[0]
    return [state[key + "positions"][b, state[key + "valid"][b]].tolist() for b in range(2)]


@pytest.mark.parametrize("size", [1, 4, 5, 6, 25, 1000])
def test_the_last_rows_stay_in_order(size):
    assert positions_after(f"window:size={size}", [[5, 5]] * 5) == [list(range(max(0, 25 - size), 25))] * 2


def test_streams_advance_by_their_own_tokens():
    assert positions_after("window:size=4", [[5, 2], [5, 0], [0, 3]]) == [[6, 7, 8, 9], [1, 2, 3, 4]]


@pytest.mark.parametrize("sinks", [1, 2, 3])
def test_sinks_are_the_first_of_the_stream(sinks):
    last = [[15 + sinks - 4 + i for i in range(4 - sinks)], [5 + sinks - 4 + i for i in range(4 - sinks)]]
    expected = [list(range(sinks)) + rows for rows in last]
    assert positions_after(f"window:size=4,sinks={sinks}", [[5, 1], [5, 1], [5, 3]]) == expected


def test_a_window_longer_than_what_there_is_holds_what_there_is():
    assert positions_after("window:size=9,sinks=3", [[5, 0], [1, 1]]) == [[0, 1, 2, 3, 4, 5], [0]]


@pytest.mark.parametrize(
    ("option", "kind", "banks"),
    [
        ("", "decoder-only", {"decoder.0", "decoder.1"}),
        ("", "encoder-decoder", {"cross"}),
        ("", "encoder-only", {"encoder.0", "encoder.1"}),
        (",site=encoder", "encoder-decoder", {"encoder.0", "encoder.1"}),
        (",site=decoder", "encoder-decoder", {"decoder.0", "decoder.1"}),
        (",site=all", "encoder-decoder", {"encoder.0", "encoder.1", "decoder.0", "decoder.1", "cross"}),
    ],
)
def test_the_site_says_where_rows_are_kept(option, kind, banks):
    run = Reader(small_model(kind), mt.memory("window:size=4" + option), 1).run
    assert {name.rpartition(".")[0] for name in run.states[0]} == banks


def test_what_is_dropped_is_what_was_oldest():
    tap = Tap(passes=False)
    reader = Reader(small_model("decoder-only"), Stack([mt.memory("window", size=7, sinks=1), tap]), 1)
    for tokens in SEGMENTS[:3]:
        reader.read(tokens[:1])
    assert [position for _, layer, position, _ in tap.rows(0) if layer == 0] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_memory_stays_bounded():
    reader = Reader(small_model("decoder-only"), mt.memory("window", size=6), 1)
    sizes = []
    for _ in range(4):
        for tokens in SEGMENTS:
            reader.read(tokens[:1])
        sizes.append(reader.run.nbytes())
    assert len(set(sizes)) == 1 and reader.run.start.tolist() == [20 * LENGTH]


def test_positions_do_not_run_out():
    """Far into a stream the distances, and so the outputs, are those of its beginning."""
    near, far = (Reader(small_model("decoder-only"), mt.memory("window", size=8), 1) for _ in range(2))
    far.run.start = np.array([1 << 24])
    for tokens in SEGMENTS:
        np.testing.assert_allclose(near.read(tokens[:1]), far.read(tokens[:1]), atol=1e-9)


@pytest.mark.parametrize(("positions", "same"), [("cache", True), ("true", False)])
def test_sinks_are_as_near_as_their_places_in_the_window(positions, same):
    """With the true distance the same rows give other outputs, the longer ago the stream began."""
    near, far = (Reader(small_model("decoder-only"), mt.memory("window", size=8, sinks=2, positions=positions), 1) for _ in range(2))
    for reader in (near, far):
        reader.read(SEGMENTS[0][:1])
    far.run.start = far.run.start + 1000
    for tokens in SEGMENTS[1:]:
        out, other = near.read(tokens[:1]), far.read(tokens[:1])
    assert np.allclose(out, other, atol=1e-12) == same


def shown(text, lengths):
    """Positions in the view of the last memory of `text`, each stream's, relative to the segment."""
    reader = Reader(small_model("decoder-only"), made := mt.memory(text), 2)
    for tokens, n in zip(SEGMENTS, lengths, strict=False):
        reader.read(tokens, n)
    start, member = reader.run.start, members_of(made)[-1]
    view = member.view(reader.run.states[-1], "decoder", 0, Segment(9, "decoder", start, start))
    return [(view.positions[b, view.valid[b]] - start[b]).tolist() for b in range(2)]


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("window:size=6,sinks=2", [-6, -5, -4, -3, -2, -1], [-4, -3, -2, -1]),
        ("window:size=6,sinks=2,positions=true", [-20, -19, -4, -3, -2, -1], [-4, -3, -2, -1]),
        ("window:size=6", [-6, -5, -4, -3, -2, -1], [-4, -3, -2, -1]),
        ("window:size=3+window:size=6,sinks=2", [-9, -8, -7, -6, -5, -4], [-4]),
    ],
)
def test_places_are_counted_back_from_the_newest_row(text, first, second):
    """Of a window behind another one that is not the last row read."""
    assert shown(text, [[5, 1], [5, 1], [5, 0], [5, 2]]) == [first, second]


@pytest.mark.parametrize(("text", "learns"), [("window:size=32", True), ("store:top_k=8", True), ("window:size=32,gradient=none", False)])
def test_what_only_a_later_segment_asks_for_is_learned_through_the_rows(text, learns):
    """At the cross site the encoder's only teacher is the decoder that looks at its rows, a segment later."""
    config = mt.Config(vocab_size=24, d_model=16, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=4)
    trainer = mt.Trainer(mt.Transformer(config, seed=0), mt.memory(text), learning_rate=1e-2, schedule="constant")
    rng = np.random.default_rng(0)
    source, target = np.full((32, 2, 4), 20), np.full((32, 2, 1), 21)
    for _ in range(150):
        source[:, 0] = rng.integers(12, 20, (32, 4))
        source[:, 0, 1] = target[:, 1, 0] = rng.integers(3, 11, 32)
        loss = 2 * float(trainer.step(source, target))
    assert loss < 0.1 if learns else loss > 1
