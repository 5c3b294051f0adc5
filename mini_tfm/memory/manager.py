"""Finding strategies, making them from a line of text, and telling whose fault an error is.

Plugins are loaded by pluggy from the entry-point group `mini_tfm`, one when it is asked for: a plugin that
cannot be imported costs one warning and nothing else, and a list of names imports nothing.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pluggy

from ..errors import InvalidType, InvalidValue, MiniTfmError, PluginError
from . import hookspecs
from .base import CONTRACT_VERSION, MERGES, NEEDS, SITES, Memory, MemorySpec
from .stack import Stack


class PluginWarning(UserWarning):
    """A plugin could not be loaded; everything else works."""


class _Registry:
    """pluggy's manager, the factories that hooks registered, and what failed to load."""

    def __init__(self) -> None:
        self.plugins = pluggy.PluginManager("mini_tfm")
        self.plugins.add_hookspecs(hookspecs)
        self.factories: dict[str, Callable[..., Memory]] = {}
        self.owners: dict[str, str] = {}  # strategy -> "entry point (distribution version)"
        self.failed: dict[str, str] = {}

    def entry_points(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)}

    def load(self, name: str) -> None:
        """Imports the plugin of entry point `name` and runs its hook, once."""
        point = self.entry_points()[name]
        if name in self.failed or self.plugins.get_plugin(name) is not None:
            return
        owner = f"{name} ({_distribution(point)})"
        found: dict[str, Callable[..., Memory]] = {}
        try:
            module = point.load()
            self.plugins.register(module, name)
            others = [plugin for plugin in self.plugins.get_plugins() if plugin is not module]
            self.plugins.subset_hook_caller("register_memories", others)(register=found.__setitem__)
            if not found:
                raise InvalidValue("it registers no strategy: no function marked @hookimpl is called register_memories")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and all: somebody else's module must not stop ours
            self.failed[name] = f"{type(error).__name__}: {error}"
            if (plugin := self.plugins.get_plugin(name)) is not None:
                self.plugins.unregister(plugin)
            warnings.warn(
                f"memory plugin {owner} could not be loaded and is left out: {self.failed[name]}", PluginWarning, stacklevel=2
            )
            return
        for strategy, factory in found.items():
            self.register(strategy, factory, owner)

    def register(self, name: str, factory: Callable[..., Memory], owner: str) -> None:
        if name in self.factories:
            warnings.warn(
                f"memory {name!r} of plugin {owner} is left out: {self.owners[name]} has that name", PluginWarning, stacklevel=3
            )
            return
        self.factories[name], self.owners[name] = factory, owner

    def factory(self, name: str) -> Callable[..., Memory]:
        if name not in self.factories:
            points = self.entry_points()
            for point in [name] if name in points else points:
                self.load(point)
        if name in self.factories:
            return self.factories[name]
        if name in self.failed:
            raise PluginError(f"memory {name!r}: its plugin could not be loaded: {self.failed[name]}")
        known = list_memories()
        close = difflib.get_close_matches(name, known, 1)
        raise InvalidValue(
            f"memory: expected an installed strategy ({', '.join(known)}), got {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "; `mini-tfm plugins list` shows what is installed")
        )


def _distribution(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"


_registry = _Registry()


def register_memory(name: str, factory: Callable[..., Memory]) -> None:
    """Registers a strategy for this process, without a package: notebooks, tests, experiments."""
    if not callable(factory):
        raise InvalidType(f"factory: expected a Memory class or a callable that gives one, got {factory!r}")
    _registry.factories[name], _registry.owners[name] = factory, "registered in this process"


def list_memories() -> list[str]:
    """Names of all installed strategies. Imports no plugin."""
    return sorted({*_registry.entry_points(), *_registry.factories})


def describe_memory(name: str) -> dict[str, Any]:
    """Where a strategy comes from, its first docstring line and its options with their defaults."""
    factory = _registry.factory(name)
    options = {
        p.name: "required" if p.default is p.empty else p.default
        for p in inspect.signature(factory).parameters.values()
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
    parts = re.split(r"\+(?=[A-Za-z_][\w-]*(?:[:+]|$))", name)
    if len(parts) > 1:
        if options:
            raise InvalidValue(f"memory: give the options of a stack inside its text, got {name!r} and {sorted(options)}")
        return Stack([memory(part) for part in parts])
    name, _, text = name.partition(":")
    given = _parse_options(name, text)
    if both := sorted(set(given) & set(options)):
        raise InvalidValue(f"memory {name!r}: option {both[0]!r} is given twice")
    return _make(name.strip(), {**given, **options})


def _parse_options(name: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        option, equals, value = part.partition("=")
        if not equals or not option.strip():
            raise InvalidValue(f"memory {name!r}: expected option=value, got {part!r}")
        if option.strip() in options:
            raise InvalidValue(f"memory {name!r}: option {option.strip()!r} is given twice")
        options[option.strip()] = _parse_value(value.strip())
    return options


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float | str) else text


def _make(name: str, options: dict[str, Any]) -> Memory:
    factory = _registry.factory(name)
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        if unknown := sorted(set(options) - set(signature.parameters)):
            raise InvalidValue(
                f"memory {name!r}: unknown option {unknown[0]!r}; it takes {', '.join(signature.parameters) or 'none'}"
            )
    missing = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name not in options and p.kind is p.KEYWORD_ONLY]
    if missing:
        raise InvalidValue(f"memory {name!r}: option {missing[0]!r} is required, as in '{name}:{missing[0]}=...'")
    try:
        made = factory(**options)
    except MiniTfmError as error:
        raise type(error)(f"memory {name!r}: {error}") from error
    except Exception as error:
        raise PluginError(f"memory {name!r} ({_registry.owners[name]}) failed in __init__: {type(error).__name__}: {error}") from error
    if not isinstance(made, Memory):
        raise PluginError(f"memory {name!r} ({_registry.owners[name]}): expected a Memory, its factory gave {type(made).__name__}")
    made.name = name
    made.text = name + (":" + ",".join(f"{option}={value}" for option, value in options.items()) if options else "")
    _check_spec(made)
    return made


def _check_spec(made: Memory) -> None:
    spec, who = made.spec, f"memory {made.name!r} ({owner(made)})"
    if not isinstance(spec, MemorySpec):
        raise PluginError(f"{who}: spec: expected a MemorySpec, got {type(spec).__name__}")
    for field, value, allowed in (("sites", spec.sites, SITES), ("needs", spec.needs, NEEDS), ("merge", {spec.merge}, MERGES)):
        if not set(value) <= set(allowed):
            raise PluginError(f"{who}: spec.{field}: expected some of {', '.join(allowed)}, got {sorted(set(value) - set(allowed))}")
    if spec.gradient not in ("none", "rows", "state"):
        raise PluginError(f"{who}: spec.gradient: expected none, rows or state, got {spec.gradient!r}")
    if spec.version > CONTRACT_VERSION:
        raise PluginError(f"{who}: written for contract {spec.version}, this library has {CONTRACT_VERSION}: upgrade mini-tfm")


def owner(made: Memory) -> str:
    """The plugin, distribution and version a strategy comes from."""
    return _registry.owners.get(made.name, f"{type(made).__module__}.{type(made).__qualname__}")


@contextlib.contextmanager
def blamed(made: Memory, method: str, site: str | None, layer: int | None, step: int) -> Iterator[None]:
    """Any error inside is the strategy's: told with its name, version, method and place, the cause kept."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MiniTfmError) and not isinstance(error, _Nonsense):
            raise  # it told the user something: a folder not writable, a store of another width
        place = "".join(f", {word} {value}" for word, value in (("site", site), ("layer", layer)) if value is not None)
        told = str(error) if isinstance(error, _Nonsense) else f"{type(error).__name__}: {error}"
        raise PluginError(f"memory {made.name or type(made).__name__!r} ({owner(made)}) failed in {method}{place}, segment {step}: {told}") from error


class _Nonsense(InvalidValue):
    """A return value that the contract does not allow."""


def expect(condition: Any, what: str) -> None:
    """Refuses a strategy's return value."""
    if not condition:
        raise _Nonsense(what)


def expect_array(name: str, value: Any, shape: tuple[int | None, ...], kind: str) -> None:
    """`value` is an array or Var of `shape` (None: any) and dtype kind ("f", "b" or "i"), finite where real."""
    from ..autodiff import value_of

    array = value_of(value)
    expect(isinstance(array, np.ndarray), f"{name}: expected an array, got {type(value).__name__}")
    want = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=True))
    expect(fits, f"{name}: expected shape {want}, got {array.shape}")
    kinds = {"f": "floating point", "b": "bool", "i": "integer"}
    expect(array.dtype.kind == kind, f"{name}: expected {kinds[kind]}, got {array.dtype}")
    if kind == "f":
        expect(np.isfinite(array).all(), f"{name}: holds NaN or infinity")
