"""What every kernel checks before it computes, shared by the compiled door and its NumPy twins.

A fact about an argument is stated once, here, so that the two implementations refuse the same inputs with the
same words. Every function returns the value in the form the kernels want (C-contiguous, plain ndarray) or raises
`InvalidType` (not an array, wrong dtype) or `InvalidValue` (rank, shape, range), naming the argument, what was
expected and what came.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np

from mini_tfm.errors import InvalidType, InvalidValue, shown
from mini_tfm.reference.types import Block, PackedWeight, kept_width

FLOAT32, FLOAT64, INT64, BOOL = np.dtype("float32"), np.dtype("float64"), np.dtype("int64"), np.dtype("bool")
FLOAT16, INT8, UINT8, UINT16 = np.dtype("float16"), np.dtype("int8"), np.dtype("uint8"), np.dtype("uint16")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def _shape_text(shape) -> str:
    """(2, None) -> '(2, any)'."""
    return "(" + ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def _array(name, x, dtypes, shape, ndim, min_ndim):
    if not isinstance(x, np.ndarray):
        raise InvalidType(f"{name}: expected a NumPy array of {' or '.join(map(str, dtypes))}, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise InvalidType(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if shape is not None:
        if len(shape) != x.ndim or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
            raise InvalidValue(f"{name}: expected shape {_shape_text(shape)}, got {x.shape}")
    elif ndim is not None and x.ndim != ndim:
        raise InvalidValue(f"{name}: expected {ndim} dimensions, got {x.ndim} (shape {x.shape})")
    elif x.ndim < min_ndim:
        raise InvalidValue(f"{name}: expected at least {min_ndim} dimensions, got {x.ndim} (shape {x.shape})")


def _contiguous(x):
    """A plain C-contiguous, aligned array with the same values: `x` itself when it is one already."""
    return np.require(np.asarray(x), requirements="CA")


def real(name, x, *, like=None, shape=None, ndim=None, min_ndim=0):
    """A float32 or float64 array; of `like`'s dtype when given. Strided input is copied to contiguous."""
    _array(name, x, (FLOAT32, FLOAT64) if like is None else (like.dtype,), shape, ndim, min_ndim)
    flags = x.flags
    return x if type(x) is np.ndarray and flags.c_contiguous and flags.aligned else _contiguous(x)


def double(name, x, *, shape):
    """A float64 array, whatever the others' dtype: what a forward gives its backward without rounding."""
    _array(name, x, (FLOAT64,), shape, None, 0)
    return _contiguous(x)


def heads_real(name, x, *, like=None, shape=None, ndim=4, or_kept=False):
    """A real array (B, H, N, D) whose rows of D may lie anywhere; where they are not whole it is copied to contiguous.

    or_kept: where `like` is of float32, one of uint16 or int8 may stand for it, see kept.py.
    """
    dtypes = (FLOAT32, FLOAT64) if like is None else (like.dtype,)
    _array(name, x, (*dtypes, UINT16, INT8) if or_kept and dtypes == (FLOAT32,) else dtypes, shape, ndim, 0)
    whole = x.shape[-1] <= 1 or x.strides[-1] == x.itemsize
    kept = type(x) is np.ndarray and x.flags.aligned and whole and not any(stride % x.itemsize for stride in x.strides)
    return x if kept else _contiguous(x)


def strided_real(name, x, *, like):
    """A real array whose strides are kept, whatever they are (zero, negative, overlapping)."""
    _array(name, x, (like.dtype,), None, None, 0)
    if any(stride % x.itemsize for stride in x.strides) or not x.flags.aligned:
        raise InvalidValue(f"{name}: expected strides that are multiples of {x.itemsize} bytes, got {x.strides}")
    return np.asarray(x)


def output(name, x, *, like, shape=None, ndim=None, apart_from=()):
    """An array written in place: it must be writeable, contiguous and apart from the inputs, for a copy would lose the result."""
    _array(name, x, (like.dtype,), shape, ndim, 0)
    if not (x.flags.c_contiguous and x.flags.aligned):
        raise InvalidValue(f"{name}: expected a C-contiguous array (it is written in place), got strides {x.strides}")
    if not x.flags.writeable:
        raise InvalidValue(f"{name}: expected a writeable array, got a read-only one")
    for other_name, other in apart_from:
        # For contiguous arrays the bounds test is exact.
        if np.may_share_memory(x, other):
            raise InvalidValue(f"{name}: expected memory of its own, got an array that overlaps {other_name}")
    return x


def optional_output(out, like, *inputs):
    """`out` when it is an array of `like`'s shape apart from the inputs (name, array); None when it is None."""
    return None if out is None else output("out", out, like=like, shape=like.shape, apart_from=inputs)


def into(out, value):
    """`value`, in `out` when there is one."""
    if out is None:
        return value
    out[...] = value
    return out


def integers(name, x, *, shape=None, ndim=None, low=None, high=None, also=None):
    """An int64 array with every value in [low, high), or equal to `also`."""
    _array(name, x, (INT64,), shape, ndim, 0)
    x = _contiguous(x)
    if x.size and low is not None:
        smallest, largest = int(x.min()), int(x.max())
        if smallest < low or largest >= high:
            bad = (x < low) | (x >= high)
            if also is not None:
                bad &= x != also
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                but = "" if also is None else f" (or {also})"
                raise InvalidValue(f"{name}: expected values from {low} to {high - 1}{but}, got {int(x[where])} at {where}")
    return x


def mask(name, x, *, shape):
    """A bool array."""
    _array(name, x, (BOOL,), shape, None, 0)
    return _contiguous(x)


def integer(name, x, *, low, high=None):
    """A Python int in [low, high]; booleans and floats are refused."""
    if type(x) is not int and (isinstance(x, (bool, np.bool_)) or not isinstance(x, Integral)):
        raise InvalidType(f"{name}: expected an integer, got {type(x).__name__}")
    x = int(x)
    if x < low or (high is not None and x > high):
        raise InvalidValue(f"{name}: expected an integer {f'from {low} to {high}' if high is not None else f'>= {low}'}, got {shown(x)}")
    return x


def number(name, x, *, low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """A finite Python float in the interval."""
    if type(x) is not float and (isinstance(x, (bool, np.bool_)) or not isinstance(x, Real)):
        raise InvalidType(f"{name}: expected a number, got {type(x).__name__}")
    try:
        x = float(x)
    except OverflowError:
        raise InvalidValue(f"{name}: expected a number that a float can hold, got {shown(x)}") from None
    inside = (x > low if open_low else x >= low) and (x < high if open_high else x <= high)
    if not (math.isfinite(x) and inside):
        bounds = f"{'(' if open_low or low == -math.inf else '['}{low}, {high}{')' if open_high or high == math.inf else ']'}"
        raise InvalidValue(f"{name}: expected a finite number in {bounds}, got {x}")
    return x


def flag(name, x):
    """True or False, not something that happens to be truthy."""
    if x is not True and x is not False and not isinstance(x, np.bool_):
        raise InvalidType(f"{name}: expected True or False, got {type(x).__name__}")
    return bool(x)


# One function a kernel: everything it takes, checked, in its own order.


def gemm(a, b, trans_a, trans_b, out, accumulate, bias):
    trans_a, trans_b, accumulate = flag("trans_a", trans_a), flag("trans_b", trans_b), flag("accumulate", accumulate)
    a = real("a", a, ndim=2)
    b = real("b", b, like=a, ndim=2)
    m, k = a.shape[::-1] if trans_a else a.shape
    k_b, n = b.shape[::-1] if trans_b else b.shape
    if k != k_b:
        raise InvalidValue(
            f"b: expected {k} {'columns' if trans_b else 'rows'} to match a of shape {a.shape} (trans_a={trans_a}), "
            f"got shape {b.shape} (trans_b={trans_b})"
        )
    if bias is not None:
        bias = real("bias", bias, like=a, shape=(n,))
        if accumulate:
            raise InvalidValue("bias: expected None, as the product is added to out (accumulate=True), got an array")
    if out is None:
        if accumulate:
            raise InvalidValue("out: expected an array to accumulate into (accumulate=True), got None")
    else:
        others = (("a", a), ("b", b)) if bias is None else (("a", a), ("b", b), ("bias", bias))
        output("out", out, like=a, shape=(m, n), apart_from=others)
    return a, b, trans_a, trans_b, accumulate, bias, m, n, k


def bfloat16(bfloat16, name, x):
    """Whether factors are rounded to bfloat16, which those of float32 alone can be."""
    if flag("bfloat16", bfloat16) and x.dtype != FLOAT32:
        raise InvalidType(f"bfloat16: expected False, or float32 as {name}'s dtype, got True and {x.dtype}")
    return bool(bfloat16)


PACKED_DTYPES = ("float32", "float64", "bfloat16", "int8")
GROUP = 256  # rows that share a scale by default: more and the error of normal values goes over 1 %
# What values are kept in, as arrays: of bfloat16, the bits.
KEPT_AS = {INT8: "int8", np.dtype("uint16"): "bfloat16", FLOAT32: "float32", FLOAT64: "float64"}
MOST_SCALE = float(np.finfo(np.float32).max) / 127
MAX_GROUP = 65536  # 255 * 127 times that stays within the 32 bits of an int8 product's sum


def _one_of(name, x, choices):
    if not isinstance(x, str):
        raise InvalidType(f"{name}: expected one of {', '.join(choices)}, got {type(x).__name__}")
    if x not in choices:
        raise InvalidValue(f"{name}: expected one of {', '.join(choices)}, got {x!r}")
    return x


def pack(weight, dtype, transposed, gate, group):
    """weight, dtype, transposed, gate, and the rows that share a scale, None where there are none."""
    transposed = flag("transposed", transposed)
    _one_of("dtype", dtype, PACKED_DTYPES)
    wanted = FLOAT64 if dtype == "float64" else FLOAT32
    weight = real("weight", weight, like=np.empty(0, wanted), ndim=2)
    gate = None if gate is None else real("gate", gate, like=weight, shape=weight.shape)
    if group is not None:
        group = integer("group", group, low=4, high=MAX_GROUP)
        if dtype != "int8" or group % 4:
            raise InvalidValue(f"group: expected a multiple of 4 with dtype int8, or None, got {group} with dtype {dtype}")
    if dtype == "int8":
        group = GROUP if group is None else group
        for name, x in (("weight", weight), ("gate", gate)):
            if x is not None and not np.isfinite(x).all():
                raise InvalidValue(f"{name}: expected finite values to quantise, got {x[~np.isfinite(x)][0]}")
    return weight, dtype, transposed, gate, group


def repack(values, scales, gate, gate_scales, group):
    """What it is kept in, then values, scales, gate, gate_scales and group as `pack` has them."""
    _array("values", values, tuple(KEPT_AS), None, 2, 0)
    dtype = KEPT_AS[values.dtype]
    if group is not None:
        group = integer("group", group, low=4, high=MAX_GROUP)
        if dtype != "int8" or group % 4:
            raise InvalidValue(f"group: expected a multiple of 4 with int8 values, or None, got {group} with {values.dtype}")
    if dtype == "int8":
        group = GROUP if group is None else group
    d_out, d_in = values.shape
    if gate is not None:
        _array("gate", gate, (values.dtype,), values.shape, None, 0)
    for name, x, given in (("", values, scales), ("gate_", gate, gate_scales)):
        if (dtype != "int8" or x is None) and given is not None:
            raise InvalidValue(f"{name}scales: expected None beside {'no gate' if x is None else x.dtype}, got {type(given).__name__}")
        if dtype == "int8" and x is not None:
            _array(f"{name}scales", given, (FLOAT32,), (d_out, -(-d_in // group)), None, 0)
            if given.size and not (given.min() >= 0 and given.max() <= MOST_SCALE):  # NaN fails it
                raise InvalidValue(f"{name}scales: expected finite values from 0 to {MOST_SCALE}, got {given.min()} to {given.max()}")
            if x.size and x.min() < -127:
                raise InvalidValue(f"{'gate' if name else 'values'}: expected -127 to 127, got {x.min()}")
    kept = [None if x is None else _contiguous(x) for x in (values, scales, gate, gate_scales)]
    return dtype, *kept, group


def packed_weight(weight):
    """A PackedWeight, and an array of the dtype of what it multiplies."""
    if not isinstance(weight, PackedWeight):
        raise InvalidType(f"weight: expected a PackedWeight (from pack), got {type(weight).__name__}")
    return np.empty(0, FLOAT64 if weight.dtype == "float64" else FLOAT32)


def packed_linear(x, weight, bias, gate_bias, activation, residual, out):
    """x, bias, gate_bias, the activation's number or -1, residual, rows."""
    like = packed_weight(weight)
    d_in, d_out = weight.shape
    x = real("x", x, like=like, min_ndim=1)
    if x.shape[-1] != d_in:
        raise InvalidValue(f"x: expected a last axis of {d_in} to match weight of shape {weight.shape}, got shape {x.shape}")
    bias = None if bias is None else real("bias", bias, like=like, shape=(d_out,))
    if gate_bias is not None:
        gate_bias = real("gate_bias", gate_bias, like=like, shape=(d_out,))
        if not weight.gated:
            raise InvalidValue(f"gate_bias: expected None (weight has no gate), got an array of shape {gate_bias.shape}")
    kind = -1 if activation is None else ACTIVATIONS.index(_one_of("activation", activation, ACTIVATIONS))
    shape = (*x.shape[:-1], d_out)
    residual = None if residual is None else real("residual", residual, like=like, shape=shape)
    if out is not None:
        given = (("x", x), ("bias", bias), ("gate_bias", gate_bias), ("residual", residual))
        output("out", out, like=like, shape=shape, apart_from=[(name, array) for name, array in given if array is not None])
    return x, bias, gate_bias, kind, residual, rows(x)[0]


def linear_top_k(x, weight, k, bias, lse):
    like = packed_weight(weight)
    d_in, d_out = weight.shape
    if weight.gated:
        raise InvalidValue("weight: expected one without a gate, got a gated one")
    x = real("x", x, like=like, min_ndim=1)
    if x.shape[-1] != d_in:
        raise InvalidValue(f"x: expected a last axis of {d_in} to match weight of shape {weight.shape}, got shape {x.shape}")
    bias = None if bias is None else real("bias", bias, like=like, shape=(d_out,))
    return x, integer("k", k, low=0, high=2**31 - 1), bias, flag("lse", lse), rows(x)[0]


def rows(x):
    """The last axis and how many rows of it: (N, d)."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def layer_norm(x, weight, bias, eps):
    x = real("x", x, min_ndim=1)
    weight = real("weight", weight, like=x, shape=(x.shape[-1],))
    bias = None if bias is None else real("bias", bias, like=x, shape=(x.shape[-1],))
    return x, weight, bias, number("eps", eps, low=0.0)


def rms_norm(x, weight, eps):
    x = real("x", x, min_ndim=1)
    return x, real("weight", weight, like=x, shape=(x.shape[-1],)), number("eps", eps, low=0.0)


def norm_backward(dy, x, weight, rstd):
    x = real("x", x, min_ndim=1)
    dy = real("dy", dy, like=x, shape=x.shape)
    n, d = rows(x)
    return dy, x, real("weight", weight, like=x, shape=(d,)), real("rstd", rstd, like=x, shape=(n,))


def activation_kind(kind) -> int:
    """The number the C side knows `kind` by."""
    if not isinstance(kind, str):
        raise InvalidType(f"kind: expected one of {', '.join(ACTIVATIONS)}, got {type(kind).__name__}")
    if kind not in ACTIVATIONS:
        raise InvalidValue(f"kind: expected one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    return ACTIVATIONS.index(kind)


def embedding(table, ids):
    table = real("table", table, ndim=2)
    return table, integers("ids", ids, low=0, high=table.shape[0])


def embedding_backward(ids, dout, dtable):
    dout = real("dout", dout, min_ndim=1)
    output("dtable", dtable, like=dout, ndim=2, apart_from=(("dout", dout),))
    ids = integers("ids", ids, low=0, high=dtable.shape[0])
    return ids, real("dout", dout, shape=(*ids.shape, dtable.shape[1]))


def cross_entropy(logits, targets, ignore_index, label_smoothing):
    logits = real("logits", logits, ndim=2)
    ignore_index = integer("ignore_index", ignore_index, low=-(2**63), high=2**63 - 1)
    label_smoothing = number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    n, vocab = logits.shape
    targets = integers("targets", targets, shape=(n,), low=0, high=vocab, also=ignore_index)
    return logits, targets, ignore_index, label_smoothing


def of_losses(x, lse, dlosses):
    """What the backward is given for each row of x."""
    return double("lse", lse, shape=x.shape[:1]), real("dlosses", dlosses, like=x, shape=x.shape[:1])


def linear_cross_entropy(x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk):
    """The arguments, and V."""
    transposed = flag("transposed", transposed)
    x = real("x", x, ndim=2)
    n, d = x.shape
    weight = real("weight", weight, like=x, shape=(None, d) if transposed else (d, None))
    vocab = weight.shape[0 if transposed else 1]
    bias = None if bias is None else real("bias", bias, like=x, shape=(vocab,))
    ignore_index = integer("ignore_index", ignore_index, low=-(2**63), high=2**63 - 1)
    label_smoothing = number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    chunk = integer("chunk", chunk, low=1, high=2**31 - 1)
    targets = integers("targets", targets, shape=(n,), low=0, high=vocab, also=ignore_index)
    return x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk, vocab


def linear_cross_entropy_backward(x, weight, targets, bias, lse, dlosses, dweight):
    """What the backward has besides; the rest was checked."""
    lse, dlosses = of_losses(x, lse, dlosses)
    if dweight is not None:
        inputs = (("x", x), ("weight", weight), ("bias", bias), ("lse", lse), ("dlosses", dlosses))
        output("dweight", dweight, like=x, shape=weight.shape, apart_from=[pair for pair in inputs if pair[1] is not None])
    return lse, dlosses


def adamw(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale):
    param_ = real("param", param, ndim=1)  # the dtype of all four
    output("param", param, like=param_)
    grad = real("grad", grad, like=param_, shape=param.shape)
    output("param", param, like=param_, apart_from=(("grad", grad),))
    output("m", m, like=param_, shape=param.shape, apart_from=(("param", param), ("grad", grad)))
    output("v", v, like=param_, shape=param.shape, apart_from=(("param", param), ("grad", grad), ("m", m)))
    return (
        grad,
        number("lr", lr, low=0.0),
        number("beta1", beta1, low=0.0, high=1.0, open_high=True),
        number("beta2", beta2, low=0.0, high=1.0, open_high=True),
        number("eps", eps, low=0.0),
        number("weight_decay", weight_decay, low=0.0),
        integer("step", step, low=1, high=2**53),
        number("grad_scale", grad_scale),
    )


def real_dtype(dtype):
    try:
        if dtype is None:  # to NumPy, float64
            raise TypeError
        dtype = np.dtype(dtype)
    except TypeError:
        raise InvalidType(f"dtype: expected float32 or float64, got {dtype!r}") from None
    if dtype not in (FLOAT32, FLOAT64):
        raise InvalidType(f"dtype: expected float32 or float64, got {dtype}")
    return dtype


def sinusoidal_positions(n, d_model, dtype):
    n, d_model, dtype = integer("n", n, low=0, high=2**48), integer("d_model", d_model, low=0, high=2**48), real_dtype(dtype)
    if n * d_model * dtype.itemsize >= 2**62:
        raise InvalidValue(f"n: expected a table that fits into memory, got {n} rows of {d_model}")
    return n, d_model, dtype


def rotary(x, positions, frequencies, inverse):
    x = heads_real("x", x)
    batch, _, length, d = x.shape
    per_row = isinstance(positions, np.ndarray) and positions.ndim == 2
    positions = integers("positions", positions, shape=(batch, length) if per_row else (length,))
    _array("frequencies", frequencies, (FLOAT64,), None, 1, 0)
    if 2 * len(frequencies) > d:
        raise InvalidValue(f"frequencies: expected at most half as many as the {d} numbers of a head, got {len(frequencies)}")
    return x, positions, _contiguous(frequencies), flag("inverse", inverse)


def keep_rows(store, at, rows):
    """The store is written where it lies."""
    rows = heads_real("rows", rows)
    whole = heads_real("store", store, like=rows, or_kept=True) is store
    batch, heads, capacity, width = store.shape
    _array("rows", rows, (rows.dtype,), (batch, heads, None, rows.shape[3]), None, 0)
    if width != kept_width(store.dtype, rows.shape[3]):
        expected = (batch, heads, None, kept_width(store.dtype, rows.shape[3]))
        raise InvalidValue(f"store: expected shape {_shape_text(expected)} for rows of shape {rows.shape}, got {store.shape}")
    if not whole or not store.flags.writeable:
        got = "one that is read-only" if not store.flags.writeable else f"one with strides {store.strides}"
        raise InvalidValue(f"store: expected an array that can be written, whose rows are whole, got {got}")
    most = capacity - rows.shape[2]
    return (
        store,
        integers("at", at, shape=(batch,), low=0, high=most + 1) if isinstance(at, np.ndarray) else integer("at", at, low=0, high=most),
        rows,
    )


def recurrence(x, forget, state):
    """x, forget; the state is changed where it lies."""
    x = heads_real("x", x, ndim=3)
    forget = heads_real("forget", forget, like=x, shape=x.shape)
    output("state", state, like=x, shape=(x.shape[0], x.shape[2]), apart_from=(("x", x), ("forget", forget)))
    return x, forget


def dropout(x, p, seed):
    return real("x", x), number("p", p, low=0.0, high=1.0, open_high=True), integer("seed", seed, low=0, high=2**64 - 1)


def code_bytes(d):
    """Of a row of width d: codes to a multiple of 64, then step, length, error and nothing as float32."""
    return -(-d // 64) * 64 + 16


def search(queries, bank, k, valid, scales, codes):
    """Bank and codes stay where they are, whatever their strides; the last value is the number the C side knows its rows by."""
    queries = real("queries", queries, ndim=3)
    batch, _, d = queries.shape
    kinds = (FLOAT32, FLOAT16, INT8) if queries.dtype == FLOAT32 else (queries.dtype,)
    _array("bank", bank, kinds, (batch, None, d), None, 0)
    k = integer("k", k, low=0, high=2**31 - 1)
    shape = (batch, bank.shape[1])
    valid = None if valid is None else mask("valid", valid, shape=shape)
    if (scales is None) == (bank.dtype == INT8):
        wanted = "a scale for each row of an int8 bank" if scales is None else f"None for a bank of {bank.dtype}"
        raise InvalidValue(f"scales: expected {wanted}, got {'None' if scales is None else type(scales).__name__}")
    scales = None if scales is None else real("scales", scales, like=queries, shape=shape)
    if codes is not None:
        if bank.dtype not in (FLOAT32, FLOAT16):
            raise InvalidValue(f"codes: expected None for a bank of {bank.dtype}, got {type(codes).__name__}")
        _array("codes", codes, (UINT8,), (*shape, code_bytes(d)), None, 0)
        if codes.size and codes.strides[2] != 1:
            raise InvalidValue(f"codes: expected a row's bytes to lie together, got strides {codes.strides}")
        codes = np.asarray(codes)
    return queries, np.asarray(bank), k, valid, scales, codes, kinds.index(bank.dtype)


def encode_rows(bank):
    _array("bank", bank, (FLOAT32, FLOAT16), None, None, 2)
    return np.asarray(bank)


def attention_block(block, at, q, forward=False):
    """One checked copy of `block` for queries of q's shape (B, H, T, D); `at` names it in messages.

    forward: of a call that gives the output alone, whose keys may be in bfloat16 or int8 and have owners.
    """
    if not isinstance(block, Block):
        raise InvalidType(f"{at}: expected a Block, got {type(block).__name__}")
    batch, heads, length, d = q.shape
    is_plain = not forward or block.index is not None
    k = heads_real(f"{at}.k", block.k, like=q, or_kept=not is_plain)
    kv_heads, source = k.shape[1], k.shape[2]
    owners = block.owners
    if owners is not None:
        if is_plain:
            raise InvalidValue(f"{at}.owners: expected None beside an index, for a gradient and for sums of weights, got an array")
        owners = integers(f"{at}.owners", owners, shape=(batch, source), low=0, high=len(k))
    width = kept_width(k.dtype, d)
    if (
        (owners is None and k.shape[0] != batch)
        or k.shape[3] != width
        or (kv_heads == 0) != (heads == 0)
        or (kv_heads and heads % kv_heads)
    ):
        raise InvalidValue(
            f"{at}.k: expected shape ({batch}, Hkv, S, {width}) with Hkv dividing {heads} to match q of shape {q.shape}, got {k.shape}"
        )
    v = heads_real(f"{at}.v", block.v, like=q, shape=k.shape, or_kept=k.dtype != q.dtype)
    if v.dtype != k.dtype:
        raise InvalidType(f"{at}.v: expected dtype {k.dtype} to match k, got {v.dtype}")
    valid = None if block.valid is None else mask(f"{at}.valid", block.valid, shape=(batch, source))
    lengths = None
    if block.lengths is not None:
        lengths = integers(f"{at}.lengths", block.lengths, shape=(batch,), low=0, high=source + 1)
    causal = flag(f"{at}.causal", block.causal)
    window = None if block.window is None else integer(f"{at}.window", block.window, low=1, high=2**60)
    prefix = integer(f"{at}.prefix", block.prefix, low=0, high=source)
    if prefix and (window is not None or not causal):
        raise InvalidValue(f"{at}.prefix: expected 0, or causal=True and no window, got {prefix}")
    offset = source - length
    if block.offset is not None:
        offset = integer(f"{at}.offset", block.offset, low=-(2**60), high=2**60)
    index, width = None, source
    if block.index is not None:
        if causal or window is not None:
            raise InvalidValue(f"{at}.index: expected no causal mask and no window beside an index, got both")
        index = integers(f"{at}.index", block.index, shape=(batch, heads, length, None), low=-1, high=source)
        width = index.shape[3]
    scores = (batch, heads, length, width)
    bias = None if block.bias is None else _broadcast(f"{at}.bias", strided_real(f"{at}.bias", block.bias, like=q), scores)
    needs_dbias = flag(f"{at}.needs_dbias", block.needs_dbias)
    if (needs_dbias or block.dbias is not None) and bias is None:
        raise InvalidValue(f"{at}.bias: expected an array because its gradient is asked for, got None")
    dbias = None
    if block.dbias is not None:
        dbias = strided_real(f"{at}.dbias", block.dbias, like=q)
        if not dbias.flags.writeable:
            raise InvalidValue(f"{at}.dbias: expected a writeable array, got a read-only one")
        _broadcast(f"{at}.dbias", dbias, scores)
        needs_dbias = True
    return Block(k, v, valid=valid, owners=owners, lengths=lengths, index=index, bias=bias, dbias=dbias, needs_dbias=needs_dbias,
                 causal=causal, prefix=prefix, offset=offset, window=window)  # fmt: skip


def _broadcast(name, x, shape):
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        raise InvalidValue(f"{name}: expected an array broadcastable to {shape}, got shape {x.shape}") from None


CAPS = 1e-3, 1e6  # of scores: beyond them tanh(score / cap) is a step, or the score


def cap_of_scores(cap):
    return None if cap is None else number("cap", cap, low=CAPS[0], high=CAPS[1])


def attention(q, blocks, scale, dropout, seed, cap, forward=True):
    q = heads_real("q", q)
    if not isinstance(blocks, (list, tuple)):
        raise InvalidType(f"blocks: expected a list of Block, got {type(blocks).__name__}")
    scale = number("scale", scale)
    dropout, seed = number("dropout", dropout, low=0.0, high=1.0, open_high=True), integer("seed", seed, low=0, high=2**64 - 1)
    cap = cap_of_scores(cap)
    return q, [attention_block(block, f"blocks[{i}]", q, forward) for i, block in enumerate(blocks)], scale, dropout, seed, cap


def attention_backward(dout, out, lse, q, blocks, scale, needs, dropout, seed, cap):
    q, checked, scale, dropout, seed, cap = attention(q, blocks, scale, dropout, seed, cap, forward=False)
    dout = heads_real("dout", dout, like=q, shape=q.shape)
    out = heads_real("out", out, like=q, shape=q.shape)
    lse = double("lse", lse, shape=q.shape[:3])
    if needs is None:
        needs = [True] * len(checked)
    elif not isinstance(needs, (list, tuple)) or len(needs) != len(checked):
        raise InvalidValue(f"needs: expected None or one True or False for each of {len(checked)} blocks, got {needs!r}")
    needs = [flag(f"needs[{i}]", need) for i, need in enumerate(needs)]
    for given, block in zip(blocks, checked, strict=True):
        if block.needs_dbias and block.dbias is None:
            # The bias's own layout cannot be guessed from its strides; an expanded or overlapping bias comes with its dbias.
            block.dbias = np.zeros(given.bias.shape, q.dtype)
    return dout, out, lse, q, checked, scale, needs, dropout, seed, cap


def attention_mass(q, block, lse, scale, asking, cap):
    q = heads_real("q", q)
    scale = number("scale", scale)
    block = attention_block(block, "block", q)
    lse, asking = double("lse", lse, shape=q.shape[:3]), mask("asking", asking, shape=(q.shape[0], q.shape[2]))
    return q, block, lse, scale, asking, cap_of_scores(cap)


MOST_THREADS = 4096


def thread_count(n):
    return integer("n", n, low=1, high=MOST_THREADS)
