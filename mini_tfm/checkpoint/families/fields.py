"""Fields of somebody else's `config.json`, read with a type and a default; everything wrong or unsupported is told at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ...config import LIMITS, Config
from ...errors import InvalidValue, shown

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def their_activation(ours: str, usual: str = "") -> str:
    """Its name in a `config.json`: `usual`, where that is the same function."""
    return usual if ACTIVATIONS.get(usual) == ours else next(theirs for theirs, one in ACTIVATIONS.items() if one == ours)


class Fields:
    """The fields of one file, `where`. A value of a wrong type, or one that `only` does not list, is kept as a fault."""

    def __init__(self, about: Mapping[str, Any], where: str):
        self.about, self.where = about, where
        self.faults: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self.about.get(name) is not None

    def integer(self, name: str, default: int | None = None, least: int = -1 << 63, most: int = 1 << 63) -> Any:
        """The bounds are those that keep what is done with it here from failing; `Config` knows those of a model."""
        within = f" from {least} to {most}" if most < 1 << 63 else f" of at least {least}" if least > -1 << 63 else ""
        return self._read(name, default, lambda value: type(value) is int and least <= value <= most, "an integer" + within)

    def number(self, name: str, default: float | None = None) -> Any:
        return self._read(name, default, lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max, "a number")

    def positive(self, name: str, default: float) -> Any:
        fits = lambda value: type(value) in (int, float) and 1e-6 <= value <= 1e12  # noqa: E731
        return self._read(name, default, fits, "a number from 1e-6 to 1e12")

    def layers(self, name: str, default: int) -> Any:
        return self.integer(name, default, 0, LIMITS["n_decoder_layers"])

    def flag(self, name: str, default: bool) -> bool:
        return self._read(name, default, lambda value: isinstance(value, bool), "true or false")

    def activation(self, name: str, default: str) -> str:
        given = self._read(name, default, lambda value: isinstance(value, str), "text")
        if given not in ACTIVATIONS:
            self.faults.append(f"field {name!r}: {given!r:.80} is not supported; {', '.join(sorted(ACTIVATIONS))} are")
        return ACTIVATIONS.get(given, "relu")

    def first_id(self, name: str, default: int) -> Any:
        """A token id, or the first of several."""
        value = self.about.get(name)
        if isinstance(value, list) and value and all(type(each) is int for each in value):
            return value[0]
        return self.integer(name, default)

    def only(self, name: str, *allowed: Any, why: str = "") -> None:
        """A field that may be missing or null, or have one of these values; all else is not supported."""
        value = self.about.get(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in allowed):
            shown = " or ".join(map(repr, allowed)) or "none"
            self.faults.append(f"field {name!r}: {value!r:.80} is not supported, only {shown}" + (f" ({why})" if why else ""))

    def config(self, make: Callable[[], Config]) -> Config:
        """The Config that `make` makes of these fields. Raises InvalidValue with every fault."""
        made = None
        try:
            made = make()  # reads more fields
        except InvalidValue as error:
            if not self.faults:  # else it is about a stand-in for what is wrong
                self.faults.append(str(error))
        if self.faults or made is None:
            raise InvalidValue(f"{self.where}: " + "; ".join(self.faults))
        return made

    def _read(self, name: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.about.get(name)
        if value is None:
            if default is None:
                self.faults.append(f"field {name!r} is missing")
            return 1 if default is None else default
        if not fits(value):
            self.faults.append(f"field {name!r}: expected {expected}, got {shown(value)}")
            return 1 if default is None else default
        return value
