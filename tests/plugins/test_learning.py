"""A model learns to ask its memory: associative retrieval, as associative.py says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from associative import CHANCE, learned, untrained

LEARNED = [
    "window:size=8",
    "h2o:size=8,sinks=0",
    "tova:size=8",
    "snapkv:size=8,recent=2",
    "knorm:size=8",
    "keydiff:size=8",
    "window:size=4+compressive:size=8,rate=1",
    "knn:top_k=4",
    "store:top_k=4",
    "exchange:top_k=4",
    "infini:rule=linear",
    "infini",
    "gated_delta",
    "titans",
    "titans:depth=2",
    "window:size=4+infini",
    "window:size=4+knn:top_k=4",
]


@pytest.mark.long
@pytest.mark.parametrize("text", LEARNED)
def test_what_was_said_two_segments_ago_is_known(text):
    assert learned(text, [800])[0] > 0.9


@pytest.mark.long
@pytest.mark.parametrize("text", ["none", "window:size=3", "prefix:tokens=4", "product_keys:n=8"])
def test_what_is_not_remembered_is_guessed(text):
    """The question cannot be answered from its own segment, from a window that has lost the pairs, or from trained rows."""
    assert learned(text, [400])[0] < CHANCE + 0.1


@pytest.mark.long
def test_rows_kept_by_their_score_serve_a_model_that_was_trained_with_all():
    """5 of 8 rows: the newest have two of the four pairs."""
    newest, *others = untrained(
        ["window:size=5", "h2o:size=5,sinks=0,recent=0", "tova:size=5", "snapkv:size=5,recent=0,pool=3", "keydiff:size=5"]
    )
    assert newest < 0.65 and min(others) > newest + 0.1
