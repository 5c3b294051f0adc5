"""What the tests share: the one measure of closeness, the numbers it rests on, and arrays in every memory layout."""

import os
import subprocess
import sys

import numpy as np
from hypothesis import settings

# c of the bound c * sqrt(k) * eps * max|terms|, for each operation: about twice the largest seen over ten times the usual
# number of examples, in float32 and float64, by the twins and the kernels. A kernel that needs a larger one has become
# less accurate: find out why before changing the number.
C = {
    "activation": 4.0,
    "activation_backward": 3.0,
    "adamw": 4.0,
    "attention": 1.0,  # weights are relative to a power of two near the largest score: none is exactly 1
    "attention_backward": 2.0,  # one key: 0, of the difference of two products rounded apart, has been seen at 1.27
    "attention_mass": 3.0,
    "cross_entropy": 2.5,
    "cross_entropy_backward": 1.0,
    "dropout": 2.5,
    "embedding_backward": 3.0,
    "gemm": 6.0,
    "layer_norm": 1.0,
    "layer_norm_backward": 2.5,
    "linear_cross_entropy": 2.5,
    "linear_cross_entropy_backward": 1.0,
    "linear_top_k": 6.0,
    "log_softmax": 1.5,
    "lse": 1.5,
    "packed_linear": 6.0,
    "recurrence": 4.0,
    "rms_norm": 2.5,
    "rms_norm_backward": 0.8,
    "rotary": 3.5,
    "search": 1.5,
    "sinusoidal_positions": 1.5,
    "softmax": 2.0,
    "softmax_backward": 1.5,
    "sum_of_squares": 2.0,
}


def assert_close(actual, expected, operation, *, k=1, terms=None, dtype=None):
    """|actual - expected| <= C[operation] * sqrt(k) * eps * max|terms|, and the same NaN and infinities.

    actual    an array of the kernel's dtype, whose eps counts; a Python float is float64
    expected  float64, of the same shape
    k         how many rounded terms enter one element (a number, or an array that broadcasts)
    terms     their largest magnitude (the same); None: |expected|
    dtype     of `actual`, when the test knows it
    """
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert dtype is None or actual.dtype == dtype, f"dtype {actual.dtype}, expected {dtype}"
    info = np.finfo(actual.dtype)
    with np.errstate(over="ignore"):
        rounded = expected.astype(actual.dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, rounded), err_msg="NaN and infinities")
    assert np.isfinite(actual[finite]).all(), "not finite where it should be"
    terms = np.abs(expected) if terms is None else np.asarray(terms, np.float64)
    unit = np.broadcast_to(np.sqrt(k) * info.eps * terms, expected.shape)[finite]
    error = np.abs(actual[finite].astype(np.float64) - expected[finite])
    # A result below the smallest normal number may be flushed to zero.
    wrong = error > C[operation] * unit + 1.5 * info.tiny
    if wrong.any():
        needed = np.max(error[wrong] / np.maximum(unit[wrong], info.tiny))
        raise AssertionError(f"{operation}: {wrong.sum()} of {wrong.size} out of bounds: c would be {needed:.3g}, it is {C[operation]}")


def assert_same_bits(actual, expected):
    """The same shapes, dtypes and bytes, through nested lists and tuples; NaN equals a NaN of the same bits."""
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
    elif isinstance(expected, np.ndarray):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert actual.tobytes() == expected.tobytes(), f"{(actual != expected).sum()} of {actual.size} values differ"
    else:
        assert actual == expected or (actual != actual and expected != expected)


def examples(share=1.0):
    """Hypothesis settings with a share of the profile's examples, at least one."""
    return settings(max_examples=max(1, int(settings.default.max_examples * share)))


LAYOUTS = ("contiguous", "transposed", "sliced", "reversed", "unaligned")


def laid_out(x, layout):
    """An array equal to `x`, lying in memory as `layout` says."""
    if layout == "transposed":
        return x.T.copy().T
    if layout == "sliced":
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype) if x.ndim else x.copy()
        if x.ndim:
            wide[..., 1::2] = x
            wide = wide[..., 1::2]
        return wide
    if layout == "reversed":
        return np.flip(np.flip(x).copy()) if x.ndim else x.copy()
    if layout == "unaligned":
        shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        shifted[...] = x
        return shifted
    return x.copy()


def in_a_process(program, *arguments, check=True, timeout=300, **environment):
    """Runs a Python program in a new interpreter, where warnings are errors: the finished process, text in its stdout.

    `check`: it is a failure of the test, with what the program wrote to stderr, if the program fails.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "error", **environment}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 or not check, done.stderr
    return done
