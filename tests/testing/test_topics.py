"""The small trained models of the kit use what a memory shows them, and are what their command makes."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.testing.topics import FOLDER, batch, loss_of, train, trained
from mini_tfm.testing.trial import LENGTH

KINDS = ["decoder-only", "encoder-decoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_four_tokens_of_its_own(kind):
    made = batch(kind, np.random.default_rng(0), 50)
    said = [set(row.ravel()) for row in made.target]
    assert all(len(own) <= 4 for own in said) and len(set(map(frozenset, said))) > 40
    if kind == "encoder-decoder":
        told = made.source != 23
        assert (told.sum(axis=2) == 1).all() and made.source.shape[2] == LENGTH
        assert all(set(source[there]) <= own for source, there, own in zip(made.source, told, said, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_and_a_store_are_of_use_at_once(kind):
    streams, model = batch(kind, np.random.default_rng(1), 64), trained(kind)
    without = loss_of(model, None, streams)
    assert 1.39 < without < 3.0
    for text in ("window:size=8,site=decoder", "window:size=20,site=all", "store:top_k=4,site=decoder"):
        assert loss_of(model, mt.memory(text), streams) < without - 0.2, text


def test_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 200_000


@pytest.mark.long
def test_the_command_makes_the_like():
    streams = batch("decoder-only", np.random.default_rng(1), 64)
    for memory in (None, mt.memory("window:size=20")):
        again, committed = (loss_of(model, memory, streams) for model in (train("decoder-only"), trained("decoder-only")))
        assert again == pytest.approx(committed, abs=0.05)
