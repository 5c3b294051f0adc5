"""Files as somebody hostile, or a broken download, might leave them: writers of GGUF and of Marian's files that check nothing, and seeded
mutations."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
from published import GOLDENS, tensor, write_folder

_SCALARS = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}
GGUF_FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *map(chr, range(33, 90)), "ab"],
    "tokenizer.ggml.token_type": [3, *[1] * 58],
    "tokenizer.ggml.merges": ["A B", "C D"][:0],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
GGUF_SHAPES = {
    "token_embd.weight": (59, 8),
    "output_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8),
    "blk.0.attn_k.weight": (4, 8),
    "blk.0.attn_v.weight": (4, 8),
    "blk.0.attn_output.weight": (8, 8),
    "blk.0.attn_norm.weight": (8,),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.ffn_up.weight": (12, 8),
    "blk.0.ffn_gate.weight": (12, 8),
    "blk.0.ffn_down.weight": (8, 12),
}


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value) -> bytes:
    if isinstance(value, bytes):  # as it is, type and all
        return value
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    kind, form = _SCALARS[type(value)]
    return struct.pack("<I", kind) + struct.pack(form, value)


def gguf(fields=None, shapes=None, *, version=3, counts=None, kinds=None, offsets=None, drop=()) -> bytes:
    """A GGUF file. fields, shapes: what differs from a good one, None leaves one out; counts: the numbers it claims to have of
    tensors and fields; kinds, offsets: of tensors, by name."""
    fields = {key: value for key, value in {**GGUF_FIELDS, **(fields or {})}.items() if value is not None}
    shapes = {key: value for key, value in {**GGUF_SHAPES, **(shapes or {})}.items() if value is not None and key not in drop}
    n_tensors, n_fields = counts or (len(shapes), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)
    head += b"".join(_text(key) + _value(value) for key, value in fields.items())
    data = b""
    for name, shape in shapes.items():
        array = tensor(name, shape) if np.prod(shape, dtype=object) < 10**6 else np.zeros(8, np.float32)
        offset = (offsets or {}).get(name, len(data))
        head += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", (kinds or {}).get(name, 0), offset)
        data += array.tobytes()
        data += b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + data


MARIAN_OPTIONS = {"type": "transformer", "dim-emb": 8, "dim-vocabs": [24, 24], "enc-depth": 1, "dec-depth": 1, "transformer-heads": 2,
                  "transformer-dim-ffn": 12, "transformer-ffn-activation": "relu", "transformer-decoder-autoreg": "rnn", "dec-cell": "ssru",
                  "tied-embeddings-all": True, "transformer-preprocess": "", "transformer-postprocess": "dan",
                  "transformer-tied-layers": [], "version": "v1.9.0 0 2021-01-01 00:00:00 +0000"}  # fmt: skip


def marian_shapes(options: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of such a model by Marian's names."""
    d, v, ff = options["dim-emb"], options["dim-vocabs"][0], options["transformer-dim-ffn"]
    shapes: dict[str, tuple[int, ...]] = {"Wemb": (v, d), "decoder_ff_logit_out_b": (1, v)}
    for stack, n in (("encoder", options["enc-depth"]), ("decoder", options["dec-depth"])):
        for layer in range(1, min(n, 100) + 1):
            name, sites = f"{stack}_l{layer}_", ["self", *(["context"] if stack == "decoder" else [])]
            norms = ["ffn_ffn", *(site + "_Wo" for site in sites)]
            if stack == "decoder" and options["transformer-decoder-autoreg"] == "rnn":
                sites, norms = ["context"], ["ffn_ffn", "context_Wo", "rnn_ffn"]
                shapes |= {name + "rnn_W": (d, d), name + "rnn_Wf": (d, d), name + "rnn_bf": (1, d)}
            for site in sites:
                for part in "qkvo":
                    shapes |= {f"{name}{site}_W{part}": (d, d), f"{name}{site}_b{part}": (1, d)}
            shapes |= {f"{name}ffn_W1": (d, ff), f"{name}ffn_b1": (1, ff), f"{name}ffn_W2": (ff, d), f"{name}ffn_b2": (1, d)}
            shapes |= {f"{name}{norm}_ln_{what}": (1, d) for norm in norms for what in ("scale", "bias")}
    return shapes


def marian_yaml(options: dict) -> str:
    """Options as Marian's YAML library writes them."""
    lines = []
    for key, value in options.items():
        if isinstance(value, list) and value:
            lines += [f"{key}:", *(f"  - {each}" for each in value)]
        else:
            lines.append(f"{key}: {json.dumps(value) if not isinstance(value, str) or value == '' else value}")
    return "\n".join(lines)


def marian(
    options=None, tensors=None, *, quantized=False, version=1, count=None, kinds=None, lengths=None, names=None, yaml=None, pad=0, end=b""
) -> bytes:
    """A file of Marian's. options, tensors: what differs from a good one, None leaves one out; quantized: matrices as int8, transposed,
    with their scale; count: the items it claims to have; kinds, lengths, names: of items, by name; pad: bytes behind each item."""
    options = {key: value for key, value in {**MARIAN_OPTIONS, **(options or {})}.items() if value is not None}
    good = {name: tensor(name, shape) for name, shape in marian_shapes({**MARIAN_OPTIONS, **options}).items()} if yaml is None else {}
    items: dict[str, tuple[int, tuple[int, ...], bytes]] = {}
    for name, array in {**good, **(tensors or {})}.items():
        if array is None:
            continue
        if quantized and "W" in name and "_ln_" not in name:
            scale = np.float32(127 / np.abs(array).max())
            numbers = np.rint((array if name == "Wemb" else array.T) * scale).astype(np.int8)
            items[name] = (0x4101, array.shape, numbers.tobytes() + struct.pack("<f", scale))
            items[name + "_QuantMultA"] = (0x404, (1, 1), struct.pack("<f", 30.0))
        else:
            items[name] = (0x404, array.shape, array.astype("<f4").tobytes())
    text = (marian_yaml(options) if yaml is None else yaml).encode() + b"\0"
    items["special:model.yml"] = (0x101, (len(text),), text)
    head, shapes, data, written = struct.pack("<QQ", version, len(items) if count is None else count), b"", b"", b""
    for name, (kind, shape, content) in items.items():
        content += b"\0" * (pad if "special" not in name else 0)
        told = (names or {}).get(name, name.encode() + b"\0")
        length = (lengths or {}).get(name, len(content))
        head += struct.pack("<QQQQ", len(told), (kinds or {}).get(name, kind), len(shape), length)
        written += told
        shapes += struct.pack(f"<{len(shape)}i", *shape)
        data += content
    head += written + shapes
    padding = -(len(head) + 8) % 256
    return head + struct.pack("<Q", padding) + b"\0" * padding + data + end


def hugging_face(folder: Path, variant: str = "llama-tied", tensors=None, **changes) -> Path:
    """A folder of a small model; changes: of its configuration, None leaves a field out; tensors: by name, None leaves one out."""
    told = json.loads(GOLDENS.read_text())[variant]
    about = {name: value for name, value in {**told["config"], **changes}.items() if name not in changes or value is not None}
    given = {name: tensor(name, tuple(shape)) for name, shape in told["tensors"].items()}
    write_folder(folder, about, {name: value for name, value in {**given, **(tensors or {})}.items() if value is not None})
    return folder


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes of bytes: bits, lengths, cuts, repeats."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        # Headers are where faults are: half of all changes are in the first 2,000 bytes.
        at = draw.randrange(max(1, min(len(changed), 2000) if draw.random() < 0.5 else len(changed)))
        kind = draw.randrange(7)
        if kind == 0 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and changed:
            changed[at] = draw.randrange(256)
        elif kind == 2:
            del changed[at : at + draw.randint(1, 40)]
        elif kind == 3:
            changed[at:at] = changed[at : at + draw.randint(1, 40)]
        elif kind == 4:
            changed[at : at + 8] = struct.pack("<Q", draw.choice(INTERESTING))
        elif kind == 5:
            changed[at : at + 4] = struct.pack("<I", draw.choice(INTERESTING) & 0xFFFFFFFF)
        else:
            del changed[at:]
    return bytes(changed)


JSON_VALUES = [None, True, False, 0, 1, -1, 2, 3, 1 << 31, 1 << 63, 10**400, 1.5, -1.0, 1e308, 1e-320, "", "x", "relu", [], {}, [1], [None],
               {"a": 1}, {"rope_type": "yarn"}, {"factor": -1}, [[["x"]]], "sliding_attention", ["sliding_attention"]]  # fmt: skip


def mutated_json(about: dict, draw: random.Random) -> dict:
    """One to three fields with another value, gone, or moved."""
    changed = json.loads(json.dumps(about))
    for _ in range(draw.randint(1, 3)):
        place = changed
        while True:
            name = draw.choice(sorted(place)) if place else "x"
            if isinstance(place.get(name), dict) and place[name] and draw.random() < 0.7:
                place = place[name]
                continue
            break
        kind = draw.randrange(4)
        if kind == 0:
            place.pop(name, None)
        elif kind == 1 and type(place.get(name)) is int:
            place[name] += draw.choice([-1, 1, -100, 1 << 40])
        else:
            place[name] = draw.choice(JSON_VALUES)
    return changed
