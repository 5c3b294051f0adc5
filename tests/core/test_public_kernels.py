"""mini_tfm.attention and its neighbours: what the friendly face adds to the core."""

import numpy as np
import pytest
from core import naive, naive_attention
from core.cases import Values, seeds
from helpers import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

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


def dense(q, k, v, seen, bias, scale, cap):
    """(B, H, T, Dv) and the weights, in float64: every head with keys of its own, every score there."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("bhtd,bhsd->bhts", q.astype(np.float64), k) * scale
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    shape = scores.shape
    scores = np.where(seen, scores + bias, -np.inf)
    top = np.where(np.broadcast_to(seen, shape).any(-1, keepdims=True), scores.max(-1, keepdims=True, initial=-1e300), 0)
    weights = np.exp(scores - top)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhts,bhsd->bhtd", weights, v), weights


@given(
    seed=seeds, batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 2), length=st.sampled_from([1, 2, 5, 30]),
    source=st.sampled_from([1, 3, 8, 40, 300]), d=st.sampled_from([1, 3, 8, 20]), d_v=st.sampled_from([1, 3, 8, 20]),
    masked=st.sampled_from([None, (), ("s",), ("t", "s"), ("b", 1, 1, "s"), ("b", "h", "t", "s")]), biased=st.booleans(),
    offset=st.sampled_from([None, -3, 0, 2, 1000]), causal=st.booleans(), window=st.sampled_from([None, 2]),
    cap=st.sampled_from([None, 0.5, 30.0]),
)  # fmt: skip
def test_all_that_attention_takes(dtype, seed, batch, kv_heads, group, length, source, d, d_v, masked, biased, offset, causal, window, cap):
    """mask, offset, cap, values of another width, weights: each with all the others."""
    values, heads = Values(seed, dtype), kv_heads * group
    sizes = {"b": batch, "h": heads, "t": length, "s": source}
    q, k, v = values.real(batch, heads, length, d), values.real(batch, kv_heads, source, d), values.real(batch, kv_heads, source, d_v)
    mask = None if masked is None else np.asarray(values.mask(*(sizes.get(n, n) for n in masked)))
    bias = values.real(heads, 1, source) if biased else None
    offset = offset if causal or window else None
    distance = np.arange(source) - np.arange(length)[:, None] - (source - length if offset is None else offset)
    seen = (distance <= 0 if causal else np.True_) & (True if mask is None else mask)
    if window:
        seen = seen & (distance > -window) & (causal | (distance < window))
    seen = np.broadcast_to(seen, (batch, heads, length, source))
    out, weights = mt.attention(
        q, k, v, mask=mask, bias=bias, offset=offset, causal=causal, window=window, cap=cap, scale=0.4, return_weights=True
    )
    expected, expected_weights = dense(q, k, v, seen, 0.0 if bias is None else bias, 0.4, cap)
    assert (out.dtype, weights.dtype) == (dtype, dtype)
    near = {"rtol": 0, "atol": 2000 * np.finfo(dtype).eps}
    np.testing.assert_allclose(out, expected, **near)
    np.testing.assert_allclose(weights, expected_weights, **near)
    alone = mt.attention(q, k, v, mask=mask, bias=bias, offset=offset, causal=causal, window=window, cap=cap, scale=0.4)
    assert_same_bits(np.ascontiguousarray(alone), np.ascontiguousarray(out))


def test_a_mask_hides_nan(qkv):
    q, k, v = qkv
    expected = mt.attention(q, k[:, :, :5], v[:, :, :5])
    k[:, :, 5:], v[:, :, 5:] = np.nan, np.inf
    np.testing.assert_allclose(mt.attention(q, k, v, mask=np.arange(7) < 5), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": np.ones(7)}, r"mask: expected an array of bool, True where a key is seen, got an array of float64"),
        ({"mask": np.ones((3, 7), bool)}, r"mask: expected an array broadcastable to \(2, 4, 5, 7\), got shape \(3, 7\)"),
        ({"mask": np.ones((3, 7), bool), "bias": np.ones((5, 7), np.float32)}, r"mask: expected an array broadcastable to"),
        ({"offset": 2}, r"offset: expected None without causal or window"),
        ({"offset": 1.5, "causal": True}, r"offset: expected an integer, got float"),
        ({"cap": 0}, r"cap: expected a finite number in \[0.001, 1000000.0\], got 0"),
        ({"cap": "2"}, r"cap: expected a number, got str"),
    ],
)
def test_what_attention_refuses(options, message):
    values = Values(0, "float32")
    with pytest.raises((InvalidType, InvalidValue), match=message):
        mt.attention(values.real(2, 4, 5, 8), values.real(2, 2, 7, 8), values.real(2, 2, 7, 8), **options)


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
