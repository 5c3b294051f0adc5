"""One ordinary call of every kernel, for what holds of all of them: the same bits, untouched inputs, refused arguments.

A sample is a dict from argument to value, in the order of the signature. `big=True` is large enough to be worth several
threads and has several pieces of work, none of a round size.
"""

from dataclasses import fields
from functools import cache

import numpy as np
from core.attention_cases import drawn_case
from core.cases import Values

from mini_tfm import _core
from mini_tfm.reference import Block, PackedWeight

# What a call changes; everything else that it is given stays as it is.
WITH_OUT = (
    "activation", "activation_backward", "layer_norm", "layer_norm_backward", "log_softmax", "rms_norm", "rms_norm_backward", "softmax",
    "softmax_backward",
)  # fmt: skip
IN_PLACE = {
    "linear_cross_entropy_backward": ("dweight",),
    "gemm": ("out",),
    "packed_linear": ("out",),
    "embedding_backward": ("dtable",),
    "adamw": ("param", "m", "v"),
    "keep_rows": ("store",),
    "recurrence": ("state",),
    **dict.fromkeys(WITH_OUT, ("out",)),
}
SETTINGS = {"set_num_threads", "get_num_threads", "show_config"}
IN_NUMPY = {"encode_rows"}  # for every instruction set; test_search.py has its tests


def sample(name, dtype, layout="contiguous", big=False, seed=0):
    """The arguments, freshly made; `layout` is that of everything that is not changed in place."""
    values, plain, doubles = Values(seed, dtype, layout), Values(seed + 1, dtype), Values(seed + 2, "float64", layout)
    n, d = (601, 517) if big else (7, 5)
    n_classes, out, flat = 1301 if big else 5, np.ones((n, d), dtype), n * d
    adam = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "step": 3, "grad_scale": 0.5}
    smoothing = {"ignore_index": -100, "label_smoothing": 0.1}
    batch, heads, length, source, head = (2, 4, 140, 160, 24) if big else (2, 4, 5, 6, 8)
    # Drawn when a kernel asks for them: most take a few.
    x, dy = cache(lambda: values.real(n, d)), cache(lambda: values.real(n, d))
    rows, weight, targets = (lambda: values.real(n)), (lambda: values.real(d)), (lambda: values.integers(0, d, n))
    weights, classes = cache(lambda: values.real(n_classes, d, scale=0.1)), (lambda: values.integers(0, n_classes, n))
    bias = cache(lambda: values.real(n_classes))
    q, case = cache(lambda: values.real(batch, heads, length, head)), cache(lambda: case_of(values, batch, heads, length, source, head))

    def output_layer():
        return {"bias": bias(), "transposed": True, **smoothing, "chunk": 500 if big else 2, "bfloat16": False}

    def lse_of_classes():
        return np.log(np.exp((x() @ weights().T + bias()).astype(np.float64)).sum(1))

    samples = {
        "activation": lambda: {"x": x(), "kind": "gelu", "out": out},
        "activation_backward": lambda: {"x": x(), "dy": dy(), "kind": "gelu_tanh", "out": out},
        "adamw": lambda: {
            "param": plain.real(flat), "grad": values.real(flat), "m": plain.real(flat), "v": plain.positive(flat), **adam
        },
        "add": lambda: {"x": x(), "y": dy()},
        "attention": lambda: {"q": q(), "blocks": case().blocks, "scale": 0.3, "dropout": 0.2, "seed": 5, "cap": 9.0},
        "attention_mass": lambda: {
            "q": q(), "block": case().blocks[0], "lse": doubles.real(batch, heads, length) + 5, "scale": 0.3,
            "asking": values.mask(batch, length), "cap": 9.0,
        },
        "attention_backward": lambda: attention_backward(case(), q(), values),
        "cross_entropy": lambda: {"logits": x(), "targets": targets(), **smoothing},
        "cross_entropy_backward": lambda: {
            "logits": x(), "targets": targets(), "lse": np.log(np.exp(x().astype(np.float64)).sum(1)), "dlosses": rows(), **smoothing
        },
        "linear_cross_entropy": lambda: {"x": x(), "weight": weights(), "targets": classes(), **output_layer()},
        "linear_cross_entropy_backward": lambda: {
            "x": x(), "weight": weights(), "targets": classes(), "lse": lse_of_classes(), "dlosses": rows(),
            "dweight": plain.real(*weights().shape), **output_layer(),
        },
        "dropout": lambda: {"x": x(), "p": 0.3, "seed": 12},
        "embedding": lambda: {"table": x(), "ids": values.integers(0, n, d, 3)},
        "embedding_backward": lambda: {"ids": values.integers(0, 50, 3, n), "dout": values.real(3, n, d), "dtable": plain.real(50, d)},
        "gemm": lambda: {"a": x(), "b": dy(), "trans_a": False, "trans_b": True, "out": plain.real(n, n), "accumulate": True, "bias": None,
                 "bfloat16": False},
        "keep_rows": lambda: {"store": plain.real(batch, heads, length + 3, head), "at": 2, "rows": q()},
        "layer_norm": lambda: {"x": x(), "weight": weight(), "bias": values.real(d), "eps": 1e-5, "out": out},
        "layer_norm_backward": lambda: {
            "dy": dy(), "x": x(), "weight": weight(), "mean": doubles.real(n), "rstd": values.positive(n), "out": out
        },
        "linear_top_k": lambda: {"x": x(), "weight": packed(plain, dtype, d), "k": 5, "bias": values.real(D_OUT), "lse": True},
        "log_softmax": lambda: {"x": x(), "out": out},
        "pack": lambda: {"weight": x(), "dtype": np.dtype(dtype).name, "transposed": False, "gate": dy(), "group": None},
        "packed_linear": lambda: {
            "x": x(), "weight": packed(plain, dtype, d, gated=True), "bias": values.real(D_OUT), "gate_bias": values.real(D_OUT),
            "activation": "silu", "residual": values.real(n, D_OUT), "out": plain.real(n, D_OUT)
        },
        "recurrence": lambda: {
            "x": values.real(batch, length, d), "forget": values.real(batch, length, d), "state": plain.real(batch, d)
        },
        "repack": lambda: {"values": x(), "scales": None, "gate": dy(), "gate_scales": None, "group": None},
        "rms_norm": lambda: {"x": x(), "weight": weight(), "eps": 1e-6, "out": out},
        "rms_norm_backward": lambda: {"dy": dy(), "x": x(), "weight": weight(), "rstd": values.positive(n), "out": out},
        "rotary": lambda: {
            "x": q(), "positions": values.integers(0, 999, length), "frequencies": 10000.0 ** -np.arange(0, 1, 2 / head),
            "inverse": False,
        },
        "search": lambda: {
            "queries": values.real(2, n // 4 + 1, 16), "bank": values.real(2, n, 16), "k": 5, "valid": values.mask(2, n),
            "scales": None, "codes": None,
        },
        "sinusoidal_positions": lambda: {"n": n, "d_model": d, "dtype": np.dtype(dtype)},
        "softmax": lambda: {"x": x(), "out": out},
        "softmax_backward": lambda: {"y": x(), "dy": dy(), "out": out},
        "sum_of_squares": lambda: {"x": x()},
        "checksum": lambda: {"x": x()},
    }  # fmt: skip
    return samples[name]()


def case_of(values, batch, heads, length, source, head):
    """A block with a distance bias, one that masks, one with an index."""
    case = drawn_case("distance bias", values, batch, heads, 2, length, source, head)
    case.blocks += [
        Block(values.real(batch, 2, source, head), values.real(batch, 2, source, head), valid=values.mask(batch, source),
              lengths=values.integers(1, source, batch), causal=True, offset=3, window=40),
        Block(values.real(batch, 4, source, head), values.real(batch, 4, source, head),
              index=values.integers(-1, source, batch, heads, length, 3)),
    ]  # fmt: skip
    case.biases += [None, None]
    return case


NAMES = (
    "activation", "activation_backward", "adamw", "add", "attention", "attention_backward", "attention_mass", "checksum", "cross_entropy",
    "cross_entropy_backward",
    "dropout", "embedding", "embedding_backward", "gemm", "keep_rows", "layer_norm", "layer_norm_backward", "linear_cross_entropy",
    "linear_cross_entropy_backward", "linear_top_k", "log_softmax", "pack", "packed_linear", "recurrence", "repack", "rms_norm",
    "rms_norm_backward", "rotary",
    "search", "sinusoidal_positions", "softmax", "softmax_backward", "sum_of_squares",
)  # fmt: skip


def attention_backward(case, q, values):
    """`out` and `lse` are those of the forward: a backward from made-up ones would be of no softmax."""
    case.ask_for_dbias(lambda shape: np.zeros(shape, q.dtype))
    drops = {"dropout": 0.2, "seed": 5, "cap": 9.0}
    out, lse = _core.attention(q, case.blocks, 0.3, **drops)
    needs = [True] * len(case.blocks)
    return {"dout": values.real(*q.shape), "out": out, "lse": lse, "q": q, "blocks": case.blocks, "scale": 0.3, "needs": needs, **drops}


D_OUT = 77  # of the packed weights: some panels and a tail


def packed(values, dtype, d_in, gated=False):
    gate = values.real(d_in, D_OUT) if gated else None
    return _core.pack(values.real(d_in, D_OUT), dtype=np.dtype(dtype).name, gate=gate)


def arrays_in(value):
    """Every array in a sample or a result, in order."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, PackedWeight):
        value = value.unpack() if value.gated else [value.unpack()]
    if isinstance(value, Block):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [array for part in value for array in arrays_in(part)] if isinstance(value, (list, tuple)) else []


def call(core, name, arguments):
    """Everything that the call gives: what it returns, and what it changed in place."""
    returned = getattr(core, name)(**arguments)
    if isinstance(returned, PackedWeight):
        returned = arrays_in(returned)
    changed = [arguments[argument] for argument in IN_PLACE.get(name, ()) if argument in arguments]
    return [returned, *changed] if returned is not None else changed
