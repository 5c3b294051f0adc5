"""The best rows for a query, over one bank or several."""

import numpy as np
import pytest

from mini_tfm.memory import BestRows, search

RNG = np.random.default_rng(0)


def brute_force(queries, rows, valid, k):
    scores = np.where(valid, queries.astype(np.float64) @ rows.astype(np.float64).T, -np.inf)
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def test_search_gives_the_rows_of_largest_inner_product():
    queries, bank = RNG.standard_normal((2, 5, 8)), RNG.standard_normal((2, 30, 8))
    valid = np.arange(30) < np.array([30, 3])[:, None]
    scores, index = search(queries, bank, 4, valid)
    for b in range(2):
        found = min(4, valid[b].sum())
        np.testing.assert_array_equal(index[b, :, :found], brute_force(queries[b], bank[b], valid[b], found))
        assert (index[b, :, found:] == -1).all() and np.isneginf(scores[b, :, found:]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_several_banks_are_searched_as_one(k, dtype):
    """Banks of each stream and banks that all share, with rows that are hidden."""
    queries = RNG.standard_normal((3, 2, 4, 8)).astype(dtype)
    own, shared = RNG.standard_normal((3, 20, 8)).astype(dtype), RNG.standard_normal((15, 8)).astype(np.float32)
    last = RNG.standard_normal((9, 8)).astype(np.float32)
    own_valid, last_valid = np.arange(20) < np.array([20, 7, 0])[:, None], np.arange(9) < np.array([9, 0, 4])[:, None]
    best = BestRows(queries, k)
    best.search(own, np.arange(20)[None].repeat(3, 0), own_valid)
    best.search(shared, np.arange(20, 35))
    best.search(last, np.arange(35, 44), last_valid)
    view = best.view()
    for b in range(3):
        rows, valid = np.concatenate([own[b], shared, last]), np.concatenate([own_valid[b], np.ones(15, bool), last_valid[b]])
        n = min(k, valid.sum())
        expected, index = brute_force(queries[b], rows, valid, n), view.index[b]
        np.testing.assert_array_equal(view.positions[b, index[..., :n]], expected)
        np.testing.assert_array_equal(view.bank[1][b, index[..., :n]], rows[expected].astype(dtype))
        assert (index[..., n:] == -1).all() and view.valid[b, index[..., :n]].all()


def test_only_the_best_rows_are_held():
    best = BestRows(RNG.standard_normal((1, 2, 3, 8)), 2)
    for _ in range(50):
        best.search(RNG.standard_normal((1, 40, 8)), np.arange(40)[None])
    assert best.view().bank[1].shape[1] <= 50 * 2 * 2 * 3


def test_nothing_searched_is_no_view():
    assert BestRows(np.zeros((1, 1, 1, 8)), 2).view() is None
