"""Lexical shortlists: what they allow, what is refused, and generation within them."""

import numpy as np
import pytest
from core.cases import compiled_alone
from helpers import assert_same_bits
from variants import tiny_model

from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.model import PACKED
from mini_tfm.stream import Stream
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


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_beams": 4, "num_return_sequences": 3}, {"repetition_penalty": 1.3, "min_new_tokens": 5, "stop_at_eos": True},
        {"do_sample": True, "seed": 0, "num_return_sequences": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_source_alone_has_the_answers_that_it_has_beside_others(options):
    """Alone, the columns of its shortlist are all that is computed of the output layer."""
    model = tiny_model("ssru", dtype=np.float32)
    options = {"max_new_tokens": 20, "stop_at_eos": False, "shortlist": Shortlist(ALWAYS, OFFSETS, TOKENS), **options}
    assert model.generate(SOURCE[:1], **options)[0] == model.generate(SOURCE, **options)[0]


@compiled_alone
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", ["ssru", "untied", "decoder only, gemma"])
def test_the_scores_of_some_ids_have_the_bits_that_they_have_among_all(variant, dtype):
    model = tiny_model(variant, dtype=dtype if dtype == "float64" else "float32", vocab_size=301, d_model=36)
    if dtype in PACKED:
        model.pack(dtype)
    stream = Stream(model, None, 2)
    stream.open(SOURCE if model.config.has_encoder else None, np.full(2, 4))
    ids = np.sort(np.random.default_rng(0).choice(290, 77, replace=False))
    whole, some = Session(stream.copy(), n_ids=290), Session(stream.copy(), n_ids=290, among=ids)
    hidden = whole.step(SOURCE[:, :1])
    expected, found = whole.scores(hidden), some.scores(hidden)
    assert_same_bits(found[:, ids], expected[:, ids])
    assert (np.delete(found, ids, axis=1) == -np.inf).all()
    assert np.array_equal(some.best(hidden), ids[expected[:, ids].argmax(axis=1)])
    log_probs, chosen = some.likeliest(hidden, 80)
    assert (chosen[:, 77:] == -1).all() or variant == "decoder only, gemma"
    assert np.array_equal(chosen[:, :77], ids[np.argsort(-expected[:, ids], axis=1, kind="stable")])
    assert np.allclose(np.exp(log_probs[:, :77]).sum(axis=1), 1)


def test_a_source_without_any_allowed_id_is_told_as_beside_others():
    nothing = lambda source, n: np.zeros(n, bool)  # noqa: E731
    with pytest.raises(InvalidValue, match="rule out every token at token 1 of sequence 0"):
        tiny_model("ssru", dtype=np.float32).generate(SOURCE[:1], shortlist=nothing)


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
