"""`mini-tfm info`: shows versions and kernels, a model or a memory."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidValue
from .shared import count, json_option, none_of, print_json, print_table, size

if TYPE_CHECKING:
    from ..config import Config

PACKAGES = ("numpy", "pluggy", "tokenizers", "lmdb", "click", "rich")


@click.command(short_help="Show versions and kernels, a model or a memory.")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--memory", metavar="SPEC", help="Also show this memory: its options and its documents.")
@json_option
def info(folder: Path | None, memory: str | None, as_json: bool) -> None:
    """Shows versions, kernels and threads; with FOLDER also a model; with --memory also a memory and its documents.

    FOLDER is a model's folder, a file (GGUF or Marian's) or a name on the Hub; only headers are read, no weights. What keeps a model
    from being loaded is told, all of it, with exit code 2. RAM is that of the weights; in bfloat16 and int8 it is an estimate.

    Sizes are in bytes, lengths in tokens, capacities in rows (the vectors that a memory keeps).
    """
    answer: dict[str, Any] = {"library": _library()}
    if folder is not None:
        answer["model"] = _model(folder)
    text = none_of(memory) if memory is not None else None
    if text is not None:
        answer["memory"] = _memory(text)
    problems = answer.get("model", {}).get("problems")
    if as_json:
        print_json(answer)
        if problems:
            raise InvalidValue("; ".join(problems))
        return
    for what, facts in answer.items():
        print_table([("", "left"), ("", "left")], [(name, _shown(name, fact)) for name, fact in facts.items()], title=what)
    if problems:
        raise InvalidValue("; ".join(problems))


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


def _model(name: Path) -> dict[str, Any]:
    from ..checkpoint.header import read_header

    header = read_header(name)
    config, tokenizer, pooling = header.config, header.tokenizer, header.pooling
    return {
        "folder": header.path,
        "layout": header.layout,
        "family": header.family,
        "architecture": None if config is None else _in_words(config),
        "parameters": header.n_parameters,
        "stored_as": {kind: n for kind, n in header.stored.items() if n},
        "size_bytes": sum(header.files.values()),
        "ram_bytes": None if config is None else _ram_bytes(config, header.packed),
        "context_tokens": None if config is None else _context(config),
        "tokenizer": type(tokenizer).__name__ if tokenizer else None,
        "tokenizer_tokens": tokenizer.vocab_size if tokenizer else None,
        "chat_template": tokenizer is not None and tokenizer.has_chat_template,
        "embeds": None if pooling is None else f"{' and '.join(pooling.modes)}{', length 1' if pooling.normalize else ''}",
        "memory": header.memory_text,
        "adapters": header.adapters,
        "files": dict(header.files),
        "config": None if config is None else config.to_dict(),
        "problems": header.faults,
    }


def _in_words(config: Config) -> str:
    """The architecture as one would say it."""
    decoder = "decoder" if config.decoder_mixer == "attention" else f"decoder ({config.decoder_mixer.upper()})"
    stacks = [f"{n} {name} layers" for n, name in ((config.n_encoder_layers, "encoder"), (config.n_decoder_layers, decoder)) if n]
    of_stacks = [config.heads(name) for name in ("encoder", "decoder") if getattr(config, f"has_{name}")]
    told = [f"{n} heads" + (f" ({kv} of keys and values)" if kv != n else "") for n, kv, *_ in of_stacks]
    heads = " and ".join(dict.fromkeys(told))
    norm = {"layer": "layer norm", "rms": "RMS norm"}[config.norm]
    return (
        f"{' and '.join(stacks)} of {config.d_model} numbers, {heads},"
        f" {'gated ' if config.gated else ''}{config.activation} of {config.d_ff}, {norm} ({config.norm_position}),"
        f" {config.positions} positions, {config.vocab_size} tokens"
    )


def _ram_bytes(config: Config, packed: str | None) -> dict[str, int]:
    """Estimates of the weights in RAM: as float32, and with matrices of products in bfloat16 or int8 with a scale a 256 numbers.

    packed: what the model is saved in, if it can be had in no other.
    """
    from ..model import weight_shapes

    shapes = [math.prod(shape) for shape in weight_shapes(config).values()]
    matrices = sum(math.prod(shape) for shape in weight_shapes(config).values() if len(shape) == 2)
    rest = 4 * (sum(shapes) - matrices)
    sizes = {"float32": 4 * sum(shapes), "bfloat16 (estimate)": rest + 2 * matrices, "int8 (estimate)": rest + matrices + matrices // 64}
    return {name: n for name, n in sizes.items() if packed is None or name.startswith(packed)}


def _context(config: Config) -> int | None:
    """Tokens that it was made to see at once; None: no limit is known."""
    return config.segment_length or (config.max_positions if config.positions == "learned" else config.context_length)


def _memory(text: str) -> dict[str, Any]:
    from ..memory import Stack
    from ..memory import memory as make_memory
    from ..memory.validate import owner

    made = Stack([make_memory(text)])
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
            for member in made.members
        ],
        "documents": made.documents(),
    }


def _shown(name: str, fact: Any) -> str:
    if isinstance(fact, dict):
        shown = {key: _shown(name, value) for key, value in fact.items() if value is not None}
        return ", ".join(f"{key} {value}" for key, value in shown.items()) or "none"
    if isinstance(fact, list):
        return "; ".join(_shown(name, item) for item in fact) or "none"
    if fact is None:
        return "none"
    if name in ("size_bytes", "ram_bytes", "files"):
        return size(fact)
    return count(fact) if type(fact) is int and name in ("parameters", "documents", "stored_as", "context_tokens") else str(fact)
