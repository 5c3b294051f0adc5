"""Exact top-k: which rows are found, in which order."""

import numpy as np
from core import naive
from core.cases import Values, layouts, seeds, sizes_or_none
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st

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
