"""softmax, log_softmax and the backward of softmax, row by row."""

import numpy as np
from core import naive
from core.cases import Values, layouts, leading, scales, seeds, sizes
from helpers import assert_close
from hypothesis import given


@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=scales)
def test_softmax(core, dtype, seed, rows, d, layout, scale):
    x = Values(seed, dtype, layout).real(*rows, d, scale=scale)
    # A probability is off by its own size times the rounding error of its exponent, which grows with |x|.
    expected = naive.softmax(x)
    assert_close(core.softmax(x), expected, "softmax", k=d, terms=expected * (1 + np.ptp(x, axis=-1, keepdims=True)), dtype=dtype)


@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=scales)
def test_log_softmax(core, dtype, seed, rows, d, layout, scale):
    x = Values(seed, dtype, layout).real(*rows, d, scale=scale)
    terms = 1 + np.abs(x).max(-1, keepdims=True)
    assert_close(core.log_softmax(x), naive.log_softmax(x), "log_softmax", k=d, terms=terms, dtype=dtype)


@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=scales)
def test_softmax_backward(core, dtype, seed, rows, d, layout, scale):
    values = Values(seed, dtype, layout)
    y, dy = values.positive(*rows, d), values.real(*rows, d, scale=scale)
    terms = np.abs(y) * np.abs(dy).max(-1, keepdims=True) * (1 + np.abs(y).max(-1, keepdims=True))
    assert_close(core.softmax_backward(y, dy), naive.softmax_backward(y, dy), "softmax_backward", k=d, terms=terms, dtype=dtype)


@given(seed=seeds, d=sizes)
def test_rows_of_probabilities_sum_to_one(core, dtype, seed, d):
    y = core.softmax(Values(seed, dtype).real(7, d, scale=10.0))
    assert_close(y.sum(-1, dtype=np.float64).astype(dtype), np.ones(7), "softmax", k=d)


def test_softmax_backward_is_the_slope_of_softmax(core):
    values = Values(0, "float64")
    x, dy = values.real(3, 5), values.real(3, 5)
    dx = core.softmax_backward(core.softmax(x), dy)
    np.testing.assert_allclose(dx, naive.gradient(core.softmax, x, dy), atol=1e-8)  # what a difference of step 1e-5 tells


def test_rows_as_wide_as_a_vocabulary(core, dtype):
    """Rows that the usual cases do not reach, through the kernels that have such rows."""
    values = Values(0, dtype)
    x, targets = values.real(3, 50_257, scale=4.0), np.array([50_256, 0, 7])
    expected = naive.softmax(x)
    spread = 1 + np.ptp(x, axis=-1, keepdims=True)
    lse = np.array([naive.log_sum_exp(row) for row in x.tolist()])
    assert_close(core.softmax(x), expected, "softmax", k=x.shape[1], terms=expected * spread)
    assert_close(core.log_softmax(x), x - lse[:, None], "log_softmax", k=x.shape[1], terms=spread)
    losses, actual_lse = core.cross_entropy(x, targets)
    assert_close(actual_lse.astype(dtype), lse, "cross_entropy", k=x.shape[1], terms=spread[:, 0])
    assert_close(losses, lse - x[np.arange(3), targets], "cross_entropy", k=x.shape[1], terms=spread[:, 0])
