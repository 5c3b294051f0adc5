"""How a cache keeps keys and values: in bfloat16 or int8, and without moving those of streams that change places."""

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import tiny_model

from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.cache import FIRST_CAPACITY
from mini_tfm.stream import Stream

RNG = np.random.default_rng(5)
SOURCE, TOKENS = RNG.integers(3, 13, (3, 7)), RNG.integers(3, 13, (12, 3 * FIRST_CAPACITY))
VARIANTS = ["t5", "marian", "rotary", "decoder only, llama"]


def session_of(variant, rows=2, dtype="float32", **options):
    model = tiny_model(variant, seed=3, dtype=np.dtype(dtype))
    stream = Stream(model, None, rows)
    stream.open(SOURCE[:rows] if model.config.has_encoder else None, np.full(rows, 7))
    return Session(stream, **options)


def fed(session, start, stop):
    rows = session.numbers % len(TOKENS)
    return [session.step(TOKENS[rows, i : i + 1]) for i in range(start, stop)]


def kept(session):
    return [x for kept in (session.cache._kept, session.cache._cross) for arrays in kept.values() for x in arrays[:2]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_change_places_without_their_keys(variant):
    session = session_of(variant)
    fed(session, 0, 3)
    session.reorder(np.array([0, 0, 0, 1, 1, 1]))
    before = [x.copy() for x, _ in session.cache._kept.values()]
    for index in ([2, 0, 0, 3, 3, 5], [1, 1, 0, 5, 4, 3], [0, 1, 5]):
        session.reorder(np.array(index))
    for (x, _), old in zip(session.cache._kept.values(), before, strict=True):
        assert_same_bits(x, old)


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_streams_have_been_through_they_are_as_alone(variant, cache_dtype):
    """Repeated, sorted, dropped, past a growth of the cache, and joined by others."""
    session = session_of(variant, cache_dtype=cache_dtype)
    lineage = [[i] for i in (0, 1)]  # of each stream: which row of TOKENS it was fed at each step
    fed(session, 0, 1)
    n, moves = 1, iter([[0, 0, 1, 1], [1, 0, 0, 3], [3, 2, 2, 1], [0, 2, 3], [2, 1]])
    for move in moves:
        session.reorder(np.array(move))
        lineage = [list(lineage[i]) for i in move]
        for _ in range(FIRST_CAPACITY // 2):
            rows = RNG.integers(0, len(TOKENS), len(lineage))
            for rows_of, row in zip(lineage, rows, strict=True):
                rows_of.append(int(row))
            last, n = session.step(TOKENS[rows, n : n + 1]), n + 1
    assert n > 2 * FIRST_CAPACITY
    numbers = session.numbers.copy()
    other = session_of(variant, rows=3, cache_dtype=cache_dtype)
    fed(other, 0, 4)
    session.join(other)
    joined = session.step(TOKENS[:5, n : n + 1])
    for i, (number, rows) in enumerate(zip(numbers, lineage, strict=True)):
        alone = session_of(variant, rows=2, cache_dtype=cache_dtype)
        alone.reorder(np.array([number]))
        found = [alone.step(TOKENS[row : row + 1, at : at + 1]) for at, row in enumerate(rows)]
        assert_same_bits(found[-1][0], last[i])
        assert_same_bits(alone.step(TOKENS[i : i + 1, n : n + 1])[0], joined[i])


@pytest.mark.parametrize("cache_dtype, size, extra, error", [("bfloat16", 2, 0, 2e-2), ("int8", 1, 4, 4e-2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_narrower_ones_take_less_room_and_round(variant, cache_dtype, size, extra, error):
    exact, short = session_of(variant), session_of(variant, cache_dtype=cache_dtype)
    for a, b in zip(fed(exact, 0, 40), fed(short, 0, 40), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=error * np.abs(a).max())
        assert not np.array_equal(a, b)
    for a, b in zip(kept(exact), kept(short), strict=True):
        assert a.shape[:3] == b.shape[:3] and b.nbytes == a[..., 0].size * (size * a.shape[3] + extra)


@pytest.mark.parametrize("dtype, expected", [(None, np.float32), ("bfloat16", np.uint16), ("int8", np.uint16)])
def test_the_default_is_bfloat16_for_a_packed_model(dtype, expected):
    model = tiny_model("t5", seed=3, dtype=np.float32)
    if dtype is not None:
        model.pack(dtype)
    for chosen, found in ((None, expected), ("float32", np.float32), ("bfloat16", np.uint16), ("int8", np.int8)):
        stream = Stream(model, None, 1)
        stream.open(SOURCE[:1], np.full(1, 7))
        session = Session(stream, cache_dtype=chosen)
        fed(session, 0, 2)
        assert {x.dtype for x in kept(session)} == {np.dtype(found)}


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_generate_takes_it(cache_dtype):
    model = tiny_model("decoder only, llama", seed=3, dtype=np.float32)
    exact = model.generate(SOURCE, max_new_tokens=20, output_scores=True)
    assert model.generate(SOURCE, max_new_tokens=20, output_scores=True, cache_dtype="float32") == exact
    short = model.generate(SOURCE, max_new_tokens=20, output_scores=True, cache_dtype=cache_dtype)
    assert short != exact
    assert short == model.generate(SOURCE, max_new_tokens=20, output_scores=True, cache_dtype=cache_dtype)
    with pytest.raises(InvalidValue, match="cache_dtype: expected one of float32, bfloat16, int8 or None, got 'int4'"):
        model.generate(SOURCE, cache_dtype="int4")
    with pytest.raises(InvalidValue, match=f"cache_dtype: expected None for a model of float64, got '{cache_dtype}'"):
        tiny_model("t5", dtype=np.float64).generate(SOURCE, cache_dtype=cache_dtype)


def test_room_that_is_expected_is_made_at_once():
    session = session_of("t5", room=3 * FIRST_CAPACITY)
    fed(session, 0, 1)
    before = kept(session)
    fed(session, 1, 3 * FIRST_CAPACITY)
    for x, y in zip(before, kept(session), strict=True):
        assert x is y
    assert kept(session_fed_once("t5", room=10**9))[0].shape[2] < 1000  # a limit is not a promise


def session_fed_once(variant, **options):
    session = session_of(variant, **options)
    fed(session, 0, 1)
    return session


def test_a_step_behind_the_learned_positions_says_what_to_do():
    """The 41st of 40, among steps that are run again."""
    session = session_of("learned")
    with pytest.raises(InvalidValue, match=r"max_positions = 40 positions, .*, got 41; .* fewer max_new_tokens, or a Pipeline with"):
        fed(session, 0, 41)
