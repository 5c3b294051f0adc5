"""Cross entropy, row by row."""

import numpy as np
from core import naive
from core.cases import Values, layouts, scales, seeds, sizes
from helpers import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

smoothings = st.sampled_from([0.0, 0.1, 1.0])
ignored_targets = st.sampled_from([-100, 0, -1])  # 0 is a token that may well be the padding


def drawn(seed, dtype, layout, n, vocab, scale, ignore_index):
    values = Values(seed, dtype, layout)
    targets = np.where(values.mask(n), values.integers(0, vocab, n), ignore_index)
    return values.real(n, vocab, scale=scale), targets, values.real(n)


@given(seed=seeds, n=sizes, vocab=sizes, layout=layouts, scale=scales, smoothing=smoothings, ignored=ignored_targets)
def test_forward(core, dtype, seed, n, vocab, layout, scale, smoothing, ignored):
    logits, targets, _ = drawn(seed, dtype, layout, n, vocab, scale, ignored)
    losses, lse = core.cross_entropy(logits, targets, ignored, smoothing)
    expected, expected_lse = naive.cross_entropy(logits, targets, ignored, smoothing)
    terms = 1.0 + np.abs(logits).max(-1)
    assert_close(losses, expected, "cross_entropy", k=vocab, terms=terms, dtype=dtype)
    assert_close(lse, expected_lse, "cross_entropy", k=vocab, terms=terms, dtype=dtype)
    assert (losses[targets == ignored] == 0).all() and (lse[targets == ignored] == 0).all()


@given(seed=seeds, n=sizes, vocab=sizes, layout=layouts, scale=scales, smoothing=smoothings, ignored=ignored_targets)
def test_backward(core, dtype, seed, n, vocab, layout, scale, smoothing, ignored):
    logits, targets, dlosses = drawn(seed, dtype, layout, n, vocab, scale, ignored)
    _, lse = core.cross_entropy(logits, targets, ignored, smoothing)
    dlogits = core.cross_entropy_backward(logits, targets, lse, dlosses, ignored, smoothing)
    expected = naive.cross_entropy_backward(logits, targets, dlosses, ignored, smoothing)
    terms = (np.abs(dlosses) * (1.0 + np.abs(logits).max(-1)))[:, None]
    assert_close(dlogits, expected, "cross_entropy_backward", k=vocab, terms=terms, dtype=dtype)
    assert (dlogits[targets == ignored] == 0).all()


def test_backward_is_the_slope(core):
    values = Values(0, "float64")
    logits, targets, dlosses = values.real(5, 7), np.array([0, 6, -100, 3, 3]), values.real(5)
    for smoothing in (0.0, 0.2):
        _, lse = core.cross_entropy(logits, targets, label_smoothing=smoothing)
        dlogits = core.cross_entropy_backward(logits, targets, lse, dlosses, label_smoothing=smoothing)
        expected = naive.gradient(lambda x, s=smoothing: core.cross_entropy(x, targets, label_smoothing=s)[0], logits, dlosses)
        np.testing.assert_allclose(dlogits, expected, atol=1e-8)


def test_the_defaults_ignore_minus_100_and_smooth_nothing(core, dtype):
    logits, targets = Values(0, dtype).real(4, 6), np.array([1, -100, 5, 0])
    named = core.cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0)
    assert_same_bits(core.cross_entropy(logits, targets), named)
