"""Attention mass against the weights of every query's own dense softmax."""

import numpy as np
import pytest
from core import naive_attention as naive
from core.attention_cases import FEATURES, drawn_case, only_row
from core.cases import Values
from helpers import assert_close, assert_same_bits

SHAPES = [(1, 1, 1), (2, 5, 6), (3, 40, 70), (2, 27, 300)]


def naive_mass(case, asking, block=0):
    forward = naive.attention(case.q, case.blocks, case.scale)
    ends = np.cumsum([rows.shape[3] for rows, _ in forward.lists])[:-1]
    rows, weights = forward.lists[block][0], np.split(forward.p, ends, axis=3)[block]
    mass = np.zeros((len(case.q), case.blocks[block].k.shape[2] + 1))  # the last: what an index of -1 names
    for b, h, i in np.ndindex(rows.shape[:3]):
        if asking[b, i]:
            np.add.at(mass[b], rows[b, h, i], weights[b, h, i])
    return mass[:, :-1], forward


@pytest.mark.parametrize("batch, length, source", SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_mass(core, dtype, feature, batch, length, source):
    values = Values(length, dtype)
    case = drawn_case(feature, values, batch, 4, 2, length, source, 8)
    asking = values.mask(batch, length, share=0.7)
    _, lse = core.attention(case.q, case.blocks, case.scale)
    for at, block in enumerate(case.blocks):
        expected, forward = naive_mass(case, asking, at)
        found = core.attention_mass(case.q, block, lse, case.scale, asking)
        assert_close(found, expected, "attention_mass", k=4 * length, terms=forward.terms_lse, dtype=dtype)


def test_all_that_is_asked_adds_up_to_the_queries(core, dtype):
    """Each query gives away one in all, whatever the number of tiles."""
    case = drawn_case("causal", Values(0, dtype), 2, 3, 1, 30, 300, 16)
    _, lse = core.attention(case.q, case.blocks, case.scale)
    mass = core.attention_mass(case.q, case.blocks[0], lse, case.scale, np.ones((2, 30), bool))
    np.testing.assert_allclose(mass.sum(1), 90, rtol=1e-5)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_scores_that_share_an_offset_keep_their_weights(core, dtype, offset):
    case = drawn_case("plain", Values(0, dtype), 2, 3, 1, 30, 300, 16)
    case.q[..., 0], case.blocks[0].k[..., 0], case.scale = np.sqrt(offset), np.sqrt(offset), 1.0
    _, lse = core.attention(case.q, case.blocks, case.scale)
    mass = core.attention_mass(case.q, case.blocks[0], lse, case.scale, np.ones((2, 30), bool))
    np.testing.assert_allclose(mass.sum(1, dtype=np.float64), 90, rtol=1e-5)


def test_a_batch_row_alone_has_the_same_bits(core, dtype):
    case = drawn_case("lengths", Values(3, dtype), 3, 4, 2, 20, 200, 8)
    _, lse = core.attention(case.q, case.blocks, case.scale)
    asking = np.ones((3, 20), bool)
    mass = core.attention_mass(case.q, case.blocks[0], lse, case.scale, asking)
    for row in range(3):
        part = slice(row, row + 1)
        alone = core.attention_mass(case.q[part], only_row(case.blocks[0], row), lse[part], case.scale, asking[part])
        assert_same_bits(alone, mass[part])
