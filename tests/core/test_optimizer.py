"""AdamW on Python floats, and the sum that gradient clipping needs."""

import math

import numpy as np
from core import naive
from core.cases import Values, layouts, scales, seeds, sizes_or_none
from helpers import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st


@given(
    seed=seeds, n=sizes_or_none, layout=layouts, scale=scales, step=st.sampled_from([1, 2, 1000, 10**7]),
    lr=st.sampled_from([0.0, 1e-3, 0.5]), weight_decay=st.sampled_from([0.0, 0.1]), grad_scale=st.sampled_from([1.0, 0.25]),
)  # fmt: skip
def test_adamw(core, dtype, seed, n, layout, scale, step, lr, weight_decay, grad_scale):
    values = Values(seed, dtype)
    param, m, v = values.real(n), values.real(n, scale=scale), values.positive(n, scale=scale**2)
    grad = Values(seed + 1, dtype, layout).real(n, scale=scale)
    options = {"lr": lr, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": weight_decay, "step": step, "grad_scale": grad_scale}
    expected = naive.adamw(param, grad, m, v, **options)
    terms = [np.abs(param) + np.abs(expected[0] - param), np.abs(m) + np.abs(grad), v + grad.astype(np.float64) ** 2]
    core.adamw(param, grad, m, v, **options)
    for actual, wanted, largest in zip((param, m, v), expected, terms, strict=True):
        assert_close(actual, wanted, "adamw", terms=largest, dtype=dtype)


def test_the_first_step_is_lr_long(core, dtype):
    """Bias correction: whatever the gradient's size, param moves by lr against its sign."""
    param, grad = np.zeros(4, dtype), np.array([1e-3, -5.0, 700.0, -1e-2], dtype)
    core.adamw(param, grad, np.zeros(4, dtype), np.zeros(4, dtype), lr=0.01, beta1=0.9, beta2=0.999, eps=0.0, weight_decay=0.0, step=1)
    assert_close(param, -0.01 * np.sign(grad), "adamw", k=4, terms=0.01)


def test_decay_is_decoupled(core, dtype):
    """With no gradient the parameter shrinks by lr * weight_decay and the moments stay at zero."""
    param, m, v = np.full(3, 2.0, dtype), np.zeros(3, dtype), np.zeros(3, dtype)
    core.adamw(param, np.zeros(3, dtype), m, v, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.5, step=1)
    assert_close(param, np.full(3, 2.0 * 0.95), "adamw")
    assert not m.any() and not v.any()


@given(seed=seeds, n=sizes_or_none, layout=layouts, scale=scales)
def test_sum_of_squares(core, dtype, seed, n, layout, scale):
    x = Values(seed, dtype, layout).real(3, n, scale=scale)
    total = core.sum_of_squares(x)
    assert type(total) is float
    assert_close(total, math.fsum(value * value for value in x.reshape(-1).tolist()), "sum_of_squares", k=x.size)


def test_sum_of_squares_is_accumulated_in_double(core):
    """A million small squares beside a large one, and squares that float32 cannot hold."""
    x = np.full(1_000_001, 1e-3, np.float32)
    x[0] = 1e3
    assert_close(core.sum_of_squares(x), 1e6 + 1e6 * float(np.float32(1e-3)) ** 2, "sum_of_squares", k=x.size)
    assert_close(core.sum_of_squares(np.full(2, 1e30, np.float32)), 2 * float(np.float32(1e30)) ** 2, "sum_of_squares")


def test_twenty_steps_go_downhill(core, dtype):
    param, m, v = np.full(5, 3.0, dtype), np.zeros(5, dtype), np.zeros(5, dtype)
    before = core.sum_of_squares(param)
    for step in range(1, 21):
        core.adamw(param, 2 * param, m, v, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=step)
    assert core.sum_of_squares(param) < before / 4


def test_gradients_scaled_beforehand_are_the_same(core):
    values = Values(0, "float64")
    grad, arrays = values.real(9), [values.positive(9) for _ in range(3)]
    given_scale, scaled = [a.copy() for a in arrays], [a.copy() for a in arrays]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 3}
    core.adamw(given_scale[0], grad, *given_scale[1:], **options, grad_scale=0.5)
    core.adamw(scaled[0], grad * 0.5, *scaled[1:], **options)
    assert_same_bits(given_scale, scaled)
