"""Models on disk.

A model is a folder: `config.json`, `model.safetensors` and the tokenizer's files.

    save:  arrays, dicts -> native.save_folder -> native.write_folder -> staged, fsynced, swapped in
    load:  folder -> native.load_folder -> validated, then allocated -> (config, tensors)

`native` is the one writer of the project and the reader of its own folders; it does not know what a
configuration field or a tensor name means. `models` does: it makes a Transformer of a folder and back. It is
imported by those who need it, as it stands above the tokenizers, which read and write through `native`.
"""

from mini_tfm.checkpoint.native import (
    BFLOAT16,
    encode_safetensors,
    load_folder,
    open_regular,
    parse_json_strict,
    read_bytes,
    read_json_strict,
    read_safetensors,
    save_folder,
    widen_bfloat16,
    write_folder,
)

__all__ = [
    "BFLOAT16",
    "encode_safetensors",
    "load_folder",
    "open_regular",
    "parse_json_strict",
    "read_bytes",
    "read_json_strict",
    "read_safetensors",
    "save_folder",
    "widen_bfloat16",
    "write_folder",
]
