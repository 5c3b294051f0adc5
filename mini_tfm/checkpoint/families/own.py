"""The library's own format: the fields of Config as they are, and the weights by our own names.

A packed model's has a field more, `packed`, and version 2. Its matrices lie as `weights.Kept` has them, the scales of `name` in
`name.scales`, and so the files are the same whatever the instruction set. What is looked up in a tied table stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...config import Config
from ...errors import InvalidValue, shown
from ...lora import shape_faults
from ...model import PACKED, packed_shapes, weight_shapes
from ...weights import LORA, Kept
from ..safetensors import BFLOAT16, Entry

FORMAT = "mini_tfm"
FORMAT_VERSION, PACKED_VERSION = 1, 2
GROUP = 256  # rows of a matrix that share a scale in int8


def about_of(
    config: Config,
    memory_text: str | None,
    generation: Mapping[str, Any],
    pooling: Mapping[str, Any] | None = None,
    packed: str | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a model, the memory it was trained with, how it embeds texts, and what it is packed in."""
    version = FORMAT_VERSION if packed is None else PACKED_VERSION
    about = {"format": FORMAT, "format_version": version, "model": config.to_dict(), "memory": memory_text}
    about |= ({"generation": dict(generation)} if generation else {}) | ({"pooling": dict(pooling)} if pooling else {})
    return about | ({} if packed is None else {"packed": packed})


def packed_in(about: Mapping[str, Any], where: str) -> str | None:
    """What the model is packed in, "bfloat16" or "int8"; None: its weights are float32. Raises InvalidValue."""
    packed = about.get("packed")
    if "packed" in about and packed not in PACKED:
        raise InvalidValue(f"{where}: field 'packed': expected {' or '.join(map(repr, PACKED))}, got {shown(packed)}")
    return packed


def config_of(about: Mapping[str, Any], where: str) -> Config:
    if about.get("format") != FORMAT:
        raise InvalidValue(
            f"{where}: field 'format': expected {FORMAT!r}, got {about.get('format')!r:.80}; folders saved by mini_tfm have it, and"
            " Hugging Face's have 'model_type' in its place"
        )
    version = FORMAT_VERSION if packed_in(about, where) is None else PACKED_VERSION
    if about.get("format_version") != version:
        raise InvalidValue(
            f"{where}: field 'format_version': expected {version}, got {shown(about.get('format_version'))}; upgrade mini-tfm"
        )
    if unknown := sorted(set(about) - {"format", "format_version", "model", "memory", "generation", "pooling", "packed"}):
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


def check_tensors(config: Config, entries: Mapping[str, Entry], where: str, packed: str | None = None) -> None:
    """Before a tensor is read: raises InvalidValue naming the file and every tensor missing, too much, or of another shape."""
    reals = (np.dtype(np.float32), np.dtype(np.float64))
    expected = {name: (shape, reals) for name, shape in weight_shapes(config).items()} | _packed_tensors(config, packed)
    faults = [f"tensor {name!r} is missing" for name in expected if name not in entries]
    faults += shape_faults(config, {name: tensor.shape for name, tensor in entries.items()})
    for name, tensor in entries.items():
        shape, dtypes = expected.get(name, (tensor.shape, reals))
        if name not in expected and not name.startswith(("memory.", "pooling.", "shortlist.", LORA)):
            faults.append(f"tensor {name!r} is not one of this architecture")
        elif tensor.shape != shape:
            faults.append(f"tensor {name!r}: expected shape {shape}, got {tensor.shape}")
        elif not name.startswith("shortlist.") and tensor.dtype not in dtypes:
            faults.append(f"tensor {name!r}: expected {_named(dtypes[0])}, got {_named(tensor.dtype)}")
        elif packed is not None and name.startswith(LORA):
            faults.append(f"tensor {name!r}: a packed model has no adapters")
    if faults:
        raise InvalidValue(f"{where}: " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))


def kept_of(config: Config, tensors: dict[str, np.ndarray], packed: str) -> dict[str, Kept]:
    """Takes the matrices of a packed model out of checked tensors."""
    found: dict[str, Kept] = {}
    for name in packed_shapes(config):
        values = tensors.pop(name)
        found[name] = Kept(values["bfloat16"], None) if packed == "bfloat16" else Kept(values, tensors.pop(name + ".scales"))
    return found


def tensors_of(kept: Mapping[str, Kept]) -> dict[str, np.ndarray]:
    """What `kept_of` reads back."""
    found: dict[str, np.ndarray] = {}
    for name, (values, scales) in kept.items():
        found |= {name: values.view(BFLOAT16)} if scales is None else {name: values, name + ".scales": scales}
    return found


def _packed_tensors(config: Config, packed: str | None) -> dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]:
    """Shapes and dtypes of the tensors that hold a packed model's matrices, by name."""
    found: dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]] = {}
    for name, (d_in, d_out) in packed_shapes(config).items() if packed is not None else ():
        found[name] = (d_out, d_in), (BFLOAT16 if packed == "bfloat16" else np.dtype(np.int8),)
        if packed == "int8":
            found[name + ".scales"] = (d_out, -(-d_in // GROUP)), (np.dtype(np.float32),)
    return found


def _named(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == BFLOAT16 else str(dtype)
