"""mini_tfm.attention and its neighbours: what the friendly face adds to the core."""

import numpy as np
import pytest
from core import naive, naive_attention
from core.cases import Values
from helpers import assert_close, assert_same_bits

import mini_tfm as mt
from mini_tfm import _core
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference import Block


@pytest.fixture
def qkv(dtype):
    values = Values(0, dtype)
    return values.real(2, 4, 5, 8), values.real(2, 2, 7, 8), values.real(2, 2, 7, 8)


OPTIONS = [
    {}, {"causal": True}, {"window": 2}, {"causal": True, "window": 3}, {"lengths": [7, 3]}, {"scale": 0.5}, {"scale": 0},
    {"bias": np.linspace(-1, 1, 7)}, {"bias": np.ones((4, 1, 1))}, {"bias": np.zeros((2, 1, 5, 7))},
    {"causal": True, "window": 4, "lengths": [2, 7], "bias": np.linspace(0, 1, 5)[:, None], "scale": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_attention(qkv, options):
    q, k, v = qkv
    given = {name: value.astype(q.dtype) if name == "bias" else value for name, value in options.items()}
    out = mt.attention(q, k, v, **given)
    fields = {name: value for name, value in given.items() if name != "scale"}
    if "lengths" in fields:
        fields["lengths"] = np.array(fields["lengths"])
    expected = naive_attention.attention(q, [Block(k, v, **fields)], options.get("scale", 8**-0.5))
    assert_close(out, expected.out, "attention", k=expected.n, terms=expected.terms_out, dtype=q.dtype)


def test_a_row_of_length_0_gives_zeros(qkv):
    out = mt.attention(*qkv, lengths=[0, 7])
    assert not out[0].any() and out[1].all()


def test_lists_and_half_precision_become_float32():
    assert mt.softmax([[1, 2], [3, 3]]).dtype == np.float32
    assert_close(mt.softmax([0.0, 0.0]), np.array([0.5, 0.5]), "softmax", dtype=np.float32)
    q = np.ones((1, 1, 2, 4), np.float16)
    assert mt.attention(q, q, q).dtype == np.float32
    assert mt.attention(q.tolist(), q.tolist(), q.tolist(), lengths=np.array([1], np.uint8)).shape == (1, 1, 2, 4)


def test_softmax(dtype):
    x = Values(0, dtype).real(3, 4, 5)
    assert_same_bits(mt.softmax(x), _core.softmax(x))


def test_sinusoidal_positions():
    assert_close(mt.sinusoidal_positions(20, 6), naive.sinusoidal_positions(20, 6), "sinusoidal_positions", dtype=np.float32)


def test_attention_accepts_numpy_scalars_and_truths(qkv):
    out = mt.attention(*qkv, causal=np.True_, window=np.int32(3), scale=np.float32(0.5))
    assert_same_bits(out, mt.attention(*qkv, causal=True, window=3, scale=0.5))


WRONG = [
    ("q", {"q": None}), ("q", {"q": "abc"}), ("q", {"q": np.ones((5, 8))}), ("q", {"q": np.ones((1, 1, 1, 1), complex)}),
    ("k", {"k": np.ones((2, 3, 7, 8))}), ("k", {"k": None}), ("k", {"k": np.ones((2, 2, 7, 9))}), ("k", {"k": np.array([object()])}),
    ("v", {"v": np.ones((2, 2, 6, 8))}), ("v", {"v": [[1.0], [1.0, 2.0]]}),
    ("bias", {"bias": np.ones(6)}), ("bias", {"bias": "T5"}), ("bias", {"bias": np.ones((3, 2, 4, 5, 7))}),
    ("lengths", {"lengths": [7, 8]}), ("lengths", {"lengths": [-1, 3]}), ("lengths", {"lengths": [7]}), ("lengths", {"lengths": [1.5, 2]}),
    ("lengths", {"lengths": "ab"}), ("lengths", {"lengths": [[1], [2, 3]]}), ("lengths", {"lengths": [2**70, 1]}),
    ("window", {"window": 0}), ("window", {"window": 1.5}), ("window", {"window": "1"}),
    ("causal", {"causal": 1}), ("causal", {"causal": None}),
    ("scale", {"scale": np.nan}), ("scale", {"scale": "1"}), ("scale", {"scale": np.inf}),
]  # fmt: skip


@pytest.mark.parametrize("named, changed", WRONG, ids=[f"{named}{i}" for i, (named, _) in enumerate(WRONG)])
def test_refused(named, changed):
    values = Values(0, "float64")
    arguments = {"q": values.real(2, 4, 5, 8), "k": values.real(2, 2, 7, 8), "v": values.real(2, 2, 7, 8), **changed}
    with pytest.raises((InvalidValue, InvalidType), match=rf"^{named}: expected .*, got "):
        mt.attention(**arguments)


@pytest.mark.parametrize("x", [None, "x", 1.0, np.array(1.0), [[1.0], [1.0, 2.0]], np.ones(3, complex), {"a": 1}, np.ones(3, bool)])
def test_softmax_refuses(x):
    with pytest.raises((InvalidValue, InvalidType), match=r"^x: expected .*, got "):
        mt.softmax(x)


@pytest.mark.parametrize(
    "named, arguments", [("n", (-1, 4)), ("n", (1.5, 4)), ("n", (None, 4)), ("d_model", (4, -1)), ("d_model", (4, "8"))]
)
def test_sinusoidal_positions_refuses(named, arguments):
    with pytest.raises((InvalidValue, InvalidType), match=rf"^{named}: expected .*, got "):
        mt.sinusoidal_positions(*arguments)


def test_threads(threads):
    mt.set_num_threads(2)
    assert mt.get_num_threads() == threads.get_num_threads()
    with pytest.raises(InvalidValue, match="n: expected"):
        mt.set_num_threads(0)


def test_show_config_prints_what_computes(capsys):
    mt.show_config()
    printed = capsys.readouterr().out
    config = _core.show_config()
    assert config["isa"] in printed and np.__version__ in printed and str(config["num_threads"]) in printed
