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
    assert_close(lse.astype(dtype), expected_lse, "cross_entropy", k=vocab, terms=terms)
    assert lse.dtype == np.float64
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


# The output layer, a chunk of the vocabulary at a time.


def output_layer(seed, dtype, layout, n, d, vocab, scale, transposed, biased):
    values = Values(seed, dtype, layout)
    x, weight = values.real(n, d), values.real(*((vocab, d) if transposed else (d, vocab)), scale=scale)
    return x, weight, values.real(vocab) if biased else None


layers = {
    "seed": seeds, "n": sizes, "d": st.integers(0, 20), "vocab": sizes, "layout": layouts, "scale": scales, "transposed": st.booleans(),
    "biased": st.booleans(), "smoothing": smoothings, "ignored": ignored_targets, "chunk": st.sampled_from([1, 7, 16, 1024]),
}  # fmt: skip


def largest(x, weight, bias):
    """A bound for the terms of a logit."""
    return x.shape[1] * np.abs(x).max(initial=0) * np.abs(weight).max(initial=0) + (0 if bias is None else np.abs(bias).max())


@given(**layers)
def test_an_output_layers_loss(core, dtype, seed, n, d, vocab, layout, scale, transposed, biased, smoothing, ignored, chunk):
    _, targets, _ = drawn(seed, dtype, layout, n, vocab, 1.0, ignored)
    x, weight, bias = output_layer(seed, dtype, layout, n, d, vocab, scale, transposed, biased)
    options = {"bias": bias, "transposed": transposed, "ignore_index": ignored, "label_smoothing": smoothing, "chunk": chunk}
    losses, lse = core.linear_cross_entropy(x, weight, targets, **options)
    expected, expected_lse = naive.linear_cross_entropy(x, weight, targets, bias, transposed, ignored, smoothing)
    terms = 1.0 + largest(x, weight, bias)
    assert_close(losses, expected, "linear_cross_entropy", k=vocab + d, terms=terms, dtype=dtype)
    assert_close(lse.astype(dtype), expected_lse, "linear_cross_entropy", k=vocab + d, terms=terms)
    assert lse.dtype == np.float64
    assert (losses[targets == ignored] == 0).all() and (lse[targets == ignored] == 0).all()


@given(**layers)
def test_an_output_layers_gradients(core, dtype, seed, n, d, vocab, layout, scale, transposed, biased, smoothing, ignored, chunk):
    _, targets, dlosses = drawn(seed, dtype, layout, n, vocab, 1.0, ignored)
    x, weight, bias = output_layer(seed, dtype, layout, n, d, vocab, scale, transposed, biased)
    options = {"bias": bias, "transposed": transposed, "ignore_index": ignored, "label_smoothing": smoothing, "chunk": chunk}
    _, lse = core.linear_cross_entropy(x, weight, targets, **options)
    before = Values(seed + 1, dtype).real(*weight.shape)
    dweight = before.copy()
    dx, same, dbias = core.linear_cross_entropy_backward(x, weight, targets, lse, dlosses, dweight, **options)
    assert same is dweight and (dbias is None) == (bias is None)
    expected = naive.linear_cross_entropy_backward(x, weight, targets, dlosses, bias, transposed, ignored, smoothing)
    slope = np.abs(dlosses).max() * (1.0 + largest(x, weight, bias))
    within = {"k": n + d + vocab, "dtype": dtype}
    assert_close(dx, expected[0], "linear_cross_entropy_backward", terms=slope * np.abs(weight).max(initial=0), **within)
    terms = np.abs(before).max(initial=0) + slope * np.abs(x).max(initial=0)
    assert_close(dweight, before.astype(np.float64) + expected[1], "linear_cross_entropy_backward", terms=terms, **within)
    if biased:
        assert_close(dbias, expected[2], "linear_cross_entropy_backward", terms=slope, **within)
    assert (dx[targets == ignored] == 0).all()
    alone, none, dbias_alone = core.linear_cross_entropy_backward(x, weight, targets, lse, dlosses, **options)
    assert none is None
    assert_same_bits((alone, dbias_alone), (dx, dbias))


def test_the_gradients_of_an_output_layer_are_the_slopes(core):
    values = Values(0, "float64")
    x, weight, bias, dlosses = values.real(5, 4), values.real(4, 7), values.real(7), values.real(5)
    targets = np.array([0, 6, -100, 3, 3])
    for smoothing in (0.0, 0.2):
        options = {"label_smoothing": smoothing, "chunk": 3}

        def loss(x=x, weight=weight, bias=bias, options=options):
            return core.linear_cross_entropy(x, weight, targets, bias=bias, **options)[0]

        _, lse = core.linear_cross_entropy(x, weight, targets, bias=bias, **options)
        dweight = np.zeros_like(weight)
        dx, _, dbias = core.linear_cross_entropy_backward(x, weight, targets, lse, dlosses, dweight, bias=bias, **options)
        np.testing.assert_allclose(dx, naive.gradient(lambda a, f=loss: f(x=a), x, dlosses), atol=1e-8)
        np.testing.assert_allclose(dweight, naive.gradient(lambda a, f=loss: f(weight=a), weight, dlosses), atol=1e-8)
        np.testing.assert_allclose(dbias, naive.gradient(lambda a, f=loss: f(bias=a), bias, dlosses), atol=1e-8)


def test_chunks_are_those_of_the_whole(core, dtype):
    """A sum over classes goes on from chunk to chunk, so the gradients of x and of the weights do not feel the cut."""
    values = Values(0, dtype)
    x, weight, targets, dlosses = values.real(40, 30), values.real(30, 300), values.integers(0, 300, 40), values.real(40)
    losses, lse = core.cross_entropy(core.gemm(x, weight), targets)
    for chunk in (1, 64, 299, 300, 4000):
        found, found_lse = core.linear_cross_entropy(x, weight, targets, chunk=chunk)
        np.testing.assert_allclose(found, losses, rtol=20 * np.finfo(dtype).eps)
        np.testing.assert_allclose(found_lse, lse, rtol=20 * np.finfo(dtype).eps)
    dlogits = core.cross_entropy_backward(core.gemm(x, weight), targets, lse, dlosses)
    for chunk in (1, 64, 4000):
        dx, dweight, _ = core.linear_cross_entropy_backward(x, weight, targets, lse, dlosses, np.zeros_like(weight), chunk=chunk)
        np.testing.assert_allclose(dx, core.gemm(dlogits, weight, trans_b=True), rtol=0, atol=100 * np.finfo(dtype).eps)
        np.testing.assert_allclose(dweight, core.gemm(x, dlogits, trans_a=True), rtol=0, atol=100 * np.finfo(dtype).eps)


# Logits that share an offset: their loss is that of the rest, to the roundings of the rest.

offsets = st.sampled_from([1e2, 1e3, 1e4, 1e5, 1e6, -1e6])


def in_double(logits, targets, smoothing, dlosses):
    """losses and dlogits of the same logits, in float64 throughout."""
    x = logits.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    wanted = smoothing / x.shape[1] + (1 - smoothing) * (np.arange(x.shape[1]) == targets[:, None])
    losses = -(wanted * (x - np.log(np.exp(x).sum(1, keepdims=True)))).sum(1)
    return losses, (p - wanted) * dlosses.astype(np.float64)[:, None]


@given(seed=seeds, n=st.integers(1, 8), vocab=sizes, offset=offsets, smoothing=smoothings)
def test_an_offset_of_all_logits_costs_no_precision(core, seed, n, vocab, offset, smoothing):
    values = Values(seed, "float32")
    logits, targets, dlosses = values.real(n, vocab) + np.float32(offset), values.integers(0, vocab, n), values.real(n)
    expected, expected_dlogits = in_double(logits, targets, smoothing, dlosses)
    losses, lse = core.cross_entropy(logits, targets, label_smoothing=smoothing)
    dlogits = core.cross_entropy_backward(logits, targets, lse, dlosses, label_smoothing=smoothing)
    assert_close(losses, expected, "cross_entropy", k=vocab, terms=np.ptp(logits, axis=1) + 1)
    assert_close(dlogits, expected_dlogits, "cross_entropy_backward", k=vocab, terms=(np.abs(dlosses) * 8)[:, None])
    log_p = logits - logits.max(1, keepdims=True).astype(np.float64)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    assert_close(core.log_softmax(logits), log_p, "log_softmax", k=vocab, terms=np.ptp(logits, axis=1, keepdims=True) + 1)


@given(seed=seeds, n=st.integers(1, 8), vocab=sizes, offset=offsets, smoothing=smoothings, chunk=st.sampled_from([1, 7, 1024]))
def test_an_offset_of_an_output_layers_bias_costs_no_precision(core, seed, n, vocab, offset, smoothing, chunk):
    """x W is whole and small, so the logits are those numbers of float32 that the kernel makes, too."""
    values = Values(seed, "float32")
    x, weight = values.whole(n, 3), values.whole(3, vocab)
    bias, targets, dlosses = values.real(vocab) + np.float32(offset), values.integers(0, vocab, n), values.real(n)
    expected, expected_dlogits = in_double(x @ weight + bias, targets, smoothing, dlosses)
    options = {"bias": bias, "label_smoothing": smoothing, "chunk": chunk}
    losses, lse = core.linear_cross_entropy(x, weight, targets, **options)
    dx, _, dbias = core.linear_cross_entropy_backward(x, weight, targets, lse, dlosses, **options)
    if core.__name__.endswith("reference"):  # adds the bias in double
        expected, expected_dlogits = in_double((x @ weight).astype(np.float64) + bias, targets, smoothing, dlosses)
    assert_close(losses, expected, "linear_cross_entropy", k=vocab, terms=100.0)
    slope = np.abs(dlosses).max() * 8
    assert_close(dx, expected_dlogits @ weight.T, "linear_cross_entropy_backward", k=vocab, terms=slope * 9)
    assert_close(dbias, expected_dlogits.sum(0), "linear_cross_entropy_backward", k=vocab + n, terms=slope)
