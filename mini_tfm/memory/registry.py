"""Finds strategies, and makes them from a line of text.

A strategy has the name of its entry point in the group `mini_tfm`. pluggy loads its plugin when it is first asked for, and no other:
names come from the packages' metadata. A plugin that cannot be imported, or a package whose metadata cannot be read, costs one
warning and nothing else.
"""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from numbers import Number
from typing import Any, NamedTuple

import pluggy

from ..errors import InvalidType, InvalidValue, MiniTfmError, PluginError, shown
from ..options import plain
from . import hookspecs
from .base import Memory
from .stack import Stack
from .text import check_bools, members_of, options_of, signature_of, text_of
from .validate import check_spec, with_message

BUILT_IN = "mini_tfm_plugins."
IN_PROCESS = "registered in this process"


class PluginWarning(UserWarning):
    """A plugin could not be loaded; everything else works."""


class Point(NamedTuple):
    """An entry point, with its distribution ("name version") and that one's summary: all that is known without an import."""

    name: str
    value: str
    distribution: str
    about: str
    entry: metadata.EntryPoint

    @property
    def owner(self) -> str:
        return f"{self.name} ({self.distribution})"

    @property
    def is_built_in(self) -> bool:
        return self.value.startswith(BUILT_IN)


class _Registry:
    """pluggy's manager, the factories that hooks registered, and what failed to load."""

    def __init__(self) -> None:
        self.plugins = pluggy.PluginManager("mini_tfm")
        self.plugins.add_hookspecs(hookspecs)
        self.factories: dict[str, Callable[..., Memory]] = {}
        self.owners: dict[str, str] = {}  # strategy -> "entry point (distribution version)"
        self.failed: dict[str, str] = {}
        self.unreadable: set[str] = set()  # packages, once warned of

    def points(self) -> dict[str, Point]:
        """By name. Of two with the same name the built-in one wins, else the first distribution by name."""
        found: dict[str, Point] = {}
        for point in self._all_points():
            found.setdefault(point.name, point)
        return found

    def _all_points(self) -> list[Point]:
        found, seen = [], set[str]()
        for package in metadata.distributions():
            try:
                points = [each for each in package.entry_points if each.group == hookspecs.ENTRY_POINT_GROUP]
                if not points:
                    continue
                name, version = package.metadata["Name"], package.version
                if not name:
                    raise InvalidValue("its metadata has no name")
                about = package.metadata["Summary"] or ""
            except Exception as error:  # somebody else's package must not stop ours
                self._left_out(package, error)
                continue
            if (same := re.sub(r"[-_.]+", "-", name).lower()) in seen:
                continue  # an older one behind it on the path
            seen.add(same)
            found += [Point(each.name, each.value, f"{name} {version}", about, each) for each in points]
        return sorted(found, key=lambda point: (not point.is_built_in, point.distribution, point.value))

    def _left_out(self, package: metadata.Distribution, error: Exception) -> None:
        """Warns of a package whose metadata cannot be read, once."""
        where = str(getattr(package, "_path", package))  # all that is known of a package without a name
        if where not in self.unreadable:
            self.unreadable.add(where)
            message = f"package {where}: its entry points cannot be read, and it is left out: {type(error).__name__}: {error}"
            warnings.warn(message, PluginWarning, stacklevel=2)

    def load(self, name: str) -> None:
        """Imports the plugin of entry point `name` and runs its hook, once."""
        if name in self.failed or self.plugins.get_plugin(name) is not None:
            return
        point, *others_of_name = [point for point in self._all_points() if point.name == name]
        for other in others_of_name:
            message = f"memory plugin {other.owner} is left out: {point.owner} has that name"
            warnings.warn(message, PluginWarning, stacklevel=2)
        found: dict[str, Callable[..., Memory]] = {}

        def register(strategy: str, factory: Callable[..., Memory]) -> None:
            _check_registration(strategy, factory)
            found[strategy] = factory

        try:
            module = point.entry.load()
            self.plugins.register(module, name)
            others = [plugin for plugin in self.plugins.get_plugins() if plugin is not module]
            self.plugins.subset_hook_caller("register_memories", others)(register=register)
            if not found:
                raise InvalidValue("it registers no strategy: a function register_memories(register) marked @hookimpl must call register")
        except BaseException as error:  # SystemExit and all: somebody else's module must not stop ours
            if (plugin := self.plugins.get_plugin(name)) is not None:
                self.plugins.unregister(plugin)
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failed[name] = f"{type(error).__name__}: {error}"
            message = f"memory plugin {point.owner} could not be loaded and is left out: {self.failed[name]}"
            warnings.warn(message, PluginWarning, stacklevel=2)
            return
        points = self.points()
        for strategy, factory in found.items():
            # Whichever is loaded first, a name means its own plugin; one module may be the plugin of several names.
            if strategy in points and points[strategy].value != point.value:
                message = f"memory {strategy!r} of plugin {point.owner} is left out: it is the name of another plugin"
                warnings.warn(message, PluginWarning, stacklevel=2)
                continue
            self.register(strategy, factory, point.owner)

    def register(self, name: str, factory: Callable[..., Memory], owner: str) -> None:
        if name in self.factories:
            warnings.warn(f"memory {name!r} of plugin {owner} is left out: {self.owners[name]} has that name", PluginWarning, stacklevel=3)
            return
        self.factories[name], self.owners[name] = factory, owner

    def factory(self, name: str) -> Callable[..., Memory]:
        points: Mapping[str, Point] = {}
        if name not in self.factories and name in (points := self.points()):
            self.load(name)
        if name in self.factories:
            return self.factories[name]
        if name in self.failed:
            raise PluginError(f"memory {name!r}: its plugin could not be loaded: {self.failed[name]}")
        if name in points:
            offered = ", ".join(sorted(strategy for strategy, owner in self.owners.items() if owner == points[name].owner))
            raise PluginError(
                f"memory {name!r}: the plugin of that name offers only {offered}; a memory is found by its name if an entry point has it"
            )
        raise _unknown(name)


def _unknown(name: str) -> InvalidValue:
    if name == "none":
        return InvalidValue("memory: 'none' is no strategy; where no memory is wanted, give None")
    known = list_memories()
    close = difflib.get_close_matches(name, known, 1)
    return InvalidValue(
        f"memory: expected an installed strategy ({', '.join(known)}), got {shown(name)}"
        + (f"; did you mean {close[0]!r}?" if close else "; `mini-tfm plugins list` shows what is installed")
    )


def _check_registration(name: Any, factory: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise InvalidValue(f"name: expected letters, digits, _ and -, a letter first, got {shown(name)}")
    if not callable(factory):
        raise InvalidType(f"factory: expected a Memory class or a callable that returns a Memory, got {shown(factory)}")


_registry = _Registry()


def register_memory(name: str, factory: Callable[..., Memory]) -> None:
    """Registers a strategy for this process, without a package: notebooks, tests, experiments."""
    _check_registration(name, factory)
    _registry.factories[name], _registry.owners[name] = factory, IN_PROCESS


def list_memories() -> list[str]:
    """Names of all installed strategies. Imports no plugin."""
    return sorted({*_registry.points(), *_registry.factories})


def list_plugins() -> dict[str, dict[str, Any]]:
    """`describe_memory` of every installed strategy, as far as it imports nobody else's code: then options are None, and about is the
    package's summary."""
    points, found = _registry.points(), {}
    for name in sorted({*points, *_registry.factories}):
        if name in _registry.factories or points[name].is_built_in:
            found[name] = describe_memory(name)
        else:
            found[name] = {"name": name, "plugin": points[name].owner, "about": points[name].about, "options": None}
    return found


def check_names(text: str) -> None:
    """Raises InvalidValue unless every memory of `text` is one of an installed strategy. Imports no plugin."""
    known = list_memories()
    for name in (member.partition(":")[0].strip() for member in members_of(text)):
        if name not in known:
            raise _unknown(name)


def describe_memory(name: str) -> dict[str, Any]:
    """Where a strategy comes from, its first docstring line and its options with their defaults."""
    factory = _registry.factory(name)
    options = {
        p.name: "required" if p.default is p.empty else p.default
        for p in _signature(name, factory).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    }
    doc = (inspect.getdoc(factory) or "").partition("\n")[0]
    return {"name": name, "plugin": _registry.owners[name], "about": doc, "options": options}


def memory(name: str, **options: Any) -> Memory:
    """An installed strategy by name, with its options; or a whole specification in one line.

        memory("window", size=512, sinks=4)
        memory("window:size=512,sinks=4+store:path=notes.mdb")

    Raises InvalidValue for an unknown name or option (naming those there are), PluginError where the
    plugin itself fails.
    """
    if not isinstance(name, str):
        raise InvalidType(f"memory: expected the name of a strategy, got {type(name).__name__}")
    parts = members_of(name)
    if len(parts) > 1:
        if options:
            raise InvalidValue(f"memory: expected the options of a stack inside its text, got {shown(name)} and {sorted(options)}")
        return Stack([memory(part) for part in parts])
    name, _, text = parts[0].partition(":")
    return _make(name.strip(), text, options)


def memory_of_file(text: str, where: str) -> Memory:
    """The memory that the file `where` names: only a built-in one, or one of this process, and only if it keeps nothing on disk.

    What a file names is never imported or opened. Raises InvalidValue that says how to ask for it.
    """
    points = _registry.points()
    try:
        members = members_of(text)
    except InvalidValue as error:
        raise with_message(error, f"{where}: {error}") from error
    for name in (member.partition(":")[0].strip() for member in members):
        is_built_in = name in points and points[name].is_built_in
        if not is_built_in and _registry.owners.get(name) != IN_PROCESS:
            break
    else:
        try:
            made = memory(text)
        except MiniTfmError as error:
            raise with_message(error, f"{where}: {error}") from error
        if not any(member.durable for member in (made.members if isinstance(made, Stack) else [made])):
            return made
    said = text if len(text) <= 200 else text[:200] + "..."
    raise InvalidValue(
        f"{where}: names the memory {said!r}, and a file may only name a built-in memory that opens no file. If you trust it, ask for it:"
        f" memory={said!r}, or --memory {said!r} on the command line; --memory none goes without"
    )


def _signature(name: str, factory: Callable[..., Memory]) -> inspect.Signature:
    try:
        return signature_of(factory)
    except (TypeError, ValueError) as error:
        raise PluginError(f"memory {name!r} ({_registry.owners[name]}): the options of its factory cannot be read: {error}") from error


def _make(name: str, text: str, options: dict[str, Any]) -> Memory:
    factory = _registry.factory(name)
    signature = _signature(name, factory)
    given = options_of(name, text, signature)
    if both := sorted(set(given) & set(options)):
        raise InvalidValue(f"memory {name!r}: option {both[0]!r} is given twice")
    check_bools(name, options, signature)
    options = {**given, **{option: plain(value) if isinstance(value, Number) else value for option, value in options.items()}}
    for option, value in options.items():
        if isinstance(value, int) and abs(value) >= 10**40:
            raise InvalidValue(f"memory {name!r}: {option}: expected a number of at most 40 digits, got {shown(value)}")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if not takes_any and (unknown := sorted(set(options) - set(signature.parameters))):
        close = difflib.get_close_matches(unknown[0], signature.parameters, 1)
        raise InvalidValue(
            f"memory {name!r}: unknown option {shown(unknown[0])}; it takes {', '.join(signature.parameters) or 'none'}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    asked = [p for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    missing = [p.name for p in asked if p.default is p.empty and p.name not in options]
    if missing:
        raise InvalidValue(f"memory {name!r}: option {missing[0]!r} is required, as in '{name}:{missing[0]}=...'")
    try:
        made = factory(**options)
    except MiniTfmError as error:
        raise with_message(error, f"memory {name!r}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(f"memory {name!r} ({_registry.owners[name]}) failed in __init__: {type(error).__name__}: {error}") from error
    if not isinstance(made, Memory):
        raise PluginError(f"memory {name!r} ({_registry.owners[name]}): expected a Memory, its factory returned {type(made).__name__}")
    made.name, made.origin = name, _registry.owners[name]
    made.text = text_of(name, options, signature)
    check_spec(made)
    return made
