"""Products whose factors are rounded to bfloat16, against the sums of rounded factors written out."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, layouts, scales, seeds, sizes, sizes_or_none
from helpers import assert_close, assert_same_bits, laid_out
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import _core
from mini_tfm.errors import InvalidType

F = np.dtype("float32")


def rounded(x):
    """To 8 significant bits, ties to even. Not of numbers below the normal ones, which some processors take for zero."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def terms_of(a, b):
    return np.abs(a).max(1, initial=0)[:, None] * np.abs(b).max(0, initial=0).astype(np.float64)


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("trans_a", [False, True])
@given(seed=seeds, m=sizes_or_none, k=sizes_or_none, n=sizes_or_none, layout=layouts, scale=scales)
def test_a_product_is_that_of_the_rounded_factors(core, trans_a, trans_b, seed, m, k, n, layout, scale):
    values = Values(seed, F)
    a, b = values.real(m, k, scale=scale), values.real(k, n)
    stored_a, stored_b = (laid_out(x.T if trans else x, layout) for x, trans in ((a, trans_a), (b, trans_b)))
    out = core.gemm(stored_a, stored_b, trans_a=trans_a, trans_b=trans_b, bfloat16=True)
    assert_close(out, naive.gemm(rounded(a), rounded(b)), "gemm", k=k, terms=terms_of(a, b), dtype=F)


@given(seed=seeds, m=sizes_or_none, k=sizes_or_none, n=sizes_or_none)
def test_what_is_there_and_a_bias_are_not_rounded(core, seed, m, k, n):
    values = Values(seed, F)
    a, b, before, bias = values.real(m, k), values.real(k, n), values.real(m, n), values.real(n)
    expected, terms = naive.gemm(rounded(a), rounded(b)), terms_of(a, b)
    out = core.gemm(a, b, out=before.copy(), accumulate=True, bfloat16=True)
    assert_close(out, before + expected, "gemm", k=k + 1, terms=np.abs(before) + terms)
    assert_close(core.gemm(a, b, bias=bias, bfloat16=True), bias + expected, "gemm", k=k + 1, terms=np.abs(bias) + terms)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 700, 300), (300, 1, 257), (257, 513, 1), (385, 1061, 270), (3, 2049, 5), (130, 4200, 40)])
def test_past_the_edges_of_panels(core, shape):
    """Whole numbers of 8 bits, which stay what they are, so that every order of summation gives the same bits."""
    m, k, n = shape
    values = Values(0, F)
    a, b, bias = values.whole(m, k, low=-9, high=10), values.whole(k, n, low=-9, high=10), values.whole(n)
    expected = a.astype(np.int64) @ b.astype(np.int64)
    for trans_a, trans_b in np.ndindex(2, 2):
        stored = (a.T.copy() if trans_a else a, b.T.copy() if trans_b else b)
        options = {"trans_a": bool(trans_a), "trans_b": bool(trans_b), "bfloat16": True}
        np.testing.assert_array_equal(core.gemm(*stored, **options), expected)
        np.testing.assert_array_equal(core.gemm(*stored, bias=bias, **options), expected + bias.astype(np.int64))


@pytest.mark.parametrize("trans_a, trans_b", list(np.ndindex(2, 2)))
def test_a_factor_is_rounded_to_the_nearest_and_ties_to_even(core, trans_a, trans_b):
    """Through products with 1, in every place of a pair and of a vector."""
    one, step = np.float32(1), np.float32(2**-7)
    given_ = [one + step / 2, one + 3 * step / 2, one + step / 2 + np.float32(2**-20), -one - step / 2, np.float32(3.4e38)]
    given_ += [np.float32(1e-37)]
    wanted = [one, one + 2 * step, one + step, -one, np.float32(np.inf), np.float32(rounded(1e-37))]
    given_, wanted = np.resize(np.array(given_, F), 70), np.resize(np.array(wanted, F), 70)
    options = {"trans_a": bool(trans_a), "trans_b": bool(trans_b), "bfloat16": True}
    for k in (1, 2, 3):
        for at in range(k):
            a, unit = np.zeros((70, k), F), np.zeros((k, 1), F)
            a[:, at], unit[at] = given_, 1
            left = core.gemm(a.T.copy() if trans_a else a, unit.T.copy() if trans_b else unit, **options)
            right = core.gemm(unit if trans_a else unit.T.copy(), a if trans_b else a.T.copy(), **options)
            np.testing.assert_array_equal(left[:, 0], wanted)
            np.testing.assert_array_equal(right[0], wanted)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_stay_what_they_are(core, special):
    a = np.ones((3, 5), F)
    a[1, 3] = special
    out = core.gemm(a, np.ones((5, 2), F), bfloat16=True)
    np.testing.assert_array_equal(out, [[5, 5], [special, special], [5, 5]])
    payload = np.array([[0x7FFFFFFF]], np.uint32).view(F)  # to which nothing may be added
    assert np.isnan(core.gemm(payload, np.ones((1, 1), F), bfloat16=True)).all()


@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="the BLAS that the twins call does not promise it")
@pytest.mark.parametrize("trans_a, trans_b", list(np.ndindex(2, 2)))
def test_the_same_bits_at_every_number_of_threads_and_in_any_company(threads, trans_a, trans_b):
    values = Values(3, F)
    a, b = values.real(210, 1500), values.real(1500, 330)
    options = {"trans_a": bool(trans_a), "trans_b": bool(trans_b), "bfloat16": True}

    def product(rows, columns):
        parts = a[rows].T if trans_a else a[rows], b[:, columns].T if trans_b else b[:, columns]
        return threads.gemm(*map(np.ascontiguousarray, parts), **options)

    everything = slice(None)
    threads.set_num_threads(1)
    alone = product(everything, everything)
    for n_threads in (2, 3, 5):
        threads.set_num_threads(n_threads)
        assert_same_bits(product(everything, everything), alone)
        for rows in (slice(0, 1), slice(209, 210), slice(50, 63)):
            assert_same_bits(product(rows, everything), alone[rows])
        assert_same_bits(product(everything, slice(40, 47)), np.ascontiguousarray(alone[:, 40:47]))


@given(seed=seeds, n=sizes, d=st.integers(0, 20), vocab=sizes, transposed=st.booleans(), chunk=st.sampled_from([7, 1024]))
def test_an_output_layer_is_that_of_the_rounded_factors(core, seed, n, d, vocab, transposed, chunk):
    """Its backward rounds the gradient of the logits, too, for the products, not for the bias."""
    values = Values(seed, F)
    x, weight, bias, targets = values.real(n, d), values.real(d, vocab), values.real(vocab), values.integers(0, vocab, n)
    dlosses, before = values.real(n), values.real(d, vocab)
    stored, start = (np.ascontiguousarray(w.T) if transposed else w for w in (weight, before))
    options = {"transposed": transposed, "chunk": chunk, "bfloat16": True}
    losses, lse = core.linear_cross_entropy(x, stored, targets, bias=bias, **options)
    logits = naive.gemm(rounded(x), rounded(weight)) + bias
    expected, expected_lse = naive.cross_entropy(logits, targets, -100, 0.0)
    terms = 1 + np.abs(logits).max(-1) + d * np.abs(x).max(initial=0) * np.abs(weight).max(initial=0)
    assert_close(losses, expected, "linear_cross_entropy", k=vocab + d, terms=terms)
    assert_close(lse.astype(F), expected_lse, "linear_cross_entropy", k=vocab + d, terms=terms)
    dweight = np.array(start)
    dx, _, dbias = core.linear_cross_entropy_backward(x, stored, targets, lse, dlosses, dweight, bias=bias, **options)
    dlogits = naive.cross_entropy_backward(logits, targets, dlosses, -100, 0.0)
    # A gradient within rounding of the middle between two neighbours may go to either: half a step of 2^-8.
    slope = np.abs(dlosses).max()
    np.testing.assert_allclose(dx, dlogits @ rounded(weight).T, rtol=0, atol=2**-7 * slope * (1 + np.abs(weight).sum(1).max(initial=0)))
    change = np.asarray(dweight, np.float64) - start
    within = 2**-7 * slope * (1 + np.abs(x).sum(0).max(initial=0))
    np.testing.assert_allclose(change.T if transposed else change, rounded(x).T @ dlogits, rtol=0, atol=within)
    np.testing.assert_allclose(dbias, dlogits.sum(0), rtol=0, atol=1e-5 * slope * (n + d * terms.max()))


def test_an_output_layers_backward_rounds_the_gradient_of_logits(core):
    """x is 1, so that dweight is dlogits, which bfloat16 holds only when rounded."""
    x, weight, targets = np.ones((1, 1), F), np.array([[-6.0, 0.5]], F), np.array([0])
    _, lse = core.linear_cross_entropy(x, weight, targets)
    found = {}
    for bfloat16 in (False, True):
        found[bfloat16] = np.zeros_like(weight)
        core.linear_cross_entropy_backward(x, weight, targets, lse, np.ones(1, F), found[bfloat16], bfloat16=bfloat16)
    assert (found[False] != rounded(found[False])).all()
    np.testing.assert_array_equal(found[True], rounded(found[False]))


def test_what_is_not_float32_is_refused(core):
    x = np.ones((2, 2))
    with pytest.raises(InvalidType, match="bfloat16: expected False, or float32 as a's dtype, got True and float64"):
        core.gemm(x, x, bfloat16=True)
    with pytest.raises(InvalidType, match="bfloat16: expected False, or float32 as x's dtype"):
        core.linear_cross_entropy(x, x, np.array([0, 1]), bfloat16=True)
    with pytest.raises(InvalidType, match="bfloat16: expected"):
        core.gemm(x.astype(F), x.astype(F), bfloat16="yes")
