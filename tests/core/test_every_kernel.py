"""What holds of every kernel: memory layouts, inputs left alone, fresh results, empty arrays, and the twin's values."""

import numpy as np
import pytest
from core.samples import IN_PLACE, NAMES, WITH_OUT, arrays_in, call, sample
from helpers import LAYOUTS, assert_same_bits

from mini_tfm import _core, reference

every_kernel = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("name", WITH_OUT)
def test_a_result_goes_where_it_is_asked_to(core, dtype, name):
    """Into `out`, which is what comes back, with the bits of a new array."""
    arguments = sample(name, dtype)
    given = getattr(core, name)(**arguments)
    given = given if isinstance(given, tuple) else (given,)
    assert given[0] is arguments["out"]
    fresh = getattr(core, name)(**{**arguments, "out": None})
    fresh = fresh if isinstance(fresh, tuple) else (fresh,)
    assert_same_bits(given, fresh)
    assert not any(np.shares_memory(array, given[0]) for array in fresh)


@every_kernel
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_layout_of_an_input_does_not_matter(core, dtype, name, layout):
    """Bit for bit."""
    assert_same_bits(call(core, name, sample(name, dtype, layout)), call(core, name, sample(name, dtype)))


@every_kernel
def test_inputs_are_left_alone_and_may_be_read_only(core, dtype, name):
    arguments = sample(name, dtype)
    changed = {id(arguments[argument]) for argument in IN_PLACE.get(name, ())}
    if name == "attention_backward":
        changed |= {id(block.dbias) for block in arguments["blocks"]}
    inputs = [array for array in arrays_in(arguments) if id(array) not in changed]
    before = [array.tobytes() for array in inputs]
    for array in inputs:
        array.setflags(write=False)
    call(core, name, arguments)
    assert [array.tobytes() for array in inputs] == before


@every_kernel
def test_results_are_arrays_of_their_own(core, dtype, name):
    arguments = sample(name, dtype)
    given = arrays_in(arguments)
    results = [array for array in arrays_in(call(core, name, arguments)) if not any(array is x for x in given)]
    for i, array in enumerate(results):
        assert type(array) is np.ndarray and array.flags.c_contiguous and array.flags.writeable
        assert array.dtype in (dtype, np.float64, np.int64)  # what a backward takes back is float64 for both
        assert not any(np.shares_memory(array, other) for other in [*given, *results[:i]])


@every_kernel
def test_a_big_call_agrees_with_the_twin(dtype, name):
    """A rough look at sizes that the dumb implementations are too slow for; their bounds hold at the small ones."""
    results = call(_core, name, sample(name, dtype, big=True))
    expected = call(reference, name, sample(name, dtype, big=True))
    for array, wanted in zip(map(np.asarray, arrays_in(results) or results), arrays_in(expected) or expected, strict=True):
        if array.dtype == np.int64:
            assert (array == wanted).mean() > 0.999  # scores that are equal but for rounding may change places
        else:
            largest = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros_like(wanted)).max()
            np.testing.assert_allclose(array, wanted, rtol=0, atol=200 * np.finfo(dtype).eps * largest)


# kernel, axis of the rows, the arguments that have them, and how many results do.
ROWS = {
    "activation": (0, ("x", "out"), 1), "activation_backward": (0, ("x", "dy", "out"), 1), "add": (0, ("x", "y"), 1),
    "cross_entropy": (0, ("logits", "targets"), 2),
    "cross_entropy_backward": (0, ("logits", "targets", "lse", "dlosses"), 1), "embedding": (1, ("ids",), 1), "gemm": (0, ("a", "out"), 1),
    "linear_cross_entropy": (0, ("x", "targets"), 2), "linear_cross_entropy_backward": (0, ("x", "targets", "lse", "dlosses"), 1),
    "linear_top_k": (0, ("x",), 3), "packed_linear": (0, ("x", "residual", "out"), 1),
    "layer_norm": (0, ("x", "out"), 3), "layer_norm_backward": (0, ("dy", "x", "mean", "rstd", "out"), 1),
    "log_softmax": (0, ("x", "out"), 1), "rms_norm": (0, ("x", "out"), 2), "rms_norm_backward": (0, ("dy", "x", "rstd", "out"), 1),
    "recurrence": (0, ("x", "forget", "state"), 2), "rotary": (0, ("x",), 1),
    "search": (1, ("queries",), 2), "softmax": (0, ("x", "out"), 1),
    "softmax_backward": (0, ("y", "dy", "out"), 1),
}  # fmt: skip


@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="the BLAS that the twins call does not promise it")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("big", [False, True])
def test_a_row_has_the_same_bits_in_any_company(threads, dtype, name, big):
    """Of the compiled kernels: alone, with a few others, at the end of a tile. Attention has its own such tests."""
    threads.set_num_threads(3)
    axis, arguments, n_results = ROWS[name]

    def results(rows):
        taken = sample(name, dtype, big=big)
        taken |= {argument: np.take(taken[argument], rows, axis) for argument in arguments}
        return arrays_in(call(threads, name, taken))[:n_results]

    n = sample(name, dtype, big=big)[arguments[0]].shape[axis]
    everything = results(range(n))
    for rows in (range(1), range(n - 1, n), range(n // 2, n), range(0, n, 3)):
        for part, whole in zip(results(rows), everything, strict=True):
            assert_same_bits(part, np.take(whole, rows, axis))


# kernel and its arguments, from many rows; the first result is rows as well.
PAST_CACHES = [
    ("softmax", lambda rows, d: {"x": rows}), ("log_softmax", lambda rows, d: {"x": rows}),
    ("softmax_backward", lambda rows, d: {"y": rows, "dy": rows[::-1].copy()}),
    ("layer_norm", lambda rows, d: {"x": rows, "weight": rows[0], "bias": rows[1], "eps": 1e-5}),
    ("rms_norm", lambda rows, d: {"x": rows, "weight": rows[0], "eps": 1e-5}),
    ("layer_norm_backward", lambda rows, d: {"dy": rows[::-1].copy(), "x": rows, "weight": rows[0], "mean": rows[:, 0].astype(np.float64),
                                             "rstd": rows[:, 1].copy()}),
    ("rms_norm_backward", lambda rows, d: {"dy": rows[::-1].copy(), "x": rows, "weight": rows[0], "rstd": rows[:, 1].copy()}),
    ("activation", lambda rows, d: {"x": rows, "kind": "gelu"}), ("activation", lambda rows, d: {"x": rows, "kind": "relu"}),
    ("activation_backward", lambda rows, d: {"x": rows, "dy": rows[::-1].copy(), "kind": "gelu"}),
    ("embedding", lambda rows, d: {"table": rows, "ids": np.arange(len(rows))[::-1].copy()}),
]  # fmt: skip


@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="of the compiled kernels' ways with memory")
@pytest.mark.parametrize("name, arguments", PAST_CACHES, ids=[f"{name}{i}" for i, (name, _) in enumerate(PAST_CACHES)])
@pytest.mark.parametrize("d", [33, 517, 3001])
def test_large_results_have_the_same_bits(threads, name, arguments, d):
    """Results above 32 MB take another way to memory, from the first element to the last; rows alone do not."""
    n = 35_000_000 // (4 * d)
    rows = np.random.default_rng(0).standard_normal((n, d), np.float32)
    threads.set_num_threads(2)
    given = arguments(rows, d)
    whole = arrays_in(call(threads, name, given))[0]
    few = min(n, 300)
    for part in (slice(0, few), slice(n // 2, n // 2 + few), slice(n - few, n)):
        alone = {
            key: value[part] if isinstance(value, np.ndarray) and len(value) == n and key != "table" else value
            for key, value in given.items()
        }
        assert_same_bits(arrays_in(call(threads, name, alone))[0], whole[part])


@every_kernel
def test_subclasses_of_arrays_are_taken_as_plain_ones(core, dtype, name):
    """A masked array's mask or a matrix's product must not get into the checks."""

    class Odd(np.ndarray):
        def __array_finalize__(self, obj):
            pass

        def __getitem__(self, key):
            raise AssertionError("a kernel used the subclass")

    arguments = sample(name, dtype)
    odd = {
        key: value.view(Odd) if isinstance(value, np.ndarray) and key not in IN_PLACE.get(name, ()) else value
        for key, value in arguments.items()
    }
    assert_same_bits(call(core, name, odd), call(core, name, sample(name, dtype)))


def real(*shape):
    return lambda dtype: np.ones(shape, dtype)


def whole(*shape):
    return lambda dtype: np.zeros(shape, np.int64)


def double(*shape):
    return lambda dtype: np.ones(shape)


def truth(*shape):
    return lambda dtype: np.ones(shape, bool)


def a_block(k, **more):
    return lambda dtype: [reference.Block(np.ones(k, dtype), np.ones(k, dtype), **{name: value(dtype) for name, value in more.items()})]


def packed(d_in, d_out):
    return lambda dtype: _core.pack(np.ones((d_in, d_out), dtype), dtype=dtype.name)


def same_name(dtype):
    return dtype.name


# kernel, arguments, and what comes back: shapes, each filled with one value.
EMPTY = [
    ("gemm", {"a": real(0, 3), "b": real(3, 2)}, [((0, 2), 0)]),
    ("gemm", {"a": real(2, 3), "b": real(3, 0)}, [((2, 0), 0)]),
    ("gemm", {"a": real(2, 0), "b": real(0, 3)}, [((2, 3), 0)]),
    ("gemm", {"a": real(2, 0), "b": real(0, 3), "out": real(2, 3)}, [((2, 3), 0)]),
    ("gemm", {"a": real(2, 0), "b": real(0, 3), "out": real(2, 3), "accumulate": True}, [((2, 3), 1)]),
    ("pack", {"weight": real(0, 3), "dtype": same_name}, [((0, 3), 0)]),
    ("pack", {"weight": real(3, 0), "dtype": same_name, "gate": real(3, 0)}, [((3, 0), 0), ((3, 0), 0)]),
    ("packed_linear", {"x": real(0, 3), "weight": packed(3, 2)}, [((0, 2), 0)]),
    ("packed_linear", {"x": real(2, 3), "weight": packed(3, 0)}, [((2, 0), 0)]),
    ("packed_linear", {"x": real(2, 0), "weight": packed(0, 3)}, [((2, 3), 0)]),
    ("packed_linear", {"x": real(9, 0), "weight": packed(0, 3), "bias": real(3), "residual": real(9, 3)}, [((9, 3), 2)]),
    ("linear_top_k", {"x": real(0, 3), "weight": packed(3, 2), "k": 2, "lse": True}, [((0, 2), 0), ((0, 2), 0), ((0,), 0)]),
    ("linear_top_k", {"x": real(2, 3), "weight": packed(3, 0), "k": 2, "lse": True}, [((2, 2), -np.inf), ((2, 2), -1), ((2,), -np.inf)]),
    ("linear_top_k", {"x": real(2, 3), "weight": packed(3, 2), "k": 0}, [((2, 0), 0), ((2, 0), 0)]),
    ("linear_top_k", {"x": real(2, 0), "weight": packed(0, 1), "k": 1, "lse": True}, [((2, 1), 0), ((2, 1), 0), ((2,), 0)]),
    ("softmax", {"x": real(0)}, [((0,), 0)]),
    ("softmax", {"x": real(3, 0)}, [((3, 0), 0)]),
    ("softmax", {"x": real(0, 3)}, [((0, 3), 0)]),
    ("log_softmax", {"x": real(2, 0, 3)}, [((2, 0, 3), 0)]),
    ("log_softmax", {"x": real(2, 3, 0)}, [((2, 3, 0), 0)]),
    ("softmax_backward", {"y": real(0, 3), "dy": real(0, 3)}, [((0, 3), 0)]),
    ("softmax_backward", {"y": real(3, 0), "dy": real(3, 0)}, [((3, 0), 0)]),
    ("layer_norm", {"x": real(0, 3), "weight": real(3), "bias": real(3), "eps": 1e-5}, [((0, 3), 0), ((0,), 0), ((0,), 0)]),
    ("layer_norm_backward", {"dy": real(0, 3), "x": real(0, 3), "weight": real(3), "mean": double(0), "rstd": real(0)},
     [((0, 3), 0), ((3,), 0), ((3,), 0)]),
    ("layer_norm_backward", {"dy": real(2, 0), "x": real(2, 0), "weight": real(0), "mean": double(2), "rstd": real(2)},
     [((2, 0), 0), ((0,), 0), ((0,), 0)]),
    ("rms_norm", {"x": real(0, 3), "weight": real(3), "eps": 1e-5}, [((0, 3), 0), ((0,), 0)]),
    ("rms_norm_backward", {"dy": real(0, 3), "x": real(0, 3), "weight": real(3), "rstd": real(0)}, [((0, 3), 0), ((3,), 0)]),
    ("activation", {"x": real(0), "kind": "gelu"}, [((0,), 0)]),
    ("activation_backward", {"x": real(2, 0), "dy": real(2, 0), "kind": "silu"}, [((2, 0), 0)]),
    ("add", {"x": real(2, 0), "y": real(2, 0)}, [((2, 0), 0)]),
    ("recurrence", {"x": real(2, 0, 3), "forget": real(2, 0, 3), "state": real(2, 3)}, [((2, 0, 3), 0), ((2, 3), 1)]),
    ("recurrence", {"x": real(2, 4, 0), "forget": real(2, 4, 0), "state": real(2, 0)}, [((2, 4, 0), 0), ((2, 0), 0)]),
    ("rms_norm", {"x": lambda dtype: np.ones((2, 0, 3, 4), dtype).swapaxes(1, 2), "weight": real(4), "eps": 1e-5},
     [((2, 3, 0, 4), 0), ((0,), 0)]),
    ("dropout", {"x": real(0, 4), "p": 0.5, "seed": 1}, [((0, 4), 0)]),
    ("embedding", {"table": real(3, 2), "ids": whole(0)}, [((0, 2), 0)]),
    ("embedding", {"table": real(0, 2), "ids": whole(4, 0)}, [((4, 0, 2), 0)]),
    ("embedding", {"table": real(3, 0), "ids": whole(4)}, [((4, 0), 0)]),
    ("embedding_backward", {"ids": whole(0), "dout": real(0, 2), "dtable": real(3, 2)}, [((3, 2), 1)]),
    ("cross_entropy", {"logits": real(0, 3), "targets": whole(0)}, [((0,), 0), ((0,), 0)]),
    ("cross_entropy", {"logits": real(0, 0), "targets": whole(0)}, [((0,), 0), ((0,), 0)]),
    ("cross_entropy_backward", {"logits": real(0, 3), "targets": whole(0), "lse": double(0), "dlosses": real(0)}, [((0, 3), 0)]),
    ("linear_cross_entropy", {"x": real(0, 3), "weight": real(3, 4), "targets": whole(0)}, [((0,), 0), ((0,), 0)]),
    ("linear_cross_entropy", {"x": real(0, 3), "weight": real(3, 0), "targets": whole(0)}, [((0,), 0), ((0,), 0)]),
    ("linear_cross_entropy", {"x": real(2, 0), "weight": real(0, 1), "targets": whole(2)}, [((2,), 0), ((2,), 0)]),
    ("linear_cross_entropy", {"x": real(2, 0), "weight": real(1, 0), "targets": whole(2), "transposed": True}, [((2,), 0), ((2,), 0)]),
    ("linear_cross_entropy_backward", {"x": real(0, 3), "weight": real(3, 4), "targets": whole(0), "lse": double(0), "dlosses": real(0),
                                       "dweight": real(3, 4), "bias": real(4)}, [((0, 3), 0), ((3, 4), 1), ((4,), 0)]),
    ("linear_cross_entropy_backward", {"x": real(0, 3), "weight": real(0, 3), "targets": whole(0), "lse": double(0), "dlosses": real(0),
                                       "dweight": real(0, 3), "bias": real(0), "transposed": True}, [((0, 3), 0), ((0, 3), 0), ((0,), 0)]),
    ("linear_cross_entropy_backward", {"x": real(2, 0), "weight": real(0, 1), "targets": whole(2), "lse": double(2), "dlosses": real(2),
                                       "dweight": real(0, 1)}, [((2, 0), 0), ((0, 1), 0)]),
    ("adamw", {"param": real(0), "grad": real(0), "m": real(0), "v": real(0), "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8,
               "weight_decay": 0.0, "step": 1}, [((0,), 0)] * 3),
    ("sum_of_squares", {"x": real(0)}, [((), 0)]),
    ("sum_of_squares", {"x": real(3, 0)}, [((), 0)]),
    ("sinusoidal_positions", {"n": 0, "d_model": 4}, [((0, 4), 0)]),
    ("sinusoidal_positions", {"n": 4, "d_model": 0}, [((4, 0), 0)]),
    ("rotary", {"x": real(1, 2, 0, 4), "positions": whole(0), "frequencies": np.ones(2)}, [((1, 2, 0, 4), 0)]),
    ("rotary", {"x": real(1, 2, 3, 0), "positions": whole(3), "frequencies": np.ones(0)}, [((1, 2, 3, 0), 0)]),
    ("rotary", {"x": real(0, 2, 3, 4), "positions": whole(0, 3), "frequencies": np.ones(2)}, [((0, 2, 3, 4), 0)]),
    ("search", {"queries": real(0, 2, 3), "bank": real(0, 4, 3), "k": 2}, [((0, 2, 2), 0), ((0, 2, 2), 0)]),
    ("search", {"queries": real(1, 0, 3), "bank": real(1, 4, 3), "k": 2}, [((1, 0, 2), 0), ((1, 0, 2), 0)]),
    ("search", {"queries": real(1, 2, 3), "bank": real(1, 0, 3), "k": 2}, [((1, 2, 2), -np.inf), ((1, 2, 2), -1)]),
    ("search", {"queries": real(1, 2, 3), "bank": real(1, 4, 3), "k": 0}, [((1, 2, 0), 0), ((1, 2, 0), 0)]),
    ("search", {"queries": real(1, 2, 0), "bank": real(1, 4, 0), "k": 1}, [((1, 2, 1), 0), ((1, 2, 1), 0)]),
    ("attention", {"q": real(1, 2, 3, 4), "blocks": lambda dtype: [], "scale": 1.0}, [((1, 2, 3, 4), 0), ((1, 2, 3), -np.inf)]),
    ("attention", {"q": real(1, 2, 3, 4), "blocks": a_block((1, 2, 0, 4)), "scale": 1.0}, [((1, 2, 3, 4), 0), ((1, 2, 3), -np.inf)]),
    ("attention", {"q": real(1, 2, 0, 4), "blocks": a_block((1, 2, 3, 4)), "scale": 1.0}, [((1, 2, 0, 4), 0), ((1, 2, 0), 0)]),
    ("attention", {"q": real(0, 2, 3, 4), "blocks": a_block((0, 2, 3, 4)), "scale": 1.0}, [((0, 2, 3, 4), 0), ((0, 2, 3), 0)]),
    ("attention", {"q": real(1, 0, 3, 4), "blocks": a_block((1, 0, 3, 4)), "scale": 1.0}, [((1, 0, 3, 4), 0), ((1, 0, 3), 0)]),
    ("attention", {"q": real(1, 2, 3, 0), "blocks": a_block((1, 1, 1, 0)), "scale": 1.0}, [((1, 2, 3, 0), 0), ((1, 2, 3), 0)]),
    ("attention", {"q": real(1, 1, 2, 4), "blocks": a_block((1, 1, 5, 4), index=whole(1, 1, 2, 0)), "scale": 1.0},
     [((1, 1, 2, 4), 0), ((1, 1, 2), -np.inf)]),
    ("attention", {"q": real(1, 1, 2, 4), "blocks": a_block((1, 1, 0, 4), bias=real(0), valid=truth(1, 0), lengths=whole(1)), "scale": 1.0},
     [((1, 1, 2, 4), 0), ((1, 1, 2), -np.inf)]),
    ("attention_backward", {"dout": real(1, 2, 3, 4), "out": real(1, 2, 3, 4), "lse": lambda dtype: np.full((1, 2, 3), -np.inf),
                            "q": real(1, 2, 3, 4), "blocks": a_block((1, 2, 0, 4)), "scale": 1.0},
     [((1, 2, 3, 4), 0), ((1, 2, 0, 4), 0), ((1, 2, 0, 4), 0)]),
    ("attention_backward", {"dout": real(1, 2, 0, 4), "out": real(1, 2, 0, 4), "lse": double(1, 2, 0), "q": real(1, 2, 0, 4),
                            "blocks": a_block((1, 2, 3, 4)), "scale": 1.0}, [((1, 2, 0, 4), 0), ((1, 2, 3, 4), 0), ((1, 2, 3, 4), 0)]),
    ("attention_backward", {"dout": real(1, 2, 3, 4), "out": real(1, 2, 3, 4), "lse": lambda dtype: np.full((1, 2, 3), -np.inf),
                            "q": real(1, 2, 3, 4), "blocks": lambda dtype: [], "scale": 1.0}, [((1, 2, 3, 4), 0)]),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, expected", EMPTY, ids=[f"{name}{i}" for i, (name, _, _) in enumerate(EMPTY)])
def test_empty_arrays(core, dtype, name, arguments, expected):
    made = {key: value(dtype) if callable(value) else value for key, value in arguments.items()}
    results = call(core, name, made)
    arrays = [np.asarray(x) for x in arrays_in(results) or results][: len(expected)]
    assert [x.shape for x in arrays] == [shape for shape, _ in expected]
    for array, (_, value) in zip(arrays, expected, strict=True):
        assert (array == value).all()
