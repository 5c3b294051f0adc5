"""Training with products of bfloat16: what is rounded and what is not, and that a run is the same run when it is resumed."""

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import tiny_model

from mini_tfm import ops
from mini_tfm.autodiff import Var, backward
from mini_tfm.data.batches import fields
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference.linear import in_bfloat16
from mini_tfm.train import Trainer

sys.path.insert(0, str(Path(__file__).parent))  # `import runs`

from runs import data, make_trainer, state


def normal(*shape):
    return np.random.default_rng([7, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layer_rounds_its_factors_forward_and_backward(transposed):
    x, w, b, dy = normal(3, 5, 24), normal(9, 24) if transposed else normal(24, 9), normal(9), normal(3, 5, 9)
    leaves = [Var(value) for value in (x, w, b)]
    with ops.bfloat16_products():
        y = ops.linear(*leaves, transposed=transposed)
    backward(y, grads=[dy])  # outside: what was computed within stays what it was
    rx, rw, rdy = (in_bfloat16(value).astype(np.float64) for value in (x, w.T if transposed else w, dy))
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(y.value, rx @ rw + b, **near)
    np.testing.assert_allclose(leaves[0].grad, rdy @ rw.T, **near)
    dw = rx.reshape(-1, 24).T @ rdy.reshape(-1, 9)
    np.testing.assert_allclose(leaves[1].grad, dw.T if transposed else dw, **near)
    np.testing.assert_allclose(leaves[2].grad, dy.reshape(-1, 9).sum(0), **near)  # not a product: not rounded
    assert all(leaf.grad.dtype == np.float32 for leaf in leaves)


def test_it_ends_where_the_block_does():
    x, w = normal(4, 33), normal(33, 6)
    plain = ops.linear(x, w)
    with ops.bfloat16_products():
        rounded = ops.linear(x, w)
        with ops.bfloat16_products(False):
            assert_same_bits(ops.linear(x, w), plain)
        assert_same_bits(ops.linear(x, w), rounded)
    assert_same_bits(ops.linear(x, w), plain)
    assert (rounded != plain).any()
    with pytest.raises(ZeroDivisionError), ops.bfloat16_products():
        raise ZeroDivisionError
    assert_same_bits(ops.linear(x, w), plain)


def test_an_output_layer_in_it():
    x, w, targets = normal(12, 16), normal(16, 30), np.arange(12)
    given = Var(x), Var(w)
    with ops.bfloat16_products():
        backward(ops.linear_cross_entropy(*given, targets))
    again = Var(in_bfloat16(x)), Var(in_bfloat16(w))
    with ops.bfloat16_products():
        backward(ops.linear_cross_entropy(*again, targets))
    plain = Var(x), Var(w)
    backward(ops.linear_cross_entropy(*plain, targets))
    for of_given, of_rounded, of_plain in zip(given, again, plain, strict=True):
        assert_same_bits(of_given.grad, of_rounded.grad)
        assert (of_given.grad != of_plain.grad).any()


def test_float64_has_none():
    with ops.bfloat16_products(), pytest.raises(InvalidType, match="bfloat16: expected False, or float32"):
        ops.linear(np.ones((2, 3)), np.ones((3, 4)))
    with pytest.raises(InvalidValue, match="bfloat16: expected False, or a model in float32, got True and a model in float64"):
        Trainer(tiny_model("pre norm", dtype=np.float64), bfloat16=True)
    with pytest.raises(InvalidValue, match="bfloat16: expected True or False, got 1"):
        Trainer(tiny_model("pre norm"), bfloat16=1)


def losses_of(**options):
    trainer = make_trainer(**options)
    return [trainer.step(*fields(batch)) for batch in map(data().batch, range(12))]


def test_losses_are_near_those_of_float32_and_not_the_same():
    plain, rounded = losses_of(), losses_of(bfloat16=True)
    np.testing.assert_allclose(rounded, plain, rtol=5e-3)
    assert (np.array(rounded) != plain).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_resumed_run_is_the_same_run(recompute, tmp_path):
    options = {"bfloat16": True, "recompute": recompute, "total_steps": 8, "early_stopping_patience": None}
    whole = make_trainer(**options)
    whole.fit(data(), 8, progress=False)
    half = make_trainer(**options)
    half.fit(data(), 4, folder=tmp_path, progress=False)
    resumed = Trainer.resume(tmp_path)
    assert resumed.options.bfloat16 is True
    resumed.fit(data(), 8, progress=False)
    assert resumed.losses == whole.losses and state(resumed) == state(whole)


def test_evaluation_rounds_as_training_does():
    batch, options = data().batch(0), {"dropout": 0.0, "source_dropout": 0.0, "gradient_accumulation_steps": 1}
    plain, rounded = (make_trainer(bfloat16=bfloat16, **options).evaluate(batch) for bfloat16 in (False, True))
    assert plain != rounded == make_trainer(bfloat16=True, **options).step(*fields(batch))
