"""Marian's binary files of models: https://github.com/marian-nmt/marian-dev/blob/master/src/common/binary.cpp

    version 1, number of items                      uint64 each, as all numbers but those of shapes
    headers   an item: bytes of its name, type, number of dimensions, bytes of its data
    names     each with a NUL at its end
    shapes    int32
    padding   its length, then so many bytes
    data      one item after another; bytes of padding at the end of an item belong to it

The item `special:model.yml` holds the architecture, as YAML. A file is hostile until shown otherwise: every length is held against the
bytes that are left before it is used. Matrices of int8 have one scale, behind their numbers; they become float32.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import FileProblem, InvalidValue
from ..files.reading import mapped, open_regular, read_bytes
from ..text.shortlist import Shortlist
from ..text.tokenizers import MAX_FILE_BYTES, BPETokenizer, Tokenizer
from ..text.vocabularies import sentencepiece_files
from .safetensors import MAX_NAME_CHARS, MAX_TENSORS, Entry

VERSION = struct.pack("<Q", 1)
OPTIONS = "special:model.yml"
SHORTLIST = struct.pack("<Q", 0xF11A48D5013417F5)
MAX_OPTIONS_BYTES = 1 << 16
MAX_RANK = 4
MAX_ALWAYS = 1 << 22  # tokens that a shortlist has for every source: all of the largest vocabulary
ALIGNMENT = 256  # bytes of padding that an item may have
FLOAT32, INT8, INTGEMM8 = 0x404, 0x101, 0x4101  # types of items
KINDS = {FLOAT32: "float32", INT8: "int8", INTGEMM8: "int8 with a scale"}
EMBEDDING, OUTPUT_BIAS = "Wemb", "decoder_ff_logit_out_b"
NEVER = -100.0  # a score that no token is chosen with, and whose share of a softmax is none in float32


class Item(NamedTuple):
    """An item as the header declares it: offset and length in bytes of the file, padding left out."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    length: int


class Marian:
    """A file: `items` by name, `options` of the architecture. Raises FileProblem, InvalidValue naming the file and what is wrong."""

    def __init__(self, path: str | os.PathLike):
        self.name, self._data = mapped(path)
        try:
            self.items = _Reader(self._data).items()
            self.options = options_of(self._text())
        except (ValueError, struct.error) as error:
            raise InvalidValue(f"{self.name}: {error}; the file is damaged or is not Marian's") from error

    def tensor(self, name: str) -> np.ndarray:
        """An item as float32. Matrices of int8, but for the embedding, lie transposed in the file, whatever their shape says."""
        shape, kind, begin, length = self.items[name]
        raw = np.frombuffer(self._data, np.uint8, length, begin)
        if kind == FLOAT32:
            return np.require(raw.view("<f4").reshape(shape), requirements="A")
        numbers = raw[:-4].view(np.int8).astype(np.float32)
        numbers *= np.float32(1) / _scale(self._data, begin + length)  # by which they were multiplied before they were rounded
        return numbers.reshape(shape) if name == EMBEDDING else numbers.reshape(shape[::-1]).T

    def _text(self) -> str:
        item = self.items.get(OPTIONS)
        if item is None:
            raise ValueError(f"has no {OPTIONS!r}, which says what the model is")
        if item.kind != INT8 or item.length > MAX_OPTIONS_BYTES:
            raise ValueError(f"{OPTIONS!r}: expected at most {MAX_OPTIONS_BYTES} bytes of int8, got {item.length}")
        return self._data[item.begin : item.begin + item.length].decode().rstrip("\0")


class _Reader:
    """Reads a header, front to back; no length is believed."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def items(self) -> dict[str, Item]:
        version, n = self.numbers(2)
        if version != 1:
            raise ValueError(f"version: expected 1, got {version}")
        if n > MAX_TENSORS:
            raise ValueError(f"expected at most {MAX_TENSORS} items, got {n}")
        headers = [self.numbers(4) for _ in range(n)]
        names = [self.name(n_bytes) for n_bytes, _, _, _ in headers]
        shapes = [self.shape(name, rank) for name, (_, _, rank, _) in zip(names, headers, strict=True)]
        self.take(self.numbers(1)[0])
        found: dict[str, Item] = {}
        for name, shape, (_, kind, _, stored) in zip(names, shapes, headers, strict=True):
            if name in found:
                raise ValueError(f"the item {name!r:.80} appears twice")
            if kind not in KINDS:
                known = ", ".join(f"{kind:#x} ({what})" for kind, what in KINDS.items())
                raise ValueError(f"item {name!r:.80}: its type {kind:#x} is not supported, only {known}")
            length = math.prod(shape) * (4 if kind == FLOAT32 else 1) + (4 if kind == INTGEMM8 else 0)
            if not length <= stored <= length + ALIGNMENT:
                raise ValueError(f"item {name!r:.80}: its shape {shape} takes {length} bytes, the header says {stored}")
            found[name] = Item(shape, kind, self.at, length)
            self.skip(stored)
            if kind == INTGEMM8 and not 1e-30 < (scale := _scale(self.data, found[name].begin + length)) < 1e30:
                raise ValueError(f"item {name!r:.80}: expected a positive scale behind its numbers, got {scale}")
        if self.at != len(self.data):
            raise ValueError(f"its items end at byte {self.at}, the file has {len(self.data)}")
        return found

    def skip(self, n: int) -> None:
        if n > len(self.data) - self.at:
            raise ValueError(f"the file ends too early: {n} bytes were to follow byte {self.at}, it has {len(self.data)}")
        self.at += n

    def take(self, n: int) -> bytes:
        self.skip(n)
        return self.data[self.at - n : self.at]

    def numbers(self, n: int) -> tuple[int, ...]:
        return struct.unpack(f"<{n}Q", self.take(8 * n))

    def name(self, n_bytes: int) -> str:
        if not 2 <= n_bytes <= MAX_NAME_CHARS:
            raise ValueError(f"expected names of 1 to {MAX_NAME_CHARS - 1} bytes, got {n_bytes - 1}")
        name = self.take(n_bytes).decode()
        if name.find("\0") != len(name) - 1:
            raise ValueError(f"the name {name!r:.80}: expected a NUL at its end, and no other")
        return name[:-1]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"item {name!r:.80}: expected 1 to {MAX_RANK} dimensions, got {rank}")
        shape = struct.unpack(f"<{rank}i", self.take(4 * rank))
        if min(shape) < 1:
            raise ValueError(f"item {name!r:.80}: expected a shape of numbers above 0, got {shape}")
        return shape


def _scale(data: Any, end: int) -> np.float32:
    """The scale of an int8 matrix, its last 4 bytes."""
    return np.float32(struct.unpack("<f", data[end - 4 : end])[0])


# The YAML of the options

_KEY, _ENTRY = re.compile(r"([\w.-]+):(?:\s+(.*?))?\s*"), re.compile(r"\s*-\s+(.*?)\s*")
_WORDS: dict[str, Any] = {"true": True, "false": False, "~": None, "null": None, "": None}


def options_of(text: str) -> dict[str, Any]:
    """The options in `text`: as much of YAML as Marian writes, which is keys with plain values or lists of them, and no nesting.

    Raises ValueError naming the line that is something else.
    """
    found: dict[str, Any] = {}
    key = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith(("#", "---")):
            continue
        if key is not None and (entry := _ENTRY.fullmatch(line)):
            found[key] = [*(found[key] or []), _value(entry[1])]
        elif (field := _KEY.fullmatch(line)) and field[1] not in found:
            value = field[2] or ""
            found[field[1]] = _list(value) if value.startswith("[") else _value(value)
            key = None if value else field[1]  # only a key without a value may have entries below it
        else:
            raise ValueError(f"{OPTIONS}: line {number}: expected 'key: value' or an entry of a list, and each key once, got {line!r:.80}")
    return found


def _list(text: str) -> list[Any]:
    if not text.endswith("]") or set("[]{}\"'") & set(text[1:-1]):
        raise ValueError(f"{OPTIONS}: expected a list of plain values, got {text!r:.80}")
    return [_value(part.strip()) for part in text[1:-1].split(",")] if text[1:-1].strip() else []


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d{1,18}\.?\d{0,18}|\.\d{1,18})([eE][-+]?\d{1,3})?", text):
        return float(text)
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return json.loads(text, strict=False)
        except ValueError:
            raise ValueError(f"{OPTIONS}: expected quoted text, got {text!r:.80}") from None
    return text[1:-1].replace("''", "'") if len(text) > 1 and text[0] == text[-1] == "'" else text


# The model in a file


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by its own names, each made float32 when it is asked for.

    Marian's decoder begins with an embedding of zeros, which no token has. Here it is that of one token more, the last, as in the
    conversion for Transformers; its output bias keeps it from being chosen.
    """

    def __init__(self, file: Marian):
        self.file = file
        self._names = [name for name in file.items if name != OPTIONS]

    def entries(self) -> dict[str, Entry]:
        """What can be read of it; numbers without a scale are not weights."""
        kinds = {name: np.dtype(np.int8 if self.file.items[name].kind == INT8 else np.float32) for name in self._names}
        return {name: Entry(0, 0, name, kinds[name], self._shape(name)) for name in self._names}

    def stored(self) -> dict[str, int]:
        """Numbers in the file by how they are stored."""
        counts: dict[str, int] = {}
        for name in self._names:
            shape, kind, _, _ = self.file.items[name]
            counts[KINDS[kind]] = counts.get(KINDS[kind], 0) + math.prod(shape)
        return counts

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.items[name].shape
        if name == EMBEDDING:
            return (shape[0] + 1, *shape[1:])
        return (*shape[:-1], shape[-1] + 1) if name == OUTPUT_BIAS else shape

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.file.tensor(name)
        if name == EMBEDDING:
            return np.concatenate([tensor, np.zeros((1, *tensor.shape[1:]), np.float32)])
        if name == OUTPUT_BIAS:
            return np.concatenate([tensor, np.full((*tensor.shape[:-1], 1), NEVER, np.float32)], axis=-1)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def find(path: str) -> str | None:
    """The file of a Marian model: `path` itself, or the one in the folder `path`; None where it is, or has, no such file.

    A folder with a config.json is somebody else's. Raises InvalidValue for a folder with several models.
    """
    if os.path.isfile(path):
        return path if _begins_with(VERSION, path) else None
    try:
        names = os.listdir(path)
    except (OSError, ValueError):  # its reader says what is wrong
        return None
    if "config.json" in names:
        return None
    found = _beginning_with(VERSION, path, names)
    if len(found) > 1:
        raise InvalidValue(f"{path}: has several models, {', '.join(map(os.path.basename, found[:5]))}; give the path of one of them")
    return found[0] if found else None


def _beginning_with(magic: bytes, folder: str, names: Iterable[str]) -> list[str]:
    files = sorted(os.path.join(folder, name) for name in names if name.endswith(".bin"))
    return [file for file in files if _begins_with(magic, file)]


def _begins_with(magic: bytes, path: str) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(magic)) == magic
    except FileProblem:
        return False


def shortlist_of(path: str) -> Shortlist | None:
    """The binary shortlist beside the file of a model; None where there is none, or several. Raises FileProblem, InvalidValue.

    magic, checksum, frequent tokens, tokens for each, number of offsets, number of tokens (uint64 each); offsets, uint64; tokens, uint32
    """
    folder = os.path.dirname(os.path.abspath(path))
    files = _beginning_with(SHORTLIST, folder, os.listdir(folder))
    if len(files) != 1:
        return None
    data = read_bytes(folder, MAX_FILE_BYTES, os.path.basename(files[0]))
    head = struct.unpack_from("<6Q", data) if len(data) >= 48 else (0,) * 6
    _, _, n_always, _, n_offsets, n_tokens = head
    if 48 + 8 * n_offsets + 4 * n_tokens != len(data) or n_always > MAX_ALWAYS:
        raise InvalidValue(f"{files[0]}: its header does not fit its {len(data)} bytes; the file is damaged or is not Marian's")
    offsets = np.frombuffer(data, "<u8", n_offsets, 48)
    tokens = np.frombuffer(data, "<u4", n_tokens, 48 + 8 * n_offsets)
    try:
        return Shortlist(np.arange(n_always), offsets, tokens)
    except InvalidValue as error:
        raise InvalidValue(f"{files[0]}: {error}") from error


def tokenizer_of(path: str) -> Tokenizer | None:
    """That of the SentencePiece model beside the file of a model; None where there is none, or several that differ."""
    folder = os.path.dirname(os.path.abspath(path))
    names = sorted(name for name in os.listdir(folder) if name.endswith(".spm"))
    if not names or len({read_bytes(folder, MAX_FILE_BYTES, name) for name in names}) > 1:
        return None
    return BPETokenizer(*sentencepiece_files(folder, names[0]), folder)
