"""Token rows, and the two positional encodings that need no parameters."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, layouts, seeds, sizes
from helpers import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

ids_shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(seed=seeds, vocab=sizes, d=sizes, shape=ids_shape, layout=layouts)
def test_embedding_copies_rows(core, dtype, seed, vocab, d, shape, layout):
    values = Values(seed, dtype, layout)
    table, ids = values.real(vocab, d), values.integers(0, vocab, *shape)
    out = core.embedding(table, ids)
    assert out.shape == (*shape, d)
    for at in np.ndindex(shape):
        assert_same_bits(out[at], table[ids[at]].copy())


@given(seed=seeds, vocab=sizes, d=sizes, n=st.integers(0, 200), layout=layouts)
def test_embedding_backward_adds_up(core, dtype, seed, vocab, d, n, layout):
    values = Values(seed, dtype, layout)
    ids, dout, before = values.integers(0, vocab, n), values.real(n, d), Values(seed, dtype).real(vocab, d)
    expected = before.astype(np.float64)
    for row, i in enumerate(ids):
        expected[i] += dout[row]
    dtable = before.copy()
    core.embedding_backward(ids, dout, dtable)
    repeats = np.bincount(ids, minlength=vocab)[:, None] + 1
    largest = max(np.abs(before).max(), np.abs(dout).max(initial=0.0))
    assert_close(dtable, expected, "embedding_backward", k=repeats, terms=largest, dtype=dtype)


def test_embedding_backward_leaves_other_rows_alone(core, dtype):
    before = Values(0, dtype).real(6, 3)
    dtable = before.copy()
    core.embedding_backward(np.array([[2, 2], [5, 2]]), np.ones((2, 2, 3), dtype), dtable)
    assert_same_bits(dtable[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert_close(dtable[[2, 5]], before[[2, 5]] + np.array([[3.0], [1.0]]), "embedding_backward", terms=3.0)


@given(n=sizes, d_model=sizes)
def test_sinusoidal_positions(core, dtype, n, d_model):
    """The angle is computed in double, so its rounding matters in float64 only: n radians of it."""
    terms = 1.0 if dtype == "float32" else 1.0 + n
    table = core.sinusoidal_positions(n, d_model, dtype)
    assert_close(table, naive.sinusoidal_positions(n, d_model), "sinusoidal_positions", terms=terms, dtype=dtype)


def test_sinusoidal_positions_are_float32_unless_asked(core):
    assert core.sinusoidal_positions(3, 4).dtype == np.float32


def test_sinusoidal_positions_of_the_paper(core):
    """Section 3.5: sin(pos / 10000^(2i / d)) at 2i, cos of the same at 2i + 1; checked by hand for d = 4."""
    table = core.sinusoidal_positions(101, 4, np.float64)
    np.testing.assert_allclose(table[0], [0, 1, 0, 1])
    np.testing.assert_allclose(table[100], [np.sin(100), np.cos(100), np.sin(1), np.cos(1)], rtol=1e-12)


def frequencies(d, base=10000.0):
    return base ** (-2 * np.arange(d // 2) / max(d, 1))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@given(seed=seeds, shape=st.tuples(*[st.integers(1, 4)] * 3), half=st.integers(0, 40), rest=st.integers(0, 5), layout=layouts)
def test_rotary(core, dtype, per_row, inverse, seed, shape, half, rest, layout):
    values = Values(seed, dtype, layout)
    x = values.real(*shape, 2 * half + rest)
    positions = values.integers(-50, 5000, *((shape[0], shape[2]) if per_row else (shape[2],)))
    turns = frequencies(2 * half)
    expected = naive.rotary(x, positions, turns, inverse)
    # As above: in float64 the angle's own rounding counts, in float32 it is lost in the result's.
    terms = np.abs(x).max(initial=0) * (1.0 if dtype == "float32" else 1.0 + np.abs(positions).max())
    assert_close(core.rotary(x, positions, turns, inverse=inverse), expected, "rotary", terms=terms, dtype=dtype)


@given(seed=seeds, base=st.sampled_from([100.0, 1e4, 5e5]))
def test_rotary_turns_back(core, dtype, seed, base):
    values = Values(seed, dtype)
    x, positions = values.real(2, 3, 4, 10), values.integers(0, 100_000, 4)
    there = core.rotary(x, positions, frequencies(10, base))
    assert_close(core.rotary(there, positions, frequencies(10, base), inverse=True), x, "rotary", terms=np.abs(x).max())


def test_rotary_products_depend_on_the_distance(core):
    values = Values(0, "float64")
    q, k, turns = values.real(1, 1, 1, 8), values.real(1, 1, 1, 8), frequencies(8)
    products = [(core.rotary(q, np.array([5 + at]), turns) * core.rotary(k, np.array([at]), turns)).sum() for at in (0, 7, 1000)]
    np.testing.assert_allclose(products, products[0], rtol=1e-10)
