"""What a Trainer and a fit may be told, checked before any work: all faults in one error."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InvalidValue
from .optimizer import SCHEDULES

# name: lowest value, value it must stay below (None: any), whole number, may be None
_Limit = tuple[float, float | None, bool, bool]

_TRAINER: dict[str, _Limit] = {
    "learning_rate": (0, None, False, False),
    "warmup_steps": (0, None, True, False),
    "weight_decay": (0, None, False, False),
    "eps": (0, None, False, False),
    "dropout": (0, 1, False, False),
    "attention_dropout": (0, 1, False, True),
    "ff_dropout": (0, 1, False, True),
    "label_smoothing": (0, 1, False, False),
    "source_dropout": (0, 1, False, False),
    "seed": (0, None, True, False),
    "clip": (0, None, False, True),
    "total_steps": (1, None, True, True),
    "bptt_segments": (1, None, True, True),
    "gradient_accumulation_steps": (1, None, True, False),
    "early_stopping_patience": (1, None, True, True),
    "early_stopping_threshold": (0, None, False, False),
}

_FIT: dict[str, _Limit] = {
    "validate_every": (1, None, True, False),
    "validation_batches": (1, None, True, False),
    "save_every": (1, None, True, True),
    "save_total_limit": (0, None, True, False),
}

# What `fit` does when it was never told otherwise. A saved run remembers what it was told.
FIT_DEFAULTS: dict[str, Any] = {
    "validate_every": 100,
    "validation_batches": 4,
    "save_every": None,
    "save_total_limit": 0,
    "save_best": False,
    "jsonl_log": None,
    "csv_log": None,
    "tensorboard_log": None,
}


def check_trainer_options(options: dict[str, Any]) -> None:
    """Raises InvalidValue naming every option at fault."""
    faults = _out_of_limits(options, _TRAINER)
    betas = options.get("betas")
    if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        faults.append(f"betas: expected two numbers of at least 0 and below 1, got {betas!r}")
    for name in ("recompute", "bfloat16"):
        if not isinstance(options.get(name, False), bool):
            faults.append(f"{name}: expected True or False, got {options[name]!r}")
    if options.get("schedule") not in SCHEDULES:
        faults.append(f"schedule: expected one of {', '.join(SCHEDULES)}, got {options.get('schedule')!r}")
    if faults:
        raise InvalidValue("Trainer: " + "; ".join(faults))


def check_fit_options(options: dict[str, Any]) -> None:
    """Raises InvalidValue naming every option at fault."""
    faults = [f"unknown option {name!r}" for name in options if name not in FIT_DEFAULTS]
    faults += _out_of_limits(options, _FIT)
    if not isinstance(options.get("save_best"), bool):
        faults.append(f"save_best: expected True or False, got {options.get('save_best')!r}")
    for name in ("jsonl_log", "csv_log", "tensorboard_log"):
        if not isinstance(options.get(name), str | None) or options.get(name) == "":
            faults.append(f"{name}: expected a path or None, got {options.get(name)!r}")
    if faults:
        raise InvalidValue("fit: " + "; ".join(faults))


def _out_of_limits(options: dict[str, Any], limits: dict[str, _Limit]) -> list[str]:
    faults = []
    for name, (low, high, whole, optional) in limits.items():
        value: Any = options.get(name)
        if value is None and optional:
            continue
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not low <= value < (high or math.inf):
            kind = "an integer" if whole else "a number"
            faults.append(f"{name}: expected {kind} of at least {low}{f' and below {high}' if high else ''}, got {value!r}")
    return faults
