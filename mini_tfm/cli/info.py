"""`mini-tfm info`: shows versions and kernels, a model or a memory."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from .shared import count, json_option, none_of, print_json, print_table, size

PACKAGES = ("numpy", "pluggy", "tokenizers", "lmdb", "click", "rich")


@click.command(short_help="Show versions and kernels, a model or a memory.")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--memory", metavar="SPEC", help="Also show this memory: its options and its documents.")
@json_option
def info(folder: Path | None, memory: str | None, as_json: bool) -> None:
    """Shows versions, kernels and threads; with FOLDER also a model; with --memory also a memory and its documents.

    Sizes are in bytes, lengths in tokens, capacities in rows (the vectors that a memory keeps).
    """
    answer: dict[str, Any] = {"library": _library()}
    if folder is not None:
        answer["model"] = _model(folder)
    text = none_of(memory) if memory is not None else None
    if text is not None:
        answer["memory"] = _memory(text)
    if as_json:
        print_json(answer)
        return
    for what, facts in answer.items():
        print_table([("", "left"), ("", "left")], [(name, _shown(name, fact)) for name, fact in facts.items()], title=what)


def _library() -> dict[str, Any]:
    from .. import __version__, _core

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "mini-tfm": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **_core.show_config(),
        "packages": versions,
    }


def _model(folder: Path) -> dict[str, Any]:
    from ..transformer import load_checkpoint

    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    return {
        "folder": str(folder),
        "parameters": model.n_parameters,
        "size_bytes": model.nbytes,
        "memory": checkpoint.memory_text,
        "tokenizer": type(checkpoint.tokenizer).__name__ if checkpoint.tokenizer else None,
        "tokenizer_tokens": checkpoint.tokenizer.vocab_size if checkpoint.tokenizer else None,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "config": model.config.to_dict(),
    }


def _memory(text: str) -> dict[str, Any]:
    from ..memory import memory as make_memory
    from ..memory.validate import owner

    made = make_memory(text)
    members = getattr(made, "members", [made])
    return {
        "text": made.text,
        "strategies": [
            {
                "name": member.name,
                "plugin": owner(member),
                "sites": sorted(member.spec.sites),
                "needs": sorted(member.spec.needs),
                "merge": member.spec.merge,
                "gradient": member.spec.gradient,
                "capacity_rows": member.spec.capacity,
            }
            for member in members
        ],
        "documents": made.documents(),
    }


def _shown(name: str, fact: Any) -> str:
    if isinstance(fact, dict):
        shown = {key: _shown(name, value) for key, value in fact.items() if value is not None}
        return ", ".join(f"{key} {value}" for key, value in shown.items()) or "none"
    if isinstance(fact, list):
        return "; ".join(_shown(name, item) for item in fact) or "none"
    if name in ("size_bytes", "files"):
        return size(fact)
    if fact is None:
        return "none"
    return count(fact) if type(fact) is int and name in ("parameters", "documents") else str(fact)
