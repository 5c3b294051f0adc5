"""Checks of training with a strategy: its gradients, its parameters, computing again, and going on from what was saved."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np

from ..autodiff import backward, value_of
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..memory.run import members_of, memory_parameters, parameter_prefixes
from ..train import Trainer
from .trial import TOLERANCE, CheckFailed, Trial, leaves

# Training


def gradients_are_right(trial: Trial) -> None:
    """The gradient of a segment's loss, given the state before it, agrees with finite differences."""
    if not trial.model.config.has_decoder:
        return
    segments = trial.segments(2, 3)
    reader = trial.reader(2)
    for tokens in segments[:2]:
        reader.read(tokens)
    _compare_gradient(trial, segments[2:], reader.run.dump())
    if all(member.spec.gradient != "none" for member in members_of(trial.make())):
        _compare_gradient(trial, segments, None)


def _compare_gradient(trial: Trial, segments: np.ndarray, state: dict | None) -> None:
    model = trial.model
    w = leaves(model)
    backward(trial.loss(segments, w, state))
    rng = np.random.default_rng(0)
    of_memory = [name for name in w if name.startswith("memory.")]
    for names in (list(w), *([name] for name in of_memory)):
        direction = {name: rng.standard_normal(w[name].shape) for name in names}
        got = sum(float((w[n].grad * d).sum()) for n, d in direction.items() if w[n].grad is not None)

        def loss_at(step: float, direction: dict = direction) -> float:
            return float(trial.loss(segments, {n: x + step * direction.get(n, 0.0) for n, x in model.weights.items()}, state))

        for step in STEPS:
            expected = _slope(loss_at, step)
            if abs(got - expected) <= 1e-5 * abs(expected) + ROUNDING / step:
                break
        else:
            what = "all weights" if len(names) == len(w) else names[0]
            through = f"through {len(segments)} segments" if state is None else "of one segment"
            raise CheckFailed(f"gradient {through}, along {what}: expected {expected:.6g} by finite differences, got {got:.6g}")


STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # of finite differences: the smaller, the more a loss may curve, and the more rounding there is
ROUNDING = 1e-13  # of a loss, in float64


def _slope(f: Callable[[float], float], step: float) -> float:
    """f'(0) by Richardson's extrapolation of two central differences, whose error is of order step^4."""
    wide, narrow = ((f(h) - f(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * narrow - wide) / 3


def gradient_is_as_declared(trial: Trial) -> None:
    """With spec.gradient "none" no gradient flows from a segment to earlier ones; otherwise some does."""
    if not trial.model.config.has_decoder:
        return
    grads = []
    segments = trial.segments(1, 3)
    for detach_at in (None, 2):
        w = leaves(trial.model)
        backward(trial.loss(segments, w, detach_at=detach_at))
        grads.append(np.concatenate([x.grad.ravel() for x in w.values() if x.grad is not None]))
    declared = {member.spec.gradient for member in members_of(trial.make())} - {"none"}
    differ = grads[0].shape != grads[1].shape or np.max(np.abs(grads[0] - grads[1])) > TOLERANCE
    if declared and not differ:
        message = "expected other gradients when they are cut before the last segment, got the same"
        raise CheckFailed(f"spec.gradient is {min(declared)!r}: {message}")
    if not declared and differ:
        raise CheckFailed("spec.gradient is 'none': expected no gradient from one segment to another, got some")


def parameters_learn(trial: Trial) -> None:
    """Every parameter of the strategy gets a gradient, and training moves it."""
    memory = trial.make()
    names = list(memory_parameters(memory, trial.model.config, trial.model.dtype))
    if not names or not trial.model.config.has_decoder:
        return
    trainer = Trainer(trial.model, memory, learning_rate=1e-2, weight_decay=0.0, schedule="constant")
    before = {name: trial.model.weights[name].copy() for name in names}
    tokens = np.moveaxis(trial.segments(2, 4), 0, 1)
    for _ in range(2):
        trainer.step(tokens if trial.model.config.has_encoder else None, tokens)
    for name in names:
        if np.array_equal(before[name], trial.model.weights[name]):
            raise CheckFailed(f"parameter {_short(memory, name)!r}: expected training to move it, got no change in 2 steps")


def _short(memory: Memory, name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in parameter_prefixes(memory) if name.startswith(prefix)), name)


def recomputing_gives_the_same(trial: Trial) -> None:
    """Recomputed segments give the same gradients as kept segments, bit for bit."""
    if not trial.model.config.has_decoder:
        return
    tokens, grads = np.moveaxis(trial.segments(2, 3), 0, 1), []
    for recompute in (False, True):
        single = trial.like(dtype=np.float32)
        trainer = Trainer(single.model, single.make(), recompute=recompute)
        trainer.step(tokens if single.model.config.has_encoder else None, tokens)
        grads.append(trainer.optimizer.grad)
    kept, again = grads
    if not np.array_equal(kept, again):
        raise CheckFailed(f"expected the same gradients, got a difference of {np.max(np.abs(kept - again)):.3g}")


def training_resumes(trial: Trial) -> None:
    """Saved and resumed training continues with the same bits."""
    if not trial.model.config.has_decoder:
        return
    single = trial.like(dtype=np.float32)
    trainer = Trainer(single.model, single.make(), learning_rate=1e-2)
    tokens = np.moveaxis(trial.segments(2, 3), 0, 1)
    source = tokens if single.model.config.has_encoder else None
    trainer.step(source, tokens)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(f"{folder}/model")
        text = trainer.memory.text if trainer.memory is not None else None
        again = Trainer.resume(f"{folder}/model", make_memory(text) if text else single.make())
    losses = [(value_of(trainer.step(source, tokens)), value_of(again.step(source, tokens))) for _ in range(2)]
    if any(a != b for a, b in losses):
        raise CheckFailed(f"expected the losses {[a for a, _ in losses]} after resuming, got {[b for _, b in losses]}")
