"""Models as folders: configuration, weights, tokenizer, and the text of the memory that the model was trained with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..config import Config
from ..errors import InvalidValue
from ..text.tokenizers import MAX_FILE_BYTES, Tokenizer, tokenizer_of
from ..weights import Weight
from .families import family_of, own
from .folder import CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILES, OpenFolder, save_folder


@dataclass(frozen=True)
class Contents:
    """What a model folder holds. tokenizer, memory_text: None where there is none."""

    config: Config
    weights: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    memory_text: str | None


class HasWeights(Protocol):
    """A model, as far as a folder is concerned."""

    config: Config
    weights: dict[str, np.ndarray]


def save_model(
    folder: str | os.PathLike,
    model: HasWeights,
    *,
    tokenizer: Tokenizer | None = None,
    memory_text: str | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model folder, all of it or nothing. A memory is kept as text: its trained parameters are weights."""
    files = {**(tokenizer.files() if tokenizer is not None else {}), **(extra_files or {})}
    weights = {name: Weight(weight).array for name, weight in model.weights.items()}
    save_folder(folder, own.about_of(model.config, memory_text), weights, files)


def read_model(folder: str | os.PathLike, dtype: str = "float32") -> Contents:
    """Reads a model folder of any family. Raises FileProblem or InvalidValue naming the file, field or tensor at fault."""
    if dtype not in ("float32", "float64"):
        raise InvalidValue(f"dtype: expected 'float32', or 'float64' for checks, got {dtype!r}")
    config_path, tensors_path = (os.path.join(os.fspath(folder), name) for name in (CONFIG_FILE, TENSORS_FILE))
    with contextlib.nullcontext(folder) if isinstance(folder, OpenFolder) else OpenFolder(folder) as opened:
        about = opened.read_json(CONFIG_FILE)
        family = family_of(about, config_path)
        config = family.config_of(about, config_path)
        family.check_tensors(config, opened.read_entries(TENSORS_FILE), tensors_path)
        weights = family.weights_of(config, opened.read_tensors(TENSORS_FILE))
        first, second = (opened.read_bytes(name, MAX_FILE_BYTES) for name in TOKENIZER_FILES)
        has_tokenizer = first is not None or second is not None
        tokenizer = tokenizer_of(first, second, os.fspath(folder)) if has_tokenizer else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InvalidValue(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    return Contents(config, {name: w.astype(dtype) for name, w in weights.items()}, tokenizer, about.get("memory"))
