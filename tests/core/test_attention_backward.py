"""The backward of attention, against the dense one and against finite differences."""

from dataclasses import replace

import numpy as np
import pytest
from core import naive_attention as naive
from core.attention_cases import BIASES, FEATURES, drawn_case, only_row
from core.cases import Values, layouts, seeds
from core.naive import gradient
from core.test_attention import HIDING, HIDING_BIASES, case_that_hides, few, head_sizes, lengths, sources
from helpers import assert_close, assert_same_bits, examples
from hypothesis import given

from mini_tfm import _core


def backward(core, case, dout, needs=None, cap=None):
    """dq and the blocks' gradients, from a forward of the same implementation."""
    out, lse = core.attention(case.q, case.blocks, case.scale, cap=cap)
    return core.attention_backward(dout, out, lse, case.q, case.blocks, case.scale, needs, cap=cap)


def check(core, case, dout, start=0.0, cap=None):
    """Every gradient; the tables of the biases hold `start` already."""
    expected = naive.attention_backward(dout, case.q, case.blocks, case.scale, cap)
    tables = case.ask_for_dbias(lambda shape: np.full(shape, start, dout.dtype))
    dq, grads = backward(core, case, dout, cap=cap)
    bounds = {"operation": "attention_backward", "dtype": dout.dtype}
    n_all = expected.n + expected.n_queries
    assert_close(dq, expected.dq, k=expected.n, terms=expected.terms_dq, **bounds)
    assert len(grads) == len(case.blocks)
    for i, grad in enumerate(grads):
        assert_close(grad.dk, expected.dk[i], k=n_all, terms=expected.terms_dk, **bounds)
        assert_close(grad.dv, expected.dv[i], k=n_all, terms=expected.terms_dv, **bounds)
        if tables[i] is None:
            assert grad.dbias is None
        else:
            wanted = start + case.biases[i].gradient(expected.dscores[i])
            shared = expected.dscores[i].size / max(tables[i].size, 1) + expected.n  # how many scores one element of the table feeds
            assert_close(tables[i], wanted, k=shared, terms=start + expected.terms_dbias, **bounds)


@pytest.mark.parametrize("feature", FEATURES)
@examples(0.5)
@given(seed=seeds, batch=few, kv_heads=few, group=few, length=lengths, source=sources, d=head_sizes, layout=layouts)
def test_backward(core, dtype, feature, seed, batch, kv_heads, group, length, source, d, layout):
    values = Values(seed, dtype, layout)
    case = drawn_case(feature, values, batch, kv_heads * group, kv_heads, length, source, d)
    check(core, case, values.real(*case.q.shape), start=0.5)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("cap", [0.1, 2.0, 50.0])
def test_capped(core, dtype, feature, cap):
    for seed, (length, source) in enumerate([(1, 5), (3, 300), (40, 70)]):
        values = Values(seed, dtype)
        case = drawn_case(feature, values, 1, 4, 2, length, source, 8, size=3.0)
        check(core, case, values.real(*case.q.shape), start=0.5, cap=cap)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_capped_score_that_is_hidden_gets_nothing(core, dtype, odd):
    values = Values(0, dtype)
    case, used = case_that_hides("hidden by a bias per key", values, 40)
    dout, (block,) = values.real(*case.q.shape), case.blocks
    expected = naive.attention_backward(dout, case.q, case.blocks, case.scale, 2.0)
    block.k, block.v = (np.where(used[:, None, :, None], x, odd).astype(dtype) for x in (block.k, block.v))
    dq, (grad,) = backward(core, case, dout, cap=2.0)
    for found, wanted in ((dq, expected.dq), (grad.dk, expected.dk[0]), (grad.dv, expected.dv[0])):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("length, source", [(63, 64), (65, 129), (130, 515), (257, 257), (1, 1025), (4, 2049)])
@pytest.mark.parametrize("feature", ["plain", "causal", "prefix", "causal window", "window", "lengths", "distance bias"])
def test_past_the_edges_of_tiles(dtype, feature, length, source):
    """Of the compiled kernel: the twin has none."""
    values = Values(length, dtype)
    case = drawn_case(feature, values, 1, 2, 1, length, source, 8)
    check(_core, case, values.real(*case.q.shape))


@pytest.mark.parametrize("d", [4, 7, 32, 64, 80, 128, 256])
def test_head_sizes(core, dtype, d):
    for length in (1, 40):
        values = Values(d, dtype)
        case = drawn_case("causal", values, 1, 2, 1, length, 70, d)
        check(core, case, values.real(*case.q.shape))


@pytest.mark.parametrize("feature", FEATURES)
def test_it_is_the_slope_of_the_forward(core, feature):
    """Against differences of the implementation's own forward, with step 1e-5: good to about 1e-9 of values near 1."""
    values = Values(3, "float64")
    case = drawn_case(feature, values, batch=2, heads=2, kv_heads=1, length=3, source=4, d=3)
    dout = values.real(*case.q.shape)

    def out(q=case.q, at=0, **changed):
        blocks = [replace(block, **(changed if i == at else {})) for i, block in enumerate(case.blocks)]
        return core.attention(q, blocks, case.scale)[0]

    expected_dq = gradient(lambda q: out(q), case.q, dout)
    expected = []
    for i, (block, bias) in enumerate(zip(case.blocks, case.biases, strict=True)):
        dk = gradient(lambda k, i=i: out(at=i, k=k), block.k, dout)
        dv = gradient(lambda v, i=i: out(at=i, v=v), block.v, dout)
        dbias = None if bias is None else gradient(lambda table, i=i, bias=bias: out(at=i, bias=bias.view(table)), bias.table, dout)
        expected.append((dk, dv, dbias))
    tables = case.ask_for_dbias(np.zeros)
    dq, grads = backward(core, case, dout)
    np.testing.assert_allclose(dq, expected_dq, atol=1e-7)
    for grad, table, (dk, dv, dbias) in zip(grads, tables, expected, strict=True):
        np.testing.assert_allclose(grad.dk, dk, atol=1e-7)
        np.testing.assert_allclose(grad.dv, dv, atol=1e-7)
        if table is not None:
            np.testing.assert_allclose(table, dbias, atol=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in BIASES if kind not in ("expanded", "distance")])
@pytest.mark.parametrize("length", [1, 20])
def test_dbias_on_request_has_the_shape_of_the_bias(core, dtype, kind, length):
    values = Values(0, dtype)
    case = drawn_case(f"{kind} bias", values, batch=2, heads=2, length=length, source=9, d=8)
    dout, block = values.real(*case.q.shape), case.blocks[0]
    expected = naive.attention_backward(dout, case.q, case.blocks, case.scale)
    block.needs_dbias = True
    _, (grad,) = backward(core, case, dout)
    assert block.dbias is None  # the caller's block is not written to
    wanted = case.biases[0].view(case.biases[0].gradient(expected.dscores[0]))
    assert_close(grad.dbias, wanted, "attention_backward", k=4 * length * 9, terms=expected.terms_dbias, dtype=dtype)


@pytest.mark.parametrize("length", [1, 40])
def test_blocks_may_share_a_table(core, dtype, length):
    """One distance bias over memory and segment: both add to it."""
    values = Values(0, dtype)
    case = drawn_case("distance bias", values, batch=2, heads=4, kv_heads=2, length=length, source=30, d=8)
    dout, first = values.real(*case.q.shape), case.blocks[0]
    case.blocks.append(replace(first, k=values.real(*first.k.shape), v=values.real(*first.v.shape), lengths=np.array([5, 30])))
    expected = naive.attention_backward(dout, case.q, case.blocks, case.scale)
    dtable = np.zeros_like(case.biases[0].table)
    for block in case.blocks:
        block.dbias = case.biases[0].view(dtable)
    backward(core, case, dout)
    wanted = sum(case.biases[0].gradient(dscores) for dscores in expected.dscores)
    assert_close(dtable, wanted, "attention_backward", k=4 * length + expected.n, terms=expected.terms_dbias)


def test_gradients_that_nobody_needs_are_not_made(core, dtype):
    values = Values(0, dtype)
    case = drawn_case("blocks", values, length=5)
    dout = values.real(*case.q.shape)
    dq, grads = backward(core, case, dout)
    some_dq, some = backward(core, case, dout, needs=[True, False, True])
    assert_same_bits(some_dq, dq)
    assert some[1] == (None, None, None)
    assert_same_bits(some[0][:2] + some[2][:2], grads[0][:2] + grads[2][:2])


def test_a_query_that_sees_nothing_gives_and_gets_nothing(core, dtype):
    """Also where it is NaN; the others' gradients are those without it."""
    values = Values(0, dtype)
    for length in (1, 3, 40):
        case = drawn_case("lengths", values, batch=2, heads=2, kv_heads=1, length=length, source=20, d=8)
        block, dout = case.blocks[0], values.real(*case.q.shape)
        block.lengths = np.array([0, 20])
        case.q[0] = dout[0] = np.nan
        out, lse = core.attention(case.q, case.blocks, case.scale)
        dq, (grad,) = core.attention_backward(dout, out, lse, case.q, case.blocks, case.scale)
        for x in (out, dq, grad.dk, grad.dv):
            assert not x[0].any() and np.isfinite(x).all()
        assert (lse[0] == -np.inf).all() and np.isfinite(lse[1]).all()


@examples(2)
@given(seed=seeds, length=lengths)
def test_a_batch_row_alone_has_the_same_bits(core, dtype, seed, length):
    values = Values(seed, dtype)
    case = drawn_case("everything", values, batch=3, heads=4, kv_heads=2, length=length, source=40, d=8)
    dout = values.real(*case.q.shape)
    dq, grads = backward(core, case, dout)
    for row in range(3):
        one = replace(case, q=case.q[row : row + 1], blocks=[only_row(block, row) for block in case.blocks])
        alone_dq, alone = backward(core, one, dout[row : row + 1])
        assert_same_bits(alone_dq, dq[row : row + 1])
        for a, grad in zip(alone, grads, strict=True):
            assert_same_bits((a.dk, a.dv), (grad.dk[row : row + 1], grad.dv[row : row + 1]))


@pytest.mark.parametrize("feature", [*HIDING, *(f"hidden by a bias {kind}" for kind in HIDING_BIASES)])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_hidden_rows_get_zero_and_nan_stays_out(core, dtype, feature, odd):
    """What no query sees has zero gradients, even if it holds NaN or an infinity; so has a bias of -inf."""
    for length in (2, 40):
        values = Values(length, dtype)
        case, used = case_that_hides(feature, values, length)
        dout, (block,) = values.real(*case.q.shape), case.blocks
        expected = naive.attention_backward(dout, case.q, case.blocks, case.scale)
        block.k, block.v = (np.where(used[:, None, :, None], x, odd).astype(dtype) for x in (block.k, block.v))
        block.needs_dbias = block.bias is not None
        dq, (grad,) = backward(core, case, dout)
        assert_close(dq, expected.dq, "attention_backward", k=expected.n, terms=expected.terms_dq)
        for d_bank, wanted in ((grad.dk, expected.dk[0]), (grad.dv, expected.dv[0])):
            assert np.isfinite(d_bank).all() and not d_bank.transpose(0, 2, 1, 3)[~used].any()
            np.testing.assert_allclose(d_bank, wanted, atol=1e-4)
        if block.bias is not None:
            assert np.isfinite(grad.dbias).all() and not grad.dbias[np.isneginf(block.bias)].any()


@pytest.mark.parametrize("feature", ["plain", "causal", "distance bias", "index", "everything"])
@pytest.mark.parametrize("length, source", [(3, 5), (30, 140)])
def test_with_dropout_it_is_the_slope_of_what_was_kept(core, feature, length, source):
    """The backward draws the forward's weights again: along random directions, against differences of the forward."""
    values = Values(length, "float64")
    case = drawn_case(feature, values, 2, 4, 2, length, source, 8)
    drops = {"dropout": 0.4, "seed": 11}
    dout = values.real(*case.q.shape)
    tables = case.ask_for_dbias(lambda shape: np.zeros(shape))
    out, lse = core.attention(case.q, case.blocks, case.scale, **drops)
    dq, grads = core.attention_backward(dout, out, lse, case.q, case.blocks, case.scale, **drops)
    arrays = [case.q, *(x for block in case.blocks for x in (block.k, block.v))]
    slopes = [dq, *(x for grad in grads for x in (grad.dk, grad.dv))]
    for bias, table in zip(case.biases, tables, strict=True):
        if bias is not None and np.isfinite(bias.table).all():
            arrays.append(bias.table)
            slopes.append(table)
    for x, slope in zip(arrays, slopes, strict=True):
        direction, step = values.real(*x.shape), 1e-6
        kept, loss = x.copy(), []
        for sign in (1, -1):
            x[...] = kept + sign * step * direction
            loss.append((core.attention(case.q, case.blocks, case.scale, **drops)[0] * dout).sum())
        x[...] = kept
        np.testing.assert_allclose((loss[0] - loss[1]) / (2 * step), (slope * direction).sum(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("feature", ["plain", "per key bias", "index"])
@pytest.mark.parametrize("offset", [1e2, 1e4, 4.3e4, 1e6])
def test_scores_that_share_an_offset_keep_their_weights(core, dtype, feature, offset):
    """All scores of a query lie near `offset`. Its weights add up to one, in the backward as on the way there: dv of ones adds up
    to the queries, and of values of one key's the output's gradient is nothing."""
    for length in (1, 3, 40):
        case = drawn_case(feature, Values(length, dtype), batch=2, heads=2, kv_heads=2, length=length, source=50, d=8)
        block = case.blocks[0]
        case.q[..., 0], block.k[..., 0], case.scale = np.sqrt(offset), np.sqrt(offset), 1.0
        dout = np.ones_like(case.q)
        seen = (np.ones(case.q.shape[:3], bool) if block.index is None else (block.index >= 0).any(-1)).sum(2)
        _, (grad,) = backward(core, case, dout)
        np.testing.assert_allclose(grad.dv.sum(2, dtype=np.float64), np.broadcast_to(seen[..., None], (2, 2, 8)), rtol=1e-5)
