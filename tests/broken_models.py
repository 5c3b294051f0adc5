"""Files as somebody hostile, or a broken download, might leave them: a GGUF writer that checks nothing, and seeded mutations."""

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
