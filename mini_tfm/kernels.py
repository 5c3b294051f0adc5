"""The kernels as plain functions: NumPy in, NumPy out.

A thin, friendly face of the compiled layer (`mini_tfm._core`, which says what it promises): arguments that a user leaves
out are filled in, array-likes become arrays, one block of keys and values is made from `k` and `v`. Reals are float32 or
float64 and all of one dtype; what is neither, a list of Python floats for one, becomes float32.
"""

from __future__ import annotations

import dataclasses
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


def attention(
    q, k, v, *, bias=None, causal=False, window=None, lengths=None, scale=None, mask=None, offset=None, cap=None, return_weights=False
):
    """Scaled dot-product attention: softmax(scale * q k^T + bias) v, without a (T, S) matrix in memory.

    Args:
        q: (B, H, T, D) queries.
        k: (B, Hkv, S, D) keys; Hkv divides H, and head h reads kv head h // (H // Hkv).
        v: (B, Hkv, S, Dv) values. q, k and v may have any strides if a row of D lies together; the result is laid out as q is. A Dv
            other than D costs copies: what is narrower is widened with zeros.
        bias: added to the scores, broadcastable to (B, H, T, S); read where it lies and never expanded, so a view of any
            strides costs nothing. -inf hides a key, whatever it and its value hold.
        causal: query i sees key j only if j <= i + offset.
        window: a positive int; query i then sees only keys with j > i + offset - window, and, unless causal, with
            j < i + offset + window. None: no limit.
        lengths: (B,) integers from 0 to S: keys from there on are hidden in that row. None: all S are there.
        scale: None is 1 / sqrt(D).
        mask: bool, broadcastable to (B, H, T, S): True where a key is seen, as in PyTorch. It costs a bias of its size.
        offset: where query i stands among the keys, with causal or window. None: S - T, the last query stands at the last key.
        cap: from 0.001 to 1e6; a score is then cap * tanh(score / cap), before the bias is added (arXiv 2408.00118, section 2).
        return_weights: the weights (B, H, T, S) are returned, too, rows that add up to 1, or 0 where a query sees no key. It is for
            looking at small examples: it costs S / D times as much again.

    Returns:
        (B, H, T, Dv), of q's dtype; with return_weights a pair of it and the weights. A query that sees no key gets zeros. NaN
        reaches the queries that see it, no others.

    Raises:
        InvalidValue, InvalidType: naming the argument, what was expected and what came.

    The function is arXiv 1706.03762 eq. 1 without the projections; the method, blocks and an online softmax, is
    arXiv 2205.14135 and 1805.02867. The result has the same bits for any number of threads, and a batch row the same
    bits whatever the other rows are.
    """
    q, k, v = _real("q", q), _real("k", k), _real("v", v)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.ndim and q.shape[-1] else 1.0
    if offset is not None and not causal and window is None:
        raise InvalidValue(f"offset: expected None without causal or window, for nothing else asks where a query stands, got {offset!r}")
    bias = None if bias is None else _real("bias", bias)
    if mask is not None:
        bias = _hiding(mask, bias, q, (*q.shape[:3], *k.shape[2:3]))
    lengths = None if lengths is None else _integers("lengths", lengths)
    block = _core.Block(k, v, bias=bias, causal=causal, window=window, lengths=lengths, offset=offset)
    try:
        out = _of_any_width(q, block, scale, cap)
        return (out, weights_of(q, block, scale, cap)) if return_weights else out
    except (InvalidValue, InvalidType) as error:
        # The core speaks of blocks; here there is one, and its fields are our arguments.
        raise type(error)(str(error).replace("blocks[0].", "")) from None


def _hiding(mask: Any, bias: np.ndarray | None, q: np.ndarray, scores: tuple[int, ...]) -> np.ndarray:
    """A bias, broadcastable as both are, that is -inf where the mask is False."""
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise InvalidType(f"mask: expected an array of bool, True where a key is seen, got {_kind_of(mask)}; scores are added by bias")
    try:
        np.broadcast_shapes(mask.shape, scores)
        return np.where(mask, q.dtype.type(0) if bias is None else bias, q.dtype.type(-np.inf))
    except ValueError:
        raise InvalidValue(f"mask: expected an array broadcastable to {scores}, got shape {mask.shape}") from None


def _of_any_width(q: np.ndarray, block: _core.Block, scale: float, cap: float | None) -> np.ndarray:
    """Attention with values (B, Hkv, S, Dv). Columns of zeros change neither a score nor, cut off again, a result."""
    k, v = block.k, block.v
    if not (q.ndim == k.ndim == v.ndim == 4) or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3] or v.shape[3] == k.shape[3]:
        return _core.attention(q, [block], scale, cap=cap)[0]  # what does not fit is told there
    width = max(q.shape[3], v.shape[3])
    wide = dataclasses.replace(block, k=_widened(k, width), v=_widened(v, width))
    return _core.attention(_widened(q, width), [wide], scale, cap=cap)[0][..., : v.shape[3]]


def _widened(x: np.ndarray, width: int) -> np.ndarray:
    return x if x.shape[3] == width else np.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))


def weights_of(q: np.ndarray, block: _core.Block, scale: float, cap: float | None) -> np.ndarray:
    """The weights (B, H, T, S): what attention makes of values of which each is 1 in a column of its own, some columns at a time."""
    batch, kv_heads, source, _ = block.k.shape
    weights, some = np.zeros((*q.shape[:3], source), q.dtype), max(q.shape[3], 1)
    for at in range(0, source, some):
        one = np.eye(source, min(some, source - at), -at, dtype=q.dtype)
        own = dataclasses.replace(block, v=np.broadcast_to(one, (batch, kv_heads, *one.shape)))
        weights[..., at : at + some] = _of_any_width(q, own, scale, cap)
    return weights


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
