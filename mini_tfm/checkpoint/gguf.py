"""GGUF, llama.cpp's format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic, version 2 or 3, number of tensors, number of fields
    fields    key, type, value: the architecture, the tokenizer, the chat template
    tensors   name, shape (fastest axis first), type, offset; data begins at the next multiple of `general.alignment`

A file is hostile until shown otherwise: every length is held against the bytes that are left before it is used. Blocks of
quantised numbers become float32: those of the plain kinds here, in half the time that the `gguf` package, llama.cpp's own, takes; the
others by that package. Names and fields are translated to those of
the Hugging Face folder that the file was made from, so that one family reads both.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..config import RotaryScaling
from ..errors import FileProblem, InvalidValue
from ..files.reading import mapped
from ..positions import scaled_frequencies
from .safetensors import BFLOAT16, MAX_TENSORS, Entry

MAGIC = b"GGUF"
MAX_FIELDS = 1 << 16
MAX_ITEMS = 1 << 22  # of an array: four times the largest vocabulary
MAX_STRING = 1 << 24
# Type of a field -> struct's letter; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Type of a tensor -> NumPy's, where it needs no unpacking.
_PLAIN: dict[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 28: np.dtype("<f8"), 30: BFLOAT16}
Q4_0, Q4_1, Q8_0 = 2, 3, 8
_BLOCKS = {Q4_0: 18, Q4_1: 20, Q8_0: 34}  # bytes of a block of 32 numbers


class Stored(NamedTuple):
    """A tensor as the header declares it: its shape as NumPy has it, offset and length in bytes of the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    length: int


class Gguf:
    """A GGUF file: `fields` by key, `stored` tensors by name. Raises FileProblem, InvalidValue naming the file and what is wrong."""

    def __init__(self, path: str | os.PathLike):
        self.name, self._data = mapped(path)
        try:
            self.fields, self.stored = _Reader(self._data).header()
        except FileProblem as error:
            raise FileProblem(f"{self.name}: {error}") from error
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise InvalidValue(f"{self.name}: {error}; the file is damaged or is not GGUF") from error

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, float16, bfloat16 and float32 as they lie in the mapped file, quantised ones as float32."""
        shape, kind, begin, length = self.stored[name]
        raw = np.frombuffer(self._data, np.uint8, length, begin)
        if kind in _PLAIN:
            return raw.view(_PLAIN[kind]).reshape(shape)
        if kind in _BLOCKS:
            return _unpacked(raw, kind).reshape(shape)
        quants = _quants(self.name)
        return quants.quants.dequantize(raw.reshape(*shape[:-1], -1), quants.GGMLQuantizationType(kind)).reshape(shape)


class _Reader:
    """Reads a header, front to back; no length is believed."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        if bytes(self.data[:4]) != MAGIC:
            raise ValueError("expected a file that begins with 'GGUF'")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version: expected 2 or 3, got {version}" + (" (big-endian)" if version in (2 << 24, 3 << 24) else ""))
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        if n_tensors > MAX_TENSORS or n_fields > MAX_FIELDS:
            raise ValueError(f"expected at most {MAX_TENSORS} tensors and {MAX_FIELDS} fields, got {n_tensors} and {n_fields}")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.text()
            if key in fields:
                raise ValueError(f"the field {key!r:.80} appears twice")
            fields[key] = self.value(self.number("I"))
        declared = {}
        for _ in range(n_tensors):
            name = self.text()
            if name in declared:
                raise ValueError(f"the tensor {name!r:.80} appears twice")
            rank = self.number("I")
            if not 1 <= rank <= 4:
                raise ValueError(f"tensor {name!r:.80}: expected 1 to 4 dimensions, got {rank}")
            shape = tuple(self.number("Q") for _ in range(rank))[::-1]
            declared[name] = (shape, self.number("I"), self.number("Q"))
        return fields, self.placed(declared, fields.get("general.alignment", 32))

    def placed(self, declared: Mapping[str, tuple[tuple[int, ...], int, int]], alignment: Any) -> dict[str, Stored]:
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
            raise ValueError(f"general.alignment: expected 1 to 65536, got {alignment!r:.80}")
        start = -(-self.at // alignment) * alignment
        found = {}
        for name, (shape, kind, offset) in declared.items():
            length = _length(name, shape, kind)
            if offset % alignment or start + offset + length > len(self.data):
                raise ValueError(f"tensor {name!r:.80}: its {length} bytes at {offset} are not within the file")
            found[name] = Stored(shape, kind, start + offset, length)
        end = 0
        for name, one in sorted(found.items(), key=lambda item: item[1].begin):
            if one.begin < end:
                raise ValueError(f"tensor {name!r:.80} lies on another one")
            end = one.begin + one.length
        return found

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"the file ends within its header, at byte {self.at}")
        taken = self.data[self.at : self.at + n]
        self.at += n
        return taken

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        n = self.number("Q")
        if n > MAX_STRING:
            raise ValueError(f"a text: expected at most {MAX_STRING} bytes, got {n}")
        return self.take(n).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != 9:
            raise ValueError(f"a field has the unknown type {kind}")
        of, n = self.number("I"), self.number("Q")
        if n > MAX_ITEMS:
            raise ValueError(f"an array: expected at most {MAX_ITEMS} items, got {n}")
        if of == 8:
            return [self.text() for _ in range(n)]
        if of not in _SCALARS:
            raise ValueError(f"an array has items of the type {of}, which is not supported")
        letter = _SCALARS[of]
        return list(struct.unpack(f"<{n}{letter}", self.take(n * struct.calcsize("<" + letter))))


def _length(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor."""
    count = math.prod(shape)
    if kind in _PLAIN:
        return count * _PLAIN[kind].itemsize
    if kind in _BLOCKS:
        block, size = 32, _BLOCKS[kind]
    else:
        quants = _quants(f"tensor {name!r:.80}")
        try:
            block, size = quants.GGML_QUANT_SIZES[quants.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name!r:.80} has the unknown type {kind}") from None
    if shape[-1] % block:
        raise ValueError(f"tensor {name!r:.80}: expected rows of whole blocks of {block} numbers, got {shape[-1]}")
    return count // block * size


def _unpacked(raw: np.ndarray, kind: int) -> np.ndarray:
    """Blocks of 32 numbers of one scale -> float32 (blocks, 32).

    Q8_0: scale, 32 int8. Q4_0, Q4_1: scale, least number in Q4_1 (-8 scales in Q4_0), 16 bytes, of which the lower halves
    are the first 16 numbers.
    """
    blocks = raw.reshape(-1, _BLOCKS[kind])
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == Q8_0:
        return blocks[:, 2:].view(np.int8) * scale
    found = np.empty((len(blocks), 2, 16), np.float32)
    numbers = blocks[:, -16:]
    if kind == Q4_0:
        np.multiply((numbers & 15).view(np.int8) - np.int8(8), scale, out=found[:, 0])
        np.multiply((numbers >> 4).view(np.int8) - np.int8(8), scale, out=found[:, 1])
    else:
        np.multiply(numbers & 15, scale, out=found[:, 0])
        np.multiply(numbers >> 4, scale, out=found[:, 1])
        found += blocks[:, 2:4].copy().view("<f2").astype(np.float32)[:, None]
    return found.reshape(-1, 32)


def _quants(what: str) -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise FileProblem(f"{what}: holds quantised numbers, which the gguf package unpacks: pip install gguf") from error
    return gguf


# What the same model is called in Hugging Face's folders

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FACTORS = "rope_freqs.weight"  # by which frequencies are divided
ORIGINAL_POSITIONS = 8192  # of Llama 3, before its frequencies were scaled
_KNOWN = {*_FIELDS, "vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.type", "rope.scaling.factor"}
_KNOWN |= {"rope.scaling.original_context_length", "rope.scaling.finetuned"}


def about_of(file: Gguf) -> dict[str, Any]:
    """The `config.json` of the model in a file. Raises InvalidValue naming what is not supported."""
    fields, name = file.fields, file.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InvalidValue(f"{file.name}: the architecture {name!r:.80} is not supported, only {', '.join(ARCHITECTURES)}")
    own = {key.removeprefix(name + "."): value for key, value in fields.items() if key.startswith(name + ".")}
    if unknown := sorted(set(own) - _KNOWN):
        raise InvalidValue(f"{file.name}: {', '.join(f'{name}.{key}' for key in unknown[:10])} are not supported")
    about = {"model_type": name} | {theirs: own[key] for key, theirs in _FIELDS.items() if key in own}
    about["tie_word_embeddings"] = "output.weight" not in file.stored
    about["attention_bias"] = name == "llama" and "blk.0.attn_q.bias" in file.stored
    table = file.stored.get("token_embd.weight")
    about["vocab_size"] = table.shape[0] if table is not None else own.get("vocab_size")
    kind = own.get("rope.scaling.type", "none")
    if FACTORS in file.stored:
        about["rope_scaling"] = _scaling_of(file, own.get("rope.freq_base", 10000.0))
    if kind not in ("none", "linear", "yarn"):
        raise InvalidValue(f"{file.name}: {name}.rope.scaling.type: {kind!r:.40} is not supported, only none, linear and yarn")
    if kind != "none":
        about["rope_scaling"] = {"rope_type": kind, "factor": own.get("rope.scaling.factor", 1.0)}
        if "rope.scaling.original_context_length" in own:
            about["rope_scaling"]["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    for role in ("bos", "eos", "padding"):
        if f"tokenizer.ggml.{role}_token_id" in fields:
            about[("pad" if role == "padding" else role) + "_token_id"] = fields[f"tokenizer.ggml.{role}_token_id"]
    return about


def _scaling_of(file: Gguf, base: Any) -> dict[str, Any]:
    """What a file says by a factor for each frequency: the scaling of Llama 3. Raises InvalidValue for other factors."""
    factors = file.tensor(FACTORS).astype(np.float64).reshape(-1) if file.stored[FACTORS].length <= 1 << 16 else np.zeros(0)
    known = (
        len(factors) > 0 and bool(np.isfinite(factors).all()) and bool((factors >= 1).all()) and isinstance(base, int | float) and base > 1
    )
    if known:
        frequencies = float(base) ** (-np.arange(len(factors)) / len(factors))
        scaling = RotaryScaling(kind="llama3", factor=float(factors.max()), original_positions=ORIGINAL_POSITIONS)
        if np.allclose(frequencies / factors, scaled_frequencies(frequencies, scaling, float(base)), rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": ORIGINAL_POSITIONS}
    came = f"{len(factors)} from {factors.min():.4g} to {factors.max():.4g}" if len(factors) else f"shape {file.stored[FACTORS].shape}"
    raise InvalidValue(f"{file.name}: tensor {FACTORS!r}: expected the factors of Llama 3's frequencies (1 to its factor), got {came}")


def generation_of(file: Gguf) -> dict[str, Any]:
    """Options of generation: the tokens that end an answer, where there are several."""
    keys = (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
    n = len(file.fields.get("tokenizer.ggml.tokens") or ())
    ids = list(dict.fromkeys(one for key in keys if type(one := file.fields.get(key)) is int and 0 <= one < n))
    return {"eos_token_id": ids} if len(ids) > 1 else {}


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by Hugging Face's names, each unpacked when it is asked for."""

    def __init__(self, file: Gguf, about: Mapping[str, Any]):
        self.file, self.about = file, about
        self._names = {_theirs(name): name for name in file.stored if name != FACTORS}

    def entries(self) -> dict[str, Entry]:
        return {
            theirs: Entry(0, 0, theirs, _PLAIN.get(self.file.stored[name].kind, np.dtype("f4")), self.file.stored[name].shape)
            for theirs, name in self._names.items()
        }

    def __getitem__(self, theirs: str) -> np.ndarray:
        tensor = self.file.tensor(self._names[theirs])
        part = theirs.rpartition("self_attn.")[2]
        if self.about["model_type"] == "llama" and part.startswith(("q_proj", "k_proj")):
            heads = (
                self.about["num_attention_heads"]
                if part[0] == "q"
                else self.about.get("num_key_value_heads", self.about["num_attention_heads"])
            )
            # llama.cpp turns the pairs (2 i, 2 i + 1), everybody else (i, i + D / 2).
            pairs = tensor.reshape(heads, len(tensor) // heads // 2, 2, *tensor.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _theirs(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if part in _WHOLE:
        return f"{_WHOLE[part]}.{kind}"
    head, _, rest = part.partition(".")
    number, _, what = rest.partition(".")
    return f"layers.{number}.{_LAYER[what]}.{kind}" if head == "blk" and what in _LAYER else name
