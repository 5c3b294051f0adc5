"""The permutation: one to one at every size, another for every seed and epoch, and never held in RAM."""

import tracemalloc

import numpy as np
import pytest
from helpers import assert_same_bits, examples
from hypothesis import example, given
from hypothesis import strategies as st

from mini_tfm.data import Permutation
from mini_tfm.errors import InvalidType, InvalidValue


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**70), epoch=st.integers(0, 1000))
@example(n=1, seed=0, epoch=0)
@example(n=2, seed=0, epoch=0)
@example(n=4096, seed=1, epoch=3)
@example(n=4097, seed=1, epoch=3)
@examples(5)
def test_each_number_comes_exactly_once(n, seed, epoch):
    np.testing.assert_array_equal(np.sort(Permutation(n, seed, epoch)(np.arange(n))), np.arange(n))


@given(n=st.integers(2, 10**18), seed=st.integers(0, 2**63), data=st.data())
def test_any_position_alone_is_what_it_is_among_others(n, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    order = Permutation(n, seed)
    found = order(places)
    assert len(np.unique(found)) == len(places) and found.min() >= 0 and found.max() < n
    assert [int(order(p)) for p in places] == found.tolist()
    assert_same_bits(order(places.reshape(1, -1)), found.reshape(1, -1))


def test_seeds_and_epochs_give_other_orders():
    orders = [Permutation(1000, seed, epoch)(np.arange(1000)).tolist() for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    for one in orders:
        assert sum(a == b for a, b in zip(one, range(1000), strict=True)) < 12  # 1 is expected of chance
        steps = np.diff(one)
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.12 and len(np.unique(steps)) > 500


@pytest.mark.parametrize("n", [3, 10])
def test_every_number_is_as_likely_at_every_place(n):
    """Chi-square over 2000 seeds, the sizes at which a network of few rounds would show."""
    times = np.zeros((n, n))
    for seed in range(2000):
        times[np.arange(n), Permutation(n, seed)(np.arange(n))] += 1
    expected = 2000 / n
    chi = ((times - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


def test_the_order_is_the_same_on_every_machine():
    """A resumed run depends on it: a change of these numbers is a change of the format of saved runs."""
    assert Permutation(10, 0)(np.arange(10)).tolist() == [4, 6, 8, 9, 0, 2, 5, 7, 3, 1]
    assert Permutation(10**12, 7, 3)([0, 1, 10**12 - 1]).tolist() == [161541912750, 846335040506, 798298596647]


def test_a_permutation_of_a_trillion_takes_no_ram():
    tracemalloc.start()
    Permutation(10**12, 0)(np.arange(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(
    ("arguments", "positions", "error", "told"),
    [
        ((0, 0), 0, InvalidValue, "n: expected"),
        ((2.5, 0), 0, InvalidValue, "n: expected"),
        ((5, -1), 0, InvalidValue, "seed: expected"),
        ((5, 0, -1), 0, InvalidValue, "epoch: expected"),
        ((5, 0), 5, InvalidValue, "positions: expected 0 to 4, got 5"),
        ((5, 0), [-1, 2], InvalidValue, "positions: expected 0 to 4, got -1"),
        ((5, 0), 0.5, InvalidType, "positions: expected integers"),
    ],
)
def test_what_is_no_place_is_refused(arguments, positions, error, told):
    with pytest.raises(error, match=told):
        Permutation(*arguments)(positions)
