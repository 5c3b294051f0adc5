"""Turns the fields of an options class (see `mini_tfm.options.option`) into options of a command."""

from __future__ import annotations

import dataclasses
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
    if kinds(field)[0] == "bool":
        return {"is_flag": True, "default": None if keeps else default, "help": limits.help}
    return {
        "type": _type(field, limits),
        "default": None if keeps else default,
        "show_default": str(default) if keeps and default is not None else True,
        "metavar": limits.unit,
        "help": limits.help,
    }


def _type(field: dataclasses.Field, limits: About) -> Any:
    if limits.path:
        is_folder = limits.unit == "DIR"
        return click.Path(path_type=Path, file_okay=not is_folder, dir_okay=is_folder)
    return {"int": int, "float": float}.get(kinds(field)[0], str)
