"""A text in chunks that overlap: every token is kept once, in order, with the context that was promised."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm.chunks import ending_full, streamed

SIZES = st.integers(1, 12).flatmap(lambda length: st.tuples(st.integers(1, 60), st.just(length), st.integers(0, length - 1)))


def all_at_once(tokens, length, shared):
    return list(streamed([tokens], length, shared))


@pytest.mark.parametrize("cut", [all_at_once, ending_full])
@given(sizes=SIZES)
def test_every_token_is_kept_once_with_context_on_both_sides(cut, sizes):
    n, length, shared = sizes
    chunks = cut(np.arange(100, 100 + n), length, shared)
    assert np.concatenate([chunk.tokens[chunk.kept] for chunk in chunks]).tolist() == list(range(100, 100 + n))
    for chunk in chunks:
        assert 0 < chunk.n_kept == chunk.kept.sum() and len(chunk.tokens) <= length
    for one, next_one in itertools.pairwise(chunks):
        assert next_one.first == shared // 2 and len(one.tokens) - one.stop == shared - shared // 2
        assert one.tokens[len(one.tokens) - shared :].tolist() == next_one.tokens[:shared].tolist()
    assert chunks[0].first == 0 and chunks[-1].stop == len(chunks[-1].tokens)
    whole = chunks[:-1] if cut is all_at_once else chunks[1:]
    assert all(len(chunk.tokens) == length for chunk in whole)
    assert len(chunks) == 1 + max(0, -((length - n) // (length - shared)))


@given(sizes=SIZES, seed=st.integers(0, 9))
def test_the_chunks_do_not_depend_on_the_pieces(sizes, seed):
    n, length, shared = sizes
    tokens = np.arange(n)
    pieces = np.split(tokens, np.sort(np.random.default_rng(seed).integers(0, n + 1, 5)))
    found, expected = list(streamed(pieces, length, shared)), all_at_once(tokens, length, shared)
    assert [(c.tokens.tolist(), c.first, c.stop) for c in found] == [(c.tokens.tolist(), c.first, c.stop) for c in expected]


def test_with_an_overlap_of_one_half_the_middle_half_is_kept():
    """arXiv 2305.01625, section 2.2."""
    first, *middle, last = all_at_once(np.arange(50), 16, 8)
    assert [(c.first, c.stop) for c in middle] == [(4, 12)] * len(middle) and len(middle) == 4
    assert (first.first, first.stop) == (0, 12) and (last.first, last.stop) == (4, len(last.tokens))


@pytest.mark.parametrize("cut", [all_at_once, ending_full])
def test_without_overlap_it_is_a_plain_cut(cut):
    chunks = cut(np.arange(23), 8, 0)
    assert [len(c.tokens) for c in chunks] == ([8, 8, 7] if cut is all_at_once else [7, 8, 8]) and all(c.kept.all() for c in chunks)


def test_nothing_is_no_chunk():
    assert list(streamed([], 4, 2)) == list(streamed([np.zeros(0, np.int64)], 4, 2)) == []
