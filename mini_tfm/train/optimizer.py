"""AdamW on flat arenas: one array each for parameters, gradients and moments, grouped by learning rate factor and decay."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _core
from ..autodiff import Var
from ..errors import InvalidValue
from ..memory.base import Param


def schedule_factor(schedule: str, step: int, warmup_steps: int, total_steps: int | None) -> float:
    """The factor of the learning rate at `step` (counted from 0): linear warm-up to 1, then the schedule.

    "cosine" decays to 0 at `total_steps` (arXiv 1608.03983, eq. 5, without restarts), "linear" in a straight line; both
    stay at 1 where `total_steps` is None. "inverse_sqrt" falls with the square root of the step (arXiv 1706.03762,
    eq. 3, in which d_model sets the peak; here it is 1, after the warm-up).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "inverse_sqrt":
        return math.sqrt(max(1, warmup_steps) / (step + 1))
    if schedule == "constant" or total_steps is None:
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101) and gradient clipping by the global norm.

    weights: arrays by name, those to train; they are moved into the arena, `self.weights` has views of it. Norms, biases and
    tables of positions do not decay; `params` says how the strategies' own parameters are treated.
    """

    def __init__(
        self, weights: Mapping[str, np.ndarray], params: Mapping[str, Param], *, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        self.betas, self.eps, self.step_count = betas, eps, 0
        treated: dict[tuple[float, float], list[str]] = {}
        for name, weight in sorted(weights.items()):  # the arena's order must not depend on where the weights came from
            param = params.get(name)
            decays = param.weight_decay if param else weight.ndim > 1 and "position" not in name and "relative" not in name
            factor = param.lr_factor if param else 1.0
            treated.setdefault((factor, weight_decay if decays else 0.0), []).append(name)
        size = sum(w.size for w in weights.values())
        dtype = next(iter(weights.values())).dtype
        self.arena, self.grad, self.m, self.v = (np.zeros(size, dtype) for _ in range(4))
        self.groups: list[tuple[slice, float, float]] = []
        start = 0
        for (factor, decay), names in sorted(treated.items()):
            n = sum(weights[name].size for name in names)
            self.groups.append((slice(start, start + n), factor, decay))
            start += n
        self.shapes = {name: weights[name].shape for _, names in sorted(treated.items()) for name in names}
        self._make_views()
        for name, view in self.weights.items():
            view[...] = weights[name]

    def _make_views(self) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self.grads: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in self.shapes.items():
            part = slice(start, start := start + math.prod(shape))
            self.weights[name], self.grads[name] = self.arena[part].reshape(shape), self.grad[part].reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("weights", "grads", "leaves")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled: its views are of its own arena."""
        self.__dict__.update(state)
        self._make_views()

    def take(self, weights: dict[str, np.ndarray]) -> None:
        """Makes `weights` views of the arena again, which has their values then: where one was replaced, or all of them were moved
        into the arena of another trainer. Raises InvalidValue where one is missing, or not of the shape it had.
        """
        replaced = {name: weights.get(name) for name, view in self.weights.items() if weights.get(name) is not view}
        for name, given in replaced.items():
            view = self.weights[name]
            if given is None or np.shape(given) != view.shape:
                got = "none" if given is None else f"shape {np.shape(given)}"
                raise InvalidValue(f"model.weights[{name!r}]: expected shape {view.shape}, as it had when the Trainer was made, got {got}")
            replaced[name] = np.array(given) if np.may_share_memory(given, self.arena) else given
        for name, given in replaced.items():
            self.weights[name][...] = given
            weights[name] = self.weights[name]

    @functools.cached_property
    def leaves(self) -> dict[str, Var]:
        """The weights as Vars whose gradients are added into the arena: the same at every step."""
        return {name: Var(weight, self.grads[name]) for name, weight in self.weights.items()}

    def zero_grad(self) -> None:
        self.grad[:] = 0

    def grad_norm(self) -> float:
        return math.sqrt(_core.sum_of_squares(self.grad))

    def step(self, learning_rate: float, clip: float | None, norm: float | None = None) -> float:
        """One update; returns the norm of the gradient before clipping. norm: the same, if it is known."""
        norm = self.grad_norm() if norm is None else norm
        scale = clip / norm if clip is not None and norm > clip else 1.0
        self.step_count += 1
        for part, factor, decay in self.groups:
            _core.adamw(
                self.arena[part],
                self.grad[part],
                self.m[part],
                self.v[part],
                lr=learning_rate * factor,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                weight_decay=decay,
                step=self.step_count,
                grad_scale=scale,
            )
        return norm

    def state(self) -> dict[str, np.ndarray]:
        return {"m": self.m, "v": self.v}

    def load_state(self, state: Mapping[str, np.ndarray], step_count: int) -> None:
        for name, own in self.state().items():
            if name not in state or state[name].shape != own.shape:
                raise InvalidValue(f"optimizer state {name!r}: expected {own.size} numbers, got {getattr(state.get(name), 'shape', None)}")
            own[:] = state[name]
        self.step_count = step_count
