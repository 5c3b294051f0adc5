"""Turns the fields of an options class (see `mini_tfm.options.option`) into options of a command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..options import About, about, kinds

C = TypeVar("C", bound=Callable[..., Any])


def options_of(kind: type, names: Iterable[str] = (), *, keeps: bool = False, **changes: Mapping[str, Any]) -> Callable[[C], C]:
    """A decorator that adds an option to a command for each field of `kind`, or only for the fields in `names`.

    Name, type, default, unit and help come from the field. keeps: an option that is not given is None and keeps its earlier
    value. changes: by field, different arguments of `click.option`; `flag` is the option's name, such as --max-grad-norm.
    """
    chosen = [field for field in dataclasses.fields(kind) if (field.name in names if names else about(field).cli)]

    def decorate(command: C) -> C:
        for field in reversed(chosen):
            attributes = {**_attributes(field, about(field), keeps), **changes.get(field.name, {})}
            flag = attributes.pop("flag", "--" + field.name.replace("_", "-"))
            command = click.option(flag, field.name, **attributes)(command)
        return command

    return decorate


def values_of(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The command's options that are fields of `kind`."""
    return {field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options}


def _attributes(field: dataclasses.Field, limits: About, keeps: bool) -> dict[str, Any]:
    default = field.default
    if limits.read is not None:
        read = _read_by_itself(str(field.type))
        return {**read, "metavar": limits.unit, "help": limits.help + (" Can be repeated." if "multiple" in read else "")}
    if kinds(field)[0] == "bool":
        return {"is_flag": True, "default": None if keeps else default, "help": limits.help}
    return {
        "type": _type(field, limits),
        "default": None if keeps else default,
        "show_default": str(default) if keeps and default is not None else True,
        "metavar": limits.unit,
        "help": limits.help,
    }


def _read_by_itself(kind: str) -> dict[str, Any]:
    """Of a field that has a way to be read: several values, lists as JSON, or "true", "false" or a word."""
    if kind.startswith("bool"):
        words = {"false": False, "true": True}
        read = lambda context, parameter, value: words.get(value, value)  # noqa: E731
        return {"type": click.Choice([*words, "never"]), "default": "false", "show_default": True, "callback": read}
    if kind.startswith("tuple[tuple"):
        return {"type": _Json()}
    several = lambda context, parameter, value: list(value) or None  # noqa: E731
    return {"type": int if kind.startswith("tuple[int") else str, "multiple": True, "callback": several}


class _Json(click.ParamType):
    name = "json"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"expected JSON, such as [[3], [4, 5]]: {error}", parameter, context)


def _type(field: dataclasses.Field, limits: About) -> Any:
    if limits.path:
        is_folder = limits.unit == "DIR"
        return click.Path(path_type=Path, file_okay=not is_folder, dir_okay=is_folder)
    return {"int": int, "float": float}.get(kinds(field)[0], str)
