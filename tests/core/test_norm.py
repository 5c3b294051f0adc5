"""layer_norm and rms_norm, forward against rows in Python floats, backward against the Jacobian written out."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, layouts, leading, scales, seeds, sizes
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st

eps_values = st.sampled_from([0.0, 1e-12, 1e-5, 1e-1])


def spread(x, rstd, eps):
    """Largest |x| in units of the row's spread: how much of x's rounding the division by the spread brings out."""
    return 1.0 + np.abs(x).max(-1).reshape(-1).astype(np.float64) * rstd


@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=scales, eps=eps_values, with_bias=st.booleans())
def test_layer_norm(core, dtype, seed, rows, d, layout, scale, eps, with_bias):
    values = Values(seed, dtype, layout)
    x, weight, bias = values.real(*rows, d, scale=scale) + dtype.type(scale), values.real(d), values.real(d) if with_bias else None
    eps = eps or 1e-12 if d == 1 else eps  # one value has no variance: 0 / 0
    expected = naive.norm(x, weight, bias, eps, centre=True)
    y, mean, rstd = core.layer_norm(x, weight, bias, eps)
    far = spread(x, expected[2], eps)
    terms = np.abs(weight).max() * far.reshape(*rows, 1) ** 2 + (np.abs(bias).max() if with_bias else 0.0)
    assert_close(y, expected[0], "layer_norm", k=d, terms=terms, dtype=dtype)
    assert_close(mean.astype(dtype), expected[1], "layer_norm", k=d, terms=np.abs(x).max(-1).reshape(-1))
    assert mean.dtype == np.float64
    assert_close(rstd, expected[2], "layer_norm", k=d, terms=expected[2] * far**2, dtype=dtype)


@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=scales, eps=eps_values)
def test_rms_norm(core, dtype, seed, rows, d, layout, scale, eps):
    values = Values(seed, dtype, layout)
    x, weight = values.real(*rows, d, scale=scale), values.real(d)
    expected, _, expected_rstd = naive.norm(x, weight, None, eps, centre=False)
    y, rstd = core.rms_norm(x, weight, eps)
    assert_close(y, expected, "rms_norm", k=d, terms=np.abs(expected), dtype=dtype)
    assert_close(rstd, expected_rstd, "rms_norm", k=d, dtype=dtype)


@pytest.mark.parametrize("centre", [True, False], ids=["layer_norm", "rms_norm"])
@given(seed=seeds, rows=leading, d=sizes, layout=layouts, scale=scales)
def test_backward(core, dtype, centre, seed, rows, d, layout, scale):
    values, eps = Values(seed, dtype, layout), 1e-5
    x, weight, dy = values.real(*rows, d), values.real(d), values.real(*rows, d, scale=scale)
    if centre:
        _, mean, rstd = core.layer_norm(x, weight, None, eps)
        grads, operation = core.layer_norm_backward(dy, x, weight, mean, rstd), "layer_norm_backward"
    else:
        _, rstd = core.rms_norm(x, weight, eps)
        grads, operation = core.rms_norm_backward(dy, x, weight, rstd), "rms_norm_backward"
    n = int(np.prod(rows))
    g, far = np.abs(dy).max(initial=0.0), spread(x, rstd.astype(np.float64), eps)
    terms = [g * np.abs(weight).max() * (rstd * far**3).reshape(*rows, 1), g * far.max() ** 2, g]
    for grad, expected, k, largest in zip(grads, naive.norm_backward(dy, x, weight, eps, centre), (d, n + d, n), terms, strict=False):
        assert_close(grad, expected, operation, k=k, terms=largest, dtype=dtype)


def test_backward_is_the_slope(core):
    values = Values(0, "float64")
    x, weight, bias, dy, eps = values.real(4, 6), values.real(6), values.real(6), values.real(4, 6), 1e-3
    _, mean, rstd = core.layer_norm(x, weight, bias, eps)
    layer = core.layer_norm_backward(dy, x, weight, mean, rstd)
    rms = core.rms_norm_backward(dy, x, weight, core.rms_norm(x, weight, eps)[1])
    slopes = [
        (layer[0], lambda x: core.layer_norm(x, weight, bias, eps)[0], x),
        (layer[1], lambda weight: core.layer_norm(x, weight, bias, eps)[0], weight),
        (layer[2], lambda bias: core.layer_norm(x, weight, bias, eps)[0], bias),
        (rms[0], lambda x: core.rms_norm(x, weight, eps)[0], x),
        (rms[1], lambda weight: core.rms_norm(x, weight, eps)[0], weight),
    ]
    for grad, function, at in slopes:
        np.testing.assert_allclose(grad, naive.gradient(function, at, dy), atol=1e-7)


def test_a_large_mean_does_not_drown_the_variance(core, dtype):
    """E[x^2] - E[x]^2 would give a variance of nothing but rounding errors here."""
    offset = 1000.0 if dtype == "float32" else 1e7
    x = (offset + np.arange(64) % 2).astype(dtype)[None]
    y, _, _ = core.layer_norm(x, np.ones(64, dtype), None, 0.0)
    np.testing.assert_allclose(np.abs(y), 1.0, rtol=1e-3)


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("value", [0.1, 3.3, 1000.1, -1e6 / 3, 1e8])
def test_a_constant_row_is_nothing_but_its_bias(core, dtype, value, eps):
    """Its sum is rounded, and the mean with it: taken off alone, what is left would be divided by a spread of nearly nothing."""
    for d in (2, 3, 5, 31, 512, 768, 1000, 1024, 4099):
        x, bias = np.full((3, d), value, dtype), np.arange(d).astype(dtype)
        y, mean, rstd = core.layer_norm(x, np.ones(d, dtype), bias, eps)
        np.testing.assert_array_equal(y, np.tile(bias, (3, 1)))
        np.testing.assert_array_equal(mean, np.full(3, x[0, 0]))
        np.testing.assert_allclose(rstd, eps**-0.5, rtol=1e-3)
        dx, dweight, _ = core.layer_norm_backward(np.ones_like(x), x, np.ones(d, dtype), mean, rstd)
        assert not dweight.any() and np.abs(dx).max() <= 8 * np.finfo(dtype).eps * eps**-0.5


@given(seed=seeds, d=sizes, offset=st.sampled_from([1e2, 1e3, 1e4, 1e5, 1e6]), spread=st.sampled_from([1.0, 30.0]))
def test_an_offset_costs_no_precision(core, seed, d, offset, spread):
    """Against the same numbers of float32 in float64, forward and backward."""
    values = Values(seed, "float32")
    x, weight, dy = values.real(4, d, scale=spread) + np.float32(offset), values.real(d), values.real(4, d)
    y, mean, rstd = core.layer_norm(x, weight, None, 1e-5)
    expected = naive.norm(x, weight, None, 1e-5, centre=True)
    z = np.abs(expected[0]).max() + 1
    assert_close(y, expected[0], "layer_norm", k=d, terms=z)
    grads = core.layer_norm_backward(dy, x, weight, mean, rstd)
    wanted = naive.norm_backward(dy, x, weight, 1e-5, centre=True)
    largest = np.abs(dy).max() * (1 + np.abs(weight).max())
    for grad, correct, terms in zip(grads, wanted, (largest * rstd.max() * 10, largest * 10, largest), strict=True):
        assert_close(grad, correct, "layer_norm_backward", k=d, terms=terms)
