"""The library's own format: the fields of Config as they are, and the weights by our own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...config import Config
from ...errors import InvalidValue, shown
from ...lora import shape_faults
from ...model import weight_shapes
from ...weights import LORA
from ..safetensors import Entry

FORMAT = "mini_tfm"
FORMAT_VERSION = 1


def about_of(
    config: Config, memory_text: str | None, generation: Mapping[str, Any], pooling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `config.json` says of a model, the memory it was trained with, and how it embeds texts."""
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": config.to_dict(), "memory": memory_text}
    return about | ({"generation": dict(generation)} if generation else {}) | ({"pooling": dict(pooling)} if pooling else {})


def config_of(about: Mapping[str, Any], where: str) -> Config:
    if about.get("format") != FORMAT:
        raise InvalidValue(
            f"{where}: field 'format': expected {FORMAT!r}, got {about.get('format')!r:.80}; folders saved by mini_tfm have it, and"
            " Hugging Face's have 'model_type' in its place"
        )
    if about.get("format_version") != FORMAT_VERSION:
        raise InvalidValue(
            f"{where}: field 'format_version': expected {FORMAT_VERSION}, got {shown(about.get('format_version'))}; upgrade mini-tfm"
        )
    if unknown := sorted(set(about) - {"format", "format_version", "model", "memory", "generation", "pooling"}):
        raise InvalidValue(f"{where}: unknown field {shown(unknown[0])}")
    memory_text = about.get("memory")
    if memory_text is not None and not isinstance(memory_text, str):
        raise InvalidValue(f"{where}: field 'memory': expected text or null, got {shown(memory_text)}")
    if not isinstance(about.get("generation", {}), dict):
        raise InvalidValue(f"{where}: field 'generation': expected a mapping of options, got {shown(about['generation'])}")
    try:
        return Config.from_dict(about.get("model", {}))
    except InvalidValue as error:
        raise InvalidValue(f"{where}: {error}") from error


def check_tensors(config: Config, entries: Mapping[str, Entry], where: str) -> None:
    shapes = weight_shapes(config)
    faults = [f"tensor {name!r} is missing" for name in shapes if name not in entries]
    faults += shape_faults(config, {name: tensor.shape for name, tensor in entries.items()})
    for name, tensor in entries.items():
        if name not in shapes and not name.startswith(("memory.", "pooling.", "shortlist.", LORA)):
            faults.append(f"tensor {name!r} is not one of this architecture")
        elif name in shapes and tensor.shape != shapes[name]:
            faults.append(f"tensor {name!r}: expected shape {shapes[name]}, got {tensor.shape}")
        elif not name.startswith("shortlist.") and tensor.dtype not in (np.float32, np.float64):
            faults.append(f"tensor {name!r}: expected float32, got {tensor.dtype}")
    if faults:
        raise InvalidValue(f"{where}: " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
