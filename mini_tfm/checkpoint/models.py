"""Models as folders: what `config.json` says, and that the weights are those the config asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mini_tfm.checkpoint.folder import load_folder, save_folder
from mini_tfm.config import Config
from mini_tfm.errors import InvalidValue
from mini_tfm.memory.base import Memory
from mini_tfm.model import Transformer, weight_shapes
from mini_tfm.text.tokenizers import Tokenizer, load_tokenizer

FORMAT = "mini_tfm"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Saved:
    """A loaded folder: the model, its tokenizer if it has one, the text of the memory it was trained with."""

    model: Transformer
    tokenizer: Tokenizer | None
    memory_text: str | None

    def memory(self) -> Memory | None:
        from mini_tfm.memory import memory

        return memory(self.memory_text) if self.memory_text else None


def save_model(
    folder: str | os.PathLike,
    model: Transformer,
    *,
    tokenizer: Tokenizer | None = None,
    memory: Memory | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model folder, all of it or nothing. The memory is kept as text: its trained parameters are weights."""
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model.config.to_dict(),
        "memory": memory.text if memory is not None else None,
    }
    files = {**(tokenizer.files() if tokenizer is not None else {}), **(extra_files or {})}
    save_folder(folder, config, model.weights, files)


def load_saved(folder: str | os.PathLike, dtype: str = "float32") -> Saved:
    """Reads a folder of `save_model`. Raises FileProblem or InvalidValue naming the file, field or tensor at fault."""
    if dtype not in ("float32", "float64"):
        raise InvalidValue(f"dtype: expected 'float32' ('float64' for checks), the only ones so far, got {dtype!r}")
    about, tensors = load_folder(folder)
    where = os.path.join(os.fspath(folder), "config.json")
    if about.get("format") != FORMAT:
        raise InvalidValue(
            f"{where}: field 'format': expected {FORMAT!r}, got {about.get('format')!r}; only folders saved by mini_tfm load so far"
        )
    if about.get("format_version") != FORMAT_VERSION:
        raise InvalidValue(
            f"{where}: field 'format_version': expected {FORMAT_VERSION}, got {about.get('format_version')!r}; upgrade mini-tfm"
        )
    if unknown := sorted(set(about) - {"format", "format_version", "model", "memory"}):
        raise InvalidValue(f"{where}: unknown field {unknown[0]!r}")
    memory_text = about.get("memory")
    if memory_text is not None and not isinstance(memory_text, str):
        raise InvalidValue(f"{where}: field 'memory': expected text or null, got {memory_text!r}")
    config = Config.from_dict(about.get("model", {}))
    _check_tensors(config, tensors, os.path.join(os.fspath(folder), "model.safetensors"))
    model = Transformer(config, dtype=dtype, weights={name: w.astype(dtype) for name, w in tensors.items()})
    files = os.listdir(folder)
    tokenizer = load_tokenizer(folder) if "tokenizer.json" in files or "tokenizer_config.json" in files else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InvalidValue(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    return Saved(model, tokenizer, memory_text)


def load(folder: str | os.PathLike, dtype: str = "float32") -> Transformer:
    """The model saved in `folder` (see `Transformer.save`). dtype: float32."""
    return load_saved(folder, dtype).model


def _check_tensors(config: Config, tensors: Mapping[str, np.ndarray], where: str) -> None:
    shapes = weight_shapes(config)
    faults = [f"tensor {name!r} is missing" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes and not name.startswith("memory."):
            faults.append(f"tensor {name!r} is not one of this architecture")
        elif name in shapes and tensor.shape != shapes[name]:
            faults.append(f"tensor {name!r}: expected shape {shapes[name]}, got {tensor.shape}")
        elif tensor.dtype not in (np.float32, np.float64):
            faults.append(f"tensor {name!r}: expected float32, got {tensor.dtype}")
    if faults:
        raise InvalidValue(f"{where}: " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
