"""Lexical shortlists: what they allow, what is refused, and generation within them."""

import numpy as np
import pytest
from variants import tiny_model

from mini_tfm.errors import InvalidValue
from mini_tfm.text.shortlist import Shortlist
from mini_tfm.transformer import load

ALWAYS, OFFSETS, TOKENS = np.arange(3), np.array([0, 0, 2, 2, 3, 6]), np.array([7, 9, 5, 4, 5, 12])
SOURCE = np.array([[3, 4, 3, 8], [1, 4, 4, 4]])


def test_it_allows_what_each_token_of_a_source_brings():
    shortlist = Shortlist(ALWAYS, OFFSETS, TOKENS)
    for source, allowed in (([], [0, 1, 2]), ([1, 1], [0, 1, 2, 7, 9]), ([4, 3, 90], [0, 1, 2, 4, 5, 12])):
        assert np.flatnonzero(shortlist(np.array(source, np.int64), 13)).tolist() == allowed
        assert np.flatnonzero(shortlist(np.array(source, np.int64), 6)).tolist() == [i for i in allowed if i < 6]
    again = Shortlist.of(shortlist.arrays(), "a file")
    assert np.array_equal(again(SOURCE[0], 13), shortlist(SOURCE[0], 13)) and Shortlist.of({"embedding.weight": 1}, "a file") is None


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "seed": 0, "num_return_sequences": 2}], ids=str)
def test_nothing_else_is_generated(options):
    model, lengths = tiny_model("ssru", dtype=np.float32), [4, 2]
    options = {"max_new_tokens": 30, "stop_at_eos": False, **options}
    free = np.unique(model.generate(SOURCE, lengths, **options))
    shortlist = Shortlist(np.setdiff1d(np.arange(13), free)[:2], OFFSETS, TOKENS)
    for source, n, row in zip(SOURCE, lengths, model.generate(SOURCE, lengths, shortlist=shortlist, **options), strict=True):
        assert shortlist(source[:n], 13)[np.unique(row)].all()
    assert not shortlist(SOURCE[0], 13)[free].all()


def test_a_models_own_is_kept_with_it_and_can_be_left_out(tmp_path):
    model = tiny_model("ssru", dtype=np.float32)
    model.generation = {"shortlist": Shortlist(ALWAYS, OFFSETS, TOKENS)}
    made = model.generate(SOURCE, max_new_tokens=20, stop_at_eos=False)
    model.save(tmp_path / "model")
    again = type(model)(model.config, weights=model.weights)
    free = again.generate(SOURCE, max_new_tokens=20, stop_at_eos=False)
    again = load(tmp_path / "model")
    assert set(again.weights) == set(model.weights) and made != free
    assert again.generate(SOURCE, max_new_tokens=20, stop_at_eos=False, shortlist=None) == made
    assert again.generate(SOURCE, max_new_tokens=20, stop_at_eos=False, shortlist=False) == free


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("always", np.array([-1])), ("always", np.zeros((1, 1), int)), ("always", np.array([1.0])), ("tokens", None),
        ("offsets", np.array([0, 3, 2, 6])), ("offsets", np.array([1, 6])), ("offsets", np.array([0, 7])), ("offsets", np.zeros(0, int)),
    ],
)  # fmt: skip
def test_wrong_arrays_are_refused_by_name(name, array):
    arrays = {**Shortlist(ALWAYS, OFFSETS, TOKENS).arrays(), "shortlist." + name: array}
    with pytest.raises(InvalidValue, match=f"^a file: shortlist: {name}: expected"):
        Shortlist.of({key: value for key, value in arrays.items() if value is not None}, "a file")


@pytest.mark.parametrize("given", [lambda ids, n: np.ones(n), lambda ids, n: np.ones(n + 1, bool), lambda ids, n: None])
def test_a_function_that_tells_something_else_is_refused(given):
    with pytest.raises(InvalidValue, match=r"shortlist: expected bool of shape \(13,\), got"):
        tiny_model("ssru", dtype=np.float32).generate(SOURCE, shortlist=given)


def test_it_needs_a_source():
    model = tiny_model("ssru", dtype=np.float32)
    for call in (
        lambda: model.generate(encoder_outputs=model.encode(SOURCE), shortlist=Shortlist(ALWAYS, OFFSETS, TOKENS)),
        lambda: tiny_model("decoder only", dtype=np.float32).generate(SOURCE, shortlist=Shortlist(ALWAYS, OFFSETS, TOKENS)),
    ):
        with pytest.raises(InvalidValue, match="shortlist: needs a model with an encoder"):
            call()
