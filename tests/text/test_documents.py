"""Documents to train on: Python's own, long texts in parts, and the split into what is held out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.text import documents as text


def test_python_topics():
    topics = text.python_topics()
    assert list(topics) == sorted(topics)
    assert len(topics) > 50
    assert "lambda" in topics["lambda"]
    assert sum(map(len, topics.values())) > 200_000


@given(
    documents=st.dictionaries(st.text(), st.text(), min_size=2, max_size=20),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(),
)
def test_a_split_is_a_partition_of_whole_documents(documents, fraction, seed):
    train, held_out = text.split_documents(documents, fraction, seed)
    assert train and held_out
    assert train | held_out == documents
    assert len(train) + len(held_out) == len(documents)
    assert list(train) == sorted(train) and list(held_out) == sorted(held_out)
    backwards = dict(reversed(documents.items()))
    assert text.split_documents(backwards, fraction, seed) == (train, held_out)


def test_a_split_respects_the_fraction_and_the_seed():
    topics = text.python_topics()
    total = sum(len(value.encode()) for value in topics.values())
    splits = [text.split_documents(topics, 0.1, seed)[1] for seed in range(5)]
    for held_out in splits:
        assert 0.08 * total < sum(len(value.encode()) for value in held_out.values()) <= 0.1 * total
    assert len({tuple(held_out) for held_out in splits}) == 5


def test_a_split_is_the_same_for_ever():
    documents = {letter: letter * 10 for letter in "abcdefghij"}
    assert list(text.split_documents(documents, 0.3, 7)[1]) == ["c", "e", "j"]


@pytest.mark.parametrize(
    "arguments, error, field",
    [
        (({"a": "x"}, 0.5, 0), InvalidValue, "documents"),
        (({}, 0.5, 0), InvalidValue, "documents"),
        (({"a": "x", "b": 3}, 0.5, 0), InvalidType, "documents"),
        (({"a": "x", "b": "y"}, 0, 0), InvalidValue, "held_out_fraction"),
        (({"a": "x", "b": "y"}, 1.0, 0), InvalidValue, "held_out_fraction"),
        (({"a": "x", "b": "y"}, float("nan"), 0), InvalidValue, "held_out_fraction"),
        (({"a": "x", "b": "y"}, True, 0), InvalidType, "held_out_fraction"),
        (({"a": "x", "b": "y"}, 0.5, 1.0), InvalidType, "seed"),
    ],
)
def test_split_arguments_are_checked(arguments, error, field):
    with pytest.raises(error, match=field):
        text.split_documents(*arguments)
