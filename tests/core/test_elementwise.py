"""Activations, sums and recurrences against the formulas in Python floats; what dropout promises about its mask."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, layouts, leading, seeds, sizes
from helpers import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import reference
from mini_tfm.errors import InvalidValue

KINDS = tuple(naive.ACTIVATIONS)


def each(function, x):
    return np.array([function(value) for value in x.astype(np.float64).reshape(-1).tolist()]).reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=st.sampled_from([1e-3, 1.0, 10.0]))
def test_activation(core, dtype, kind, seed, rows, d, layout, scale):
    x = Values(seed, dtype, layout).real(*rows, d, scale=scale)
    # Far on the left 1 + erf(x) and 1 + tanh(x) cancel: the error is that of x times a number near 1, not of the result.
    assert_close(core.activation(x, kind), each(naive.ACTIVATIONS[kind], x), "activation", terms=np.abs(x), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=st.sampled_from([1e-3, 1.0, 10.0]))
def test_activation_backward(core, dtype, kind, seed, rows, d, layout, scale):
    values = Values(seed, dtype, layout)
    x, dy = values.real(*rows, d, scale=scale), values.real(*rows, d)
    slope = each(naive.SLOPES[kind], x)
    # x * density(x) is largest near 1; rounding x^2 in its exponent costs x^2 of it.
    terms = np.abs(dy.astype(np.float64)) * (1 + np.abs(x))
    assert_close(core.activation_backward(x, dy, kind), dy * slope, "activation_backward", terms=terms, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_backward_is_the_slope(core, kind):
    values = Values(0, "float64")
    x, dy = values.real(5, 4), values.real(5, 4)
    expected = naive.gradient(lambda x: core.activation(x, kind), x, dy)
    np.testing.assert_allclose(core.activation_backward(x, dy, kind), expected, atol=1e-8)


@given(seed=seeds, rows=leading, d=sizes, layout=layouts)
def test_add(core, dtype, seed, rows, d, layout):
    values = Values(seed, dtype, layout)
    x, y = values.real(*rows, d), values.real(*rows, d)
    assert_same_bits(core.add(x, y), np.ascontiguousarray(x + y))


@given(seed=seeds, batch=st.integers(1, 3), length=st.integers(1, 6), d=sizes, layout=layouts)
def test_recurrence(core, dtype, seed, batch, length, d, layout):
    values = Values(seed, dtype, layout)
    x, forget, state = values.real(batch, length, d), values.real(batch, length, d, scale=3), Values(seed, dtype).real(batch, d)
    expected, last = naive.recurrence(x, forget, state)
    largest = max(np.abs(x).max(), np.abs(state).max())
    c = core.recurrence(x, forget, state)
    assert_close(c, expected, "recurrence", k=length, terms=largest, dtype=dtype)
    assert_close(state, last, "recurrence", k=length, terms=largest, dtype=dtype)


def test_a_recurrence_goes_on_from_its_state(core, dtype):
    """Step by step, of columns of a wider product, it has the bits of the whole."""
    values = Values(0, dtype)
    both = values.real(2, 7, 2 * 37)
    x, forget, state = both[..., :37], both[..., 37:], values.real(2, 37)
    whole, stepped = state.copy(), state.copy()
    expected = core.recurrence(x.copy(), forget.copy(), whole)
    found = [core.recurrence(x[:, t : t + 1], forget[:, t : t + 1], stepped) for t in range(7)]
    assert_same_bits(np.concatenate(found, axis=1), expected)
    assert_same_bits(stepped, whole)


@pytest.mark.parametrize("other", ["x", "forget"])
def test_a_state_within_what_a_recurrence_reads_is_refused(core, dtype, other):
    """Behind the first rows, which have as many bytes as the whole."""
    wide = np.zeros((2, 9, 3), dtype)
    given = {"x": np.ones((2, 2, 3), dtype), "forget": np.ones((2, 2, 3), dtype), other: wide[:, ::8]}
    with pytest.raises(InvalidValue, match=f"state: .*overlaps {other}"):
        core.recurrence(**given, state=wide[1, 2:4])


ps = st.floats(0.0, 0.99)
dropout_seeds = st.integers(0, 2**64 - 1)


@given(seed=dropout_seeds, p=ps, rows=leading, d=sizes, layout=layouts)
def test_dropout_keeps_or_zeroes(core, dtype, seed, p, rows, d, layout):
    x = Values(seed % 2**32, dtype, layout).positive(*rows, d)
    y = core.dropout(x, p, seed)
    assert_close(y, np.where(y == 0, 0.0, x / (1.0 - p)), "dropout", dtype=dtype)


@given(seed=dropout_seeds, p=ps, d=st.integers(0, 3000))
def test_the_twin_draws_the_same_mask(core, dtype, seed, p, d):
    x = np.ones(d, dtype)
    np.testing.assert_array_equal(core.dropout(x, p, seed) != 0, reference.dropout(x, p, seed) != 0)


@given(seed=dropout_seeds, p=ps)
def test_a_mask_depends_on_seed_and_place_alone(core, seed, p):
    """Not on the values, the dtype, or the shape: the same call on dy is the backward."""
    kept = core.dropout(np.ones(600, np.float32), p, seed) != 0
    other = core.dropout(Values(0, "float64").positive(20, 30), p, seed) != 0
    np.testing.assert_array_equal(kept, other.reshape(-1))
    np.testing.assert_array_equal(kept[:100], core.dropout(np.ones(100, np.float32), p, seed) != 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_p(core, p):
    """Within 5 standard deviations, over all and over every 64th place (a vector's lane), for neighbouring seeds too."""
    n = 100_000
    masks = np.array([core.dropout(np.ones(n, np.float32), p, seed) == 0 for seed in (0, 1, 2, 2**63, 2**64 - 1)])
    assert np.abs(masks.mean(1) - p).max() < 5 * np.sqrt(p * (1 - p) / n)
    lanes = masks[:, : n // 64 * 64].reshape(len(masks), -1, 64).mean(1)
    assert np.abs(lanes - p).max() < 5 * np.sqrt(p * (1 - p) / (n // 64))
    both = (masks[:-1] & masks[1:]).mean(1)  # two seeds agree as often as chance
    assert np.abs(both - p * p).max() < 5 * np.sqrt(p * p / n)
    runs = (masks[:, :-1] & masks[:, 1:]).mean(1)  # and so do neighbours
    assert np.abs(runs - p * p).max() < 5 * np.sqrt(p * p / n)


def test_dropout_of_nothing_is_the_input(core, dtype):
    x = Values(0, dtype).real(50)
    assert_same_bits(core.dropout(x, 0.0, 3), x)
