"""Where the rows of queries, keys and values lie in memory does not show in what attention computes."""

import numpy as np
import pytest
from core.cases import Values, compiled_alone
from helpers import assert_same_bits

from mini_tfm import _core
from mini_tfm.reference import Block


def side_by_side(x):
    """Heads of one row next to each other, as a projection leaves them."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def within_more(x):
    """A part of a larger array; all around it are NaNs, which would show."""
    b, h, n, d = x.shape
    more = np.full((b, n + 3, h + 2, d + 5), np.nan, x.dtype)
    part = more[:, 1 : 1 + n, 2 : 2 + h, 3 : 3 + d].swapaxes(1, 2)
    part[...] = x
    return part


def backwards(x):
    return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]


def torn(x):
    """Not even the elements of a row lie together: such an array is copied."""
    return np.repeat(x, 2, axis=3)[..., ::2]


LAYOUTS = [side_by_side, within_more, backwards, torn]
CASES = {
    "grouped heads, dropout": (2, 4, 2, 37, 150, 32, {"causal": True}, 0.2),
    "one query": (1, 3, 1, 1, 700, 20, {}, 0.0),
    "few queries": (3, 2, 2, 5, 6, 1, {}, 0.0),
    "tiles": (2, 2, 2, 200, 64, 64, {"window": 40}, 0.0),
    "own rows": (2, 2, 1, 6, 40, 16, {"index": 5}, 0.0),
    "no keys": (1, 1, 1, 3, 0, 8, {}, 0.0),
}


def everything(q, k, v, dout, options, dropout):
    block, how = Block(k, v, **options), {"dropout": dropout, "seed": 3}
    out, lse = _core.attention(q, [block], 0.3, **how)
    dq, (grads,) = _core.attention_backward(dout, out, lse, q, [block], 0.3, **how)
    mass = _core.attention_mass(q, block, lse, 0.3, np.ones((q.shape[0], q.shape[2]), bool))
    return {"out": out, "lse": lse, "dq": dq, "dk": grads.dk, "dv": grads.dv, "mass": mass}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_layout(dtype, case, layout):
    b, h, kv_heads, t, s, d, options, dropout = CASES[case]
    values, options = Values(0, dtype), dict(options)
    if "index" in options:
        options["index"] = values.rng.integers(-1, s, (b, h, t, options["index"]))
    arrays = [values.real(*shape) for shape in ((b, h, t, d), (b, kv_heads, s, d), (b, kv_heads, s, d), (b, h, t, d))]
    want = everything(*arrays, options, dropout)
    got = everything(*map(layout, arrays), options, dropout)
    for name in want:
        assert_same_bits(got[name], want[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_of_any_layout(dtype, layout):
    x = Values(1, dtype).real(2, 3, 5, 6)
    turns = np.array([1.0, 0.1, 0.01])
    assert_same_bits(_core.rotary(layout(x), np.arange(5), turns), _core.rotary(x, np.arange(5), turns))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rms_norm_of_heads_of_any_layout(core, dtype, layout):
    values = Values(1, dtype)
    x, weight = values.real(2, 3, 5, 37), values.real(37)
    assert_same_bits(core.rms_norm(layout(x), weight, 1e-6), core.rms_norm(x, weight, 1e-6))


@compiled_alone
def test_results_lie_as_the_queries_do(dtype):
    """So that projections before and after need no copies."""
    x = Values(2, dtype).real(2, 3, 9, 4)
    for layout, contiguous in ((side_by_side, lambda y: y.swapaxes(1, 2)), (np.ascontiguousarray, lambda y: y)):
        got = everything(*[layout(x)] * 4, {}, 0.0)
        for name in ("out", "dq", "dk", "dv"):
            assert contiguous(got[name]).flags.c_contiguous, name


def test_keys_that_all_heads_share_are_read_where_they_lie(dtype):
    """Strides of zero."""
    values = Values(3, dtype)
    q, k = values.real(2, 2, 4, 8), values.real(1, 1, 6, 8)
    shared = np.broadcast_to(k, (2, 2, 6, 8))
    want = everything(q, shared.copy(), shared.copy(), q, {}, 0.0)
    got = everything(q, shared, shared, q, {}, 0.0)
    for name in want:
        assert_same_bits(got[name], want[name])
