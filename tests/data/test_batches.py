"""Streams of segments: where they begin, what predicts what, and that a batch is a function of (seed, step)."""

import numpy as np
import pytest
from helpers import assert_same_bits

from mini_tfm.data.batches import Batch, fields
from mini_tfm.data.streams import TextStreams
from mini_tfm.errors import InvalidType, InvalidValue

BOS, PAD = 1, 0
# Every token says where it is from: document * 1000 + place, so a shift by one is seen.
DOCUMENTS = {"a": 1000 + np.arange(40), "b": 2000 + np.arange(23), "c": 3000 + np.arange(4)}


def streams(**changes):
    return TextStreams(DOCUMENTS, **{"segment_length": 5, "n_segments": 3, "batch_size": 6, **changes})


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, other = streams(seed=3), streams(seed=3)
    for step in (5, 0, 5, 99):  # in any order, however often
        assert_same_bits(fields(one.batch(step)), fields(other.batch(step)))
    later = [one.batch(step) for step in range(4)]
    assert len({batch.target.tobytes() for batch in later}) == 4
    assert (streams(seed=4).batch(0).target != one.batch(0).target).any()


@pytest.mark.parametrize("step", range(20))
def test_the_decoder_predicts_the_segment_after_the_encoders(step):
    data = streams()
    batch = data.batch(step)
    assert batch.source.shape == batch.target.shape == (6, 3, 5)
    assert batch.source_lengths.shape == batch.target_lengths.shape == (6, 3)
    for b in range(6):
        expected = None
        for t in range(3):
            s, n = batch.source_lengths[b, t], batch.target_lengths[b, t]
            source, target = batch.source[b, t, :s], batch.target[b, t, :n]
            assert (batch.source[b, t, s:] == PAD).all() and (batch.target[b, t, n:] == PAD).all()
            if n == 0:
                assert s == 0
                continue
            if s == 1 and source[0] == BOS:
                assert t == 0 and target[0] % 1000 == 0, "only a document's beginning stands behind bos"
            else:
                assert s == 5 and target[0] == source[-1] + 1, "the target goes on where the source ends"
                assert expected is None or source[0] == expected, "a segment's source is the target before"
            np.testing.assert_array_equal(np.diff(target), 1)
            expected = target[0]
            end = len(DOCUMENTS["a" if target[0] < 2000 else "b"])
            assert n == 5 or target[-1] % 1000 == end - 1, "only a document's end is short"


def test_a_document_begins_with_the_bos_segment():
    batch = streams().cut([(DOCUMENTS["b"], 0), (DOCUMENTS["b"], 7)], 3)
    np.testing.assert_array_equal(batch.source[0], [[BOS, 0, 0, 0, 0], 2000 + np.arange(5), 2005 + np.arange(5)])
    np.testing.assert_array_equal(batch.target[0], [2000 + np.arange(5), 2005 + np.arange(5), 2010 + np.arange(5)])
    np.testing.assert_array_equal(batch.source_lengths[0], [1, 5, 5])
    np.testing.assert_array_equal(batch.source[1, 0], 2007 + np.arange(5))
    np.testing.assert_array_equal(batch.target[1], [2012 + np.arange(5), 2017 + np.arange(5), [2022, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.target_lengths[1], [5, 5, 1])
    assert batch.n_tokens == 15 + 11


def test_what_lies_past_the_end_of_a_document_is_empty():
    batch = streams().cut([(DOCUMENTS["b"], 15)], 4)
    np.testing.assert_array_equal(batch.source_lengths[0], [5, 0, 0, 0])
    np.testing.assert_array_equal(batch.target_lengths[0], [3, 0, 0, 0])


def test_a_decoder_only_model_gets_the_text_itself():
    data = streams(has_encoder=False)
    batch = data.cut([(DOCUMENTS["b"], 0), (DOCUMENTS["b"], 15)], 3)
    assert batch.source is None and batch.source_lengths is None
    np.testing.assert_array_equal(batch.target[0].ravel(), 2000 + np.arange(15))
    np.testing.assert_array_equal(batch.target_lengths, [[5, 5, 5], [5, 3, 0]])


def test_beginnings_are_drawn_more_often_than_other_places():
    data = streams(batch_size=400)
    batch = data.batch(0)
    begins = (batch.source_lengths[:, 0] == 1).mean()
    assert 0.08 < begins < 0.25  # one in eight, and 1 in 35 of the other draws
    first = batch.source[batch.source_lengths[:, 0] == 5, 0, 0]
    assert len(np.unique(first)) > 35
    long = (batch.target[:, 0, 0] < 2000).mean()
    assert 0.55 < long < 0.72, "documents are drawn by their length, 40 of 63 tokens"


def test_documents_shorter_than_a_segment_are_left_out():
    data = streams()
    assert [len(document) for document in data.documents] == [40, 23]
    assert all((data.batch(step).target < 3000).all() for step in range(10))


def test_the_number_of_segments_can_be_asked_for():
    assert streams().batch(0, n_segments=2).target.shape == (6, 2, 5)


def test_a_list_of_documents_will_do():
    given = TextStreams(list(DOCUMENTS.values()), segment_length=5, n_segments=3, batch_size=6)
    assert_same_bits(fields(given.batch(3)), fields(streams().batch(3)))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"segment_length": 0}, InvalidValue, "segment_length: expected"),
        ({"segment_length": 2.5}, InvalidValue, "segment_length: expected"),
        ({"n_segments": 0}, InvalidValue, "n_segments: expected"),
        ({"batch_size": None}, InvalidValue, "batch_size: expected"),
        ({"documents": {}}, InvalidValue, "documents: expected one longer than a segment"),
        ({"segment_length": 40}, InvalidValue, "the longest has 40 tokens"),
        ({"documents": [np.ones(50)]}, InvalidType, "documents: expected arrays of token ids"),
        ({"documents": ["text " * 20]}, InvalidType, "documents: expected arrays of token ids, each .*; encode"),
        ({"documents": "text " * 20}, InvalidType, "documents: expected"),
        ({"documents": [np.ones((9, 9), int)]}, InvalidType, "documents: expected"),
    ],
)
def test_what_is_no_stream_is_refused(changes, error, told):
    with pytest.raises(error, match=told):
        TextStreams(**{"documents": DOCUMENTS, "segment_length": 5, "n_segments": 3, "batch_size": 6, **changes})


def test_fields_are_the_arguments_of_a_step():
    batch = Batch(*(np.full((1, 1, 1), i) for i in range(6)))
    assert [int(x.item()) for x in fields(batch)] == [0, 1, 2, 3, 4, 5]
