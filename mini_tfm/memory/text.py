"""Memories as text: `window:size=512,sinks=4+store:path=notes.mdb`, read and written.

A value has the type that its parameter declares, by annotation or default. Text stays text, byte for byte: `1.10` and `1.1` are
two documents. A value in quotes is a Python string, for text with a comma, a plus or a quote in it.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidValue, shown

_STACKED = r"\+(?=[A-Za-z_][\w-]*(?:[:+]|$))"
_QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
MAX_CHARACTERS = 1 << 16
MAX_MEMBERS = 64


def members_of(text: str) -> list[str]:
    """The memories of a stack, each as text. Raises InvalidValue for more than anyone stacks: a file may hold the text."""
    if len(text) > MAX_CHARACTERS:
        raise InvalidValue(f"memory: expected at most {MAX_CHARACTERS} characters, got {len(text)}: {shown(text)}")
    members = _split(text.strip(), _STACKED)
    if len(members) > MAX_MEMBERS:
        raise InvalidValue(f"memory: expected a stack of at most {MAX_MEMBERS} memories, got {len(members)}: {shown(text)}")
    return members


def options_of(name: str, text: str, signature: inspect.Signature) -> dict[str, Any]:
    """`option=value,option=value` as keywords for a factory. Raises InvalidValue naming the option."""
    options: dict[str, Any] = {}
    for part in filter(None, _split(text, ",")):
        option, equals, value = part.partition("=")
        option = option.strip()
        if not equals or not option:
            raise InvalidValue(f"memory {name!r}: expected option=value, got {shown(part)}")
        if option in options:
            raise InvalidValue(f"memory {name!r}: option {shown(option)} is given twice")
        try:
            options[option] = _value(value, _types(signature, option))
        except ValueError as error:
            raise InvalidValue(f"memory {name!r}: {option}: expected {error}, got {shown(value)}") from None
    return options


def with_files_in(folder: str, text: str) -> str:
    """The same memories, but each option `path` names a file in `folder`: what they do leaves the user's own files alone.

    Raises InvalidValue for a memory with `read_only=true`: a new file has nothing to read.
    """
    members, writing, is_read_only = [], [], False
    for number, member in enumerate(members_of(text)):
        name, colon, options = member.partition(":")
        kept, replaced = [], []
        for part in _split(options, ","):
            option, _, value = part.partition("=")
            if option.strip() == "read_only" and value.strip().lower() == "true":
                is_read_only = True
                continue
            kept.append(part)
            if option.strip() == "path":
                part = "path=" + repr(os.path.join(folder, f"{number}-{os.path.basename(_value(value, {str}))}"))
            replaced.append(part)
        writing.append(name + (colon if kept else "") + ",".join(kept))
        members.append(name + colon + ",".join(replaced))
    if is_read_only:
        raise InvalidValue(
            f"memory: {shown(text)} never writes, and the checks read back what they have written to a new file; check the same memory"
            f" without read_only: {'+'.join(writing)}"
        )
    return "+".join(members)


def command_that_trains(text: str, has_encoder: bool) -> list[str]:
    """The command of `mini-tfm` that trains a model of this kind, on text of the user's own, with these memories."""
    kind = [] if has_encoder else ["--n-encoder-layers", "0"]
    written = re.sub(r"read_only\s*=\s*true", "read_only=false", text, flags=re.IGNORECASE)
    return ["train", "--text", "YOUR.txt", *kind, "--memory", written, "--out", "NEW"]


def check_bools(name: str, options: Mapping[str, Any], signature: inspect.Signature) -> None:
    """True is a number to Python, and to nobody else. Raises InvalidValue naming the option."""
    for option, value in options.items():
        wanted = _types(signature, option)
        if isinstance(value, bool) and wanted is not None and bool not in wanted and wanted & {int, float}:
            words = " or ".join(words for kind, words in _WORDS.items() if kind in wanted)
            raise InvalidValue(f"memory {name!r}: {option}: expected {words}, got {value}")


def text_of(name: str, options: Mapping[str, Any], signature: inspect.Signature) -> str | None:
    """The text that makes the same memory again; None where an option has a value that text cannot say."""
    written = []
    for option, value in options.items():
        parameter = signature.parameters.get(option)
        if parameter is not None and value is None and parameter.default is None:
            continue
        for text in (str(value), repr(value)):
            try:
                back = options_of(name, f"{option}={text}", signature)
                stacked = members_of(f"{name}:{option}={text}+x")
            except InvalidValue:
                continue
            if back == {option: value} and type(back[option]) is type(value) and len(stacked) == 2:
                written.append(f"{option}={text}")
                break
        else:
            return None
    text = name + (":" + ",".join(written) if written else "")
    said = {option: value for option, value in options.items() if any(each.startswith(option + "=") for each in written)}
    try:
        return text if options_of(name, text.partition(":")[2], signature) == said else None
    except InvalidValue:
        return None


def signature_of(factory: Callable[..., Any]) -> inspect.Signature:
    """Of a strategy's factory, with annotations as types where their names are known."""
    try:
        return inspect.signature(factory, eval_str=True)
    except Exception:  # an annotation of a plugin may be anything
        return inspect.signature(factory)


def _split(text: str, separator: str) -> list[str]:
    """`text` cut at a separator (a regular expression), but not inside the quotes of a value, as in path='a,b'."""
    parts, start = [], 0
    for cut in re.finditer(rf"=\s*(?:{_QUOTED})|({separator})", text):
        if cut[1] is not None:
            parts.append(text[start : cut.start()])
            start = cut.end()
    return [*parts, text[start:]]


def _types(signature: inspect.Signature, option: str) -> set[Any] | None:
    """The types that a parameter declares, else the type of its default; None where it declares none."""
    parameter = signature.parameters.get(option)
    if parameter is None or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return None
    declared = parameter.annotation
    if declared is parameter.empty:
        return None if parameter.default in (None, parameter.empty) else {type(parameter.default)}
    if typing.get_origin(declared) is typing.Literal:
        return {type(choice) for choice in typing.get_args(declared)}
    alternatives = (
        typing.get_args(declared) if isinstance(declared, types.UnionType) or typing.get_origin(declared) is typing.Union else [declared]
    )
    known = {bool, int, float, str, Path, types.NoneType}
    return set(alternatives) if known.issuperset(alternatives) else None


def _value(text: str, wanted: set[Any] | None) -> Any:
    """`text` as one of the types wanted. Raises ValueError that says what was expected."""
    bare = text.strip()
    if re.fullmatch(_QUOTED, bare) and (wanted is None or wanted & {str, Path}):
        try:
            return _as_text(ast.literal_eval(bare), wanted)
        except (SyntaxError, ValueError):  # a backslash that means nothing, a line break
            raise ValueError("a Python string in the quotes") from None
    if wanted is None:
        return _guess(text)
    for kind, read in _READERS.items():
        # Where text is a possible value, too, something else is only what Python would write the same way.
        if kind in wanted and (value := read(bare)) is not _NO and (not wanted & {str, Path} or repr(value) == text):
            return value
    if wanted & {str, Path}:
        return _as_text(text, wanted)
    raise ValueError(" or ".join(words for kind, words in _WORDS.items() if kind in wanted))


def _guess(text: str) -> Any:
    """For a parameter of no declared type: a number, bool or None if Python would write it so, else text."""
    for read in _READERS.values():
        value = read(text.strip())
        if value is not _NO and text.strip() in (repr(value), repr(value).lower()):
            return value
    return text


def _as_text(text: str, wanted: set[Any] | None) -> Any:
    return Path(text) if wanted is not None and Path in wanted and str not in wanted else text


_NO = object()
_DIGITS = 40  # Python reads thousands, which nothing here could count


def _read_none(text: str) -> Any:
    return None if text.lower() == "none" else _NO


def _read_bool(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), _NO)


def _read_int(text: str) -> Any:
    return int(text) if re.fullmatch(rf"[+-]?[0-9]{{1,{_DIGITS}}}", text) else _NO


def _read_float(text: str) -> Any:
    value = float(text) if re.fullmatch(_NUMBER, text, re.ASCII) else float("inf")
    return value if abs(value) != float("inf") else _NO


_READERS = {types.NoneType: _read_none, bool: _read_bool, int: _read_int, float: _read_float}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "none"}
