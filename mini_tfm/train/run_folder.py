"""A run on disk: the model's own folder, with two more files from which training resumes.

    config.json model.safetensors ...   the model after the last saved step, which `mt.load` reads
    training.json                       options, step, losses: everything that is not an array
    training.safetensors                the optimizer's moments
    best/                               the model of the best validation, with `save_best`
    checkpoint-<step>/                  the models of the last saves, `save_total_limit` of them

Everything else a step depends on is a function of (seed, step): there is no random state to save.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..checkpoint.folder import OpenFolder
from ..checkpoint.models import save_model
from ..checkpoint.safetensors import encode_safetensors
from ..data.batches import Batch, fields
from ..errors import FileProblem, InvalidValue, TrainingError
from ..memory.base import Memory
from ..options import Options
from ..transformer import load_checkpoint
from .options import FitOptions, TrainerOptions
from .run import Run

R = TypeVar("R", bound=Run)

TRAINING_FILE = "training.json"
OPTIMIZER_FILE = "training.safetensors"
BEST = "best"
CHECKPOINT = "checkpoint-"
MAX_TRAINING_BYTES = 1 << 28  # a loss of each step is in it

# The fields of `training.json`, with the values of those that a folder of 0.1.0 lacks.
_FIELDS: dict[str, Any] = {
    "step_count": 0,
    "tokens_seen": 0,
    "losses": [],
    "validations": [],
    "best": None,
    "seconds": 0.0,
    "data_state": None,
    "batch_digest": None,
    "fit_options": {},
}
_NEEDED = ("options", "step_count", "tokens_seen", "losses")
# Of 0.1.0: every version has saved them, so a file without one of them is spoilt. A later option takes its default.
_ALWAYS_SAVED = (
    *("learning_rate", "schedule", "warmup_steps", "total_steps", "weight_decay", "betas", "eps", "clip", "dropout"),
    *("label_smoothing", "source_dropout", "bptt_segments", "seed"),
)
_OPTIONS: dict[str, type[Options]] = {"options": TrainerOptions, "fit_options": FitOptions}


def save_run(trainer: Run, folder: str | Path) -> None:
    """Writes the whole run into `folder`: after a crash, the old files or the new ones.

    Raises TrainingError, and leaves the folder as it is, when a weight is not finite: a run could not resume from it.
    """
    check_finite(trainer)
    about = {
        "options": trainer.options.to_dict(),
        **{name: getattr(trainer, name) for name in _FIELDS},
        "fit_options": trainer.fit_options.to_dict(),
    }
    extra = {
        TRAINING_FILE: json.dumps(about).encode(),
        OPTIMIZER_FILE: b"".join(bytes(part) for part in encode_safetensors(trainer.optimizer.state())),
    }
    save_model(folder, trainer.model, tokenizer=trainer.tokenizer, memory_text=_text_of(trainer.memory), extra_files=extra)


def save_weights(trainer: Run, folder: Path) -> None:
    """Writes the model alone."""
    check_finite(trainer)
    save_model(folder, trainer.model, tokenizer=trainer.tokenizer, memory_text=_text_of(trainer.memory))


def check_finite(trainer: Run) -> None:
    if not np.isfinite(trainer.optimizer.arena).all():
        bad = [name for name, weight in trainer.model.weights.items() if not np.isfinite(weight).all()]
        raise TrainingError(
            f"step {trainer.step_count}: weights are not finite ({', '.join(bad[:3])}) and not saved; the last save stays as it"
            " was: lower learning_rate, or add warmup_steps"
        )


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders checkpoint-<step> inside `folder`, oldest step first."""
    found = [path for path in Path(folder).glob(CHECKPOINT + "*") if re.fullmatch(CHECKPOINT + "[0-9]+", path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def keep_checkpoint(trainer: Run, folder: Path, limit: int) -> None:
    """Saves the model of this step and keeps the newest limit - 1 of earlier steps; those of later steps, from an interrupted run, stay."""
    save_weights(trainer, folder / f"{CHECKPOINT}{trainer.step_count}")
    earlier = [path for path in checkpoints(folder) if _step_of(path) <= trainer.step_count]
    for path in earlier[:-limit]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise FileProblem(f"{path}: an old checkpoint cannot be removed: {error.strerror or error}") from error


def _text_of(memory: Memory | None) -> str | None:
    return None if memory is None else memory.text


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(CHECKPOINT))


def load_run(kind: Callable[..., R], folder: str | Path, memory: Memory | None, communicator: Any) -> R:
    """The trainer that `save_run` wrote. Raises FileProblem or InvalidValue naming the file or field at fault."""
    with OpenFolder(folder, (TRAINING_FILE, OPTIMIZER_FILE)) as opened:  # a save meanwhile must not mix two steps
        checkpoint = load_checkpoint(opened)
        about = _checked(opened.read_json(TRAINING_FILE, MAX_TRAINING_BYTES))
        moments = opened.read_tensors(OPTIMIZER_FILE)
    if memory is not None and memory.text != checkpoint.memory_text:
        raise InvalidValue(
            f"memory: {folder} was trained with {checkpoint.memory_text or 'one made in Python, or none'}, expected the same, got"
            f" {memory.text or memory.name}; to train its model with another memory, start a new run: Trainer(mt.load(folder), memory)"
        )
    memory = memory if memory is not None else checkpoint.memory()
    names = set(checkpoint.model.weights)
    trainer = kind(checkpoint.model, memory, tokenizer=checkpoint.tokenizer, communicator=communicator, **about.pop("options").to_dict())
    if added := sorted(set(trainer.model.weights) - names):
        raise InvalidValue(f"memory: its parameter {added[0]} is not in {folder}; give the memory that it was trained with")
    trainer.optimizer.load_state(moments, about["step_count"])
    for name, value in about.items():
        setattr(trainer, name, value)
    trainer.resumed = True
    return trainer


def _checked(about: dict[str, Any]) -> dict[str, Any]:
    """The fields of a training file, with option objects; refuses a file that `save_run` did not write."""
    faults = [f"field {name!r} is missing" for name in _NEEDED if name not in about]
    faults += [f"unknown field {name!r}" for name in about if name not in _NEEDED and name not in _FIELDS]
    about = {**copy.deepcopy(_FIELDS), "options": {}, **about}
    faults += [
        f"{name}: expected {wanted}, got {_short(about[name])}" for name, (is_good, wanted) in _CHECKS.items() if not is_good(about[name])
    ]
    if not faults and len(about["losses"]) != about["step_count"]:
        faults.append(f"losses: expected {about['step_count']}, as many as steps, got {len(about['losses'])}")
    for name, kind in _OPTIONS.items():
        faults += _option_faults(name, kind, about[name])
    if faults:
        raise InvalidValue(f"{TRAINING_FILE}: " + "; ".join(faults))
    return about | {name: kind.of(about[name]) for name, kind in _OPTIONS.items()}


def _option_faults(name: str, kind: type[Options], given: Any) -> list[str]:
    """Unknown options, and missing ones that every version has saved."""
    if not isinstance(given, dict):
        return [f"{name}: expected a mapping, got {type(given).__name__}"]
    known = [field.name for field in dataclasses.fields(kind)]
    missing = [option for option in _ALWAYS_SAVED if name == "options" and option not in given]
    return [f"unknown option {option!r}" for option in given if option not in known] + [
        f"option {option!r} is missing" for option in missing
    ]


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else type(value).__name__


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_validation(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and _is_count(pair[0]) and isinstance(pair[1], float)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step_count": (_is_count, "an integer of at least 0"),
    "tokens_seen": (_is_count, "an integer of at least 0"),
    "losses": (lambda value: isinstance(value, list) and all(isinstance(loss, float) for loss in value), "a list of numbers"),
    "validations": (lambda value: isinstance(value, list) and all(map(_is_validation, value)), "a list of [step, loss]"),
    "best": (lambda value: value is None or _is_validation(value), "[step, loss] or null"),
    "seconds": (lambda value: isinstance(value, float) and value >= 0, "a number of at least 0"),
    "data_state": (lambda value: isinstance(value, dict | None), "a mapping or null"),
    "batch_digest": (lambda value: isinstance(value, str | None), "text or null"),
}


def digest(batch: Batch) -> str:
    """SHA-256 of a batch: by it a resumed run recognizes its data."""
    sha = hashlib.sha256()
    for values in (*fields(batch), *(() if batch.first is None else (batch.first,))):  # runs of earlier releases have none
        sha.update(b"-" if values is None else repr((values.shape, values.dtype.str)).encode() + np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()
