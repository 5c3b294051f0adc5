"""What every kernel refuses: each argument of each sample made wrong in every way that its kind allows.

The error names the argument, what was expected and what came, and nothing has been written by then.
"""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from core.samples import IN_PLACE, NAMES, WITH_OUT, arrays_in, sample

from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference import Block, PackedWeight

# These axes may have any length; an ellipsis: all of them, and any number of axes.
FREE = {
    ("softmax", "x"): ..., ("log_softmax", "x"): ..., ("activation", "x"): ..., ("dropout", "x"): ..., ("sum_of_squares", "x"): ...,
    ("checksum", "x"): ...,
    ("embedding", "table"): (0, 1), ("embedding", "ids"): ...,
    ("embedding_backward", "dtable"): (0,), ("cross_entropy", "logits"): (1,), ("cross_entropy", "targets"): (),
    ("cross_entropy_backward", "logits"): (1,), ("rotary", "x"): (0, 1, 3), ("rotary", "frequencies"): (0,), ("search", "queries"): (1,),
    ("keep_rows", "store"): (2,), ("keep_rows", "rows"): (2,),
}  # fmt: skip
LAST_AXIS_ALONE = {("layer_norm", "x"), ("rms_norm", "x"), ("linear_top_k", "x")}
MAY_BE_NONE = {
    *("bias", "valid", "lengths", "index", "dbias", "window", "offset", "needs", "gate", "gate_bias", "group", "activation", "residual"),
    *("scales", "gate_scales", "codes", "dweight", "cap"),
}
OPTIONAL_OUT = {("gemm", "out"), ("packed_linear", "out"), *((name, "out") for name in WITH_OUT)}

NUMBERS = {
    "eps": [-1e-9, np.nan, np.inf], "p": [-0.1, 1.0, np.nan], "label_smoothing": [-0.1, 1.1, np.nan], "lr": [-1.0, np.inf],
    "beta1": [1.0, -0.1, np.nan], "beta2": [1.0, -0.1, np.nan], "weight_decay": [-0.1, np.nan], "grad_scale": [np.nan, np.inf],
    "scale": [np.nan, np.inf], "cap": [0.0, -1.0, 1e-9, 1e9, np.nan, np.inf],
}  # fmt: skip
INTEGERS = {
    "step": [0, -1, 2**70], "seed": [-1, 2**64], "k": [-1, 2**40], "n": [-1, -(2**70), 2**70], "d_model": [-1, 2**70],
    "ignore_index": [2**63, -(2**63) - 1], "offset": [2**70], "window": [0, -1],
    "chunk": [0, -1, 2**40],
    "group": [0, -4, 6, 2**20],
}  # fmt: skip
RANGES = {"ids": (0, 50), "targets": (0, 5), "index": (-1, 6), "lengths": (0, 7)}  # [low, high) in the samples, or past it


def wrong_values(argument, value):
    """(label, wrong value) for one argument by the kind of its value: those that the argument itself must be named for."""
    if isinstance(value, np.ndarray):
        yield from {"a list": value.tolist(), "a number": 1.0, "a string": "x", "strings": value.astype(str)}.items()
        yield from ((f"{kind} values", value.astype(kind)) for kind in ("float16", "complex64", "int32", "uint8", "object", ">f4", ">i8"))
        if value.dtype.kind != "b":
            yield "bool values", value.astype(bool)
        if value.dtype.kind != "i":
            yield "int64 values", value.astype(np.int64)
        if argument in RANGES:
            for label, bad in (("too low", RANGES[argument][0] - 1), ("too high", RANGES[argument][1]), ("huge", 2**62)):
                yield label, np.where(np.arange(value.size).reshape(value.shape) == value.size // 2, bad, value)
    elif isinstance(value, bool):
        yield from (("1", 1), ("None", None), ("a string", "no"), ("an array", np.array([True, False])))
    elif isinstance(value, PackedWeight):
        yield from (("an array", value.unpack()), ("a list", []), ("a number", 1.0), ("a string", "x"), ("the class", PackedWeight))
    elif argument in ("kind", "activation"):
        yield from (("unknown", "tanh"), ("upper case", "GELU"), ("bytes", b"gelu"), ("a number", 1))
    elif argument == "dtype":
        yield from (("int", int), ("float16", np.float16), ("unknown", "float31"), ("a number", 4), ("big-endian", ">f4"))
    elif argument in NUMBERS or argument in INTEGERS:
        yield from (("a string", "1"), ("a list", [1]), ("True", True), ("complex", 1j), ("an array", np.ones(2)))
        yield from ((str(bad), bad) for bad in (*NUMBERS.get(argument, ()), *INTEGERS.get(argument, ())))
        if argument in INTEGERS:
            yield from (("a fraction", 1.5), ("a float", 1.0))
    if argument not in MAY_BE_NONE:
        yield "None", None


def misfits(name, argument, value):
    """(label, wrong value) where the fault is between arguments, so that any of them may be named."""
    if not isinstance(value, np.ndarray):
        return
    free = FREE.get((name, argument), ())
    last_alone = (name, argument) in LAST_AXIS_ALONE
    if free is not ...:
        for axis in range(value.ndim):
            if axis not in free and not (last_alone and axis < value.ndim - 1):
                yield f"axis {axis} one longer", np.concatenate([value, value.take([0], axis)], axis)
                yield f"axis {axis} one shorter", value.take(range(value.shape[axis] - 1), axis)
        if not last_alone:
            yield "one axis more", value[None]
            yield "one axis less", value[0]
    has_its_own = (name, argument) == ("rotary", "x")  # frequencies are float64 whatever x is
    if value.dtype.kind == "f" and not has_its_own and sum(array.dtype.kind == "f" for array in arrays_in(sample(name, "float32"))) > 1:
        yield "the other real", value.astype(np.float64 if value.dtype == np.float32 else np.float32)
    if argument in IN_PLACE.get(name, ()):
        frozen = value.copy()
        frozen.setflags(write=False)
        yield "read-only", frozen
        yield "strided", np.repeat(value, 2, axis=-1)[..., ::2]


def overlapping(name, arguments):
    """(the two arguments, label, changed ones) where something written lies on something else."""
    for argument in IN_PLACE.get(name, ()):
        target = arguments[argument]
        for other, x in arguments.items():
            if other != argument and isinstance(x, np.ndarray) and x.dtype == target.dtype and x.size >= target.size:
                yield f"{argument}|{other}", f"{argument} on {other}", {argument: x.reshape(-1)[: target.size].reshape(target.shape)}


def wrong_blocks(good):
    """(what may be named, label, blocks): a list of blocks made wrong, the fields of a Block made wrong."""
    for label, bad in (("None", None), ("a Block", good), ("a number", 3)):
        yield "blocks", label, bad
    for label, bad in (("None", None), ("a tuple", (good.k, good.v)), ("a dict", asdict(good))):
        yield r"blocks\[1\]", label, [good, bad]
    dtype, length = good.k.dtype, 5
    bias, index = np.ones((2, 4, length, 6), dtype), np.zeros((2, 4, length, 3), np.int64)
    full = replace(good, valid=np.ones((2, 6), bool), lengths=np.full(2, 6), bias=bias, causal=True, offset=1, window=3)
    for name in ("k", "v", "valid", "lengths", "bias", "causal", "offset", "window"):
        for label, bad in wrong_values(name, getattr(full, name)):
            yield rf"blocks\[1\]\.{name}", f"{name} {label}", [good, replace(full, **{name: bad})]
        for label, bad in misfits("attention", name, getattr(full, name)):
            if name != "bias" or label not in ("axis 0 one shorter", "one axis less"):  # these two still broadcast
                yield r"blocks\[1\]\.\w+", f"{name} {label}", [good, replace(full, **{name: bad})]
    indexed = replace(good, index=index)
    for label, bad in (*wrong_values("index", index), ("a head less", index[:, :3]), ("one axis less", index[0])):
        yield r"blocks\[0\]\.index", f"index {label}", [replace(indexed, index=bad)]
    for changed in ({"causal": True}, {"window": 2}):
        yield r"blocks\[0\]\.index", f"index with {changed}", [replace(indexed, **changed)]
    yield r"blocks\[0\]\.bias", "needs_dbias without a bias", [replace(good, needs_dbias=True)]
    three = np.ones((2, 3, 6, 8), dtype)
    yield r"blocks\[0\]\.k", "3 heads for 4", [Block(three, three)]
    frozen = bias.copy()
    frozen.setflags(write=False)
    for label, bad in (("read-only", frozen), ("of a wrong shape", bias[:, :3]), ("of int64", bias.astype(np.int64))):
        yield r"blocks\[0\]\.dbias", f"dbias {label}", [replace(good, bias=bias, dbias=bad)]


def faults(name, dtype):
    """Everything wrong with one kernel: (pattern of what may be named, label, the whole call)."""
    arguments = sample(name, dtype)
    for argument, value in arguments.items():
        for label, bad in wrong_values(argument, value):
            if (name, argument, label, dtype) == ("search", "bank", "float16 values", np.float32):
                continue  # such a bank is taken
            if not (bad is None and (name, argument) in OPTIONAL_OUT):
                yield argument, f"{argument}: {label}", {**arguments, argument: bad}
        for label, bad in misfits(name, argument, value):
            yield "|".join([*arguments, r"blocks\[\d\]\.\w+", r"block\.\w+"]), f"{argument}: {label}", {**arguments, argument: bad}
    for named, label, changed in overlapping(name, arguments):
        yield named, label, {**arguments, **changed}
    if "blocks" in arguments:
        for named, label, blocks in wrong_blocks(Block(arguments["blocks"][0].k, arguments["blocks"][0].v)):
            yield named, label, {**arguments, "blocks": blocks}


@pytest.mark.parametrize("name", NAMES)
def test_refused(core, dtype, name):
    function = getattr(core, name)
    untold = []
    n_faults = 0
    for named, label, arguments in faults(name, dtype):
        n_faults += 1
        before = [array.tobytes() for array in arrays_in(arguments)]
        try:
            function(**arguments)
        except (InvalidValue, InvalidType) as error:
            if not re.match(rf"({named}): expected .*, got ", str(error), re.DOTALL):
                untold.append(f"{label}: {error}")
        except Exception as error:
            untold.append(f"{label}: {type(error).__name__} {error}")
        else:
            untold.append(f"{label}: taken")
            continue
        assert [array.tobytes() for array in arrays_in(arguments)] == before, f"{label}: written to before it was refused"
    assert not untold, "\n".join(untold)
    assert n_faults >= 12


@pytest.mark.parametrize("n", [0, -1, 4097, 1.5, True, None, "2"])
def test_a_number_of_threads(core, n):
    before = core.get_num_threads()
    with pytest.raises((InvalidValue, InvalidType), match="n: expected"):
        core.set_num_threads(n)
    assert core.get_num_threads() == before


def test_unexpected_and_missing_arguments(core):
    for name in NAMES:
        with pytest.raises(TypeError):
            getattr(core, name)()
        with pytest.raises(TypeError):
            getattr(core, name)(**sample(name, "float32"), surprise=1)
