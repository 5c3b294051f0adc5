"""Attention against every query's own dense softmax, forward: each kind of mask and bias alone, and all at once."""

from dataclasses import replace

import numpy as np
import pytest
from core import naive_attention as naive
from core.attention_cases import FEATURES, drawn_case, only_row
from core.cases import Values, compiled_alone, layouts, seeds
from helpers import assert_close, assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import _core
from mini_tfm.errors import InvalidValue
from mini_tfm.reference import Block

few = st.integers(1, 3)
lengths = st.sampled_from([1, 2, 3, 4, 5, 9, 17, 33])
sources = st.sampled_from([1, 2, 3, 5, 8, 16, 31, 66])
head_sizes = st.sampled_from([1, 2, 3, 8, 13, 16, 33])


def check(core, case, cap=None):
    out, lse = core.attention(case.q, case.blocks, case.scale, cap=cap)
    expected = naive.attention(case.q, case.blocks, case.scale, cap)
    assert_close(out, expected.out, "attention", k=expected.n, terms=expected.terms_out, dtype=case.q.dtype)
    assert lse.dtype == np.float64
    assert_close(lse.astype(case.q.dtype), expected.lse, "lse", k=expected.n, terms=expected.terms_lse)


@pytest.mark.parametrize("feature", FEATURES)
@examples(0.5)
@given(seed=seeds, batch=few, kv_heads=few, group=few, length=lengths, source=sources, d=head_sizes, layout=layouts)
def test_forward(core, dtype, feature, seed, batch, kv_heads, group, length, source, d, layout):
    values = Values(seed, dtype, layout)
    check(core, drawn_case(feature, values, batch, kv_heads * group, kv_heads, length, source, d))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("cap", [0.1, 2.0, 50.0])
def test_capped(core, dtype, feature, cap):
    """Far below the scores, among them, far above; of few queries, of many, past a tile."""
    for seed, (length, source) in enumerate([(1, 5), (3, 300), (40, 70)]):
        check(core, drawn_case(feature, Values(seed, dtype), 1, 4, 2, length, source, 8, size=3.0), cap)


def test_a_cap_holds_what_is_infinite(core, dtype):
    q, k = np.ones((1, 1, 3, 1), dtype), np.array([np.inf, 0, -np.inf], dtype).reshape(1, 1, 3, 1)
    out, _ = core.attention(q, [Block(k, np.array([1.0, 0.0, 0.0], dtype).reshape(1, 1, 3, 1))], 1.0, cap=2.0)
    np.testing.assert_allclose(out, np.exp(2) / (np.exp(2) + 1 + np.exp(-2)), rtol=1e-6)


@pytest.mark.parametrize("length, source", [(63, 64), (64, 65), (65, 129), (130, 515), (257, 257), (1, 1025), (2, 300), (4, 2049)])
@pytest.mark.parametrize("feature", ["plain", "causal", "prefix", "causal window", "window", "lengths", "valid", "distance bias"])
def test_past_the_edges_of_tiles(dtype, feature, length, source):
    """Of the compiled kernel: the twin has none."""
    check(_core, drawn_case(feature, Values(length, dtype), 1, 2, 1, length, source, 8))


@pytest.mark.parametrize("d", [4, 7, 32, 40, 64, 80, 96, 128, 200, 256])
def test_head_sizes(core, dtype, d):
    for length in (1, 40):
        check(core, drawn_case("causal", Values(d, dtype), 1, 2, 1, length, 70, d))


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_flat_and_peaked(core, dtype, size):
    for length in (1, 20):
        check(core, drawn_case("everything", Values(0, dtype), length=length, source=50, d=16, size=size))


def test_the_formula_of_the_paper(core):
    """softmax(q k^T / sqrt(d)) v with two keys, by hand."""
    q, k = np.array([[[[1.0, 0.0]]]]), np.array([[[[2.0, 5.0], [0.0, -3.0]]]])
    v = np.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    out, lse = core.attention(q, [Block(k, v)], 2**-0.5)
    a, b = np.exp(2 / np.sqrt(2)), 1.0
    np.testing.assert_allclose(out[0, 0, 0], [a / (a + b), b / (a + b)], rtol=1e-14)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(a + b), rtol=1e-14)


def test_blocks_share_one_softmax(core, dtype):
    """Keys cut into blocks anywhere are the same keys."""
    case = drawn_case("plain", Values(0, dtype), length=9, source=30, d=8)
    k, v = case.blocks[0].k, case.blocks[0].v
    whole = naive.attention(case.q, case.blocks, case.scale)
    for cuts in ([7], [1, 29], [10, 10, 20]):
        case.blocks = [Block(a, b) for a, b in zip(np.split(k, cuts, 2), np.split(v, cuts, 2), strict=True)]
        out, lse = core.attention(case.q, case.blocks, case.scale)
        assert_close(out, whole.out, "attention", k=30, terms=whole.terms_out)
        assert_close(lse.astype(dtype), whole.lse, "lse", k=30, terms=whole.terms_lse)


def test_an_index_of_all_rows_is_no_index(core, dtype):
    case = drawn_case("plain", Values(0, dtype), batch=2, heads=4, kv_heads=2, length=6, source=11, d=8)
    expected = naive.attention(case.q, case.blocks, case.scale)
    case.blocks[0].index = np.broadcast_to(np.arange(11), (2, 4, 6, 11)).copy()
    out, _ = core.attention(case.q, case.blocks, case.scale)
    assert_close(out, expected.out, "attention", k=11, terms=expected.terms_out)


def test_a_row_named_twice_counts_twice(core, dtype):
    case = drawn_case("plain", Values(0, dtype), batch=1, heads=1, length=1, source=2, d=4)
    block = case.blocks[0]
    block.index = np.array([[[[1, 0, 1, -1]]]])
    out, _ = core.attention(case.q, case.blocks, case.scale)
    twice = Block(block.k[:, :, [1, 0, 1]], block.v[:, :, [1, 0, 1]])
    assert_close(out, naive.attention(case.q, [twice], case.scale).out, "attention", k=3, terms=np.abs(block.v).max())


def test_the_last_query_sees_the_last_key(core, dtype):
    """Causal without an offset: with 2 queries and 5 keys the first query sees 4, the second all."""
    q, v = np.zeros((1, 1, 2, 1), dtype), np.arange(5, dtype=dtype).reshape(1, 1, 5, 1)
    out, lse = core.attention(q, [Block(np.zeros_like(v), v, causal=True)], 1.0)
    assert_close(out.reshape(2), np.array([1.5, 2.0]), "attention", k=5)
    assert_close(np.exp(lse.reshape(2)).astype(dtype), np.array([4.0, 5.0]), "lse", k=5, terms=5.0)


@pytest.mark.parametrize("window", [None, 1, 5, 2**60])
@pytest.mark.parametrize("offset", [-(2**60), -2, 0, 2, 2**60])
@pytest.mark.parametrize("causal", [False, True])
def test_far_offsets_and_wide_windows(core, causal, offset, window):
    """The largest that are taken do not overflow when they are added up."""
    for length in (1, 3, 70):
        case = drawn_case("plain", Values(0, "float64"), length=length, source=70)
        case.blocks = [replace(case.blocks[0], causal=causal, offset=offset, window=window)]
        check(core, case)


HIDING = ["causal", "prefix", "offset", "window", "causal window", "lengths", "valid", "index"]
HIDING_BIASES = {  # a bias of -inf, of which every fifth key is hidden: its shape without the keys, and its way through memory
    "per key": ((1, 1, 1), lambda bias: bias), "of each head": ((1, 2, 1), lambda bias: bias),
    "of each row": ((2, 1, 1), lambda bias: bias),
    "dense": ((2, 2, None), lambda bias: bias), "strided": ((2, 2, None), lambda bias: np.repeat(bias, 2, axis=3)[..., ::2]),
    "beside an index": ((2, 2, None), lambda bias: bias),
}  # fmt: skip


def case_that_hides(feature, values, length, source=70):
    """A case of one block, and which rows (B, S) some query sees."""
    if not feature.startswith("hidden by a bias"):
        case = drawn_case(feature, values, batch=2, heads=2, length=length, source=source, d=8)
        case.blocks[0].offset = case.blocks[0].offset or 9  # or the last query might see everything
        rows, seen = naive.rows_and_seen(case.q, case.blocks[0])
        used = np.zeros((2, source), bool)
        for b in range(2):
            used[b, rows[b][seen[b]]] = True
        return case, used
    kind = feature.removeprefix("hidden by a bias ")
    shape, laid = HIDING_BIASES[kind]
    case = drawn_case("plain", values, batch=2, heads=2, length=length, source=source, d=8)
    bias = values.real(*(length if n is None else n for n in shape), source)
    bias[..., ::5] = -np.inf
    case.blocks[0].bias = laid(bias)
    if kind == "beside an index":
        case.blocks[0].index = np.broadcast_to(np.arange(source), (2, 2, length, source)).copy()
    return case, np.broadcast_to(np.arange(source) % 5 > 0, (2, source))


@pytest.mark.parametrize("feature", [*HIDING, *(f"hidden by a bias {n}" for n in HIDING_BIASES)])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_is_never_read(core, dtype, feature, odd):
    """NaN or an infinity in every key and value that a mask or a bias of -inf hides leaves no trace."""
    n_hidden = 0
    for seed, length in enumerate((1, 2, 5, 40)):
        case, used = case_that_hides(feature, Values(seed, dtype), length)
        expected = naive.attention(case.q, case.blocks, case.scale)
        (block,) = case.blocks
        block.k, block.v = (np.where(used[:, None, :, None], x, odd).astype(dtype) for x in (block.k, block.v))
        out, lse = core.attention(case.q, case.blocks, case.scale)
        assert_close(out, expected.out, "attention", k=expected.n, terms=expected.terms_out)
        assert_close(lse.astype(dtype), expected.lse, "lse", k=expected.n, terms=expected.terms_lse)
        n_hidden += (~used).sum()
    assert n_hidden


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("feature", ["causal", "window", "valid", "lengths", "index"])
def test_nan_reaches_the_rows_that_see_it_alone(core, dtype, feature, length):
    case = drawn_case(feature, Values(7, dtype), batch=2, heads=2, kv_heads=1, length=length, source=50, d=8)
    expected = naive.attention(case.q, case.blocks, case.scale)
    block = case.blocks[0]
    rows, seen = naive.rows_and_seen(case.q, block)
    poisoned = int(rows[0][seen[0]][0])
    hit = (seen & (rows == poisoned)).any(-1)
    hit[1] = False
    for bank in ("k", "v"):
        poison = getattr(block, bank).copy()
        poison[0, 0, poisoned, 3] = np.nan
        out, lse = core.attention(case.q, [replace(block, **{bank: poison})], case.scale)
        expected_out, expected_lse = expected.out.copy(), expected.lse.copy()
        if bank == "k":
            expected_out[hit] = expected_lse[hit] = np.nan
        else:
            expected_out[hit, 3] = np.nan
        assert_close(out, expected_out, "attention", k=expected.n, terms=expected.terms_out)
        assert_close(lse.astype(dtype), expected_lse, "lse", k=expected.n, terms=expected.terms_lse)


@examples(2)
@given(seed=seeds, length=lengths)
def test_a_batch_row_alone_has_the_same_bits(core, dtype, seed, length):
    case = drawn_case("everything", Values(seed, dtype), batch=3, heads=4, kv_heads=2, length=length, source=40, d=8)
    out, lse = core.attention(case.q, case.blocks, case.scale)
    for row in range(3):
        alone = core.attention(case.q[row : row + 1], [only_row(block, row) for block in case.blocks], case.scale)
        assert_same_bits(alone, (out[row : row + 1], lse[row : row + 1]))


@pytest.mark.parametrize("feature", ["plain", "causal", "prefix", "causal window", "lengths", "valid", "distance bias", "index", "blocks"])
@pytest.mark.parametrize("source, d", [(70, 8), (300, 64), (517, 40)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@compiled_alone
def test_a_query_alone_has_the_bits_it_has_among_many(dtype, feature, kv_heads, source, d):
    """Of the compiled kernel: one query takes another way through C than many, split over keys, and the tiles are the same. With
    4 heads of keys it is one query that a head is read for, with 2 it is two."""
    case = drawn_case(feature, Values(source, dtype), 2, 4, kv_heads, 40, source, d)
    out, lse = _core.attention(case.q, case.blocks, case.scale)
    for first, last in ((0, 1), (7, 8), (20, 23), (39, 40)):
        part = slice(first, last)
        blocks = []
        for block in case.blocks:
            offset = block.k.shape[2] - 40 if block.offset is None else block.offset
            bias = None if block.bias is None else block.bias[..., part, :]
            index = None if block.index is None else np.ascontiguousarray(block.index[:, :, part])
            blocks.append(replace(block, offset=offset + first, bias=bias, index=index))
        alone = _core.attention(np.ascontiguousarray(case.q[:, :, part]), blocks, case.scale)
        assert_same_bits(alone, (np.ascontiguousarray(out[:, :, part]), np.ascontiguousarray(lse[:, :, part])))


@pytest.mark.parametrize("feature", ["plain", "causal", "valid", "window"])
def test_dropout_zeroes_its_share_and_leaves_the_mean(core, dtype, feature):
    """With values of one the output is the sum of the weights kept, over 1 - p: 1 on average, and not the same in every row."""
    case = drawn_case(feature, Values(5, dtype), 4, 4, 2, 40, 90, 8)
    for block in case.blocks:
        block.v = np.ones_like(block.v)
    plain, lse = core.attention(case.q, case.blocks, case.scale)
    sums = []
    for seed in range(8):
        out, lse_too = core.attention(case.q, case.blocks, case.scale, dropout=0.3, seed=seed)
        assert_same_bits(lse_too, lse)
        sums.append(out[..., 0][plain[..., 0] > 0.5])
    sums = np.stack(sums)
    assert abs(sums.mean() - 1) < 0.05
    assert np.median(sums.std(axis=0)) > 0.01
    assert not np.array_equal(sums[0], sums[1])
    again, _ = core.attention(case.q, case.blocks, case.scale, dropout=0.3, seed=7)
    assert_same_bits(again[..., 0][plain[..., 0] > 0.5], sums[7])


def test_a_prefix_needs_a_causal_mask_and_no_window(core):
    q = k = v = np.ones((1, 1, 3, 2), np.float32)
    for options in ({"causal": False}, {"causal": True, "window": 2}):
        with pytest.raises(InvalidValue, match=r"blocks\[0\]\.prefix: expected 0, or causal=True and no window, got 2"):
            core.attention(q, [Block(k, v, prefix=2, **options)], 1.0)
    with pytest.raises(InvalidValue, match=r"blocks\[0\]\.prefix: expected"):
        core.attention(q, [Block(k, v, prefix=4, causal=True)], 1.0)


def test_a_prefix_is_a_block_of_its_own_and_a_causal_rest(dtype):
    """As one softmax over both: the same up to the order in which parts are merged."""
    values = Values(2, dtype)
    q, k, v = values.real(2, 2, 20, 8), values.real(2, 2, 33, 8), values.real(2, 2, 33, 8)
    out, lse = _core.attention(q, [Block(k, v, causal=True, prefix=7, offset=5)], 0.3)
    front = Block(k[:, :, :7], v[:, :, :7])
    apart, lse_apart = _core.attention(q, [front, Block(k[:, :, 7:], v[:, :, 7:], causal=True, offset=-2)], 0.3)
    near = {"rtol": 0, "atol": 20 * np.finfo(dtype).eps}
    np.testing.assert_allclose(out, apart, **near)
    np.testing.assert_allclose(lse, lse_apart, **near)
