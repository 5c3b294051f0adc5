"""The kernels as plain functions: NumPy in, NumPy out.

A thin, friendly face of the compiled layer (`mini_tfm._core`, which says what it promises): arguments that a user leaves
out are filled in, array-likes become arrays, one block of keys and values is made from `k` and `v`. Reals are float32 or
float64 and all of one dtype; what is neither, a list of Python floats for one, becomes float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mini_tfm import _core
from mini_tfm.errors import InvalidType, InvalidValue

__all__ = ["attention", "get_num_threads", "set_num_threads", "show_config", "sinusoidal_positions", "softmax"]

_REALS = (np.dtype("float32"), np.dtype("float64"))


def _real(name: str, x: Any) -> np.ndarray:
    """An array of float32 or float64; other numbers become float32, arrays of half precision too."""
    if isinstance(x, np.ndarray) and x.dtype in _REALS:
        return x
    try:
        converted = np.asarray(x)
        if converted.dtype.kind not in "fiu":
            raise TypeError
        return converted.astype(np.float32)
    except (TypeError, ValueError):
        raise InvalidType(f"{name}: expected an array of real numbers, got {_kind_of(x)}") from None


def _kind_of(x: Any) -> str:
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__


def _integers(name: str, x: Any) -> np.ndarray:
    try:
        converted = np.asarray(x)
        if converted.dtype.kind not in "iu" and converted.size:
            raise TypeError
        return converted.astype(np.int64)
    except (TypeError, ValueError):
        raise InvalidType(f"{name}: expected an array of integers, got {_kind_of(x)}") from None


def attention(q, k, v, *, bias=None, causal=False, window=None, lengths=None, scale=None):
    """Scaled dot-product attention: softmax(scale * q k^T + bias) v, without a (T, S) matrix in memory.

    Args:
        q: (B, H, T, D) queries.
        k: (B, Hkv, S, D) keys; Hkv divides H, and head h reads kv head h // (H // Hkv).
        v: (B, Hkv, S, D) values. q, k and v may have any strides if a row of D lies together; the result is laid out as q is.
        bias: added to the scores, broadcastable to (B, H, T, S); read where it lies and never expanded, so a view of any
            strides costs nothing. -inf hides a key.
        causal: query i sees key j only if j <= i + S - T: the last query sees the last key.
        window: a positive int; query i then sees only keys with j > i + S - T - window, and, unless causal, with
            j < i + S - T + window. None: no limit.
        lengths: (B,) integers from 0 to S: keys from there on are hidden in that row. None: all S are there.
        scale: None is 1 / sqrt(D).

    Returns:
        (B, H, T, D), of q's dtype. A query that sees no key gets zeros. NaN reaches the queries that see it, no others.

    Raises:
        InvalidValue, InvalidType: naming the argument, what was expected and what came.

    The function is arXiv 1706.03762 eq. 1 without the projections; the method, blocks and an online softmax, is
    arXiv 2205.14135 and 1805.02867. The result has the same bits for any number of threads, and a batch row the same
    bits whatever the other rows are.
    """
    q, k, v = _real("q", q), _real("k", k), _real("v", v)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.ndim and q.shape[-1] else 1.0
    block = _core.Block(
        k,
        v,
        bias=None if bias is None else _real("bias", bias),
        causal=causal,
        window=window,
        lengths=None if lengths is None else _integers("lengths", lengths),
    )
    try:
        return _core.attention(q, [block], scale)[0]
    except (InvalidValue, InvalidType) as error:
        # The core speaks of blocks; here there is one, and its fields are our arguments.
        raise type(error)(str(error).replace("blocks[0].", "")) from None


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis of x (..., d) with d any size, of x's dtype and shape.

    A row that is all -inf gives zeros; a row with NaN or +inf gives NaN. Raises InvalidValue for an array without axes,
    InvalidType for what is not real numbers.
    """
    return _core.softmax(_real("x", x))


def sinusoidal_positions(n, d_model):
    """The positional table of arXiv 1706.03762 section 3.5: (n, d_model) float32.

    Row p holds sin(p / 10000^(2i / d_model)) at column 2i and the cosine of the same at column 2i + 1, computed in
    double. An odd d_model ends with a sine, of which the paper says nothing. Raises InvalidValue for a negative size,
    InvalidType for what is not an integer.
    """
    return _core.sinusoidal_positions(n, d_model)


def set_num_threads(n):
    """Kernels use up to n threads from now on, in this process; results do not depend on it. n from 1 to 4096.

    At import it is OMP_NUM_THREADS, or else the processors that the process may use, within its cgroup's quota. Raises
    InvalidValue, InvalidType.
    """
    _core.set_num_threads(n)


def get_num_threads():
    """How many threads kernels use: 1 in a build without OpenMP and in a forked child, where OpenMP's threads are gone."""
    return _core.get_num_threads()


def show_config():
    """Prints what computes here: version, instruction set in use, those that run here and those built in, OpenMP, threads,
    compiler, and the versions of NumPy and Python."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("mini-tfm")
    except PackageNotFoundError:
        ours = "not installed"
    config = _core.show_config()
    rows = {
        "mini_tfm": ours,
        "instruction set": config["isa"] + (", emulated: for tests alone" if config["isa"] in config["emulated"] else ""),
        "run here": f"{', '.join(config['isas'])} (MINI_TFM_ISA chooses)",
        "built in": ", ".join(config["isas_built"]),
        "OpenMP": "yes" if config["openmp"] else "no",
        "threads": config["num_threads"],
        "compiler": config["compiler"] or "none",
        "NumPy": np.__version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
    }
    for name, value in rows.items():
        print(f"{name + ':':17}{value}")
