"""gemm against the sum written out."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, layouts, scales, seeds, sizes_or_none
from helpers import assert_close, laid_out
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm.errors import InvalidValue


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("trans_a", [False, True])
@given(seed=seeds, m=sizes_or_none, k=sizes_or_none, n=sizes_or_none, layout=layouts, scale=scales)
def test_a_product(core, dtype, trans_a, trans_b, seed, m, k, n, layout, scale):
    values = Values(seed, dtype)
    a, b = values.real(m, k, scale=scale), values.real(k, n)
    stored_a, stored_b = (laid_out(x.T if trans else x, layout) for x, trans in ((a, trans_a), (b, trans_b)))
    out = core.gemm(stored_a, stored_b, trans_a=trans_a, trans_b=trans_b)
    terms = np.abs(a).max(1, initial=0)[:, None] * np.abs(b).max(0, initial=0).astype(np.float64)
    assert_close(out, naive.gemm(a, b), "gemm", k=k, terms=terms, dtype=dtype)


@given(seed=seeds, m=sizes_or_none, k=sizes_or_none, n=sizes_or_none)
def test_out_is_written_and_returned(core, dtype, seed, m, k, n):
    values = Values(seed, dtype)
    a, b, out = values.real(m, k), values.real(k, n), np.full((m, n), np.nan, dtype)
    assert core.gemm(a, b, out=out) is out
    np.testing.assert_array_equal(out, core.gemm(a, b))


@given(seed=seeds, m=sizes_or_none, k=sizes_or_none, n=sizes_or_none)
def test_accumulate_adds_to_what_was_there(core, dtype, seed, m, k, n):
    values = Values(seed, dtype)
    a, b, before = values.real(m, k), values.real(k, n), values.real(m, n)
    out = core.gemm(a, b, out=before.copy(), accumulate=True)
    terms = np.abs(before) + np.abs(a).max(1, initial=0)[:, None] * np.abs(b).max(0, initial=0).astype(np.float64)
    assert_close(out, before + naive.gemm(a, b), "gemm", k=k + 1, terms=terms)


@given(seed=seeds, m=sizes_or_none, k=sizes_or_none, n=sizes_or_none, trans_b=st.booleans(), layout=layouts)
def test_a_bias_is_what_every_row_starts_from(core, dtype, seed, m, k, n, trans_b, layout):
    values = Values(seed, dtype)
    a, b, bias = values.real(m, k), values.real(k, n), values.real(n)
    out = core.gemm(a, b.T.copy() if trans_b else b, trans_b=trans_b, bias=laid_out(bias, layout))
    terms = np.abs(bias) + np.abs(a).max(1, initial=0)[:, None] * np.abs(b).max(0, initial=0).astype(np.float64)
    assert_close(out, bias + naive.gemm(a, b), "gemm", k=k + 1, terms=terms)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 700, 300), (300, 1, 257), (257, 513, 1), (385, 260, 270), (3, 2049, 5), (130, 2200, 75)])
def test_past_the_edges_of_panels(core, dtype, shape):
    """Whole numbers, so that every order of summation gives the same bits."""
    m, k, n = shape
    values = Values(0, dtype)
    a, b, bias, before = values.whole(m, k), values.whole(k, n), values.whole(n), values.whole(m, n)
    expected = a.astype(np.int64) @ b.astype(np.int64)
    for trans_a, trans_b in np.ndindex(2, 2):
        stored = (a.T.copy() if trans_a else a, b.T.copy() if trans_b else b)
        options = {"trans_a": bool(trans_a), "trans_b": bool(trans_b)}
        np.testing.assert_array_equal(core.gemm(*stored, **options), expected)
        np.testing.assert_array_equal(core.gemm(*stored, bias=bias, **options), expected + bias.astype(np.int64))
        added = core.gemm(*stored, out=before.copy(), accumulate=True, **options)
        np.testing.assert_array_equal(added, expected + before.astype(np.int64))


def test_a_bias_and_what_is_there_are_too_much(core):
    with pytest.raises(InvalidValue, match="bias: expected None"):
        core.gemm(np.ones((2, 3), "f"), np.ones((3, 4), "f"), out=np.ones((2, 4), "f"), accumulate=True, bias=np.ones(4, "f"))
