"""Keys and values as a cache keeps them: in bfloat16, and in rows that several streams share. The bits are those of plain ones."""

from dataclasses import replace

import numpy as np
import pytest
from core.cases import Values, compiled_alone, seeds
from helpers import assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import _core, reference
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference import Block
from mini_tfm.reference.linear import from_bfloat16, to_bfloat16

lengths = st.sampled_from([1, 2, 4, 5, 30])
sources = st.sampled_from([1, 3, 33, 64, 257, 300])
head_sizes = st.sampled_from([1, 3, 8, 16, 33, 64])


def kept(values, rows, source, batch, kv_heads, d, in_bfloat16, shared):
    """A block as a cache keeps it, and the plain one that it stands for."""
    k, v = values.real(rows, kv_heads, source, d), values.real(rows, kv_heads, source, d)
    owners = values.integers(0, rows, batch, source) if shared else None
    if in_bfloat16:
        k, v = to_bfloat16(k), to_bfloat16(v)
    block = Block(k, v, owners=owners, valid=values.mask(batch, source), causal=True)
    if in_bfloat16:
        k, v = from_bfloat16(k), from_bfloat16(v)
    if shared:
        k, v = (np.stack([x[owners[b], :, np.arange(source)].swapaxes(0, 1) for b in range(batch)]) for x in (k, v))
    return block, replace(block, k=k, v=v, owners=None)


@pytest.mark.parametrize("in_bfloat16, shared", [(True, False), (False, True), (True, True)])
@examples(1)
@given(seed=seeds, batch=st.integers(1, 3), group=st.integers(1, 3), length=lengths, source=sources, d=head_sizes)
def test_they_have_the_bits_of_plain_ones(core, in_bfloat16, shared, seed, batch, group, length, source, d):
    values = Values(seed, "float32")
    rows = batch + 2 if shared else batch
    block, plain = kept(values, rows, source, batch, 2, d, in_bfloat16, shared)
    q = values.real(batch, 2 * group, length, d)
    beside = Block(values.real(batch, 2, 5, d), values.real(batch, 2, 5, d))
    for a, b in zip(core.attention(q, [block, beside], 0.3), core.attention(q, [plain, beside], 0.3), strict=True):
        assert_same_bits(a, b)


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
    ({"k": np.zeros((2, 2, 6, 8), np.int8)}, "k: expected dtype float32 or uint16, got int8"),
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
    for one, message in ((block, "k: expected dtype float32, got uint16"), (shared, "owners: expected None")):
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
    assert reference.keep_rows is not _core.keep_rows
