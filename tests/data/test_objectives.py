"""Objectives: every token or pair exactly once an epoch, nothing across a document's end, and what the papers say is left out."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from helpers import assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st
from variants import tiny_model, tokens

import mini_tfm as mt
from mini_tfm import _core
from mini_tfm.autodiff import value_of
from mini_tfm.compare import Recall
from mini_tfm.data import Corpus, Curriculum, Mixture, NextSegment, Pairs, SpanDenoising, TextStreams
from mini_tfm.data.batches import Batch, Example, fields, lay_out
from mini_tfm.data.packing import BLOCK, SegmentLine, SegmentLines
from mini_tfm.errors import InvalidValue
from mini_tfm.stream import Stream
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm.train import Trainer
from mini_tfm.train.segments import read_batch

BOS, EOS, PAD = 1, 2, 0
MEMORIES = [None, "window:size=5", "window:size=4,sinks=2,site=all", "recurrent:tokens=2", "store:top_k=3", "window:size=3+store:top_k=2"]


def documents_of(lengths, first=3):
    """Documents whose tokens are all different: each says where it is from."""
    starts = first + np.concatenate([[0], np.cumsum(lengths)])
    return [np.arange(a, b) for a, b in itertools.pairwise(starts)]


def segments_of(batch):
    """(row, segment, source, target, whether a document begins) of what is not a pause."""
    for b, t in np.argwhere(batch.target_lengths > 0):
        source = None if batch.source is None else batch.source[b, t, : batch.source_lengths[b, t]]
        yield b, t, source, batch.target[b, t, : batch.target_lengths[b, t]], batch.begins is not None and batch.begins[b, t]


def rows_of_epochs(data, n):
    """Rows of each of the first `n` epochs."""
    return [behind - first for _, _, first, behind in itertools.islice(data._rows.epochs(0, 1 << 40), n)]


def an_epoch(data, epoch=0):
    """The rows of an epoch, as batches of one row, cut out of the batches of its steps."""
    *before, here = rows_of_epochs(data, epoch + 1)
    for position in range(sum(before), sum(before) + here):
        step, b = divmod(position, data.batch_size)
        batch = data.batch(step)
        yield dataclasses.replace(batch, **{
            f.name: getattr(batch, f.name)[b : b + 1] for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None
        })  # fmt: skip


shapes = given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    length=st.integers(1, 9),
    n=st.integers(1, 5),
    size=st.integers(1, 4),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 11),
    has_encoder=st.booleans(),
)


# Packing


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), length=st.integers(1, 7), data=st.data())
def test_the_line_has_each_token_once_in_order(lengths, length, data):
    corpus, shift = Corpus.of(documents_of(lengths)), data.draw(st.integers(0, length - 1))
    line = SegmentLine(corpus, length, shift)
    windows = list(line.windows(0, len(line)))
    assert [(w.document, at) for w in windows for at in range(w.start, w.stop)] == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    for d, n in enumerate(lengths):
        first, *whole = [w.stop - w.start for w in windows if w.document == d]
        assert first == n <= length or (n > length and first == 1 + (shift + d) % length)
        assert whole[:-1] == [length] * len(whole[:-1]) and 0 < (whole or [1])[-1] <= length
    first, n = data.draw(st.integers(0, 2 * len(line))), data.draw(st.integers(0, 2 * len(line)))
    assert list(line.windows(first, n)) == [windows[(first + k) % len(line)] for k in range(n)]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), length=st.integers(1, 9))
def test_the_sizes_of_all_lines_are_known_beforehand(lengths, length):
    corpus = Corpus.of(documents_of(lengths))
    lines = SegmentLines(corpus, length)
    assert lines.sizes.tolist() == [len(SegmentLine(corpus, length, shift)) for shift in range(lines.n)]
    assert lines.n == (length if max(lengths) > length else 1), "documents of one segment each are cut nowhere"
    assert lines.padding == pytest.approx(1 - lines.n * sum(lengths) / (lines.sizes.sum() * length))


def test_a_line_of_more_documents_than_a_block():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 3 * BLOCK + 17)
    corpus = Corpus.of(documents_of(lengths))
    for shift, size in enumerate(SegmentLines(corpus, 2).sizes):
        line = SegmentLine(corpus, 2, shift)
        windows = list(line.windows(0, len(line)))
        assert len(line) == size and sum(w.stop - w.start for w in windows) == lengths.sum()
        assert windows[-1].document == len(lengths) - 1
        for first in rng.integers(0, len(line), 50):
            assert list(line.windows(int(first), 3)) == [windows[(first + k) % len(line)] for k in range(3)]


# Next segment and language modelling


@shapes
@examples(3)
def test_every_token_is_a_target_once_an_epoch(lengths, length, n, size, seed, epoch, has_encoder):
    documents = documents_of(lengths)
    data = NextSegment(documents, segment_length=length, n_segments=n, batch_size=size, seed=seed, has_encoder=has_encoder)
    epochs = rows_of_epochs(data, 2 * data._lines.n)
    assert data.steps_per_epoch * size == pytest.approx(np.mean(epochs)), "on average"
    start_of = {int(d[0]): d for d in documents}
    found = []
    for batch in an_epoch(data, epoch):
        before = None
        for _, t, source, target, begins in segments_of(batch):
            found += target.tolist()
            document = next(d for d in documents if d[0] <= target[0] <= d[-1])
            at = int(target[0] - document[0])
            np.testing.assert_array_equal(target, document[at : at + len(target)])  # nothing across its end
            assert len(target) == length or at == 0 or target[-1] == document[-1], "shorter first and last alone"
            assert begins == (int(target[0]) in start_of) or batch.begins is None
            if t and not begins:
                assert before[-1] + 1 == target[0], "a row goes on where it was, unless a document begins"
            if has_encoder:
                np.testing.assert_array_equal(source, document[max(0, at - length) : at] if at else [BOS])
            else:
                assert source is None
            before = target
    assert sorted(found) == list(range(3, 3 + sum(lengths)))


def test_epochs_have_other_orders_and_rows():
    data = NextSegment(documents_of([50, 7, 31, 12]), segment_length=4, n_segments=3, batch_size=2, seed=1)
    epochs = [[b.target.tobytes() for b in an_epoch(data, epoch)] for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) > 1, "rows are cut elsewhere, too"


def cuts_of(data, epoch):
    """The first tokens of all segments of an epoch."""
    return {int(s[3][0]) for batch in an_epoch(data, epoch) for s in segments_of(batch)}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("has_encoder", [True, False])
def test_a_document_is_cut_at_other_places_in_each_epoch(has_encoder, n):
    """Or a model learns it by heart, cuts and all. In as many epochs as a segment has tokens, each token once begins one."""
    documents = documents_of([41, 7, 30, 5])
    shape = {"segment_length": 8, "n_segments": n, "batch_size": 3, "has_encoder": has_encoder}
    data = NextSegment(documents, seed=5, **shape)
    for turn in (0, 8):
        cuts = [cuts_of(data, epoch) for epoch in range(turn, turn + 8)]
        for document in documents:
            inner = sorted(at for c in cuts for at in c & set(document[1:].tolist()))
            assert inner == (document[1:].tolist() if len(document) > 8 else []), "one segment is not cut"
            assert all(int(document[0]) in c for c in cuts)
    firsts = [
        [min(cuts_of(each, epoch) - {3}) for epoch in range(turn, turn + 8)]
        for each, turn in ((data, 0), (data, 8), (NextSegment(documents, seed=6, **shape), 0))
    ]
    assert len({*map(tuple, firsts)}) == 3, "in an order of its own in each turn, and with each seed"


def test_a_stage_of_a_curriculum_is_cut_elsewhere_than_the_one_before():
    """It begins with epoch 0 again."""
    data = NextSegment(documents_of([400]), segment_length=64, n_segments=1, batch_size=1)
    assert len({min(cuts_of(data.with_segments(n), 0) - {3}) for n in (1, 2, 3, 6)}) == 4


def test_where_a_text_is_cut_changes_no_loss_if_all_of_it_is_remembered():
    """A decoder-only model with a window sees the same before each token; short first segments take no more room than they have."""
    model, memory = tiny_model("decoder only, llama"), mt.memory("window:size=99")
    rng = np.random.default_rng(1)
    corpus = Corpus.of([tokens(rng, n) for n in (21, 13, 4)])
    data, losses = NextSegment(corpus, segment_length=5, n_segments=1, batch_size=1, has_encoder=False), []
    for shift in range(5):
        line = SegmentLine(corpus, 5, shift)
        batch = lay_out([[data._example(window, (0, 0, 0)) for window in line.windows(0, len(line))]], PAD)
        counted = np.arange(5) < batch.target_lengths[0, :, None]
        losses.append(token_losses(model, memory, batch)[0][counted])
    assert len(losses[0]) == corpus.n_tokens
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-9)


@pytest.mark.parametrize("make", ["next", "lm", "denoise", "pairs"])
def test_a_batch_is_a_pure_function_of_seed_and_step(make):
    def data(seed):
        rng = np.random.default_rng(0)
        shape = {"segment_length": 6, "n_segments": 2, "batch_size": 3, "seed": seed}
        texts = documents_of([40, 9, 3, 25, 17])
        if make == "denoise":
            return SpanDenoising(texts, vocab_size=200, **shape)
        if make == "pairs":
            return Pairs([(rng.integers(3, 90, 1 + i % 7), rng.integers(3, 90, 1 + i % 4)) for i in range(40)], batch_size=3, seed=seed)
        return NextSegment(texts, has_encoder=make == "next", **shape)

    one, other = data(3), data(3)
    for step in (5, 0, 5, 300, 17):
        assert_same_bits(fields(one.batch(step)), fields(other.batch(step)))
    assert len({one.batch(step).target.tobytes() for step in range(6)}) == 6
    assert any(not np.array_equal(data(4).batch(step).target, one.batch(step).target) for step in range(3))
    assert one.state == other.state != data(4).state
    assert one.batch(np.int64(2)).target.shape == one.batch(2).target.shape


def test_what_is_left_of_padding_is_told():
    data = NextSegment(documents_of([50, 7, 31, 12]), segment_length=4, n_segments=3, batch_size=1)
    assert sum(batch.n_tokens for batch in an_epoch(data)) == 100
    segments = [sum(len(list(segments_of(batch))) for batch in an_epoch(data, epoch)) for epoch in range(4)]
    assert data.padding == pytest.approx(1 - 100 / (4 * np.mean(segments))) and min(segments) >= 13 + 2 + 8 + 3
    joined = NextSegment(Corpus.of(documents_of([50, 7, 31, 12])).joined(), segment_length=4, n_segments=5, batch_size=1)
    assert joined.padding == pytest.approx(1 - 25 / (25 + 3 / 4)), "in three epochs of four, its first and last segment are short"


# A packed document is what it is alone


def token_losses(model, memory, batch):
    """(B, n, L): nats of each target token."""
    stream = Stream(model, memory, len(batch.target), training=True)
    found = np.zeros(batch.target.shape)
    for t, hidden in read_batch(stream, batch):
        scores = _core.log_softmax(value_of(stream.logits(value_of(hidden))))
        found[:, t] = -np.take_along_axis(scores, batch.target[:, t, :, None], 2)[..., 0]
    return found


def spans_of(batch, b):
    """The documents in a row: (first segment, behind the last)."""
    n = int((batch.target_lengths[b] > 0).sum())
    begins = [0, *(t for t in range(1, n) if batch.begins is not None and batch.begins[b, t]), n]
    return list(itertools.pairwise(begins))


def alone(batch, b, start, stop):
    names = [f.name for f in dataclasses.fields(batch) if getattr(batch, f.name) is not None]
    return dataclasses.replace(
        batch, **{name: getattr(batch, name)[b : b + 1, start:stop] for name in names if name != "begins"}, begins=None
    )


@pytest.mark.parametrize("text", MEMORIES)
@pytest.mark.parametrize("variant", ["pre norm", "decoder only", "relative", "rotary"])
def test_a_packed_document_has_the_losses_it_has_alone(variant, text):
    model = tiny_model(variant)
    memory = mt.memory(text) if text else None
    model.add_memory_weights(memory, 0)
    rng = np.random.default_rng(1)
    documents = [tokens(rng, n) for n in (9, 3, 5, 1, 12, 4, 4, 2)]
    data = NextSegment(documents, segment_length=4, n_segments=5, batch_size=3, has_encoder=model.config.has_encoder)
    batch = data.batch(0)
    assert batch.begins is not None and batch.begins[:, 1:].sum() > 3
    packed = token_losses(model, memory, batch)
    for b in range(3):
        for start, stop in spans_of(batch, b):
            lone = token_losses(model, memory, alone(batch, b, start, stop))
            counted = np.arange(batch.target.shape[2]) < batch.target_lengths[b, start:stop, None]
            np.testing.assert_allclose(packed[b, start:stop][counted], lone[0][counted], rtol=1e-11)


@pytest.mark.parametrize("text", MEMORIES[1:])
def test_neighbours_do_not_matter(text):
    """Other documents in its row and in the others: not a digit changes."""
    model, memory = tiny_model("pre norm"), mt.memory(text)
    model.add_memory_weights(memory, 0)
    data = NextSegment([tokens(np.random.default_rng(1), n) for n in (6, 9, 7)], segment_length=4, n_segments=10, batch_size=1)
    batch = data.batch(0)  # all three
    spans = spans_of(batch, 0)
    assert len(spans) > 2
    before = token_losses(model, memory, batch)
    for start, stop in spans:
        others = np.ones(batch.target.shape[1], bool)
        others[start:stop] = False
        changed = dataclasses.replace(batch, source=batch.source.copy(), target=batch.target.copy())
        for array in (changed.source, changed.target):
            array[:, others] = 3 + (array[:, others] + 2) % 10
        assert_same_bits(token_losses(model, memory, changed)[:, ~others], before[:, ~others])


def test_gradients_stop_at_a_document():
    """The gradient of a row of two documents is the sum of theirs, each alone."""

    def trainer():
        return Trainer(tiny_model("pre norm"), mt.memory("recurrent:tokens=2"), clip=None, learning_rate=0.0, weight_decay=0.0)

    def gradients(batch):
        one = trainer()
        one.step(*fields(batch))
        return {name: g * batch.n_tokens for name, g in one.optimizer.grads.items()}

    batch = NextSegment([tokens(np.random.default_rng(1), n) for n in (8, 12)], segment_length=4, n_segments=9, batch_size=1).batch(0)
    parts = [gradients(alone(batch, 0, *span)) for span in spans_of(batch, 0)]
    assert len(parts) >= 2
    for name, g in gradients(batch).items():
        np.testing.assert_allclose(g, sum(part[name] for part in parts), rtol=1e-9, atol=1e-12)


def test_a_document_that_begins_is_not_asked_of_the_memory():
    """With source_dropout the decoder sees the memory alone, but not where that is empty."""
    first, second = [5, 6, 7, 8], [9, 10, 11, 4]
    rows = [[Example(np.array(first), np.array(first), begins=True), Example(np.array(second), np.array(second), begins=True)]]
    losses = []
    for change in (0, 1):
        batch = lay_out(rows, PAD)
        batch.source[0, 1] += change
        trainer = Trainer(tiny_model("pre norm"), source_dropout=0.999999)
        losses.append(trainer.step(*fields(batch)))
    assert losses[0] != losses[1]


def test_a_fact_is_not_asked_for_in_another_document():
    recall = Recall(ByteTokenizer())
    length = recall.length + 4
    one, other = np.full(length, 40), np.full(length, 41)
    row = [Example([BOS], one, begins=True), Example(one, one), Example([BOS], other, begins=True), Example(other, other)]
    batch = lay_out([row], PAD)
    _, asked = recall.plant(batch, (0,), facts_at=1)
    assert asked[0, 1] >= 0 and (asked[0, 2:] == -1).all()


@pytest.mark.parametrize("begins", [np.ones((1, 3), bool), np.ones((2, 2)), [[True], [False]]])
def test_begins_of_the_wrong_shape_are_refused(begins):
    model = tiny_model("pre norm")
    with pytest.raises(InvalidValue, match=r"begins: expected bool of shape \(2, 2\)"):
        Trainer(model).step(np.full((2, 2, 3), 5), np.full((2, 2, 3), 5), begins=begins)


# Span denoising


def restored(source, target, first_sentinel):
    """The tokens, put together from what is left and what was left out."""
    spans, number = {}, None
    for token in target:
        if token > first_sentinel - 30:
            number = int(token)
            spans[number] = []
        else:
            spans[number].append(int(token))
    marks = list(spans)
    assert marks == [first_sentinel - k for k in range(len(marks))] and spans[marks[-1]] == [] and target[-1] == marks[-1]
    whole, used = [], []
    for token in source:
        if int(token) in spans:
            used.append(int(token))
            whole += spans[int(token)]
        else:
            whole.append(int(token))
    assert used == marks[:-1], "each sentinel stands once, in order"
    return whole, [spans[mark] for mark in marks[:-1]]


@shapes
@examples(3)
def test_every_token_is_left_or_left_out_once_an_epoch(lengths, length, n, size, seed, epoch, has_encoder):
    data = SpanDenoising(documents_of(lengths), vocab_size=600, segment_length=length, n_segments=n, batch_size=size, seed=seed,
                         eos_id=599 - 40, has_encoder=has_encoder)  # fmt: skip
    found = []
    for batch in an_epoch(data, epoch):
        for b, t, source, target, _ in segments_of(batch):
            if not has_encoder:
                scored = batch.weights[b, t, : len(target)] > 0
                assert (np.diff(scored.astype(int)) >= 0).all() and target[~scored][-1] == 559
                source, target = target[~scored][:-1], target[scored]
            whole, _ = restored(source, target, 599)
            assert whole == list(range(whole[0], whole[0] + len(whole))) and len(whole) <= length
            found += whole
    assert sorted(found) == list(range(3, 3 + sum(lengths)))


def test_as_much_is_left_out_as_the_paper_says():
    """15 % in spans of 3: of 512 tokens 77 in 26 spans, as T5 has it (arXiv 1910.10683, section 3.1.4)."""
    data = SpanDenoising([np.arange(3, 3 + 512 * 40) % 5000], vocab_size=5100, segment_length=512, n_segments=1, batch_size=1)
    assert data.n_sentinels == 27 == SpanDenoising.sentinels(512)
    lengths, places, whole = [], np.zeros(512), 0
    for batch in an_epoch(data):
        source, target = batch.source[0, 0], batch.target[0, 0]
        if len(source) + len(target) < 512 + 26 + 27:
            continue  # the document's first segment, and its last
        whole += 1
        assert len(source) == 512 - 77 + 26 and len(target) == 77 + 27, "all whole segments are as long as each other"
        assert (np.diff(np.flatnonzero(source > 5099 - 27)) > 1).all(), "no two spans touch"
        marks = np.flatnonzero(target > 5099 - 27)
        lengths += (np.diff(marks) - 1).tolist()
        at = 0
        for token in source:
            if token > 5099 - 27:
                n = lengths[-26 + int(5099 - token)]
                places[at : at + n] += 1
                at += n
            else:
                at += 1
    assert whole == 39 and np.mean(lengths) == pytest.approx(77 / 26) and min(lengths) == 1 and max(lengths) > 6
    halves = places[:256].sum() / places.sum()
    assert 0.44 < halves < 0.56 and places[:40].sum() > 0 and places[-40:].sum() > 0, "anywhere in the segment"


def test_the_same_segment_is_noised_otherwise_in_another_epoch():
    data = SpanDenoising([np.arange(3, 35)], vocab_size=60, segment_length=32, n_segments=1, batch_size=1)
    assert len({data.batch(epoch).source.tobytes() for epoch in range(20)}) > 15


def test_text_that_takes_the_sentinels_is_refused():
    data = SpanDenoising([np.arange(3, 35)], vocab_size=36, segment_length=16, n_segments=1, batch_size=2)
    with pytest.raises(InvalidValue, match=r"vocab_size: 36 leaves ids up to 33 for the text .* document 0 holds 34"):
        [data.batch(step) for step in range(3)]


# Pairs


def pairs_of(n, seed=0):
    """Pairs that say who they are: a source of i, a target of 1000 + i."""
    rng = np.random.default_rng(seed)
    return [(np.full(rng.integers(1, 20), 3 + i), np.full(rng.integers(1, 12), 1003 + i)) for i in range(n)]


@given(n=st.integers(1, 60), size=st.integers(1, 7), pool=st.integers(1, 5), length=st.sampled_from([None, 4]), epoch=st.integers(0, 3))
@examples(3)
def test_every_pair_comes_once_an_epoch(n, size, pool, length, epoch):
    pairs = pairs_of(n)
    data = Pairs(pairs, batch_size=size, segment_length=length, pool_batches=pool, seed=5)
    found, sizes = [], []
    for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
        batch = data.batch(step)
        sizes.append(len(batch.target))
        for b in range(len(batch.target)):
            source = np.concatenate([s[:k] for s, k in zip(batch.source[b], batch.source_lengths[b], strict=True)])
            target = np.concatenate([s[:k] for s, k in zip(batch.target[b], batch.target_lengths[b], strict=True)])
            i = int(source[0]) - 3
            np.testing.assert_array_equal(source, pairs[i][0])
            np.testing.assert_array_equal(target, [*pairs[i][1], EOS])
            assert batch.target_lengths[b, -1] == len(target), "behind the last segment of the source"
            assert length is None or (batch.source_lengths[b] <= length).all()
            found.append(i)
    assert sorted(found) == list(range(n)) and sum(sizes) == n and sorted(sizes)[1:] == [size] * (len(sizes) - 1)


def test_pairs_of_like_length_come_together():
    data = Pairs(pairs_of(2000), batch_size=16, seed=1)
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    full = sum(b.source_lengths.sum() + b.target_lengths.sum() for b in batches)
    room = sum(b.source.size + b.target.size for b in batches)
    assert 1 - full / room < 0.08  # 0.38 without sorting
    unsorted = Pairs(pairs_of(2000), batch_size=16, seed=1, pool_batches=1)
    batches = [unsorted.batch(step) for step in range(125)]
    assert (
        1 - sum(b.source_lengths.sum() + b.target_lengths.sum() for b in batches) / sum(b.source.size + b.target.size for b in batches)
        > 0.3
    )
    lengths = [b.source.shape[2] for b in [data.batch(step) for step in range(20)]]
    assert sorted(lengths) != lengths, "in no order"


def test_a_source_of_several_segments_goes_through_the_memory():
    """The target asks for what stood in the first of three segments."""
    rng = np.random.default_rng(0)
    letters = rng.integers(3, 7, 400)
    pairs = [(np.concatenate([[a], rng.integers(7, 12, 5)]), [a]) for a in letters]
    losses = {}
    for text in (None, "recurrent:tokens=1"):
        config = mt.Config(vocab_size=13, d_model=32, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=64)
        trainer = Trainer(mt.Transformer(config, seed=1), mt.memory(text) if text else None, learning_rate=1e-2, total_steps=120)
        losses[text] = np.mean(trainer.fit(Pairs(pairs, batch_size=16, segment_length=2), progress=False)["loss"][-10:])
    assert losses[None] > 0.6 > 0.3 > losses["recurrent:tokens=1"], losses  # of letter and end: ln 4 / 2 = 0.69


def test_pairs_for_a_model_without_an_encoder_are_one_text():
    batch = Pairs([([5, 6, 7], [8, 9]), ([10], [11, 12, 4])], batch_size=2, has_encoder=False).batch(0)
    rows = {
        tuple(row[:n]): weights[:n].tolist()
        for row, n, weights in zip(batch.target[:, 0], batch.target_lengths[:, 0], batch.weights[:, 0], strict=True)
    }
    assert batch.source is None
    assert rows == {(5, 6, 7, EOS, 8, 9, EOS): [0, 0, 0, 0, 1, 1, 1], (10, EOS, 11, 12, 4, EOS): [0, 0, 1, 1, 1, 1]}


def test_pairs_that_are_too_long():
    pairs = [*pairs_of(5), (np.arange(3, 33), np.arange(3, 18))]
    with pytest.raises(InvalidValue, match="max_source_length: expected at most 20 tokens, the source of pair 5 has 30"):
        Pairs(pairs, batch_size=2, max_source_length=20)
    with pytest.raises(InvalidValue, match="max_target_length: expected at most 12 tokens, the target of pair 5 has 15"):
        Pairs(pairs, batch_size=2, max_target_length=12)
    data = Pairs(pairs, batch_size=6, max_source_length=20, max_target_length=12, cut=True)
    batch = data.batch(0)
    assert batch.source.shape == (6, 1, 20) and batch.target.shape == (6, 1, 13)


# All


@pytest.mark.parametrize(
    ("kind", "text"),
    [("next", "window:size=5"), ("lm", "recurrent:tokens=2"), ("denoise", "recurrent:tokens=2"), ("denoise, no encoder", None),
     ("pairs", None), ("pairs, no encoder", "window:size=5")],
)  # fmt: skip
def test_a_model_learns_from_it(kind, text):
    has_encoder = kind in ("next", "denoise", "pairs")
    texts, shape = [np.tile(np.arange(3, 13), 12)], {"segment_length": 10, "n_segments": 2, "batch_size": 4, "has_encoder": has_encoder}
    if kind.startswith("pairs"):
        data = Pairs([(np.arange(3 + i % 4, 9), np.arange(4, 7)) for i in range(30)], batch_size=4, has_encoder=has_encoder)
    else:
        data = SpanDenoising(texts, vocab_size=20, **shape) if kind.startswith("denoise") else NextSegment(texts, **shape)
    layers = {} if has_encoder else {"n_encoder_layers": 0}
    model = tiny_model("pre norm", dtype=np.float32, vocab_size=20, d_model=32, d_ff=32, **layers)
    trainer = Trainer(model, mt.memory(text) if text else None, learning_rate=8e-3, total_steps=40, warmup_steps=5)
    losses = trainer.fit(data, progress=False)["loss"]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert not any(isinstance(value, np.ndarray) and value.dtype == object for value in fields(data.batch(0)))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: NextSegment([[1, 2]], segment_length=0, n_segments=1, batch_size=1), "segment_length: expected"),
        (lambda: NextSegment([[1, 2]], segment_length=2, n_segments=0, batch_size=True), "n_segments: .* batch_size: expected"),
        (lambda: NextSegment([[1, 2]], segment_length=2, n_segments=1, batch_size=1, seed=-1), "seed: expected"),
        (lambda: NextSegment([([1], [2])], segment_length=2, n_segments=1, batch_size=1), "expected texts for this objective, got pairs"),
        (lambda: NextSegment([[1, 2]], segment_length=2, n_segments=1, batch_size=1).batch(-1), "step: expected"),
        (lambda: NextSegment([[1, 2]], segment_length=2, n_segments=1, batch_size=1).batch(0.5), "step: expected"),
        (lambda: NextSegment([[1, 2]], segment_length=2, n_segments=1, batch_size=1).with_segments(0), "n_segments: expected"),
        (lambda: Pairs([[1, 2]], batch_size=1), "expected pairs for this objective, got texts"),
        (lambda: Pairs([([1], [2])], batch_size=0, pool_batches=0), "batch_size: .* pool_batches: expected"),
        (lambda: Pairs([([1], [2])], batch_size=1, segment_length=3, has_encoder=False), "segment_length: expected None"),
        (lambda: Pairs([([1], [2])], batch_size=1, max_source_length=0), "max_source_length: expected"),
        (lambda: Pairs([([1], [2])], batch_size=1).batch(-1), "step: expected"),
        (lambda: denoising(noise_density=0), "noise_density: expected"),
        (lambda: denoising(mean_span=0.5), "mean_span: expected"),
        (lambda: denoising(vocab_size=None), "vocab_size: expected"),
        (lambda: denoising(vocab_size=2), "vocab_size: expected room for 2 sentinels"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(make, told):
    with pytest.raises(InvalidValue, match=told):
        make()


def denoising(**changes):
    return SpanDenoising([[3, 4, 5]], **{"vocab_size": 20, "segment_length": 3, "n_segments": 1, "batch_size": 1, **changes})


def test_laying_out():
    batch = lay_out([[None, Example(np.array([5]), np.array([6, 7]))], [Example(np.array([8, 9]), np.array([4]), begins=True)]], PAD)
    assert batch.source.tolist() == [[[0, 0], [5, 0]], [[8, 9], [0, 0]]] and batch.source_lengths.tolist() == [[0, 1], [2, 0]]
    assert batch.target.tolist() == [[[0, 0], [6, 7]], [[4, 0], [0, 0]]] and batch.target_lengths.tolist() == [[0, 2], [1, 0]]
    assert batch.weights is None and batch.begins is None and isinstance(batch, Batch)


def test_numbers_of_numpy_are_numbers():
    """And the state, which a run saves as JSON, has Python's."""
    documents, pairs = [np.arange(3, 50)], [(np.arange(3, 9), np.arange(3, 7))]
    shape = {"segment_length": np.int64(8), "n_segments": np.int32(2), "batch_size": np.uint8(2), "seed": np.int64(1)}
    plain = {name: int(n) for name, n in shape.items()}
    noise = {"noise_density": np.float32(0.25), "mean_span": np.int64(2), "vocab_size": np.int64(99)}
    paired = {"batch_size": np.int64(1), "max_source_length": np.int64(9), "seed": np.int64(0)}
    for made, same in (
        (NextSegment(documents, **shape), NextSegment(documents, **plain)),
        (TextStreams(documents, **shape), TextStreams(documents, **plain)),
        (SpanDenoising(documents, **shape, **noise), SpanDenoising(documents, **plain, noise_density=0.25, mean_span=2, vocab_size=99)),
        (Pairs(pairs, **paired), Pairs(pairs, batch_size=1, max_source_length=9)),
        (
            Curriculum(NextSegment(documents, **shape), [(np.int64(0), np.int64(1))]),
            Curriculum(NextSegment(documents, **plain), [(0, 1)]),
        ),
        (Mixture({"a": (NextSegment(documents, **shape), np.float32(2))}), Mixture({"a": (NextSegment(documents, **plain), 2.0)})),
    ):
        assert json.loads(json.dumps(made.state)) == same.state
        assert (made.batch(np.int64(1)).target == same.batch(1).target).all()


def test_a_frame_stands_around_every_source():
    """Whole, in segments, and as one text; limits count the source alone."""
    pairs = [(np.arange(10, 14), np.array([20])), (np.arange(10, 12), np.array([21, 22]))]
    frame = ([7, 8], [9])
    whole = {tuple(source[0]): n for source, n in _sources(Pairs(pairs, batch_size=1, frame=frame, max_source_length=4))}
    assert whole == {(7, 8, 10, 11, 12, 13, 9): [7], (7, 8, 10, 11, 9): [5]}
    parts = [source for source, n in _sources(Pairs(pairs, batch_size=1, frame=frame, segment_length=4)) if len(source) == 2]
    np.testing.assert_array_equal(parts, [[[7, 8, 10, 11], [12, 13, 9, 0]], [[7, 8, 10, 11], [9, 0, 0, 0]]])
    data = Pairs(pairs, batch_size=2, frame=frame, has_encoder=False)
    assert {tuple(row[0, :4]) for row in data.batch(0).target} == {(7, 8, 10, 11)}
    assert "frame" not in Pairs(pairs, batch_size=1).state and data.state["frame"] == [[7, 8], [9]]


def _sources(data):
    batches = [data.batch(step) for step in range(data.steps_per_epoch)]
    return sorted(((batch.source[0], batch.source_lengths[0].tolist()) for batch in batches), key=lambda one: -one[0].sum())
