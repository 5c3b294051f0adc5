"""Numbers that the data classes take: Python's or NumPy's, kept as Python's, because a state is saved as JSON."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import InvalidValue, shown
from ..options import LARGEST

MOST = 2**31 - 1  # of a count, and of an id: arrays of so many are beyond what is meant


def integers(least: int = 1, most: int = MOST, **values: Any) -> list[int]:
    """The values as int. Raises one InvalidValue that names every value that is no integer, or not within the limits."""
    limit = f" and at most {most}" if most < LARGEST else ""
    faults = [
        f"{name}: expected an integer of at least {least}{limit}, got {shown(value)}"
        for name, value in values.items()
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most
    ]
    if faults:
        raise InvalidValue("; ".join(faults))
    return [int(value) for value in values.values()]


def large(least: int = 0, **values: Any) -> list[int]:
    """As `integers`, for seeds and steps, which make no array."""
    return integers(least, LARGEST, **values)


def number(value: Any) -> float | int:
    """The value as Python's number; NaN if it is none, or too large for a float: that is within no limits."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        as_float = float(value)
    except OverflowError:
        return math.nan
    return int(value) if isinstance(value, numbers.Integral) else as_float
