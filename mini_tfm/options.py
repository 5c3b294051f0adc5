"""Options as data: a frozen dataclass that checks itself; each field has its default, limits and help.

train/options.py  generate/options.py   the options
cli/options.py                          the same fields as options of the command line
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import numbers
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar

from .errors import InvalidType, InvalidValue, shown

LARGEST = 2**128 - 1  # of an integer: the longest seed; no count is near it, and each can be written as JSON
F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class About:
    """The limits of a field's value, beside its type, and its meaning.

    help: one or two sentences, for the docstring and the command line. hint: added to the error about a wrong value.
    path: the str is a path. unit: of the value, as shown on the command line. cli: whether it is an option there.
    read: makes of a value of any other type what is kept, or raises ValueError; `expected` says in words what it takes.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    hint: str = ""
    path: bool = False
    unit: str | None = None
    cli: bool = True
    read: Callable[[Any], Any] | None = None
    expected: str = ""


def option(default: Any, help: str, **about: Any) -> Any:
    """A field of an options class; `about` holds the arguments of `About`."""
    return dataclasses.field(default=default, metadata={"about": About(help, **about)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of option classes, whose fields are made by `option`.

    A field is annotated `bool`, `int`, `float`, `str` or `tuple[float, float]`, or has a way to be read, with `| None` where None
    is allowed. NumPy's numbers become Python's, lists tuples, paths absolute. Raises InvalidValue that lists every field at fault.
    """

    owner: ClassVar[str] = ""  # errors begin with it

    def __post_init__(self) -> None:
        faults = []
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            try:
                value = _read(field, value)
            except ValueError:
                much = " of at most 128 bits" if type(value) is int and abs(value) > LARGEST else ""
                faults.append(f"{field.name}: expected {_expected(field)}{much}, got {shown(value)}")
                continue
            object.__setattr__(self, field.name, value)
        if faults:
            raise InvalidValue(f"{self.owner}: " + "; ".join(faults))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options from keyword arguments. Raises InvalidType for an unknown name, InvalidValue for wrong values."""
        cls.check_names(given)
        return cls(**given)

    @classmethod
    def check_names(cls, given: Mapping[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise InvalidType(f"{cls.owner}: unknown option {shown(name)}{meant}; it takes {', '.join(known)}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed. Raises the same errors as `of`."""
        return self.of({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def about(field: dataclasses.Field) -> About:
    return field.metadata["about"]


def kinds(field: dataclasses.Field) -> list[str]:
    """The parts of a field's annotation: "int | None" -> ["int", "None"]."""
    return (field.type.__name__ if isinstance(field.type, type) else str(field.type)).split(" | ")


def takes(options: type[Options], *, keeps: bool = False) -> Callable[[F], F]:
    """Decorates a function whose `**options` are fields of an options class: adds them all to its signature and docstring.

    keeps: a field that is not given keeps the value it had before, so its default is shown as None.
    """

    def decorate(function: F) -> F:
        parameters = list(inspect.signature(function).parameters.values())
        ordinary = [each for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        ours = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None if keeps else field.default, annotation=field.type)
            for field in dataclasses.fields(options)
        ]
        function.__signature__ = inspect.Signature([*ordinary, *ours])  # type: ignore[attr-defined]
        function.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\n" + "\n".join(_described(options))
        return function

    return decorate


def _described(options: type[Options]) -> Iterator[str]:
    """One line per field: its name, default and help."""
    for field in dataclasses.fields(options):
        yield textwrap.fill(f"{field.name} ({field.default!r}): {about(field).help}", 110, subsequent_indent="    ")


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, a path as text, a list or an array as a tuple; anything else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # a fraction that is no float
            return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", 0):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def _read(field: dataclasses.Field, value: Any) -> Any:
    """A field's value as it is kept. Raises ValueError."""
    limits = about(field)
    if value is not None and limits.read is not None:
        return limits.read(value)
    if not _fits(field, value):
        raise ValueError
    return os.path.abspath(value) if value is not None and limits.path else value  # a run is resumed from any working directory


def _fits(field: dataclasses.Field, value: Any) -> bool:
    kind, limits = kinds(field)[0], about(field)
    if value is None:
        return "None" in kinds(field)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return type(value) is int and abs(value) <= LARGEST and _is_within(limits, value)
    if kind == "float":
        return _is_number(value) and _is_within(limits, value)
    if kind.startswith("tuple"):
        n = kind.count("float")
        return isinstance(value, tuple) and len(value) == n and all(_is_number(each) and _is_within(limits, each) for each in value)
    return isinstance(value, str) and value != "" and (not limits.choices or value in limits.choices)


def _is_number(value: Any) -> bool:
    """Also False for an integer that is no float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_within(limits: About, value: float) -> bool:
    """Also False for NaN and infinity."""
    return (
        -math.inf < value < math.inf
        and (limits.at_least is None or value >= limits.at_least)
        and (limits.above is None or value > limits.above)
        and (limits.at_most is None or value <= limits.at_most)
        and (limits.below is None or value < limits.below)
    )


def _expected(field: dataclasses.Field) -> str:
    """A field's allowed values in words: "an integer of at least 1 or None"."""
    kind, limits = kinds(field)[0], about(field)
    if limits.expected:
        wanted = limits.expected
    elif kind == "bool":
        wanted = "True or False"
    elif limits.choices:
        wanted = f"one of {', '.join(limits.choices)}"
    elif kind == "str":
        wanted = "a path" if about(field).path else "text"
    else:
        wanted = {"int": "an integer", "float": "a number"}.get(kind, "two numbers")
        bounds = {"of at least": limits.at_least, "above": limits.above, "at most": limits.at_most, "below": limits.below}
        wanted += " " + " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
    wanted = wanted.rstrip() + (" or None" if "None" in kinds(field) else "")
    return wanted + (f" ({limits.hint})" if limits.hint else "")
