"""Which batch each step gets: a mixture of data by weight, and a curriculum of more and more segments."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..errors import InvalidType, InvalidValue, shown
from .batches import Batch
from .checks import MOST, large, number
from .permutation import Permutation

BLOCK_STEPS = 1000  # in each block of steps a part of a mixture has exactly its share


@runtime_checkable
class Data(Protocol):
    """Training data: a batch for each step, a pure function of the step.

    Optional: `state`, plain data that describes everything the batches depend on. A saved run keeps it, and a resumed run
    refuses data with another state.
    """

    def batch(self, step: int) -> Batch: ...


class Mixture:
    """Several kinds of data; the weight of each is its share of the steps.

    parts: name -> (data, weight). In each block of 1,000 steps a part has exactly its share (weights are rounded to a
    thousandth), in an order that is a pure function of (seed, step). A part's own batches come in order, none left out, so
    its epochs stay whole. Raises InvalidType, InvalidValue.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, float]], *, seed: int = 0):
        if not isinstance(parts, Mapping) or not parts:
            raise InvalidType(f"parts: expected a mapping of name -> (data, weight), got {shown(parts)}")
        for name, part in parts.items():
            if not isinstance(part, tuple) or len(part) != 2 or not isinstance(part[0], Data):
                raise InvalidType(f"parts[{name!r}]: expected (data, weight), data with a method batch(step), got {shown(part)}")
            if not 0 < number(part[1]) < float("inf"):
                raise InvalidValue(f"parts[{name!r}]: expected a weight above 0, got {shown(part[1])}")
        [self.seed] = large(seed=seed)
        self.parts = {name: (data, number(weight)) for name, (data, weight) in parts.items()}
        weights = np.array([weight for _, weight in self.parts.values()], np.float64)
        exact = BLOCK_STEPS * weights / weights.sum()
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: BLOCK_STEPS - counts.sum()]] += 1
        if counts.min() < 1:
            raise InvalidValue(f"parts: expected weights of at least a thousandth of their sum, got {weights.tolist()}")
        self._counts, self._turns = counts, functools.lru_cache(2)(self._turns_of_block)

    @property
    def state(self) -> dict[str, Any]:
        parts = {name: {"weight": weight, **_state(data)} for name, (data, weight) in self.parts.items()}
        return {"objective": "mixture", "seed": self.seed, "parts": parts}

    def with_segments(self, n_segments: int, batch_size: int | None = None) -> Mixture:
        """The same mixture with `n_segments` segments per row, and `batch_size` rows if given, in every part."""
        if lacking := [name for name, (data, _) in self.parts.items() if not hasattr(data, "with_segments")]:
            raise InvalidType(f"parts[{lacking[0]!r}]: expected data with a method with_segments, for a curriculum")
        parts = {name: (data.with_segments(n_segments, batch_size), weight) for name, (data, weight) in self.parts.items()}
        return Mixture(parts, seed=self.seed)

    def choice(self, step: int) -> tuple[str, int]:
        """(name of the part, number of its batch) at a step."""
        block, at = divmod(int(step), BLOCK_STEPS)
        turns = self._turns(block)
        chosen = int(turns[at])
        return list(self.parts)[chosen], block * int(self._counts[chosen]) + int((turns[:at] == chosen).sum())

    def _turns_of_block(self, block: int) -> np.ndarray:
        """The number of the part at each step of a block."""
        return np.repeat(np.arange(len(self._counts)), self._counts)[Permutation(BLOCK_STEPS, self.seed, block)(np.arange(BLOCK_STEPS))]

    def batch(self, step: int) -> Batch:
        [step] = large(step=step)
        name, i = self.choice(step)
        return self.parts[name][0].batch(i)


class Curriculum:
    """`data` with a growing number of segments (arXiv 2207.06881, section 4).

    stages: (first step, segments per row), the first at step 0, or (first step, segments per row, rows per batch), so that all
    batches have about as many tokens. Each stage starts `data` from its first batch. Raises InvalidType, InvalidValue.
    """

    def __init__(self, data: Any, stages: Sequence[tuple[int, ...]]):
        if not isinstance(data, Data) or not hasattr(data, "with_segments"):
            raise InvalidType(f"data: expected data with methods batch and with_segments, got {type(data).__name__}")
        stages = list(stages) if isinstance(stages, Sequence) and not isinstance(stages, str) else []
        good = all(
            isinstance(stage, tuple | list) and len(stage) in (2, 3) and all(isinstance(number(n), int) and n <= MOST for n in stage)
            for stage in stages
        )
        firsts = [stage[0] for stage in stages] if good else []
        if not firsts or firsts[0] != 0 or sorted(set(firsts)) != firsts or any(min(stage[1:]) < 1 for stage in stages):
            raise InvalidValue(
                f"stages: expected (first step, segments), the first at step 0, steps going up, segments of at least 1, and rows in the"
                f" same way, if given; got {shown(stages)}"
            )
        self.data = data
        self.stages = [tuple(map(int, stage)) for stage in stages]
        self._of_stage = [data.with_segments(*shape) for _, *shape in self.stages]

    @property
    def state(self) -> dict[str, Any]:
        return {"curriculum": [list(stage) for stage in self.stages], "data": _state(self.data)}

    def stage(self, step: int) -> int:
        """The number of the stage that a step is in."""
        return int(np.searchsorted([first for first, *_ in self.stages], step, side="right")) - 1

    def batch(self, step: int) -> Batch:
        [step] = large(step=step)
        i = self.stage(step)
        return self._of_stage[i].batch(step - self.stages[i][0])


def _state(data: Any) -> dict[str, Any]:
    return dict(getattr(data, "state", None) or {})


def batches_of(name: str, data: Any) -> Callable[[int], Batch]:
    """The function step -> Batch that `data` is, or has. name: of the argument, for the error."""
    batch_of = getattr(data, "batch", data)
    if not callable(batch_of):
        raise InvalidType(f"{name}: expected an object with batch(step), or a function of the step, got {type(data).__name__}")
    return batch_of


def state_of(data: Any) -> dict[str, Any] | None:
    """The state of `data`, or None, as it reads after a save. Raises InvalidType where it is not plain data."""
    state = getattr(data, "state", None)
    if not isinstance(state, dict | None):
        raise InvalidType(f"data: state: expected a mapping or None, got {type(state).__name__}")
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidType(f"data: state: expected plain data, as in JSON: {error}") from error


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """The differences of two states, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        if name.endswith("corpus"):
            yield f"{name} has changed"
        else:
            yield f"{name} was {before!r}, is {now!r}"
