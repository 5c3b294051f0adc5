"""Exact top-k: which rows are found, in which order."""

import tracemalloc

import numpy as np
import pytest
from core import naive
from core.cases import Values, compiled_alone, layouts, seeds, sizes_or_none
from helpers import LAYOUTS, assert_close, assert_same_bits, laid_out
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import _core
from mini_tfm.errors import InvalidType, InvalidValue

batches, counts, ks = st.integers(1, 3), st.integers(0, 9), st.integers(0, 40)


@given(seed=seeds, batch=batches, n=counts, m=sizes_or_none, d=st.integers(0, 20), k=ks, layout=layouts, masked=st.booleans())
def test_whole_numbers_are_ranked_exactly(core, dtype, seed, batch, n, m, d, k, layout, masked):
    """Scores are exact and ties frequent: of equal scores the lower row comes first."""
    values = Values(seed, dtype, layout)
    queries, bank, valid = values.whole(batch, n, d), values.whole(batch, m, d), values.mask(batch, m) if masked else None
    scores, index = core.search(queries, bank, k, valid)
    expected_scores, expected_index = naive.search(queries, bank, k, valid)
    assert (scores.dtype, index.dtype) == (dtype, np.int64)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(scores, expected_scores)


@given(seed=seeds, batch=batches, n=st.integers(1, 9), m=st.integers(1, 300), d=st.integers(1, 40), k=st.integers(1, 40))
def test_no_better_row_is_left_out(core, dtype, seed, batch, n, m, d, k):
    values = Values(seed, dtype)
    queries, bank = values.real(batch, n, d), values.real(batch, m, d)
    scores, index = core.search(queries, bank, k)
    exact, _ = naive.search(queries, bank, k, None)
    terms = np.abs(queries).max() * np.abs(bank).max()
    assert_close(scores, exact, "search", k=d, terms=terms)  # rank by rank: nothing better was missed
    found = min(k, m)
    for b, i in np.ndindex(batch, n):
        rows = index[b, i, :found]
        assert len(set(rows.tolist())) == found and (index[b, i, found:] == -1).all()
        own = (queries[b, i].astype(np.float64) * bank[b, rows]).sum(-1)
        assert_close(scores[b, i, :found], own, "search", k=d, terms=terms)
    assert (np.diff(scores[..., :found]) <= 0).all()


@given(seed=seeds, batch=batches, n=st.integers(1, 4), m=st.integers(1, 50))
def test_hidden_rows_are_never_found(core, dtype, seed, batch, n, m):
    values = Values(seed, dtype)
    queries, bank, valid = values.real(batch, n, 5), values.real(batch, m, 5), values.mask(batch, m, share=0.5)
    bank[~valid] = np.nan  # and never looked at
    scores, index = core.search(queries, bank, m, valid)
    for b in range(batch):
        left = valid[b].sum()
        assert (np.sort(index[b, :, :left]) == np.flatnonzero(valid[b])).all()
        assert (index[b, :, left:] == -1).all() and (scores[b, :, left:] == -np.inf).all()


def test_many_rows_and_many_wanted(core, dtype):
    values = Values(0, dtype)
    queries, bank = values.whole(1, 3, 8), values.whole(1, 5000, 8)
    for k in (1, 2, 100, 5000, 5003):
        scores, index = core.search(queries, bank, k)
        products = queries[0] @ bank[0].T
        expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(index[0, :, : expected.shape[1]], expected)
        np.testing.assert_array_equal(scores[0, :, : expected.shape[1]], np.take_along_axis(products, expected, 1))


# Banks of float16, and of int8 with a scale a row, beside float32 queries.

SMALL = ("float16", "int8")


def stored(values, kind, *shape, scale=1.0):
    """A bank of `kind` and its scales: normal values as float16, whole ones over int8's range."""
    if kind == "int8":
        return laid_out(values.rng.integers(-128, 128, shape).astype(np.int8), values.layout), values.positive(*shape[:2], scale=scale)
    return values.real(*shape, scale=scale).astype(kind), None


@pytest.mark.parametrize("kind", SMALL)
@given(seed=seeds, batch=batches, n=counts, m=sizes_or_none, d=st.integers(0, 40), k=ks, layout=layouts, masked=st.booleans())
def test_small_rows_are_ranked_exactly(core, kind, seed, batch, n, m, d, k, layout, masked):
    """Whole numbers, and scales that are powers of two: nothing is rounded."""
    values = Values(seed, "float32", layout)
    queries, valid = values.whole(batch, n, d), values.mask(batch, m) if masked else None
    bank = laid_out(values.rng.integers(-4, 5, (batch, m, d)).astype(kind), layout)
    scales = laid_out(2.0 ** values.rng.integers(-2, 3, (batch, m)), layout).astype(np.float32) if kind == "int8" else None
    scores, index = core.search(queries, bank, k, valid, scales=scales)
    expected_scores, expected_index = naive.search(queries, bank, k, valid, scales)
    assert (scores.dtype, index.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("kind", SMALL)
@given(seed=seeds, n=st.integers(1, 9), m=st.integers(1, 200), d=st.integers(1, 70), k=st.integers(1, 20))
def test_no_better_small_row_is_left_out(core, kind, seed, n, m, d, k):
    values = Values(seed, "float32")
    queries, (bank, scales) = values.real(1, n, d), stored(values, kind, 1, m, d)
    scores, _ = core.search(queries, bank, k, scales=scales)
    exact, _ = naive.search(queries, bank, k, None, scales)
    terms = np.abs(queries).max() * np.abs(bank.astype(np.float64)).max() * (1.0 if scales is None else scales.max())
    assert_close(scores, exact, "search", k=d, terms=terms)


@pytest.mark.parametrize("d", [1, 7, 8, 16])
@pytest.mark.parametrize("n", [1, 5])
def test_every_float16_is_read_as_it_is(core, n, d):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    bank = np.zeros((1, 2**16, d), np.float16)
    bank[0, :, d - 1] = halves
    queries = np.zeros((1, n, d), np.float32)
    queries[..., d - 1] = 1.0
    scores, index = core.search(queries, bank, 2**16)
    kept = np.flatnonzero(~np.isnan(halves))
    order = kept[np.argsort(-halves[kept].astype(np.float32), kind="stable")]
    for i in range(n):
        np.testing.assert_array_equal(index[0, i, : len(order)], order)
        np.testing.assert_array_equal(scores[0, i, : len(order)], halves[order].astype(np.float32))
        assert (index[0, i, len(order) :] == -1).all()


def test_special_scales(core):
    """0 * inf and a NaN scale are no scores; a negative scale turns the order round."""
    bank = np.array([[[1], [2], [3], [4], [5], [0]]], np.int8)
    scales = np.array([[1.0, -1.0, np.nan, np.inf, 0.0, np.inf]], np.float32)
    scores, index = core.search(np.ones((1, 1, 1), np.float32), bank, 6, scales=scales)
    np.testing.assert_array_equal(index, [[[3, 0, 4, 1, -1, -1]]])
    np.testing.assert_array_equal(scores, [[[np.inf, 1, 0, -2, -np.inf, -np.inf]]])


KINDS = ("float32", "float64", *SMALL)


def drawn(kind, n, m, d, layout="contiguous"):
    values = Values(n + m + d, "float64" if kind == "float64" else "float32", layout)
    bank, scales = (values.real(2, m, d), None) if kind.endswith(values.dtype.name) else stored(values, kind, 2, m, d)
    return Values(1, values.dtype).real(2, n, d), bank, values.mask(2, m, share=0.9), scales


@compiled_alone
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, m, d, k", [(1, 4001, 64, 9), (7, 3001, 67, 40), (200, 1500, 48, 5), (3, 3000, 200, 1500)])
def test_a_querys_bits_depend_on_its_bank_alone(threads, kind, n, m, d, k):
    """Neither on the other queries, nor on the threads, nor on where the bank is cut."""
    queries, bank, valid, scales = drawn(kind, n, m, d)
    expected = threads.search(queries, bank, k, valid, scales=scales)
    for n_threads in (1, 2, 3, 4, 8):
        threads.set_num_threads(n_threads)
        assert_same_bits(threads.search(queries, bank, k, valid, scales=scales), expected)
        for rows in (slice(0, 1), slice(n - 1, n), slice(n // 2, n // 2 + 2), slice(0, None, 3)):
            part = threads.search(np.ascontiguousarray(queries[:, rows]), bank, k, valid, scales=scales)
            assert_same_bits(part, [result[:, rows] for result in expected])
        of_one = threads.search(queries[1:], bank[1:], k, valid[1:], scales=None if scales is None else scales[1:])
        assert_same_bits(of_one, [result[1:] for result in expected])


@compiled_alone
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_rows_score_does_not_depend_on_its_place(threads, kind, n):
    queries, bank, _, scales = drawn(kind, n, 150, 24)
    whole_scores, whole_index = threads.search(queries, bank, 150, scales=scales)
    scores = np.zeros(whole_scores.shape, whole_scores.dtype)
    np.put_along_axis(scores, whole_index, whole_scores, 2)
    for first in (1, 37, 149):
        part_scores, part_index = threads.search(queries, bank[:, first:], 150, scales=None if scales is None else scales[:, first:])
        found = np.take_along_axis(scores, part_index[..., : 150 - first] + first, 2)
        assert_same_bits(np.ascontiguousarray(part_scores[..., : 150 - first]), found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "every other row", "one bank for all", "rows last"])
def test_a_bank_is_read_where_it_lies(core, kind, layout):
    queries, bank, valid, scales = drawn(kind, 3, 90, 32)
    if layout == "one bank for all":
        bank = np.broadcast_to(bank[:1], bank.shape)
    expected = core.search(queries, bank.copy(), 7, valid, scales=scales)
    if layout == "every other row":
        wide = np.zeros((2, 180, 32), bank.dtype)
        wide[:, ::2] = bank
        bank = wide[:, ::2]
    elif layout == "rows last":
        bank = np.ascontiguousarray(bank.transpose(1, 2, 0)).transpose(2, 0, 1)
    elif layout in LAYOUTS:
        bank = laid_out(bank, layout)
    bank.flags.writeable = False
    assert_same_bits(core.search(queries, bank, 7, valid, scales=scales), expected)


@compiled_alone
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "unaligned"])
def test_a_bank_is_not_copied(threads, tmp_path, kind, layout):
    """A file of 8 MB mapped into memory: what Python holds does not grow by a tenth of it."""
    queries, bank, _, scales = drawn(kind, 2, 4, 16)
    item = bank.itemsize
    count = 2**22 // (16 * item)
    path = tmp_path / "rows"
    rows = np.tile(bank, (1, count // 4, 1))
    path.write_bytes(b"?" * (layout == "unaligned") + (rows.T if layout == "transposed" else rows).tobytes())
    mapped = np.memmap(path, rows.dtype, "r", int(layout == "unaligned"), rows.shape[::-1] if layout == "transposed" else rows.shape)
    mapped = mapped.T if layout == "transposed" else mapped
    scales = None if scales is None else np.tile(scales, (1, count // 4))
    expected = threads.search(queries, rows, 8, scales=scales)
    tracemalloc.start()
    try:
        found = threads.search(queries, mapped, 8, scales=scales)
        assert tracemalloc.get_traced_memory()[1] < rows.nbytes // 10
    finally:
        tracemalloc.stop()
    assert_same_bits(found, expected)


def hard_case(case, kind, rng, m, d):
    """A bank and scales that are unlike the normal ones in one way; float32 unless `kind` says otherwise."""
    bank = rng.standard_normal((1, m, d)).astype(np.float32)
    scales = rng.uniform(0.5, 2.0, (1, m)).astype(np.float32)
    if case == "outliers":
        bank[..., 3] *= 1000
        bank[:, ::50] *= 10
    elif case == "alike":
        bank = bank[:, :1] + 1e-3 * bank
    elif case == "equal":
        bank[:] = bank[:, :1]
    elif case == "tiny":
        bank *= 10.0 ** rng.integers(-30, -9, (1, m, 1))
        scales *= 1e-38
    elif case == "huge":
        bank *= 10.0 ** rng.integers(10, 19, (1, m, 1))
        scales *= 1e35
    elif case == "odd":
        bank[:, ::7], bank[:, 1::7, 5], bank[:, 2::7, 5], bank[:, 3::7, 5] = 0, np.nan, np.inf, -np.inf
        scales[:, ::5], scales[:, 1::5], scales[:, 2::5], scales[:, 3::5] = np.nan, np.inf, -1, 0
    elif case == "negative":
        scales *= -1
    if kind == "int8":
        largest = np.nan_to_num(np.abs(bank), nan=1, posinf=1, neginf=1).max(-1, keepdims=True)
        bank = np.rint(np.nan_to_num(bank / np.where(largest > 0, largest, 1), posinf=1, neginf=-1) * 127).clip(-127, 127)
        return bank.astype(np.int8), scales
    with np.errstate(over="ignore"):
        return bank.astype(kind), None


def hard_queries(rng, bank, n):
    """(1, n, d), normal ones from the ninth on."""
    queries = rng.standard_normal((1, n, bank.shape[2])).astype(np.float32)
    queries[0, 1] = bank[0, 100]
    queries[0, 2, 1:] = 0
    queries[0, 3] *= 1e-20
    queries[0, 4] *= 1e15
    queries[0, 5, 7], queries[0, 6, 7], queries[0, 7] = np.nan, np.inf, 0
    queries[0, 8, 9] = 300
    return queries


@compiled_alone
@pytest.mark.parametrize("kind", ("float32", *SMALL))
@pytest.mark.parametrize("case", ["normal", "outliers", "alike", "equal", "tiny", "huge", "odd", "negative"])
@pytest.mark.parametrize("d", [32, 80, 512])
def test_many_queries_find_what_each_finds_alone(threads, kind, case, d):
    """Rows that are passed over by a bound, which one query alone does not use, are none of the best."""
    rng = np.random.default_rng(d)
    bank, scales = hard_case(case, kind, rng, 2500, d)
    queries = hard_queries(rng, bank, 41)
    valid = rng.random((1, 2500)) < 0.9
    for k in (1, 20):
        scores, index = threads.search(queries, bank, k, valid, scales=scales)
        for i in range(41):
            assert_same_bits(
                threads.search(queries[:, i : i + 1], bank, k, valid, scales=scales), (scores[:, i : i + 1], index[:, i : i + 1])
            )


@compiled_alone
@pytest.mark.parametrize(
    "kind, side", [("float32", "query"), ("float16", "query"), ("int8", "query"), ("float32", "row"), ("float16", "row")]
)
def test_a_score_that_coarse_steps_would_miss(threads, kind, side):
    """The best rows have their scores from numbers that are nothing beside the largest of the query, or of the row."""
    rng, d, m = np.random.default_rng(0), 64, 3000
    signs, first = rng.choice([-1.0, 1.0], d), np.arange(d) == 0
    small = np.where(first, 0, 0.45 * signs)  # with a step of 1 these are zeros
    best = np.arange(2500, 2510)
    if side == "query":
        query, row, others = 31 * first + small, ~first * signs, first * 1.0
    else:
        query, row, others = ~first * signs, 127 * first + small, 0.4 * ~first * signs
    bank = rng.uniform(-0.8, 0.8, (m, 1)) * others
    bank[best] = row * np.linspace(1, 1.1, 10)[:, None]
    scales = np.full((1, m), 0.01, np.float32) if kind == "int8" else None
    bank = np.rint(bank * 100).astype(np.int8)[None] if kind == "int8" else bank.astype(kind)[None]
    queries = (query * np.linspace(1, 2, 40)[:, None]).astype(np.float32)[None]
    _, index = threads.search(queries, bank, 5, scales=scales)
    np.testing.assert_array_equal(index, np.broadcast_to(best[:4:-1], index.shape))


# Codes of a bank's rows, made before: they save reading and change nothing.

CODED = ("float32", "float16")


def decoded(codes, d):
    """The numbers that a row's codes stand for, and the bounds of its length and of what they leave out."""
    tail = np.ascontiguousarray(codes[..., -16:]).view(np.float32)
    return (codes[..., :d].astype(np.float64) - 128) * tail[..., :1], tail[..., 1], tail[..., 2]


@pytest.mark.parametrize("kind", CODED)
@given(seed=seeds, m=sizes_or_none, d=st.integers(0, 140), layout=layouts, exponent=st.integers(-4, 4))
def test_codes_are_near_and_their_bounds_hold(kind, seed, m, d, layout, exponent):
    bank = (Values(seed, "float32", layout).real(2, m, d) * 10.0**exponent).astype(kind)
    codes = _core.encode_rows(bank)
    assert (codes.dtype, codes.shape) == (np.uint8, (2, m, (d + 63) // 64 * 64 + 16))
    assert not codes[..., d:-16].any() and not codes[..., -4:].any()
    exact = bank.astype(np.float64)
    near, length, error = decoded(codes, d)
    top = np.abs(exact).max(-1, keepdims=True, initial=0)
    known = ((top == 0) | (top > 1e-10))[..., 0]
    assert (np.isnan(error) == ~known).all()
    assert (np.abs(near - exact)[known] <= np.broadcast_to(top / 254 * 1.001, exact.shape)[known]).all()
    for bound, of in ((length, exact), (error, near - exact)):
        true = np.sqrt((of**2).sum(-1))[known]
        assert (bound[known] >= true).all() and (bound[known] <= true * 1.00001).all()


def test_a_rows_codes_are_its_own(core):
    """Rows with what cannot be rounded beside others; one row at a time, in a file, or all at once."""
    bank = np.random.default_rng(0).standard_normal((3000, 700)).astype(np.float32)
    bank[5], bank[6, 3], bank[7, 3], bank[8], bank[9] = 0, np.nan, -np.inf, 1e-30, 1e30
    codes = core.encode_rows(bank)
    error = decoded(codes, 700)[2]
    assert np.flatnonzero(np.isnan(error)).tolist() == [6, 7, 8, 9] and error[5] == 0
    for part in (slice(0, 1), slice(4, 9), slice(2990, None), slice(None, None, -7)):
        np.testing.assert_array_equal(core.encode_rows(bank[part]), codes[part])
    np.testing.assert_array_equal(core.encode_rows(np.asfortranarray(bank)), codes)
    np.testing.assert_array_equal(core.encode_rows(bank.reshape(3, 2, 500, 700)[:, 1, ::2]), codes.reshape(3, 2, 500, -1)[:, 1, ::2])


@pytest.mark.parametrize("kind", CODED)
@given(
    seed=seeds, n=st.sampled_from([1, 2, 3, 9, 15, 16, 23, 24, 40]), m=st.integers(0, 600),
    d=st.sampled_from([1, 16, 32, 40, 64, 96, 128, 144, 192]), k=st.integers(0, 40), masked=st.booleans(),
)  # fmt: skip
def test_codes_change_nothing(core, kind, seed, n, m, d, k, masked):
    values = Values(seed, "float32")
    queries, bank, valid = values.real(2, n, d), values.real(2, m, d).astype(kind), values.mask(2, m, share=0.9) if masked else None
    expected = core.search(queries, bank, k, valid)
    assert_same_bits(core.search(queries, bank, k, valid, codes=core.encode_rows(bank)), expected)


@compiled_alone
@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("case", ["normal", "outliers", "alike", "equal", "tiny", "huge", "odd"])
@pytest.mark.parametrize("d", [32, 80, 512])
def test_codes_of_unusual_rows_change_nothing(threads, kind, case, d):
    rng = np.random.default_rng(d)
    bank, _ = hard_case(case, kind, rng, 4000, d)
    codes = threads.encode_rows(bank)
    queries = hard_queries(rng, bank, 9)
    valid = rng.random((1, 4000)) < 0.9
    for k in (1, 20, 3000):
        expected = threads.search(queries, bank, k, valid)
        for n_threads in (1, 3):
            threads.set_num_threads(n_threads)
            assert_same_bits(threads.search(queries, bank, k, valid, codes=codes), expected)
            for i in range(9):
                alone = threads.search(queries[:, i : i + 1], bank, k, valid, codes=codes)
                assert_same_bits(alone, [result[:, i : i + 1] for result in expected])


@compiled_alone
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("side", ["query", "row"])
def test_a_score_that_coarse_codes_would_miss(threads, n, side):
    """The best rows' scores come from numbers that a single rounding of the query, or of the row, makes zeros."""
    rng, d, m = np.random.default_rng(0), 64, 3000
    signs, first = rng.choice([-1.0, 1.0], d), np.arange(d) == 0
    if side == "query":
        query, row, others = 31 * first + 0.45 * signs, ~first * signs, first * 1.0
    else:
        query, row, others = ~first * signs, 127 * first + 0.45 * signs, 0.4 * ~first * signs
    bank = rng.uniform(-0.8, 0.8, (m, 1)) * others
    bank[2500:2510] = row * np.linspace(1, 1.1, 10)[:, None]
    bank = bank.astype(np.float32)[None]
    queries = (query * np.linspace(1, 2, n)[:, None]).astype(np.float32)[None]
    _, index = threads.search(queries, bank, 5, codes=threads.encode_rows(bank))
    np.testing.assert_array_equal(index, np.broadcast_to(np.arange(2509, 2504, -1), index.shape))


@pytest.mark.parametrize("layout", ["every other row", "backwards", "one bank for all", "within wider rows", "unaligned", "read-only"])
def test_codes_are_read_where_they_lie(core, layout):
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((2, 900, 96)).astype(np.float32), rng.standard_normal((2, 2, 96)).astype(np.float32)
    if layout == "one bank for all":
        bank[1] = bank[0]
    codes = core.encode_rows(bank)
    expected = core.search(queries, bank, 9)
    if layout == "every other row":
        wide = np.zeros((2, 1800, codes.shape[2]), np.uint8)
        wide[:, ::2] = codes
        codes = wide[:, ::2]
    elif layout == "backwards":
        codes = codes[:, ::-1].copy()[:, ::-1]
    elif layout == "one bank for all":
        codes = np.broadcast_to(codes[:1], codes.shape)
    elif layout == "within wider rows":
        wide = np.zeros((2, 900, codes.shape[2] + 24), np.uint8)
        wide[..., 8:-16] = codes
        codes = wide[..., 8:-16]
    elif layout == "unaligned":
        codes = np.frombuffer(b"?" + codes.tobytes(), np.uint8)[1:].reshape(codes.shape)
    else:
        codes.flags.writeable = False
    assert_same_bits(core.search(queries, bank, 9, codes=codes), expected)


@pytest.mark.skipif(
    not _core.show_config()["isa"].startswith("avx") or _core.show_config()["isa"] in _core.show_config()["emulated"],
    reason="other instruction sets read the rows",
)
@pytest.mark.parametrize("n", [1, 2, 5, 23])
def test_codes_are_read_in_place_of_rows(threads, n):
    """Those of other rows, which is not allowed, hide what the rows have. By one thread: every other would start with plain rows."""
    threads.set_num_threads(1)
    rng = np.random.default_rng(0)
    bank, about = rng.standard_normal((1, 2000, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    queries = about + 0.3 * rng.standard_normal((1, n, 64)).astype(np.float32)
    codes = threads.encode_rows(bank)
    bank[0, 1500] = 10 * about
    assert (threads.search(queries, bank, 1)[1] == 1500).all()
    assert not (threads.search(queries, bank, 1, codes=codes)[1] == 1500).any()


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
@pytest.mark.parametrize("n", [1, 4])
def test_rows_in_order_and_all_alike(threads, order, n):
    """Every row displaces another, or none does, or all are as good; over several threads."""
    m = 40_000
    bank = {"ascending": np.arange(m), "descending": -np.arange(m), "equal": np.zeros(m)}[order].astype(np.float32)
    bank = np.repeat(bank[:, None], 8, axis=1)[None] / 8
    for n_threads in (1, 3):
        threads.set_num_threads(n_threads)
        scores, index = threads.search(np.ones((1, n, 8), np.float32), bank, 50)
        best = np.arange(m)[::-1][:50] if order == "ascending" else np.arange(50)
        np.testing.assert_array_equal(index, np.broadcast_to(best, (1, n, 50)))
        np.testing.assert_array_equal(scores[0, 0], bank[0, best].sum(1))


@pytest.mark.parametrize("d", [4096, 9001])
def test_long_rows(core, d):
    values = Values(0, "float32")
    queries, bank = values.whole(1, 30, d), values.whole(1, 5, d)
    scores, index = core.search(queries, bank, 3)
    expected_scores, expected_index = naive.search(queries, bank, 3, None)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(scores, expected_scores)


def ones(dtype, *shape):
    return np.ones(shape, dtype)


QUERIES = ones("float32", 2, 3, 4)
REFUSED = {
    "float16 beside float64": (QUERIES.astype(np.float64), ones("float16", 2, 5, 4), None, "bank"),
    "int8 beside float64": (QUERIES.astype(np.float64), ones("int8", 2, 5, 4), ones("float64", 2, 5), "bank"),
    "uint8": (QUERIES, ones("uint8", 2, 5, 4), ones("float32", 2, 5), "bank"),
    "int16": (QUERIES, ones("int16", 2, 5, 4), ones("float32", 2, 5), "bank"),
    "big-endian float16": (QUERIES, ones(">f2", 2, 5, 4), None, "bank"),
    "float16 queries": (QUERIES.astype(np.float16), ones("float16", 2, 5, 4), None, "queries"),
    "int8 without scales": (QUERIES, ones("int8", 2, 5, 4), None, "scales"),
    "scales for float32": (QUERIES, ones("float32", 2, 5, 4), ones("float32", 2, 5), "scales"),
    "scales for float16": (QUERIES, ones("float16", 2, 5, 4), ones("float32", 2, 5), "scales"),
    "scales of float64": (QUERIES, ones("int8", 2, 5, 4), ones("float64", 2, 5), "scales"),
    "scales of float16": (QUERIES, ones("int8", 2, 5, 4), ones("float16", 2, 5), "scales"),
    "a list of scales": (QUERIES, ones("int8", 2, 5, 4), [[1.0] * 5] * 2, "scales"),
    "one scale": (QUERIES, ones("int8", 2, 5, 4), 1.0, "scales"),
    "a scale too few": (QUERIES, ones("int8", 2, 5, 4), ones("float32", 2, 4), "scales"),
    "scales of one bank": (QUERIES, ones("int8", 2, 5, 4), ones("float32", 5), "scales"),
    "longer rows": (QUERIES, ones("int8", 2, 5, 5), ones("float32", 2, 5), "bank"),
    "a bank too few": (QUERIES, ones("float16", 1, 5, 4), None, "bank"),
    "a flat bank": (QUERIES, ones("float16", 5, 4), None, "bank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_small_rows_that_are_refused(core, case):
    queries, bank, scales, named = REFUSED[case]
    with pytest.raises((InvalidType, InvalidValue), match=f"^{named}: expected .*, got "):
        core.search(queries, bank, 2, scales=scales)


CODES = ones("uint8", 2, 5, 80)
REFUSED_CODES = {
    "for float64": (QUERIES.astype(np.float64), ones("float64", 2, 5, 4), None, CODES),
    "for int8": (QUERIES, ones("int8", 2, 5, 4), ones("float32", 2, 5), CODES),
    "int8 themselves": (QUERIES, ones("float32", 2, 5, 4), None, CODES.astype(np.int8)),
    "a list": (QUERIES, ones("float32", 2, 5, 4), None, CODES.tolist()),
    "a row too few": (QUERIES, ones("float16", 2, 5, 4), None, CODES[:, 1:]),
    "rows too short": (QUERIES, ones("float32", 2, 5, 4), None, CODES[:, :, :64]),
    "of one bank": (QUERIES, ones("float32", 2, 5, 4), None, CODES[0]),
    "every other byte": (QUERIES, ones("float32", 2, 5, 4), None, np.repeat(CODES, 2, axis=2)[:, :, ::2]),
}


@pytest.mark.parametrize("case", REFUSED_CODES)
def test_codes_that_are_refused(core, case):
    queries, bank, scales, codes = REFUSED_CODES[case]
    with pytest.raises((InvalidType, InvalidValue), match=r"^codes: expected .*, got "):
        core.search(queries, bank, 2, scales=scales, codes=codes)


@pytest.mark.parametrize("bank", [ones("float64", 5, 4), ones("int8", 5, 4), ones("float32", 5), np.float32(1), [[1.0]], None], ids=str)
def test_rows_that_are_not_coded(core, bank):
    with pytest.raises((InvalidType, InvalidValue), match=r"^bank: expected .*, got "):
        core.encode_rows(bank)
