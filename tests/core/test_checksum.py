"""A checksum changes with any change of an array, and with nothing else."""

import numpy as np
import pytest
from core.cases import seeds
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, n=st.integers(0, 40_000))
def test_it_is_the_twins(core, dtype, seed, n):
    from mini_tfm import reference

    x = np.random.default_rng(seed).standard_normal(n).astype(dtype)
    assert core.checksum(x) == reference.checksum(x) == core.checksum(x.reshape(1, -1)) < 1 << 64


@pytest.mark.parametrize("n", [1, 63, 64, 65, 5000, 16_384, 16_385, 70_000])
def test_every_change_shows(core, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float32)
    before = core.checksum(x)
    assert core.checksum(x.copy()) == before
    changed = [-x, x[::-1], np.roll(x, 1), np.append(x, np.float32(0)), x[:-1]]
    for i in {0, n // 2, n - 1}:
        bits = x.view(np.uint32).copy()
        for bit in (0, 15, 31):  # one bit of one number
            bits[i] ^= np.uint32(1 << bit)
            changed.append(bits.view(np.float32).copy())
            bits[i] ^= np.uint32(1 << bit)
    if n > 1:
        swapped = x.copy()
        swapped[[0, -1]] = x[[-1, 0]]
        flipped = x.copy()
        flipped[[0, n - 1 - (n - 1) % 64]] *= -1  # two of one lane
        changed += [swapped, flipped]
    sums = [core.checksum(y) for y in changed if y.shape != x.shape or (y.view(np.uint32) != x.view(np.uint32)).any()]
    assert before not in sums and len(sums) > 5


def test_whole_pieces_that_change_places_show(core):
    x = np.arange(5 * (1 << 14), dtype=np.float32)
    pieces = x.reshape(5, -1)
    assert len({core.checksum(np.ascontiguousarray(pieces[order])) for order in ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 4, 3])}) == 3
