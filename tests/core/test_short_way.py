"""Plain arguments are checked in C alone; all else goes the long way, through `reference/_checks.py`, to the same bits."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from core.attention_cases import FEATURES, drawn_case
from core.cases import Values, compiled_alone
from core.samples import IN_PLACE, NAMES, WITH_OUT, arrays_in, call, sample
from helpers import assert_same_bits

from mini_tfm import _core
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference import Block, _checks

pytestmark = compiled_alone
MADE_ONCE = {"pack", "repack", "sinusoidal_positions"}  # not called in a loop: these have no short way
OFTEN = [name for name in NAMES if name not in MADE_ONCE]


def plain_sample(name, dtype):
    arguments = sample(name, dtype)
    return {argument: None if argument == "out" and name in WITH_OUT else value for argument, value in arguments.items()}


@pytest.fixture
def long_way(monkeypatch):
    """The checks in Python, each of which fails the test: a call closes that way."""

    def close():
        for name, _ in inspect.getmembers(_checks, inspect.isfunction):
            monkeypatch.setattr(_checks, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))

    return close


@pytest.mark.parametrize("name", OFTEN)
def test_plain_arguments_take_the_short_way(name, dtype, long_way):
    arguments = plain_sample(name, dtype)
    long_way()
    call(_core, name, arguments)


def test_a_closed_long_way_is_noticed(long_way):
    long_way()
    with pytest.raises(pytest.fail.Exception, match="was called"):
        _core.softmax([1.0])


@pytest.mark.parametrize("feature", FEATURES)
def test_every_kind_of_block_takes_the_short_way(feature, dtype, long_way):
    case = drawn_case(feature, Values(0, dtype), 2, 4, 2, 5, 9, 8)
    case.ask_for_dbias(lambda shape: np.zeros(shape, dtype))
    long_way()
    out, lse = _core.attention(case.q, case.blocks, case.scale, dropout=0.1, seed=2**64 - 1)
    _core.attention_backward(out, out, lse, case.q, case.blocks, case.scale, dropout=0.1, seed=2**64 - 1)
    _core.attention_mass(case.q, case.blocks[0], lse, case.scale, np.ones((2, 5), bool))


class Guest(np.ndarray):
    """An array that is not exactly one: it takes the long way."""


def as_guests(value):
    if isinstance(value, np.ndarray):
        return value.view(Guest)
    if isinstance(value, Block):
        fields = ("k", "v", "valid", "lengths", "index", "bias")
        return replace(value, **{name: as_guests(getattr(value, name)) for name in fields})
    return [as_guests(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", OFTEN)
def test_both_ways_lead_to_the_same_bits(name, dtype):
    short, long = plain_sample(name, dtype), plain_sample(name, dtype)
    given = {argument: value if argument in IN_PLACE.get(name, ()) else as_guests(value) for argument, value in long.items()}
    got, expected = call(_core, name, given), call(_core, name, short)
    for one, other in zip(arrays_in(got) or [got], arrays_in(expected) or [expected], strict=True):
        assert_same_bits(np.asarray(one), np.asarray(other))


def test_a_gradient_of_the_bias_is_made_of_its_shape(dtype):
    values = Values(1, dtype)
    q, k, bias = values.real(2, 4, 5, 8), values.real(2, 2, 9, 8), values.real(4, 1, 9)
    block = Block(k, k, bias=bias, needs_dbias=True)
    out, lse = _core.attention(q, [block], 0.3)
    _, (short,) = _core.attention_backward(q, out, lse, q, [block], 0.3)
    _, (long,) = _core.attention_backward(q, out, lse, q.view(Guest), [as_guests(block)], 0.3)
    assert short.dbias.shape == bias.shape and short.dbias.any() and block.dbias is None
    assert_same_bits(short.dbias, np.asarray(long.dbias))


def test_integers_of_another_name_are_the_same():
    x, ids = np.ones((9, 4), np.float32), np.array([1, 8], np.longlong)
    assert_same_bits(_core.embedding(x, ids), _core.embedding(x, ids.astype(np.int64)))
    q = np.ones((2, 1, 3, 4), np.float32)
    got, expected = (_core.attention(q, [Block(q, q, lengths=np.array([1, 3], kind))], 1.0)[0] for kind in (np.longlong, np.int64))
    assert_same_bits(got, expected)


def test_arrays_without_elements_whose_strides_say_nothing(dtype):
    q, none = np.ones((1, 1, 3, 8), dtype), (np.ones((1, 1, 0, 8)) * 1.0).astype(dtype)
    assert not _core.attention(q, [Block(none, none)], 1.0)[0].any()
    one = np.lib.stride_tricks.as_strided(q, (1, 1, 1, 8), (3, 5, 7, q.itemsize))
    assert_same_bits(_core.attention(one, [Block(q, q)], 1.0)[0], _core.attention(q[:, :, :1], [Block(q, q)], 1.0)[0])


HOSTILE = {
    "bytes of the other order": lambda block: {"bias": block.bias.astype(block.bias.dtype.newbyteorder())},
    "a bias that is not aligned": lambda block: {"bias": np.frombuffer(b"0" + block.bias.tobytes(), block.bias.dtype, offset=1)[:9]},
    "a bias with too many axes": lambda block: {"bias": block.bias[None]},
    "a prefix past the keys": lambda block: {"causal": True, "prefix": 10},
    "a prefix without an order": lambda block: {"prefix": 1},
    "an offset of a kind": lambda block: {"offset": 1.0},
    "a length below 0": lambda block: {"lengths": np.array([-1, 3])},
    "a row below -1": lambda block: {"index": np.full((2, 4, 5, 1), -2), "bias": None},
    "the least integer": lambda block: {"index": np.full((2, 4, 5, 1), -(2**63)), "bias": None},
    "a dbias without a bias": lambda block: {"bias": None, "dbias": np.zeros_like(block.bias)},
}


@pytest.mark.parametrize("label", HOSTILE)
def test_a_nearly_plain_block_is_refused(label, dtype):
    values = Values(1, dtype)
    q, k = values.real(2, 4, 5, 8), values.real(2, 2, 9, 8)
    block = Block(k, k, bias=values.real(2, 4, 5, 9))
    with pytest.raises((InvalidType, InvalidValue), match=r"^blocks\[0\]\.\w+: expected .*, got "):
        _core.attention(q, [replace(block, **HOSTILE[label](block))], 0.3)


@pytest.mark.parametrize("target", [5, -1, 2**63 - 1, -(2**63)])
def test_a_target_in_no_class_is_refused(target, core):
    with pytest.raises(InvalidValue, match=r"^targets: expected values from 0 to 4 \(or -100\)"):
        core.cross_entropy(np.ones((2, 5), np.float32), np.array([1, target]))


def test_a_table_that_overlaps_its_rows_gradient_is_refused(core, dtype):
    table = np.zeros((9, 4), dtype)
    with pytest.raises(InvalidValue, match=r"^dtable: expected memory of its own, got an array that overlaps dout"):
        core.embedding_backward(np.array([1, 2]), table[3:5], table)
