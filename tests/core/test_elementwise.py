"""Activations against the formulas in Python floats; what dropout promises about its mask."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, layouts, leading, seeds, sizes
from helpers import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import reference

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
