"""AdamW on arenas, and the schedules: values worked out by hand or by a plain transcription."""

import math

import numpy as np
import pytest

from mini_tfm.autodiff import backward
from mini_tfm.errors import InvalidValue
from mini_tfm.memory.base import Param
from mini_tfm.train.optimizer import AdamW, schedule_factor
from mini_tfm.transformer import Transformer


@pytest.mark.parametrize(
    ("schedule", "step", "warmup", "total", "expected"),
    [
        ("constant", 0, 0, None, 1.0),
        ("constant", 999, 0, 10, 1.0),
        ("constant", 0, 4, None, 0.25),
        ("constant", 3, 4, None, 1.0),
        ("cosine", 0, 0, 100, 1.0),
        ("cosine", 25, 0, 100, 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 50, 0, 100, 0.5),
        ("cosine", 100, 0, 100, 0.0),
        ("cosine", 1000, 0, 100, 0.0),
        ("cosine", 0, 10, 110, 0.1),
        ("cosine", 9, 10, 110, 1.0),
        ("cosine", 10, 10, 110, 1.0),
        ("cosine", 60, 10, 110, 0.5),
        ("cosine", 5, 0, None, 1.0),
        ("cosine", 9, 10, 5, 1.0),  # a warm-up longer than the run
        ("cosine", 10, 10, 10, 1.0),
        ("linear", 0, 0, 100, 1.0),
        ("linear", 25, 0, 100, 0.75),
        ("linear", 4, 10, 110, 0.5),
        ("linear", 60, 10, 110, 0.5),
        ("linear", 110, 10, 110, 0.0),
        ("linear", 999, 10, 110, 0.0),
        ("linear", 5, 0, None, 1.0),
        ("inverse_sqrt", 0, 0, 10, 1.0),
        ("inverse_sqrt", 3, 0, 10, 0.5),
        ("inverse_sqrt", 1, 4, None, 0.5),
        ("inverse_sqrt", 3, 4, None, 1.0),
        ("inverse_sqrt", 15, 4, None, 0.5),
    ],
)
def test_schedules(schedule, step, warmup, total, expected):
    assert schedule_factor(schedule, step, warmup, total) == pytest.approx(expected, abs=1e-12)


def test_inverse_sqrt_is_the_papers_schedule_up_to_its_peak():
    """arXiv 1706.03762, eq. 3, whose steps are counted from 1."""
    d, warmup = 512, 40
    paper = [d**-0.5 * min(step**-0.5, step * warmup**-1.5) for step in range(1, 400)]
    found = [schedule_factor("inverse_sqrt", step - 1, warmup, None) for step in range(1, 400)]
    np.testing.assert_allclose(found, np.array(paper) / max(paper), rtol=1e-12)


def adamw_transcribed(weights, gradients, factors, decays, *, steps, lr, betas, eps, clip):
    """arXiv 1711.05101, algorithm 2, one array at a time, with clipping by the norm of all of them."""
    m, v = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    weights = {name: w.copy() for name, w in weights.items()}
    for t in range(1, steps + 1):
        grads = {name: g * t for name, g in gradients.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        scale = min(1.0, clip / norm) if clip is not None else 1.0
        for name, w in weights.items():
            g = grads[name] * scale
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g * g
            hat_m, hat_v = m[name] / (1 - betas[0] ** t), v[name] / (1 - betas[1] ** t)
            rate = lr * factors[name]
            weights[name] = w - rate * (hat_m / (np.sqrt(hat_v) + eps) + decays[name] * w)
    return weights


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_steps_are_those_of_adamw(clip):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 4), "a.bias": (4,), "memory.x.gate": (2,), "memory.x.rows": (2, 4), "encoder.positions.weight": (5, 4)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gradients = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    params = {
        "memory.x.gate": Param((2,), lr_factor=10.0, weight_decay=False),
        "memory.x.rows": Param((2, 4), lr_factor=0.5, weight_decay=True),
    }
    factors = {**dict.fromkeys(shapes, 1.0), "memory.x.gate": 10.0, "memory.x.rows": 0.5}
    decays = {**dict.fromkeys(shapes, 0.0), "a.weight": 0.1, "memory.x.rows": 0.1}

    optimizer = AdamW(weights, params, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for t in range(1, 6):
        optimizer.zero_grad()
        for name, g in gradients.items():
            optimizer.grads[name] += g * t
        norm = optimizer.step(0.01, clip)
        assert norm == pytest.approx(t * math.sqrt(sum((g**2).sum() for g in gradients.values())), rel=1e-12)
    expected = adamw_transcribed(weights, gradients, factors, decays, steps=5, lr=0.01, betas=(0.8, 0.95), eps=1e-8, clip=clip)
    for name in shapes:
        np.testing.assert_allclose(optimizer.weights[name], expected[name], rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_norms_biases_and_positions_do_not_decay(positions):
    from mini_tfm.config import Config

    model = Transformer(Config(vocab_size=9, d_model=8, n_heads=2, d_ff=8, positions=positions, max_positions=8))
    before = {name: w.copy() + 1 for name, w in model.weights.items()}
    optimizer = AdamW(before, {}, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.5)
    optimizer.zero_grad()
    optimizer.step(0.1, 1.0)  # no gradient at all: only decay moves a weight
    moved = {name for name, w in optimizer.weights.items() if (w != before[name]).any()}
    kept = {name for name in before if "norm" in name or name.endswith("bias") or "position" in name or "relative" in name}
    assert kept and moved == set(before) - kept
    np.testing.assert_allclose(optimizer.weights["embedding.weight"], before["embedding.weight"] * (1 - 0.05), rtol=1e-6)


def test_weights_and_gradients_are_views_of_the_arenas():
    weights = {"b": np.arange(3.0), "a": np.ones((2, 2))}
    optimizer = AdamW(weights, {}, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
    assert all(np.shares_memory(w, optimizer.arena) for w in optimizer.weights.values())
    np.testing.assert_array_equal(optimizer.weights["b"], weights["b"])
    leaves = optimizer.leaves
    assert leaves is optimizer.leaves, "they are made once"
    backward((leaves["a"] * 2).sum(), (leaves["b"] * 3).sum())
    np.testing.assert_array_equal(optimizer.grads["a"], np.full((2, 2), 2.0))
    assert optimizer.grad.sum() == 4 * 2 + 3 * 3
    optimizer.zero_grad()
    assert not optimizer.grad.any() and not optimizer.grads["b"].any()


def test_the_order_of_the_weights_does_not_matter():
    weights = {name: np.full((2, 2), float(i)) for i, name in enumerate("dcab")}
    one, other = (AdamW(given, {}, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1) for given in (weights, dict(sorted(weights.items()))))
    np.testing.assert_array_equal(one.arena, other.arena)


@pytest.mark.parametrize("state", [{}, {"m": np.zeros(4)}, {"m": np.zeros(4), "v": np.zeros(5)}, {"m": np.zeros((2, 2)), "v": np.zeros(4)}])
def test_a_state_that_does_not_fit_is_refused(state):
    optimizer = AdamW({"a": np.ones((2, 2))}, {}, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
    with pytest.raises(InvalidValue, match=r"optimizer state '[mv]': expected 4 numbers"):
        optimizer.load_state(state, 3)
    assert optimizer.step_count == 0
