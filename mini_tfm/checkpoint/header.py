"""What a model is, from configurations and headers alone: no weight is read."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Config
from ..errors import FileProblem, InvalidValue
from ..lora import adapted_layers
from ..model import weight_shapes
from ..pooling import Pooling
from ..text.gguf import tokenizer_of as gguf_tokenizer
from ..text.tokenizers import Tokenizer, load_tokenizer
from ..weights import LORA
from . import gguf, hugging_face, marian, sentences
from .families import family_of, marian_binary, own, sources
from .folder import CONFIG_FILE, TENSORS_FILE, OpenFolder
from .models import peek
from .names import resolve
from .safetensors import BFLOAT16, Entry

GGUF_KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
GGUF_KINDS |= {14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
GGUF_KINDS |= {23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


@dataclass
class Header:
    """What is told of a model. config, tokenizer, pooling: None where there is none, or where `faults` says why.

    layout: "mini_tfm", "Hugging Face", "GGUF" or "Marian". family: as its file names it. stored: numbers in the file by how they
    are stored. faults: all that keeps it from being loaded.
    """

    path: str
    layout: str
    family: str = ""
    config: Config | None = None
    stored: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)  # bytes by name
    tokenizer: Tokenizer | None = None
    memory_text: str | None = None
    n_more_parameters: int = 0  # of a memory, of adapters
    adapters: str | None = None  # in words
    pooling: Pooling | None = None
    packed: str | None = None  # "bfloat16" or "int8"
    faults: list[str] = field(default_factory=list)

    @property
    def n_parameters(self) -> int | None:
        """Numbers in the weights that a load would make, with those of a memory and of adapters."""
        shapes = () if self.config is None else weight_shapes(self.config).values()
        return None if self.config is None else sum(map(math.prod, shapes)) + self.n_more_parameters


def read_header(name: str | os.PathLike) -> Header:
    """What a model is. Raises FileProblem, InvalidValue where nothing can be told; else all that is wrong is in its `faults`."""
    path = resolve(name)
    if (file := marian.find(path)) is not None:
        return _of_marian(file)
    if os.path.isfile(path):
        return _of_gguf(path)
    about = peek(path)
    if about is not None and hugging_face.is_hugging_face(about):
        found = _of_hugging_face(path, about)
    else:
        found = _of_own(path)
    with os.scandir(path) as entries:
        found.files = {each.name: each.stat().st_size for each in sorted(entries, key=lambda each: each.name) if each.is_file()}
    with _told(found):
        found.tokenizer = load_tokenizer(path) if {"tokenizer.json", "tokenizer_config.json"} & set(found.files) else None
    return found


def _of_gguf(path: str) -> Header:
    file = gguf.Gguf(path)
    family = file.fields.get("general.architecture")
    found = Header(path, "GGUF", str(family)[:80], files={os.path.basename(path): os.path.getsize(path)})
    counts: Counter[str] = Counter()
    for one in file.stored.values():
        counts[GGUF_KINDS.get(one.kind, f"type {one.kind}")] += math.prod(one.shape)
    found.stored = counts
    with _told(found):
        about = gguf.about_of(file)
        tensors = gguf.Tensors(file, about)
        found.config = family_of(about, path).config_of(about, path, set(tensors))
        sources.check_tensors(family_of(about, path), found.config, tensors.entries(), path)
    with _told(found):
        found.tokenizer = gguf_tokenizer(file.fields, path) if "tokenizer.ggml.model" in file.fields else None
    return found


def _of_marian(path: str) -> Header:
    file = marian.Marian(path)
    tensors = marian.Tensors(file)
    found = Header(path, "Marian", str(file.options.get("type"))[:80], files={os.path.basename(path): os.path.getsize(path)})
    found.stored = tensors.stored()
    with _told(found):
        found.config = marian_binary.config_of(file.options, path)
        sources.check_tensors(marian_binary, found.config, tensors.entries(), path)
    with _told(found):
        found.tokenizer = marian.tokenizer_of(path)
    return found


def _of_hugging_face(path: str, about: Mapping[str, Any]) -> Header:
    found = Header(path, "Hugging Face", str(about.get("model_type"))[:80])
    where = os.path.join(path, hugging_face.CONFIG)
    entries: dict[str, Entry] = {}
    with _told(found):
        _, entries = hugging_face.read_headers(path)
    found.stored = _counted(entries)
    with _told(found):
        family = family_of(about, where)
        found.config = family.config_of(about, where, set(sources.prefixed(family, entries).values()))
        if entries:
            sources.check_tensors(family, found.config, entries, path)
    with _told(found):
        found.pooling = sentences.read_pooling(path)
    return found


def _of_own(path: str) -> Header:
    with OpenFolder(path) as opened:
        about = opened.read_json(CONFIG_FILE)
        entries = opened.read_entries(TENSORS_FILE)
        found = Header(path, "mini_tfm", "mini_tfm", stored=_counted(entries))
        with _told(found):
            found.config = own.config_of(about, os.path.join(path, CONFIG_FILE))
            found.memory_text = about.get("memory")
            found.n_more_parameters = sum(math.prod(entry.shape) for name, entry in entries.items() if name.startswith(("memory.", LORA)))
            found.packed = own.packed_in(about, os.path.join(path, CONFIG_FILE))
            own.check_tensors(found.config, entries, os.path.join(path, TENSORS_FILE), found.packed)
            if layers := adapted_layers(entries):
                found.adapters = f"LoRA of rank {entries[f'{LORA}{layers[0]}.a'].shape[0]} beside {len(layers)} layers"
            tensors = opened.read_tensors(TENSORS_FILE, mmap=True)
            found.pooling = sentences.own_pooling(about.get("pooling"), tensors, os.path.join(path, CONFIG_FILE))
    return found


def _counted(entries: Mapping[str, Entry]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts["bfloat16" if entry.dtype == BFLOAT16 else str(entry.dtype)] += math.prod(entry.shape)
    return counts


@contextlib.contextmanager
def _told(found: Header) -> Iterator[None]:
    """Keeps what is wrong, and goes on with what else can be told."""
    try:
        yield
    except (FileProblem, InvalidValue) as error:
        found.faults.append(str(error))
