"""Packed weights and products with them: every kind of weight against sums written out, and what is promised of all."""

import numpy as np
import pytest
from core import naive
from core.cases import Values, compiled_alone, layouts, scales, seeds, sizes_or_none
from helpers import assert_close, assert_same_bits, in_a_process, laid_out
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import _core, reference
from mini_tfm.errors import InvalidType, InvalidValue

KINDS = [("float32", None), ("float64", None), ("bfloat16", None), ("int8", None), ("int8", 8)]
every_kind = pytest.mark.parametrize("kind, group", KINDS, ids=lambda x: str(x))


def real_of(kind):
    return "float64" if kind == "float64" else "float32"


def bfloat16(w):
    """To the nearest by halving the distance to the two neighbours; a tie goes to the even one."""
    low = (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    to_low, to_high = np.abs(w.astype(np.float64) - low), np.abs(high.astype(np.float64) - w)
    even = (low.view(np.uint32) >> np.uint32(16)) % 2 == 0
    return np.where((to_low < to_high) | ((to_low == to_high) & even), low, high)


def int8_step(x, group, levels):
    """(d, n) of columns: the distance of neighbouring values that each element may be rounded to."""
    step = np.zeros(x.shape)
    for at in range(0, len(x), group):
        part = x[at : at + group].astype(np.float64)
        extent = np.abs(part).max(0) if levels == 127 else np.maximum(part.max(0), 0) - np.minimum(part.min(0), 0)
        step[at : at + group] = extent / levels
    return step


@every_kind
@given(seed=seeds, d_in=sizes_or_none, d_out=sizes_or_none, layout=layouts, transposed=st.booleans(), gated=st.booleans())
def test_unpack_gives_what_was_packed(core, kind, group, seed, d_in, d_out, layout, transposed, gated):
    values = Values(seed, real_of(kind))
    weights = [values.real(d_in, d_out) for _ in range(1 + gated)]
    given_as = [laid_out(w.T if transposed else w, layout) for w in weights]
    packed = core.pack(given_as[0], dtype=kind, transposed=transposed, gate=given_as[1] if gated else None, group=group)
    shared = 256 if kind == "int8" and group is None else group
    assert (packed.shape, packed.dtype, packed.gated, packed.group) == ((d_in, d_out), kind, gated, shared)
    for weight, found in zip(weights, packed.unpack() if gated else [packed.unpack()], strict=True):
        assert found.dtype == weight.dtype
        if kind == "int8":
            step = int8_step(weight, group or 256, 127)
            assert (np.abs(found.astype(np.float64) - weight) <= step * 0.5001).all()
        else:
            np.testing.assert_array_equal(found, bfloat16(weight) if kind == "bfloat16" else weight)


@every_kind
@given(seed=seeds, d_in=sizes_or_none, d_out=sizes_or_none, layout=layouts, gated=st.booleans())
def test_what_is_kept_makes_the_same_weight_again(core, kind, group, seed, d_in, d_out, layout, gated):
    values = Values(seed, real_of(kind))
    gate = values.real(d_in, d_out) if gated else None
    packed = core.pack(values.real(d_in, d_out), dtype=kind, group=group, gate=gate)
    kept, *of_gate = packed.kept()
    assert len(of_gate) == gated and kept[0].shape == (d_out, d_in) and (kept[1] is None) == (kind != "int8")
    given_as = [None if x is None else laid_out(x, layout) for x in (*kept, *(of_gate[0] if gated else (None, None)))]
    again = core.repack(*given_as[:2], gate=given_as[2], gate_scales=given_as[3], group=group)
    assert (again.shape, again.dtype, again.gated, again.group, again.nbytes) == (
        packed.shape, packed.dtype, packed.gated, packed.group, packed.nbytes
    )  # fmt: skip
    assert_same_bits(again.unpack(), packed.unpack())
    x = values.real(3, d_in)
    assert_same_bits(core.packed_linear(x, again), core.packed_linear(x, packed))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_is_kept_is_the_same_in_numpy(kind):
    """So that a file of it is for every instruction set."""
    weight = Values(0, "float32").real(300, 70)
    for kept, twin in zip(_core.pack(weight, dtype=kind).kept()[0], reference.pack(weight, dtype=kind).kept()[0], strict=True):
        assert (kept is None) == (twin is None)
        if kept is not None:
            np.testing.assert_array_equal(kept, twin)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"scales": None}, "scales: expected a NumPy array"),
        ({"scales": np.ones((3, 1), np.float32)}, r"scales: expected shape \(3, 2\)"),
        ({"scales": np.full((3, 2), np.nan, np.float32)}, "scales: expected finite values"),
        ({"scales": np.full((3, 2), -1, np.float32)}, "scales: expected finite values from 0"),
        ({"scales": np.full((3, 2), 3e38, np.float32)}, "scales: expected finite values from 0 to 2.6"),
        ({"values": np.full((3, 300), -128, np.int8)}, "values: expected -127 to 127, got -128"),
        ({"gate": np.full((3, 300), -128, np.int8), "gate_scales": np.ones((3, 2), np.float32)}, "gate: expected -127"),
        ({"gate_scales": np.ones((3, 2), np.float32)}, "gate_scales: expected None beside no gate"),
        ({"values": np.ones((3, 300), np.uint16)}, "scales: expected None beside uint16"),
    ],
)
def test_numbers_that_no_packed_weight_has_are_refused(core, change, says):
    given_as = {"values": np.ones((3, 300), np.int8), "scales": np.ones((3, 2), np.float32)} | change
    with pytest.raises((InvalidValue, InvalidType), match=says):
        core.repack(**given_as)


@pytest.mark.parametrize("kind, share", [("float32", 1), ("bfloat16", 0.5), ("int8", 0.25)])
def test_the_memory_it_takes(kind, share):
    """A weight of whole panels, and at most a thirtieth for scales."""
    packed = _core.pack(np.ones((512, 2048), np.float32), dtype=kind)
    assert 0 <= packed.nbytes / (512 * 2048 * 4 * share) - 1 < 0.033 or _core.show_config()["isa"] == "reference"


def product(x, w, kind, group):
    """x w in float64 with the packed weight's values, x rounded as they are in bfloat16; how far an int8 product may be from it."""
    exact = naive.gemm(bfloat16(x) if kind == "bfloat16" else x, w)
    if kind != "int8" or not x.size:
        return exact, 0.0
    # A value at the end of the range may lose a whole step to the rounding of the zero point.
    return exact, int8_step(x.T, group or 256, 255).T @ np.abs(w.astype(np.float64)) * 1.001


@every_kind
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@given(seed=seeds, rows=sizes_or_none, d_in=sizes_or_none, d_out=sizes_or_none, layout=layouts, scale=scales, more=st.integers(0, 15))
def test_a_product_and_what_follows(core, kind, group, activation, seed, rows, d_in, d_out, layout, scale, more):
    has_bias, has_residual, gated, has_gate_bias = (bool(more >> bit & 1) for bit in range(4))
    values = Values(seed, real_of(kind))
    x = values.real(rows, d_in, scale=scale)
    packed = core.pack(values.real(d_in, d_out), dtype=kind, group=group, gate=values.real(d_in, d_out) if gated else None)
    w, gate = packed.unpack() if gated else (packed.unpack(), None)
    bias, residual = values.real(d_out) if has_bias else None, values.real(rows, d_out) if has_residual else None
    gate_bias = values.real(d_out) if gated and has_gate_bias else None
    out = core.packed_linear(
        laid_out(x, layout),
        packed,
        bias,
        gate_bias=gate_bias,
        activation=activation,
        residual=residual,
        out=np.empty((rows, d_out), x.dtype),
    )

    def number(b):
        return 0.0 if b is None else b.astype(np.float64)

    def act(y):
        return y if activation is None else np.vectorize(naive.ACTIVATIONS[activation], otypes=[float])(y)

    y, far = product(x, w, kind, group)
    terms = np.abs(x).max(1, initial=0)[:, None] * np.abs(w).max(0, initial=0).astype(np.float64) + np.abs(number(bias))
    y = y + number(bias)
    if gated:
        g, g_far = product(x, gate, kind, group)
        g_terms = np.abs(x).max(1, initial=0)[:, None] * np.abs(gate).max(0, initial=0).astype(np.float64) + np.abs(number(gate_bias))
        g = g + number(gate_bias)
        # An activation's slope is at most 1.13.
        far = far * (np.abs(g) + 1.13 * g_far) + 1.13 * g_far * np.abs(y)
        terms = terms * (np.abs(g) + g_terms) * 2
        y = y * act(g)
    else:
        y = act(y)
        far = far * 1.13
    y, terms = y + number(residual), terms + np.abs(number(residual))
    if kind == "int8":
        error = np.abs(out.astype(np.float64) - y)
        assert (error <= far + 1e-5 * (terms * np.sqrt(d_in + 2) + 1e-30)).all()
        return
    assert_close(out, y, "packed_linear", k=d_in + 2, terms=terms, dtype=x.dtype)


@every_kind
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 700, 130), (5, 513, 33), (13, 1100, 70), (40, 260, 301), (203, 1030, 45)])
def test_agrees_with_the_twin(kind, group, gated, shape):
    """int8 to rounding too: both quantise to the same integers."""
    n, d_in, d_out = shape
    values = Values(n, real_of(kind))
    packed = _core.pack(values.real(d_in, d_out), dtype=kind, group=group, gate=values.real(d_in, d_out) if gated else None)
    x, bias, residual = values.real(n, d_in), values.real(d_out), values.real(n, d_out)
    found, expected = (
        c.packed_linear(x, packed, bias, activation="gelu", residual=residual).astype(np.float64) for c in (_core, reference)
    )
    assert np.abs(found - expected).max() <= 20 * np.finfo(x.dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("d_in, d_out", [(1, 1), (0, 5), (33, 100), (64, 64), (700, 31), (384, 260)])
def test_a_product_has_the_bits_of_one_that_is_not_packed(core, dtype, d_in, d_out):
    """Bias and all: so it does not matter to a model what was packed."""
    values = Values(d_in, dtype)
    w, bias = values.real(d_in, d_out), values.real(d_out)
    packed = core.pack(w, dtype=dtype)
    for rows in (1, 2, 3, 4, 5, 7, 12, 13, 24, 25, 97):
        x = values.real(rows, d_in)
        assert_same_bits(core.packed_linear(x, packed, bias), core.gemm(x, w, bias=bias))
        assert_same_bits(core.linear_top_k(x, packed, 1, bias)[0][:, 0], core.gemm(x, w, bias=bias).max(axis=1))


@compiled_alone
@pytest.mark.parametrize("d_in, group", [(64, None), (192, 64), (256, None), (576, None), (1024, 1024), (320, 128), (90, None)])
def test_int8_rows_of_every_number_are_as_alone(d_in, group):
    """Past every edge of a tile of 16 rows and 64 columns, where some instruction sets have one."""
    values = Values(d_in, "float32")
    weight = _core.pack(values.real(d_in, 70), dtype="int8", group=group)
    x = values.real(100, d_in)
    alone = np.concatenate([_core.packed_linear(x[i : i + 1], weight) for i in range(100)])
    for n in (2, 4, 5, 7, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 97, 100):
        assert_same_bits(_core.packed_linear(x[:n], weight), alone[:n])


@compiled_alone
@every_kind
def test_a_row_has_the_same_bits_alone_and_at_any_number_of_threads(threads, kind, group):
    values = Values(0, real_of(kind))
    packed = threads.pack(values.real(530, 301), dtype=kind, group=group, gate=values.real(530, 301))
    plain = threads.pack(values.real(530, 1301), dtype=kind, group=group)
    x, residual = values.real(230, 530), values.real(230, 301)

    def results(rows):
        return (
            threads.packed_linear(x[rows], packed, activation="silu", residual=residual[rows]),
            *threads.linear_top_k(x[rows], plain, 7, lse=True),
        )

    threads.set_num_threads(1)
    whole = results(np.s_[:])
    for n in (2, 3, 4, 8):
        threads.set_num_threads(n)
        assert_same_bits(results(np.s_[:]), whole)
    for n_threads, count in ((1, 1), (2, 1), (2, 2), (1, 3), (2, 4), (3, 5), (2, 6), (1, 7), (2, 8), (2, 12), (1, 13), (2, 32), (3, 97)):
        threads.set_num_threads(n_threads)
        for first in (0, 230 - count, 101):
            part = np.s_[first : first + count]
            assert_same_bits(results(part), [array[part] for array in whole])


@every_kind
def test_sums_of_whole_numbers_are_exact(core, kind, group):
    """In any order, and with every factor as large as it gets: nothing saturates."""
    values = Values(1, real_of(kind))
    for n in (1, 3, 6, 7, 50):
        x = values.whole(n, 512, low=0, high=256)
        w = values.whole(512, 40, low=-127, high=128)
        for at in range(0, 512, 8):  # every scale is 1
            x[:, at : at + 2], w[at] = (255, 0), 127
        x[0], w[:, 0], w[:, 1] = 255, 127, -127
        packed = core.pack(w, dtype=kind, group=group)
        np.testing.assert_array_equal(packed.unpack(), w)
        np.testing.assert_array_equal(core.packed_linear(x, packed), x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize("d_in", [4096, 65536])
def test_int8_sums_stay_within_32_bits(core, d_in):
    x, w = np.full((2, d_in), 255, np.float32), np.full((d_in, 17), -127, np.float32)
    x[1, 0] = 0
    y = core.packed_linear(x, core.pack(w, dtype="int8"))
    np.testing.assert_allclose(y, (x.astype(np.int64) @ w.astype(np.int64)), rtol=1e-7)


@pytest.mark.parametrize("d_in, group, most", [(512, None, 0.01), (2048, None, 0.01), (2048, 128, 0.0092), (2048, 2048, 0.0125)])
def test_the_error_of_an_int8_layer(core, d_in, group, most):
    """Of normal values, relative, over a layer."""
    values = Values(2, "float32")
    x, w = values.real(60, d_in), values.real(d_in, 256)
    exact = x.astype(np.float64) @ w
    y = core.packed_linear(x, core.pack(w, dtype="int8", group=group))
    assert np.linalg.norm(y - exact) < most * np.linalg.norm(exact)


@pytest.mark.parametrize("d_in", [64, 512, 2048])
def test_the_error_of_a_bfloat16_layer(core, d_in):
    """Of normal values, relative, over a layer: factors of 8 bits, half a unit is 2^-8 at most."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, d_in)).astype(np.float32), rng.standard_normal((d_in, 200)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    error = core.packed_linear(x, core.pack(w, dtype="bfloat16")) - exact
    assert 2**-9 < np.linalg.norm(error) / np.linalg.norm(exact) < 2**-8.5


@every_kind
@given(seed=seeds, rows=sizes_or_none, d_in=st.integers(0, 20), d_out=st.integers(0, 100), k=st.integers(0, 20), biased=st.booleans())
def test_the_best_k(core, kind, group, seed, rows, d_in, d_out, k, biased):
    """Whole numbers, so that many scores are equal. int8 is held to its own products."""
    values = Values(seed, real_of(kind))
    x, bias = values.whole(rows, d_in), values.whole(d_out) if biased else None
    packed = core.pack(values.whole(d_in, d_out), dtype=kind, group=group)
    scores, ids, lse = core.linear_top_k(x, packed, k, bias, lse=True)
    y = core.packed_linear(x, packed, bias)
    assert (scores.shape, ids.shape, lse.shape) == ((rows, k), (rows, k), (rows,))
    for row in range(rows):
        order = sorted((-score, at) for at, score in enumerate(y[row].tolist()))[:k]
        expected = [at for _, at in order] + [-1] * (k - len(order))
        assert ids[row].tolist() == expected
        np.testing.assert_array_equal(scores[row], [-score for score, _ in order] + [-np.inf] * (k - len(order)))
        total = naive.log_sum_exp(y[row].astype(np.float64).tolist()) if d_out else -np.inf
        assert_close(
            lse[row : row + 1].astype(real_of(kind)),
            np.array([total]),
            "lse",
            k=max(d_out, 1),
            terms=np.array([abs(total) + 1 if d_out else 0]),
        )
    assert_same_bits(core.linear_top_k(x, packed, k, bias), (scores, ids))


def test_the_best_of_a_vocabulary(threads):
    """Several parts, several threads."""
    values = Values(3, "float32")
    x, packed = values.real(9, 64), threads.pack(values.real(64, 5003))
    y = threads.packed_linear(x, packed)
    for n in (1, 3):
        threads.set_num_threads(n)
        for k in (1, 4, 600):
            scores, ids, lse = threads.linear_top_k(x, packed, k, lse=True)
            expected = np.argsort(-y, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_array_equal(scores, np.take_along_axis(y, expected, 1))
            np.testing.assert_allclose(lse, np.log(np.exp(y.astype(np.float64)).sum(1)), rtol=1e-6)


@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 9, 36])
def test_what_is_not_finite_stays_in_its_row(core, kind, group, bad, place):
    values = Values(4, real_of(kind))
    x, packed = values.real(9, 37), core.pack(values.real(37, 21), dtype=kind, group=group)
    clean = core.packed_linear(x, packed)
    x[4, place] = bad
    y = core.packed_linear(x, packed)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert_same_bits(y[others], clean[others])
    assert not np.isfinite(y[4]).any()
    assert np.isnan(y[4]).all() if kind == "int8" or np.isnan(bad) else np.isinf(y[4]).all()
    scores, ids, lse = core.linear_top_k(x, packed, 3, lse=True)
    if np.isnan(y[4]).all():
        assert (ids[4] == -1).all() and (scores[4] == -np.inf).all() and np.isnan(lse[4])
    assert (ids[others] >= 0).all() and np.isfinite(lse[others]).all()


def test_special_scores(core):
    packed = core.pack(np.array([[1.0, np.nan, -np.inf, np.inf, 1.0]], np.float32))
    one = np.ones((1, 1), np.float32)
    scores, ids, lse = core.linear_top_k(one, packed, 5, lse=True)
    assert ids.tolist() == [[3, 0, 4, 2, -1]] and scores.tolist() == [[np.inf, 1, 1, -np.inf, -np.inf]] and np.isnan(lse[0])
    hidden = core.linear_top_k(one, core.pack(np.full((1, 3), -np.inf, np.float32)), 2, lse=True)
    assert [array.tolist() for array in hidden] == [[[-np.inf, -np.inf]], [[0, 1]], [-np.inf]]
    huge = core.linear_top_k(one, core.pack(np.array([[3e38, -3e38]], np.float32)), 1, lse=True)
    assert huge[2] == np.float32(3e38)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-33, 1e30, 1e38])
def test_int8_of_very_small_and_very_large_values(core, size):
    """No row of x and no column of w is hurt by another; what is too small to tell from 0 is 0."""
    x = np.array([[1.0, -1.0], [size, -size]], np.float32)
    y = core.packed_linear(x, core.pack(np.array([[1.0, size], [0.5, 0.0]], np.float32), dtype="int8"))
    assert abs(y[0, 0] - 0.5) < 0.01
    np.testing.assert_allclose(y[0, 1], size, rtol=0.01, atol=1e-36)
    np.testing.assert_allclose(y[1, 0], size / 2, rtol=0.02, atol=1e-30)


def test_not_a_number_in_a_weight(core):
    """bfloat16 keeps it one, with any of its bits; int8 refuses it."""
    nan = np.array([[0x7F800001, 0xFFFFFFFF, 0x7FC00000]], np.uint32).view(np.float32)
    assert np.isnan(core.pack(nan, dtype="bfloat16").unpack()).all()
    largest = np.array([[np.finfo(np.float32).max, np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(core.pack(largest, dtype="bfloat16").unpack(), [[np.inf, np.inf, -np.inf]])
    for bad in (nan, largest):
        with pytest.raises(InvalidValue, match="weight: expected finite values"):
            core.pack(bad, dtype="int8")
        with pytest.raises(InvalidValue, match="gate: expected finite values"):
            core.pack(np.ones_like(bad), dtype="int8", gate=bad)


def test_leading_axes(core):
    values = Values(5, "float32")
    packed, x = core.pack(values.real(8, 6)), values.real(2, 3, 8)
    assert core.packed_linear(x, packed).shape == (2, 3, 6)
    assert core.packed_linear(x[0, 0], packed).shape == (6,)
    scores, ids, lse = core.linear_top_k(x, packed, 2, lse=True)
    assert (scores.shape, ids.shape, lse.shape) == ((2, 3, 2), (2, 3, 2), (2, 3))


WRONG = [
    ("pack", {"dtype": "int8", "group": 6}, InvalidValue, "group"),
    ("pack", {"dtype": "int8", "group": 2}, InvalidValue, "group"),
    ("pack", {"dtype": "bfloat16", "group": 8}, InvalidValue, "group"),
    ("pack", {"dtype": "int8", "group": 65540}, InvalidValue, "group"),
    ("pack", {"dtype": "float64"}, InvalidType, "weight"),
    ("pack", {"dtype": "int8", "weight": np.ones((8, 4))}, InvalidType, "weight"),
    ("pack", {"gate": np.ones((4, 8), np.float32)}, InvalidValue, "gate"),
    ("packed_linear", {"gate_bias": np.ones(4, np.float32)}, InvalidValue, "gate_bias"),
    ("packed_linear", {"x": np.ones((2, 7), np.float32)}, InvalidValue, "x"),
    ("packed_linear", {"x": np.ones((2, 8))}, InvalidType, "x"),
    ("packed_linear", {"x": np.float32(1)}, InvalidType, "x"),
    ("packed_linear", {"x": np.ones((), np.float32)}, InvalidValue, "x"),
    ("packed_linear", {"residual": np.ones(4, np.float32)}, InvalidValue, "residual"),
    ("linear_top_k", {"x": np.ones((2, 7), np.float32)}, InvalidValue, "x"),
    ("linear_top_k", {"bias": np.ones(5, np.float32)}, InvalidValue, "bias"),
    ("linear_top_k", {"weight": "gated"}, InvalidValue, "weight"),
]


@pytest.mark.parametrize("name, wrong, error, named", WRONG, ids=[f"{name}{i}" for i, (name, *_) in enumerate(WRONG)])
def test_what_does_not_go_together_is_refused(core, name, wrong, error, named):
    weight, x = np.ones((8, 4), np.float32), np.ones((2, 8), np.float32)
    good = {
        "pack": {"weight": weight}, "packed_linear": {"x": x, "weight": core.pack(weight)},
        "linear_top_k": {"x": x, "weight": core.pack(weight), "k": 1},
    }[name]  # fmt: skip
    wrong = {key: core.pack(weight, gate=weight) if isinstance(value, str) and value == "gated" else value for key, value in wrong.items()}
    getattr(core, name)(**good)
    with pytest.raises(error, match=f"^{named}: expected .*, got "):
        getattr(core, name)(**{**good, **wrong})


def test_a_packed_weight_is_made_by_pack_alone(core):
    with pytest.raises((InvalidType, TypeError)):
        _core.PackedWeight()
    assert isinstance(core.pack(np.ones((8, 4), np.float32)), reference.PackedWeight)


@compiled_alone
@pytest.mark.parametrize("name", ["shape", "dtype", "gated", "group", "nbytes"])
def test_what_a_packed_weight_knows_cannot_be_changed(name):
    """Its memory is read by it."""
    packed = _core.pack(np.ones((8, 4), np.float32))
    with pytest.raises(AttributeError):
        setattr(packed, name, getattr(packed, name))


@compiled_alone
def test_the_twins_weight_is_no_kernels_weight():
    with pytest.raises(InvalidType, match="weight: expected a PackedWeight of the compiled pack"):
        _core.packed_linear(np.ones((1, 2), np.float32), reference.pack(np.ones((2, 2), np.float32)))


@compiled_alone
def test_its_memory_goes_with_it():
    """Two hundred of 4 MB, one after the other."""
    program = """
import numpy as np
from mini_tfm import _core
def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
weight = np.ones((1024, 1024), np.float32)
_core.pack(weight)
before = peak()
for _ in range(200):
    _core.packed_linear(weight[:3], _core.pack(weight))
print(peak() - before)
"""
    assert int(in_a_process(program).stdout) < 20_000


@compiled_alone
def test_weights_that_come_and_go_keep_their_numbers():
    """Small ones share a block of memory, which goes with the last of them; large ones have one of their own."""
    program = """
import numpy as np
from mini_tfm import _core
rng, alive = np.random.default_rng(0), {}
def in_use():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
for step in range(300):
    shape = [(7, 9), (300, 400), (64, 1000), (2100, 1100)][step % 4]
    w = rng.integers(-3, 4, shape).astype(np.float32)
    alive[step] = w[:2].copy(), _core.pack(w)
    for old in rng.choice(list(alive), min(3, len(alive)), replace=False):
        assert (alive[old][1].unpack()[:2] == alive[old][0]).all()
        if len(alive) > 12:
            del alive[old]
before, many = in_use(), [_core.pack(np.ones((512, 512), np.float32)) for _ in range(200)]
full = in_use()
del many
print(full - before, in_use() - before)
"""
    try:
        open("/proc/self/status").close()
    except OSError:
        pytest.skip("no /proc here")
    taken, left = map(float, in_a_process(program).stdout.split())
    assert 195 < taken < 260 and left < 40  # MB, of 200
