"""docs/api.md, made of the docstrings: `python tests/test_docs.py` writes it, and a test compares.

What is imported is the package itself; a name counts as public by the `__all__` of its module. Docstrings are shown as they are.
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
MODULES = {
    "mini_tfm": "`import mini_tfm as mt`: what most programs need.",
    "mini_tfm.text": "Text files, documents, tokenizers.",
    "mini_tfm.data": "From documents to batches; `mini_tfm.train` has the same names.",
    "mini_tfm.generate": "Decoding without a pipeline.",
    "mini_tfm.memory": "For authors of memories: [the contract](memory-contract.md), and short bases.",
    "mini_tfm.testing": "For authors of memories: the checks.",
}
NOT_SHOWN = {"mini_tfm.memory": {"memory", "list_memories", "register_memory"}}  # which mini_tfm has
HEAD = """# The Python interface

Every public name with its docstring: shapes, units, what is raised. `help(mt.Pipeline)` shows the same. `python tests/test_docs.py`
makes this page."""


def page() -> str:
    parts = [HEAD]
    for name, about in MODULES.items():
        module = importlib.import_module(name)
        parts += [f"## {name}", about]
        for public in sorted(set(module.__all__) - NOT_SHOWN.get(name, set()), key=str.lower):
            parts += _of(public, getattr(module, public))
    return "\n\n".join(parts) + "\n"


def _of(name: str, value: Any) -> Iterator[str]:
    """The heading of a name and its text; of a class, those of its methods, too."""
    if isinstance(value, str):
        return
    yield f"### {name}"
    if not (inspect.isclass(value) or callable(value)):
        yield _fenced(", ".join(value) if isinstance(value, dict | set | list) else repr(value))
        return
    yield _fenced(f"{name}{_signature(value)}", _doc(value))
    if not inspect.isclass(value):
        return
    for method, raw in vars(value).items():
        told = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if method.startswith("_") or not (inspect.isfunction(told) or isinstance(raw, property)) or not _doc(told):
            continue
        yield f"#### {name}.{method}"
        yield _fenced(method if isinstance(raw, property) else f"{method}{_signature(getattr(value, method))}", _doc(told))


def _doc(value: Any) -> str:
    """The docstring; not that which `dataclass` makes up of the fields, which the signature shows."""
    doc = inspect.cleandoc(value.__dict__.get("__doc__") or "") if inspect.isclass(value) else inspect.getdoc(value) or ""
    return "" if inspect.isclass(value) and doc.startswith(value.__name__ + "(") else doc


def _signature(value: Any) -> str:
    """Parameters with their types and defaults; nothing where a value has none, as in an alias of a type."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    shown, kinds = [], [each.kind for each in signature.parameters.values()]
    for each in signature.parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and "*" not in shown and each.VAR_POSITIONAL not in kinds:
            shown.append("*")
        shown.append(_parameter(each))
    returned = "" if signature.return_annotation is signature.empty else f" -> {_type(signature.return_annotation)}"
    line = f"({', '.join(shown)}){returned}"
    return line if len(line) <= 100 else "(\n" + "".join(f"    {each},\n" for each in shown) + f"){returned}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return stars + parameter.name + typed
    default = repr(parameter.default)
    if isinstance(parameter.default, frozenset) and parameter.default:  # whose order is another in each process
        default = f"frozenset({{{', '.join(sorted(map(repr, parameter.default)))}}})"
    default = "..." if default.startswith("<") else default  # a function, an object without a text of its own
    return parameter.name + (f"{typed} = {default}" if typed else f"={default}")


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _fenced(*parts: str) -> str:
    return "```text\n" + "\n\n".join(part for part in parts if part) + "\n```"
