"""Folders as Hugging Face has them: `config.json`, one or several safetensors files with their index, `generation_config.json`.

Tensors stay in the mapped files: a load reads the headers, and the pages of a weight when it is first used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import Config
from ..errors import FileProblem, InvalidValue, shown
from ..files.reading import open_regular, read_bytes
from ..files.strict_json import MAX_JSON_BYTES, encode_json, parse_json_strict
from ..files.writing import Buffers
from .families import family_for, family_of, sources
from .safetensors import Entry, encode_safetensors, read_entries, read_tensors

CONFIG, GENERATION, WEIGHTS, INDEX = "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs"

# Of `generation_config.json`, what says how such a model is to be used; how to sample is for its user to say.
DEFAULTS = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


def is_hugging_face(about: Mapping[str, Any]) -> bool:
    return "format" not in about and "model_type" in about


def read_folder(folder: str, about: Mapping[str, Any]) -> tuple[Config, dict[str, np.ndarray], dict[str, Any]]:
    """Config, weights by our names, defaults of generation. Raises FileProblem or InvalidValue naming what is at fault."""
    where = os.path.join(folder, CONFIG)
    family = family_of(about, where)
    files, entries = read_headers(folder)
    names = sources.prefixed(family, entries).values()
    config = family.config_of(about, where, set(names))
    sources.check_tensors(family, config, entries, os.path.join(folder, files[0] if len(files) == 1 else INDEX))
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        with open_regular(folder, name) as file:
            tensors |= read_tensors(file, mmap=True)
    return config, sources.weights_of(family, config, tensors), _defaults(folder, about, config)


def read_headers(folder: str) -> tuple[list[str], dict[str, Entry]]:
    """The files that hold tensors, and what their headers declare, by name. Raises FileProblem, InvalidValue."""
    files = _files(folder)
    entries: dict[str, Entry] = {}
    for name in files:
        with open_regular(folder, name) as file:
            if file.read(len(LFS)) == LFS:
                raise FileProblem(f"{file.name}: is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
            file.seek(0)
            more = read_entries(file)
        if twice := sorted(entries.keys() & more.keys()):
            where = os.path.join(folder, name)
            raise InvalidValue(f"{where}: tensor {shown(twice[0])} is in another file of the folder, too; download the model again")
        entries |= more
    return files, entries


def files_of(config: Config, weights: Mapping[str, np.ndarray], generation: Mapping[str, Any]) -> dict[str, bytes | Buffers]:
    """The files of a model in this layout, by name. Raises InvalidValue where no published family has such a model."""
    family = family_for(config)
    about = {**family.about_of(config), "torch_dtype": "float32"}
    told = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id, **generation}
    if config.has_encoder and config.has_decoder:
        told = {"decoder_start_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id, **generation}
    tensors = sources.tensors_of(family, config, weights)
    files: dict[str, bytes | Buffers] = {CONFIG: encode_json(about), WEIGHTS: encode_safetensors(tensors, {"format": "pt"})}
    return files | ({GENERATION: encode_json(told)} if config.has_decoder else {})


def _files(folder: str) -> list[str]:
    """Names of the files that hold tensors."""
    there = set(os.listdir(folder))
    if INDEX in there:
        index = parse_json_strict(read_bytes(folder, MAX_JSON_BYTES, INDEX), os.path.join(folder, INDEX))
        parts = index.get("weight_map")
        if (
            not isinstance(parts, dict)
            or not parts
            or not all(isinstance(name, str) and os.path.basename(name) == name for name in parts.values())
        ):
            raise InvalidValue(f"{os.path.join(folder, INDEX)}: field 'weight_map': expected names of files in this folder by tensor")
        names = sorted(set(parts.values()))
        if missing := [name for name in names if name not in there]:
            raise FileProblem(f"{folder}: {', '.join(missing[:5])} of {len(names)} files are missing; download the model again")
        return names
    if WEIGHTS in there:
        return [WEIGHTS]
    if pickles := sorted(name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))):
        raise FileProblem(
            f"{folder}: has no {WEIGHTS}, only {pickles[0]}, which can run code when it is read and is never opened here; save the"
            " model again as safetensors: transformers' `save_pretrained` does"
        )
    raise FileProblem(f"{folder}: has no {WEIGHTS}; check the path, or download the model again")


def _defaults(folder: str, about: Mapping[str, Any], config: Config) -> dict[str, Any]:
    given: Mapping[str, Any] = {}
    if os.path.lexists(os.path.join(folder, GENERATION)):
        given = parse_json_strict(read_bytes(folder, MAX_JSON_BYTES, GENERATION), os.path.join(folder, GENERATION))
    found = {}
    for name in DEFAULTS:
        value = given.get(name, about.get(name))
        if value is not None and (ids := _ids(value, config.vocab_size, f"{os.path.join(folder, GENERATION)}: {name}")) not in (None, []):
            found[name] = ids
    if found.get("eos_token_id") in (config.eos_id, [config.eos_id]):
        del found["eos_token_id"]
    return found


def _ids(value: Any, vocab_size: int, what: str) -> Any:
    """An id, or lists of them, without those that the model cannot say: it never stops at them. None, where that is all.

    A forced token must be one that it can say. Raises InvalidValue naming `what`.
    """
    if isinstance(value, list) and len(value) <= 100_000:
        words = [_ids(each, vocab_size, what) for each in value]
        return [word for word, each in zip(words, value, strict=True) if word is not None and (not isinstance(each, list) or word == each)]
    if type(value) is int:
        if 0 <= value < vocab_size:
            return value
        if "forced" not in what:
            return None
    raise InvalidValue(
        f"{what}: expected ids of tokens below vocab_size {vocab_size}, got {shown(value)}; correct the file, or remove the field"
    )
