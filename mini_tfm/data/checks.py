"""Numbers that the data classes take: Python's or NumPy's, kept as Python's, because a state is saved as JSON."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import InvalidValue, shown


def integers(least: int = 1, **values: Any) -> list[int]:
    """The values as int. Raises one InvalidValue that names every value that is no integer, or below `least`."""
    faults = [
        f"{name}: expected an integer of at least {least}, got {shown(value)}"
        for name, value in values.items()
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least
    ]
    if faults:
        raise InvalidValue("; ".join(faults))
    return [int(value) for value in values.values()]


def number(value: Any) -> float | int:
    """The value as Python's number; NaN if it is none, which is within no limits."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    return int(value) if isinstance(value, numbers.Integral) else float(value)
