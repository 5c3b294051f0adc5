"""The best rows for a query, over one bank or several."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import BestRows, New, Query, search
from mini_tfm.stream import Stream
from mini_tfm.testing.trial import small_model

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


def shown(view):
    """The rows that each query of a single stream sees: a list of (position, first number) for each."""
    index = view.index[0].reshape(-1, view.index.shape[-1])
    return [[(int(view.positions[0, i]), float(view.bank[1][0, i, 0])) for i in row if i >= 0] for row in index]


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("cuts", [[], [1], [64], [10, 11, 100, 170]])
def test_a_text_read_many_times_does_not_take_every_place(cuts, keyed):
    """Copies give way to other rows, wherever the banks are cut; the newest of equal rows stays."""
    text = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    bank = np.concatenate([*[text] * 16, np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)])
    queries = np.random.default_rng(2).standard_normal((1, 2, 3, 8)).astype(np.float32)
    for _ in range(2):  # the second time it is known which are copies
        best = BestRows(queries, 10)
        for part in np.split(np.arange(len(bank)), cuts):
            best.search(bank[part], part, key=("copies", tuple(part)) if keyed else None)
        distinct = np.concatenate([np.arange(15 * 12, 16 * 12), np.arange(16 * 12, len(bank))])
        for query, rows in zip(queries[0].reshape(-1, 8), shown(best.view()), strict=True):
            expected = distinct[np.argsort(-(bank[distinct] @ query), kind="stable")[:10]]
            assert [position for position, _ in rows] == expected.tolist()


@pytest.mark.parametrize("cuts", [[], [20], [5, 40]])
def test_copies_fill_the_places_that_no_other_row_takes(cuts):
    """So a store that shows every row still equals dense attention."""
    text = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    bank, queries = np.concatenate([text] * 8), np.random.default_rng(2).standard_normal((1, 1, 2, 8)).astype(np.float32)
    for k in (10, 48, 100):
        best = BestRows(queries, k)
        for part in np.split(np.arange(48), cuts):
            best.search(bank[None, part], part[None], np.ones((1, len(part)), bool))
        for query, rows in zip(queries[0, 0], shown(best.view()), strict=True):
            places = [position for position, _ in rows]
            assert len(set(places)) == len(places) == min(k, 48)
            assert places[:6] == (42 + np.argsort(-(text @ query), kind="stable")).tolist()


def test_a_copy_that_is_hidden_hides_no_other():
    text = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    best = BestRows(np.ones((2, 1, 1, 8), np.float32), 3)
    valid = np.array([[True] * 6, [True] * 3 + [False] * 3])
    best.search(np.concatenate([text] * 2), np.arange(6), valid)
    view = best.view()
    seen = [sorted(view.positions[b, view.index[b, 0, 0]].tolist()) for b in range(2)]
    assert seen == [[3, 4, 5], [0, 1, 2]]


def test_equal_scores_of_different_rows_are_no_copies():
    rows = np.eye(8, dtype=np.float32)
    best = BestRows(np.ones((1, 1, 1, 8), np.float32), 8)
    best.search(rows, np.arange(8))
    assert sorted(position for position, _ in shown(best.view())[0]) == list(range(8))


def test_padded_queries_choose_no_row():
    """Neither in the view's bank nor in its index, whatever stands in them."""
    store = mt.memory("store", top_k=2)
    model = small_model("decoder-only", np.float32)
    run = Stream(model, store, 3).run
    state = run.states[0]
    rows = RNG.standard_normal((3, 40, 8)).astype(np.float32)
    store.write(state, "decoder", 0, New("decoder", 0, rows, np.ones((3, 40), bool), np.tile(np.arange(40), (3, 1))))
    queries = RNG.standard_normal((3, 2, 5, 8)).astype(np.float32)
    valid = np.arange(5) < np.array([5, 2, 0])[:, None]
    found = store.read(state, "decoder", 0, Query(queries, lambda: queries, np.zeros((3, 5), np.int64), valid))
    whole = store.read(state, "decoder", 0, Query(queries, lambda: queries, np.zeros((3, 5), np.int64)))
    assert (found.index[~np.broadcast_to(valid[:, None], (3, 2, 5))] == -1).all()
    for b, n in enumerate((5, 2)):
        np.testing.assert_array_equal(found.positions[b, found.index[b, :, :n]], whole.positions[b, whole.index[b, :, :n]])
    assert found.valid[1].sum() <= 2 * 2 * 2 and found.valid[2].sum() <= 2 * 2
    nobody = store.read(state, "decoder", 0, Query(queries, lambda: queries, np.zeros((3, 5), np.int64), np.zeros((3, 5), bool)))
    assert nobody is None
