"""Keys and values as a cache keeps them: in bfloat16, in int8, and in rows that several streams share.

The bits are those of plain ones. The scales of int8 multiply sums and not each number: there all ways of computing have the same bits.
"""

from dataclasses import replace

import numpy as np
import pytest
from core import naive_attention as naive
from core.cases import Values, compiled_alone, seeds
from helpers import assert_close, assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import _core, reference
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference import Block
from mini_tfm.reference.kept import from_kept, to_int8, to_kept
from mini_tfm.reference.linear import from_bfloat16, to_bfloat16

lengths = st.sampled_from([1, 2, 4, 5, 30])
sources = st.sampled_from([1, 3, 33, 64, 257, 300])
head_sizes = st.sampled_from([1, 3, 8, 16, 33, 64, 80, 96])
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


def kept(values, rows, source, batch, kv_heads, d, dtype, shared):
    """A block as a cache keeps it, and the plain one that it stands for: of int8 in float64."""
    k, v = values.real(rows, kv_heads, source, d), values.real(rows, kv_heads, source, d)
    owners = values.integers(0, rows, batch, source) if shared else None
    k, v = to_kept(k, DTYPES[dtype]), to_kept(v, DTYPES[dtype])
    block = Block(k, v, owners=owners, valid=values.mask(batch, source), causal=True)
    k, v = (from_kept(x) if dtype == "int8" else from_kept(x).astype(np.float32) for x in (k, v))
    if shared:
        k, v = (np.stack([x[owners[b], :, np.arange(source)].swapaxes(0, 1) for b in range(batch)]) for x in (k, v))
    return block, replace(block, k=k, v=v, owners=None)


@pytest.mark.parametrize("dtype, shared", [("bfloat16", False), ("float32", True), ("bfloat16", True)])
@examples(1)
@given(seed=seeds, batch=st.integers(1, 3), group=st.integers(1, 3), length=lengths, source=sources, d=head_sizes)
def test_they_have_the_bits_of_plain_ones(core, dtype, shared, seed, batch, group, length, source, d):
    values = Values(seed, "float32")
    rows = batch + 2 if shared else batch
    block, plain = kept(values, rows, source, batch, 2, d, dtype, shared)
    q = values.real(batch, 2 * group, length, d)
    beside = Block(values.real(batch, 2, 5, d), values.real(batch, 2, 5, d))
    for a, b in zip(core.attention(q, [block, beside], 0.3), core.attention(q, [plain, beside], 0.3), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shared", [False, True])
@examples(1)
@given(
    seed=seeds, batch=st.integers(1, 3), group=st.integers(1, 3), length=lengths, source=sources, d=head_sizes,
    size=st.sampled_from([1e-3, 1.0, 30.0]), cap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, 7]), biased=st.booleans(),
)  # fmt: skip
def test_int8_is_close_to_what_it_stands_for(core, shared, seed, batch, group, length, source, d, size, cap, window, biased):
    values = Values(seed, "float32")
    block, plain = kept(values, batch + 2 if shared else batch, source, batch, 2, d, "int8", shared)
    bias = values.real(2 * group, length, source) if biased else None
    block, plain = (replace(x, window=window, bias=bias, lengths=values.integers(0, source + 1, batch)) for x in (block, plain))
    plain.lengths = block.lengths
    q = values.real(batch, 2 * group, length, d, scale=size)
    beside = Block(values.real(batch, 2, 5, d), values.real(batch, 2, 5, d))
    out, lse = core.attention(q, [block, beside], 0.3, cap=cap)
    expected = naive.attention(q, [plain, beside], 0.3, cap)
    assert_close(out, expected.out, "attention", k=expected.n, terms=expected.terms_out, dtype=np.float32)
    assert_close(lse.astype(np.float32), expected.lse, "lse", k=expected.n, terms=expected.terms_lse)


@compiled_alone
@examples(1)
@given(seed=seeds, group=st.integers(1, 3), source=sources, d=head_sizes, cap=st.sampled_from([None, 2.0]))
def test_a_query_of_int8_has_the_bits_that_it_has_alone(seed, group, source, d, cap):
    values = Values(seed, "float32")
    block, _ = kept(values, 3, source, 2, 2, d, "int8", True)
    q, length = values.real(2, 2 * group, 30, d), 30
    together, _ = _core.attention(q, [block], 0.3, cap=cap)
    for i in range(length):
        alone, _ = _core.attention(np.ascontiguousarray(q[:, :, i : i + 1]), [replace(block, offset=source - length + i)], 0.3, cap=cap)
        assert_same_bits(alone[:, :, 0], np.ascontiguousarray(together[:, :, i]))


@pytest.mark.parametrize("length", [1, 40])
def test_weights_are_dropped_before_values_are_scaled(core, length):
    values = Values(3, "float32")
    block, _ = kept(values, 2, 300, 2, 2, 16, "int8", False)
    q = values.real(2, 4, length, 16)
    (out, lse), (expected, whole) = (each.attention(q, [block], 0.3, dropout=0.4, seed=7) for each in (core, reference))
    assert_close(out, expected.astype(np.float64), "attention", k=300, terms=np.abs(from_kept(block.v)).max() * 5)
    assert_close(lse.astype(np.float32), whole, "lse", k=300, terms=5.0)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("part", ["k", "v"])
def test_a_hidden_row_of_int8_that_is_not_finite_does_no_harm(core, part, length):
    values = Values(0, "float32")
    k, v, q, valid = values.real(1, 1, 70, 8), values.real(1, 1, 70, 8), values.real(1, 1, length, 8), np.ones((1, 70), bool)
    valid[0, 33] = False
    harmless, _ = core.attention(q, [Block(to_int8(k), to_int8(v), valid=valid)], 1.0)
    (k if part == "k" else v)[0, 0, 33, 2] = np.inf
    out, _ = core.attention(q, [Block(to_int8(k), to_int8(v), valid=valid)], 1.0)
    assert_same_bits(out, harmless)
    out, _ = core.attention(q, [Block(to_int8(k), to_int8(v))], 1.0)
    assert np.isnan(out).all()


@compiled_alone
def test_owners_are_read_where_they_lie():
    """Part of a table that has room for more streams and keys."""
    values = Values(0, "float64")
    k, v, q = values.real(4, 2, 40, 8), values.real(4, 2, 40, 8), values.real(3, 2, 1, 8)
    table = values.integers(0, 4, 5, 64)
    a, _ = _core.attention(q, [Block(k, v, owners=table[:3, :40])], 1.0)
    b, _ = _core.attention(q, [Block(k, v, owners=table[:3, :40].copy())], 1.0)
    assert_same_bits(a, b)


def blocks(**changes):
    values = Values(0, "float32")
    k = values.real(2, 2, 6, 8)
    return Block(**({"k": to_bfloat16(k), "v": to_bfloat16(k)} | changes)), values.real(2, 2, 3, 8), k


@pytest.mark.parametrize("changes, message", [
    ({"owners": np.zeros((2, 5), np.int64)}, r"owners: expected shape \(2, 6\)"),
    ({"owners": np.full((2, 6), 2)}, "owners: expected values from 0 to 1, got 2"),
    ({"owners": np.full((2, 6), -1)}, "owners: expected values from 0 to 1, got -1"),
    ({"v": np.zeros((2, 2, 6, 8), np.float32)}, "v: expected dtype uint16 to match k, got float32"),
    ({"k": np.zeros((2, 2, 6, 8), np.int16)}, "k: expected dtype float32 or uint16 or int8, got int16"),
    ({"k": np.zeros((2, 2, 6, 8), np.int8)}, r"k: expected shape \(2, Hkv, S, 12\)"),
    ({"v": np.zeros((2, 2, 6, 8), np.int8)}, "v: expected dtype uint16 to match k, got int8"),
    ({"k": np.zeros((2, 2, 6, 12), np.int8)}, r"v: expected shape \(2, 2, 6, 12\)"),
    ({"index": np.zeros((2, 2, 3, 1), np.int64)}, "k: expected dtype float32, got uint16"),
])  # fmt: skip
def test_refused(core, changes, message):
    block, q, _ = blocks(**changes)
    with pytest.raises((InvalidType, InvalidValue), match=message):
        core.attention(q, [block], 1.0)


def test_no_gradient_and_no_sums_of_weights(core):
    block, q, k = blocks()
    shared = Block(k, k, owners=np.zeros((2, 6), np.int64))
    lse = np.zeros(q.shape[:3])
    eighth = Block(to_int8(k), to_int8(k))
    for one, message in (
        (block, "k: expected dtype float32, got uint16"), (eighth, "k: expected dtype float32, got int8"), (shared, "owners: expected None")
    ):  # fmt: skip
        with pytest.raises((InvalidType, InvalidValue), match=message):
            core.attention_mass(q, one, lse, 1.0, np.ones((2, 3), bool))
        with pytest.raises((InvalidType, InvalidValue), match=message):
            core.attention_backward(q, q, lse, q, [one], 1.0)


def test_queries_of_float64_have_no_keys_in_bfloat16(core):
    block, q, _ = blocks()
    with pytest.raises(InvalidType, match=r"k: expected dtype float64, got uint16"):
        core.attention(q.astype(np.float64), [block], 1.0)


SPECIAL = [0.0, -0.0, 1.0, np.inf, -np.inf, 3.0e38, 3.4e38, 1e-40, -1e-45, 1.00390625, 1.01171875, np.nan]


def test_a_store_keeps_the_nearest_bfloat16(core):
    rows = np.array([*SPECIAL, *Values(1, "float32").real(52)], np.float32).reshape(2, 2, 4, 4)
    store = np.full((2, 2, 9, 4), 7, np.uint16)
    core.keep_rows(store, 3, rows)
    assert_same_bits(store[:, :, 3:7], to_bfloat16(rows))
    assert (store[:, :, :3] == 7).all() and (store[:, :, 7:] == 7).all()
    assert np.isnan(from_bfloat16(store[:, :, 3:7])).sum() == 1
    with pytest.raises(InvalidType, match="store: expected dtype float64, got uint16"):
        core.keep_rows(store, 0, rows.astype(np.float64))


HALVES = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]


@examples(2)
@given(seed=seeds, d=st.sampled_from([1, 3, 8, 64, 80]), size=st.sampled_from([1e-38, 1e-33, 1e-3, 1.0, 1e4, 1e36]))
def test_a_store_of_int8_is_as_near_as_its_steps(core, seed, d, size):
    rows = Values(seed, "float32").real(2, 3, 4, d, scale=size)
    store = np.full((2, 3, 9, d + 4), 7, np.int8)
    core.keep_rows(store, 3, rows)
    assert_same_bits(store[:, :, 3:7], to_int8(rows))
    assert (store[:, :, :3] == 7).all() and (store[:, :, 7:] == 7).all()
    most = np.abs(rows).max(-1, keepdims=True).astype(np.float64)
    assert (np.abs(from_kept(store[:, :, 3:7]) - rows) <= np.where(most < 1e-30, most, most / 127 * (0.5 + 1e-4))).all()


def test_a_store_of_int8_rounds_ties_to_even_and_tells_what_is_not_finite(core):
    ones = [1.0] * 7
    rows = np.array([[[HALVES, [0.0] * 8, [1e-31] * 8, [3e38, *[-3e38] * 7], [np.inf, *ones], [np.nan, *ones]]]], np.float32)
    store = np.zeros((1, 1, 6, 12), np.int8)
    core.keep_rows(store, 0, rows)
    assert_same_bits(store, to_int8(rows))
    assert store[0, 0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, -126, 126]
    found = from_kept(store)[0, 0]
    assert not found[1:3].any() and np.isnan(found[4:]).all()
    np.testing.assert_allclose(found[3], rows[0, 0, 3], rtol=1e-7)
    for wrong, message in (
        (np.zeros((1, 1, 6, 8), np.int8), r"store: expected shape \(1, 1, any, 12\)"),
        (np.zeros((1, 1, 6, 12), np.float32), r"store: expected shape \(1, 1, any, 8\)"),
    ):
        with pytest.raises(InvalidValue, match=message):
            core.keep_rows(wrong, 0, rows)
