"""Models as folders: configuration, weights, tokenizer, and the text of the memory that the model was trained with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..config import Config
from ..errors import FileProblem, InvalidValue
from ..files.folders import write_folder
from ..files.reading import as_path, read_bytes
from ..files.strict_json import MAX_JSON_BYTES, parse_json_strict
from ..lora import merged
from ..model import kept_matrices
from ..pooling import Pooling
from ..text.gguf import tokenizer_of as gguf_tokenizer
from ..text.shortlist import Shortlist
from ..text.tokenizers import MAX_FILE_BYTES, Tokenizer, find_tokenizer, tokenizer_of
from ..weights import Kept, Part, Weight, precision_of
from . import gguf, hugging_face, marian, peft, sentences
from .families import family_of, marian_binary, own, sources
from .folder import CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILES, OpenFolder, save_folder
from .names import resolve

SOURCES = ("pyproject.toml", "setup.py", "setup.cfg")  # of a package, as a plugin is


@dataclass(frozen=True)
class Contents:
    """What a model folder holds. tokenizer, memory_text: None where there is none. generation: options that it is made for.

    pooling: how it was trained to embed texts, None where it was not. packed: "bfloat16" or "int8", and in `kept` the matrices of
    such a model, which `weights` lacks.
    """

    config: Config
    weights: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    memory_text: str | None
    generation: dict[str, Any]
    pooling: Pooling | None = None
    packed: str | None = None
    kept: Mapping[str, Kept] = field(default_factory=dict)


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
    pooling: Pooling | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    new: bool = False,
) -> None:
    """Writes a model folder, all of it or nothing. A memory is kept as text: its trained parameters are weights. A packed model's
    matrices are written as they are kept.

    new: never over a model that is there.
    """
    files = {**(tokenizer.files() if tokenizer is not None else {}), **(extra_files or {})}
    kept = kept_matrices(model.weights)
    weights = {
        name: Weight(weight).array for name, weight in model.weights.items() if not isinstance(weight, Part) or weight.table is not None
    }
    generation = dict(getattr(model, "generation", {}))
    shortlist = generation.pop("shortlist", None)
    about = own.about_of(
        model.config, memory_text, generation, None if pooling is None else sentences.own_about(pooling), precision_of(model.weights)
    )
    more = shortlist.arrays() if isinstance(shortlist, Shortlist) else {}
    save_folder(folder, about, weights | own.tensors_of(kept) | sentences.own_tensors(pooling) | more, files, new=new)


def check_place(folder: str | os.PathLike) -> None:
    """Raises FileProblem where a model would replace what is none of ours, or lie among a package's sources, as a plugin's.

    A model of ours may be replaced, and what stands beside it stays.
    """
    path = as_path(folder)
    try:
        names = set(os.listdir(path))
    except (OSError, ValueError):  # a new one; or none that can be saved to, which saving says better
        return
    if (peek(path) or {}).get("format") == own.FORMAT:
        return
    if lost := [name for name in (CONFIG_FILE, TENSORS_FILE) if name in names]:
        raise FileProblem(f"{folder} holds {lost[0]}, which is of no model of ours and would be lost; give another folder")
    if there := [name for name in SOURCES if name in names]:
        raise FileProblem(
            f"{folder} holds {there[0]}, so it is the source of a package; give a new folder, such as {os.path.join(path, 'model')}"
        )


def save_hugging_face(
    folder: str | os.PathLike, model: HasWeights, *, tokenizer: Tokenizer | None = None, pooling: Pooling | None = None
) -> None:
    """Writes a model as Hugging Face has it, with `pooling` as Sentence Transformers has it, whose folders are written first.

    Adapters are merged into what is written. Raises InvalidValue where no published family has such models.
    """
    _check_no_memory(model)
    generation = {name: value for name, value in getattr(model, "generation", {}).items() if name != "shortlist"}
    files = hugging_face.files_of(model.config, merged(model.weights), generation)
    if pooling is not None:
        modules = sentences.files_of(pooling, model.config.d_model)
        files |= modules.pop("")
        for name, content in modules.items():
            write_folder(os.path.join(folder, name), content)
    write_folder(folder, {**(tokenizer.files() if tokenizer is not None else {}), **files})


def save_adapters(folder: str | os.PathLike, model: HasWeights) -> None:
    """Writes a model's adapters as PEFT has them. Raises InvalidValue where it has none, or no published family has such models."""
    _check_no_memory(model)
    write_folder(folder, peft.files_of(model.config, model.weights))


def _check_no_memory(model: HasWeights) -> None:
    """Raises InvalidValue where the model has a memory's parameters, for which only our own format has a place."""
    if extra := [name for name in model.weights if name.startswith("memory.")]:
        raise InvalidValue(f"model: has a memory's parameters ({extra[0]}), for which this layout has no place; use save(folder)")


def read_model(folder: str | os.PathLike, dtype: str = "float32") -> Contents:
    """Reads a model folder, ours, Hugging Face's or Marian's, or a file, GGUF or Marian's; folder: a path, or a name for `names.resolve`.

    dtype: of the weights, float32 or float64.
    Raises FileProblem or InvalidValue naming the file, field or tensor at fault, all of them at once.
    """
    path = folder.path if isinstance(folder, OpenFolder) else resolve(folder)
    if isinstance(folder, OpenFolder):
        contents = _read_own(folder, path)
    elif (file := marian.find(path)) is not None:
        contents = _read_marian(file)
    elif os.path.isfile(path):
        contents = _read_gguf(path)
    else:
        about = peek(path)
        if about is not None and hugging_face.is_hugging_face(about):
            config, weights, generation = hugging_face.read_folder(path, about)
            contents = Contents(config, weights, find_tokenizer(path), None, generation, sentences.read_pooling(path))
        else:
            with OpenFolder(path) as opened:
                contents = _read_own(opened, path)
    tokenizer, config = contents.tokenizer, contents.config
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InvalidValue(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    if contents.pooling is not None:
        contents.pooling.width(config.d_model)
    weights = {name: weight.astype(dtype, copy=False) for name, weight in contents.weights.items()}
    return dataclasses.replace(contents, weights=weights)


def peek(folder: str) -> dict[str, Any] | None:
    """A folder's `config.json`, or None: the reader of our own folders says what is wrong with it."""
    try:
        return parse_json_strict(read_bytes(folder, MAX_JSON_BYTES, CONFIG_FILE), os.path.join(folder, CONFIG_FILE))
    except (FileProblem, InvalidValue):
        return None


def _read_own(opened: OpenFolder, path: str) -> Contents:
    config_path, tensors_path = (os.path.join(path, name) for name in (CONFIG_FILE, TENSORS_FILE))
    about = opened.read_json(CONFIG_FILE)
    config = own.config_of(about, config_path)
    packed = own.packed_in(about, config_path)
    own.check_tensors(config, opened.read_entries(TENSORS_FILE), tensors_path, packed)
    tensors = opened.read_tensors(TENSORS_FILE, mmap=packed is not None)  # no weight of a packed model is ever written to
    kept = {} if packed is None else own.kept_of(config, tensors, packed)
    first, second = (opened.read_bytes(name, MAX_FILE_BYTES) for name in TOKENIZER_FILES)
    tokenizer = tokenizer_of(first, second, path) if first is not None or second is not None else None
    pooling = sentences.own_pooling(about.get("pooling"), tensors, config_path)
    weights = {name: array for name, array in tensors.items() if not name.startswith(("pooling.", "shortlist."))}
    shortlist = Shortlist.of(tensors, tensors_path)
    generation = {**(about.get("generation") or {}), **({} if shortlist is None else {"shortlist": shortlist})}
    return Contents(config, weights, tokenizer, about.get("memory"), generation, pooling, packed, kept)


def _read_gguf(path: str) -> Contents:
    file = gguf.Gguf(path)
    about = gguf.about_of(file)
    tensors = gguf.Tensors(file, about)
    family = family_of(about, path)
    config = family.config_of(about, path, set(tensors))
    sources.check_tensors(family, config, tensors.entries(), path)
    tokenizer = gguf_tokenizer(file.fields, path) if "tokenizer.ggml.model" in file.fields else None
    return Contents(config, sources.weights_of(family, config, tensors), tokenizer, None, gguf.generation_of(file))


def _read_marian(path: str) -> Contents:
    file = marian.Marian(path)
    tensors = marian.Tensors(file)
    config = marian_binary.config_of(file.options, path)
    sources.check_tensors(marian_binary, config, tensors.entries(), path)
    shortlist = marian.shortlist_of(path)
    generation = {} if shortlist is None else {"shortlist": shortlist}
    return Contents(config, sources.weights_of(marian_binary, config, tensors), marian.tokenizer_of(path), None, generation)
