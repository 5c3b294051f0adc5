"""The average of several models of one run, which often does better than the last of them (arXiv 1706.03762, section 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..checkpoint.models import save_model
from ..data.checks import integers
from ..errors import InvalidType, InvalidValue
from ..lora import check_not_packed
from ..transformer import Checkpoint, load_checkpoint
from .run_folder import checkpoints


def average_models(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes into `out` the model whose every weight is the mean of those in `folders`; returns the folders.

    Sums in float64. All must have the same configuration, tokenizer and memory; `out` must not hold a model yet. Adapters are merged
    first, since the mean of two products is not the product of the means: the new model has none.
    Raises InvalidValue naming the first folder that is of another kind, FileProblem for one that cannot be read.
    """
    if isinstance(folders, str | Path):
        raise InvalidType(f"folders: expected a list of folders, got {folders!r}; last_checkpoints(run, n) returns those of a run")
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise InvalidValue("folders: expected at least one")
    if any((Path(out) / name).exists() for name in ("config.json", "model.safetensors")):
        raise InvalidValue(f"out: {out} holds a model already; give another folder")
    first = _without_adapters(paths[0])
    total = {name: weight.astype(np.float64) for name, weight in first.model.weights.items()}
    for path in paths[1:]:
        other = _without_adapters(path)
        if fault := _difference(first, other):
            raise InvalidValue(f"folders: {path} differs from {paths[0]}: {fault}")
        for name, weight in other.model.weights.items():
            total[name] += weight
    for name, weight in first.model.weights.items():
        first.model.weights[name] = (total[name] / len(paths)).astype(weight.dtype)  # not into it: it may be a file, mapped
    save_model(out, first.model, tokenizer=first.tokenizer, memory_text=first.memory_text, new=True)
    return paths


def _without_adapters(path: Path) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    check_not_packed(checkpoint.model)
    checkpoint.model.merge_lora()
    return checkpoint


def last_checkpoints(run: str | Path, n: int) -> list[Path]:
    """The newest `n` folders checkpoint-<step> of a run (see `save_total_limit`); oldest first."""
    [n] = integers(n=n)
    found = checkpoints(run)
    if len(found) < n:
        raise InvalidValue(f"{run}: expected at least {n} folders checkpoint-<step>, found {len(found)}; train with save_total_limit={n}")
    return found[-n:]


def _difference(one: Checkpoint, other: Checkpoint) -> str | None:
    """Why two models cannot be averaged; None if they can."""
    a, b = one.model.config.to_dict(), other.model.config.to_dict()
    for name in sorted(a):
        if a[name] != b.get(name):
            return f"{name} is {b.get(name)}, expected {a[name]}"
    shapes = ({name: weight.shape for name, weight in each.model.weights.items()} for each in (one, other))
    expected, got = shapes
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            return f"{name} has shape {got.get(name)}, expected {expected.get(name)}"
    if one.memory_text != other.memory_text:
        return f"its memory is {other.memory_text}, expected {one.memory_text}"
    files = [each.tokenizer.files() if each.tokenizer is not None else {} for each in (one, other)]
    return "its tokenizer differs" if files[0] != files[1] else None
