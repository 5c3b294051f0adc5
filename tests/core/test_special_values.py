"""Infinities, NaN, denormals, numbers near the largest: a table of what comes out, and how far a NaN spreads."""

from itertools import product

import numpy as np
import pytest
from core.cases import Values
from helpers import assert_same_bits

from mini_tfm.reference import Block

inf, nan = np.inf, np.nan
TINY = 1e-40  # denormal in float32; in float64 an ordinary small number
HUGE = 1e30  # its square overflows in float32

# kernel, arguments (lists become arrays), results.
TABLE = [
    ("softmax", {"x": [-inf, -inf]}, [[0, 0]]),
    ("softmax", {"x": [-inf]}, [[0]]),
    ("softmax", {"x": [HUGE]}, [[1]]),
    ("softmax", {"x": [0.0, -inf]}, [[1, 0]]),
    ("softmax", {"x": [inf, 0.0]}, [[nan, nan]]),
    ("softmax", {"x": [nan, 0.0]}, [[nan, nan]]),
    ("softmax", {"x": [nan, -inf]}, [[nan, nan]]),
    ("softmax", {"x": [HUGE, HUGE]}, [[0.5, 0.5]]),
    ("softmax", {"x": [-HUGE, HUGE]}, [[0, 1]]),
    ("softmax", {"x": [3e38, -3e38]}, [[1, 0]]),
    ("softmax", {"x": [-HUGE, -HUGE]}, [[0.5, 0.5]]),
    ("softmax", {"x": [TINY, 0.0]}, [[0.5, 0.5]]),
    ("softmax", {"x": [1e4, 0.0]}, [[1, 0]]),
    ("log_softmax", {"x": [-inf, -inf]}, [[-inf, -inf]]),
    ("log_softmax", {"x": [0.0, -inf]}, [[0, -inf]]),
    ("log_softmax", {"x": [inf, 0.0]}, [[nan, nan]]),
    ("log_softmax", {"x": [nan, 0.0]}, [[nan, nan]]),
    ("log_softmax", {"x": [HUGE, 0.0]}, [[0, -HUGE]]),
    ("softmax_backward", {"y": [0.0, 0.0], "dy": [1.0, 2.0]}, [[0, 0]]),
    ("softmax_backward", {"y": [0.5, 0.5], "dy": [nan, 2.0]}, [[nan, nan]]),
    ("softmax_backward", {"y": [1.0, 0.0], "dy": [HUGE, -HUGE]}, [[0, 0]]),
    ("layer_norm", {"x": [2.0, 2.0], "weight": [3.0, 3.0], "bias": [1.0, -1.0], "eps": 1e-2}, [[1, -1], [2], [10]]),
    ("layer_norm", {"x": [7.0], "weight": [3.0], "bias": [1.0], "eps": 1e-2}, [[1], [7], [10]]),
    ("layer_norm", {"x": [nan, 2.0], "weight": [1.0, 1.0], "bias": None, "eps": 0.1}, [[nan, nan], [nan], [nan]]),
    ("layer_norm", {"x": [inf, 2.0], "weight": [1.0, 1.0], "bias": None, "eps": 0.1}, [[nan, nan], [inf], [nan]]),
    ("layer_norm", {"x": [HUGE, -HUGE], "weight": [1.0, 1.0], "bias": None, "eps": 0.1}, [[1, -1], [0], [1 / HUGE]]),
    ("layer_norm", {"x": [TINY, -TINY], "weight": [1.0, 1.0], "bias": None, "eps": 1e-2}, [[0, 0], [0], [10]]),
    ("rms_norm", {"x": [0.0, 0.0], "weight": [3.0, 3.0], "eps": 1e-2}, [[0, 0], [10]]),
    ("rms_norm", {"x": [nan, 0.0], "weight": [3.0, 3.0], "eps": 1e-2}, [[nan, nan], [nan]]),
    ("rms_norm", {"x": [HUGE, -HUGE], "weight": [1.0, 1.0], "eps": 1e-2}, [[1, -1], [1 / HUGE]]),
    ("activation", {"x": [nan, inf, 0.0, -0.0, TINY, -HUGE, HUGE], "kind": "relu"}, [[nan, inf, 0, 0, TINY, 0, HUGE]]),
    ("activation", {"x": [nan, inf, 0.0, TINY, -HUGE, HUGE], "kind": "gelu"}, [[nan, inf, 0, TINY / 2, 0, HUGE]]),
    ("activation", {"x": [nan, inf, 0.0, TINY, -HUGE, HUGE], "kind": "gelu_tanh"}, [[nan, inf, 0, TINY / 2, 0, HUGE]]),
    ("activation", {"x": [nan, inf, 0.0, TINY, -HUGE, HUGE], "kind": "silu"}, [[nan, inf, 0, TINY / 2, 0, HUGE]]),
    ("activation", {"x": [-inf], "kind": "relu"}, [[0]]),
    ("activation_backward", {"x": [0.0, -HUGE, HUGE, nan, nan], "dy": [1.0, 1.0, 1.0, 2.0, nan], "kind": "relu"}, [[0, 0, 1, 2, nan]]),
    ("activation_backward", {"x": [0.0, -HUGE, HUGE, nan], "dy": [1.0, 1.0, 1.0, 1.0], "kind": "gelu"}, [[0.5, 0, 1, nan]]),
    ("activation_backward", {"x": [0.0, -HUGE, HUGE, nan], "dy": [1.0, 1.0, 1.0, 1.0], "kind": "gelu_tanh"}, [[0.5, 0, 1, nan]]),
    ("activation_backward", {"x": [0.0, -HUGE, HUGE, nan], "dy": [1.0, 1.0, 1.0, 1.0], "kind": "silu"}, [[0.5, 0, 1, nan]]),
    ("activation_backward", {"x": [1.0, -1.0], "dy": [inf, nan], "kind": "relu"}, [[inf, 0]]),
    ("add", {"x": [nan, inf, HUGE, TINY], "y": [1.0, -inf, -HUGE, 0.0]}, [[nan, nan, 0, TINY]]),
    ("recurrence", {"x": [[[2.0, 2.0, 2.0, nan, inf]]], "forget": [[[inf, -HUGE, 0.0, 0.0, 0.0]]], "state": [[3.0, 3.0, 4.0, 1.0, 1.0]]},
     [[[[3, 2, 3, nan, inf]]]]),
    ("dropout", {"x": [nan, inf, TINY], "p": 0.0, "seed": 0}, [[nan, inf, TINY]]),
    ("cross_entropy", {"logits": [[0.0, -inf]], "targets": [0]}, [[0], [0]]),
    ("cross_entropy", {"logits": [[0.0, -inf]], "targets": [1]}, [[inf], [0]]),
    ("cross_entropy", {"logits": [[-inf, -inf]], "targets": [1]}, [[inf], [-inf]]),
    ("cross_entropy", {"logits": [[nan, 0.0]], "targets": [1]}, [[nan], [nan]]),
    ("cross_entropy", {"logits": [[nan, inf]], "targets": [-100]}, [[0], [0]]),
    ("cross_entropy", {"logits": [[HUGE, 0.0]], "targets": [0]}, [[0], [HUGE]]),
    ("cross_entropy", {"logits": [[HUGE, 0.0]], "targets": [1]}, [[HUGE], [HUGE]]),
    ("cross_entropy", {"logits": [[3.0]], "targets": [0]}, [[0], [3]]),
    ("cross_entropy_backward", {"logits": [[nan, inf]], "targets": [-100], "lse": [0.0], "dlosses": [nan]}, [[[0, 0]]]),
    ("cross_entropy_backward", {"logits": [[HUGE, 0.0]], "targets": [1], "lse": [HUGE], "dlosses": [1.0]}, [[[1, -1]]]),
    ("cross_entropy_backward", {"logits": [[0.0, -inf]], "targets": [0], "lse": [0.0], "dlosses": [1.0]}, [[[0, 0]]]),
    # Each class a chunk of its own: what is odd comes first, comes later, or is all there is.
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[0.0, -inf]], "targets": [0], "chunk": 1}, [[0], [0]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[-inf, 0.0]], "targets": [1], "chunk": 1}, [[0], [0]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[-inf, 0.0]], "targets": [0], "chunk": 1}, [[inf], [0]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[-inf, -inf]], "targets": [1], "chunk": 1}, [[inf], [-inf]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[nan, 0.0]], "targets": [1], "chunk": 1}, [[nan], [nan]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[0.0, nan]], "targets": [0], "chunk": 1}, [[nan], [nan]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[inf, 0.0]], "targets": [1], "chunk": 1}, [[nan], [nan]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[0.0, inf]], "targets": [0], "chunk": 1}, [[nan], [nan]]),
    ("linear_cross_entropy", {"x": [[nan]], "weight": [[0.0, 1.0]], "targets": [-100], "chunk": 1}, [[0], [0]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[HUGE, 0.0]], "targets": [1], "chunk": 1}, [[HUGE], [HUGE]]),
    ("linear_cross_entropy", {"x": [[1.0]], "weight": [[-HUGE, HUGE]], "targets": [1], "chunk": 1}, [[0], [HUGE]]),
    ("linear_cross_entropy", {"x": [[0.0]], "weight": [[1.0, 1.0]], "targets": [0], "bias": [5.0, -inf], "chunk": 1}, [[0], [5]]),
    ("linear_cross_entropy_backward", {"x": [[nan]], "weight": [[0.0, 1.0]], "targets": [-100], "lse": [nan], "dlosses": [nan],
                                       "bias": [0.0, 0.0], "chunk": 1}, [[[0]], None, [0, 0]]),
    ("linear_cross_entropy_backward", {"x": [[1.0]], "weight": [[0.0, 0.0]], "targets": [0], "lse": [0.0], "dlosses": [1.0],
                                       "bias": [0.0, -inf], "chunk": 1}, [[[0]], None, [0, 0]]),
    ("linear_cross_entropy_backward", {"x": [[1.0]], "weight": [[0.0, 0.0]], "targets": [1], "lse": [-inf], "dlosses": [1.0],
                                       "bias": [-inf, -inf], "chunk": 1}, [[[0]], None, [0, -1]]),
    ("gemm", {"a": [[inf, 0.0]], "b": [[1.0], [1.0]]}, [[[inf]]]),
    ("gemm", {"a": [[inf, 1.0]], "b": [[0.0], [1.0]]}, [[[nan]]]),
    ("gemm", {"a": [[inf, 1.0]], "b": [[1.0], [-inf]]}, [[[nan]]]),
    ("gemm", {"a": [[TINY]], "b": [[1.0]]}, [[[TINY]]]),
    ("gemm", {"a": [[1.0]], "b": [[2.0]], "out": [[nan]]}, [[[2]]]),
    ("gemm", {"a": [[1.0]], "b": [[2.0]], "out": [[nan]], "accumulate": True}, [[[nan]]]),
    ("embedding", {"table": [[nan, inf], [TINY, -0.0]], "ids": [1, 0]}, [[[TINY, 0], [nan, inf]]]),
    ("embedding_backward", {"ids": [0, 0], "dout": [[inf], [-inf]], "dtable": [[1.0], [2.0]]}, [[[nan], [2]]]),
    ("rotary", {"x": [[[[nan, 1.0, 1.0, 1.0]]]], "positions": [0], "frequencies": np.array([1.0, 0.01])}, [[[[[nan, 1, nan, 1]]]]]),
    ("rotary", {"x": [[[[1.0, 0.0]]]], "positions": [2**40], "frequencies": np.array([1.0])}, [[[[[np.cos(2.0**40), np.sin(2.0**40)]]]]]),
    ("sum_of_squares", {"x": [nan, 1.0]}, [nan]),
    ("sum_of_squares", {"x": [inf, 1.0]}, [inf]),
    ("search", {"queries": [[[1.0]]], "bank": [[[nan], [inf], [2.0], [-inf]]], "k": 4}, [[[[inf, 2, -inf, -inf]]], [[[1, 2, 3, -1]]]]),
    ("search", {"queries": [[[nan]]], "bank": [[[1.0], [2.0]]], "k": 1}, [[[[-inf]]], [[[-1]]]]),
    ("search", {"queries": [[[0.0]]], "bank": [[[1.0], [inf]]], "k": 2}, [[[[0, -inf]]], [[[0, -1]]]]),
    ("search", {"queries": [[[HUGE]]], "bank": [[[1.0], [-1.0]]], "k": 2}, [[[[HUGE, -HUGE]]], [[[0, 1]]]]),
]  # fmt: skip


def as_array(argument, value, dtype):
    if not isinstance(value, list):
        return value
    if argument in ("lse", "mean"):  # float64 for both, of numbers that the others have
        return np.array(value, dtype).astype(np.float64)
    return np.array(value, np.int64 if argument in ("ids", "targets", "positions") else dtype)


def assert_table(actual, expected, dtype):
    np.testing.assert_allclose(actual, np.asarray(expected, np.float64), rtol=8 * np.finfo(dtype).eps, atol=np.finfo(np.float32).tiny)


@pytest.mark.parametrize("name, arguments, expected", TABLE, ids=[f"{name}{i}" for i, (name, _, _) in enumerate(TABLE)])
def test_the_table(core, dtype, name, arguments, expected):
    results = getattr(core, name)(**{key: as_array(key, value, dtype) for key, value in arguments.items()})
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == len(expected)
    for actual, wanted in zip(results, expected, strict=True):
        if wanted is None:
            assert actual is None
        else:
            assert_table(actual, wanted, dtype)


# The scores of one query, the values of head size 1, what comes out, lse.
ATTENTION = {
    "one key": ([5.0], [3.0], 3, 5),
    "two equal": ([2.0, 2.0], [1.0, 3.0], 2, 2 + np.log(2)),
    "huge scores": ([HUGE, -HUGE, HUGE], [1.0, 5.0, 3.0], 2, HUGE),
    "all very low": ([-HUGE, -HUGE], [1.0, 3.0], 2, -HUGE),
    "one minus infinity": ([-inf, 0.0], [7.0, 3.0], 3, 0),
    "all minus infinity": ([-inf, -inf], [7.0, 3.0], 0, -inf),
    "plus infinity": ([inf, 0.0], [7.0, 3.0], nan, nan),
    "NaN score": ([nan, 0.0], [7.0, 3.0], nan, nan),
    "NaN value": ([0.0, 0.0], [nan, 3.0], nan, np.log(2)),
    "infinite value": ([0.0, 0.0], [inf, 3.0], inf, np.log(2)),
    "NaN value that weighs nothing": ([-inf, 0.0], [nan, 3.0], 3, 0),
    "denormal values": ([0.0, 0.0], [TINY, TINY], TINY, np.log(2)),
    "denormal scores": ([TINY, 0.0], [1.0, 3.0], 2, np.log(2)),
    "low after high": ([0.0, -200.0], [1.0, 3.0], 1, 0),
    "high after low": ([-200.0, 0.0], [1.0, 3.0], 3, 0),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(core, dtype, case):
    """Every query the same; the keys repeated in one block and over blocks, which adds log(copies) to lse."""
    scores, v, out, lse = ATTENTION[case]
    for length, (n_copies, n_blocks), scored_by in product((1, 4, 40), ((1, 1), (33, 1), (1, 3)), ("keys", "bias")):
        column = np.tile(np.array(scores, dtype), n_copies).reshape(1, 1, -1, 1)
        values = np.tile(np.array(v, dtype), n_copies).reshape(1, 1, -1, 1)
        q = np.ones((1, 1, length, 1), dtype)
        block = Block(column, values)
        # A product that is -inf is a score too, but only a bias of -inf is promised to hide a NaN.
        if scored_by == "bias" or case == "NaN value that weighs nothing":
            block = Block(np.zeros_like(column), values, bias=column.reshape(-1))
        actual_out, actual_lse = core.attention(q, [block] * n_blocks, 1.0)
        assert_table(actual_out, np.full(q.shape, float(out)), dtype)
        np.testing.assert_allclose(actual_lse, np.full(q.shape[:3], lse + np.log(n_copies * n_blocks)), rtol=1e-6)


@pytest.mark.parametrize("size", [1e30, 1e200])
def test_slopes_far_out_are_0_and_1(core, size):
    """x^3 and x^2 overflow on the way."""
    x = np.array([-size, size], np.float32 if size < 1e38 else np.float64)
    for kind in ("relu", "gelu", "gelu_tanh", "silu"):
        np.testing.assert_array_equal(core.activation(x, kind), [0, x[1]])
        np.testing.assert_array_equal(core.activation_backward(x, np.ones_like(x), kind), [0, 1])


@pytest.mark.parametrize("place", [0, 7, 36])
def test_a_nan_stays_in_its_row(core, dtype, place):
    values = Values(0, dtype)
    x, dy, weight = values.real(3, 37), values.real(3, 37), values.real(37)
    dirty, targets, dlosses = x.copy(), np.array([1, 2, 3]), values.real(3)
    dirty[1, place] = np.nan

    def results(x):
        y, mean, rstd = core.layer_norm(x, weight, weight, 1e-5)
        rms_y, rms_rstd = core.rms_norm(x, weight, 1e-5)
        losses, lse = core.cross_entropy(x, targets)
        return {
            "softmax": core.softmax(x), "log_softmax": core.log_softmax(x), "softmax_backward": core.softmax_backward(x, dy),
            "layer_norm": y, "mean": mean, "rstd": rstd, "rms_norm": rms_y, "rms_rstd": rms_rstd,
            "layer_norm_backward": core.layer_norm_backward(dy, x, weight, mean, rstd)[0],
            "rms_norm_backward": core.rms_norm_backward(dy, x, weight, rms_rstd)[0],
            "cross_entropy": losses, "lse": lse,
            "cross_entropy_backward": core.cross_entropy_backward(x, targets, lse, dlosses), "gemm": core.gemm(x, weight[:, None]),
        }  # fmt: skip

    for (name, clean), spoilt in zip(results(x).items(), results(dirty).values(), strict=True):
        assert_same_bits(spoilt[[0, 2]], clean[[0, 2]])
        assert np.isnan(spoilt[1]).all(), name


def test_a_bad_gradient_spoils_its_own_parameter(core, dtype):
    grad = np.array([1.0, nan, inf, 0.0], dtype)
    param, m, v = np.ones(4, dtype), np.zeros(4, dtype), np.zeros(4, dtype)
    core.adamw(param, grad, m, v, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    np.testing.assert_array_equal(np.isnan(param), [False, True, True, False])
    assert param[3] == 1.0


def test_a_dropped_nan_is_gone(core, dtype):
    mask = core.dropout(np.ones(200, dtype), 0.5, 9) == 0
    y = core.dropout(np.full(200, nan, dtype), 0.5, 9)
    np.testing.assert_array_equal(np.isnan(y), ~mask)
    assert (y[mask] == 0).all()


def test_enough_results_are_defined():
    assert len(TABLE) >= 60
