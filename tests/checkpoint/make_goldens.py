"""Writes goldens.json and goldens.safetensors: what Transformers computes with the small models of `published.py`.

    python tests/checkpoint/make_goldens.py [variant ...]

Run where the extra `peers` is installed. goldens.json has the `config.json` and the names and shapes of the tensors that Transformers
wrote, and the version; goldens.safetensors a part of the outputs, and two numbers of each weight's gradient.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers

import mini_tfm as mt
from mini_tfm.checkpoint.safetensors import encode_safetensors, read_safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))
import peer_models
from published import GOLDENS, VALUES, VARIANTS, kept, projected


def golden(variant: str, folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    model = peer_models.make(variant, folder)
    tensors = read_safetensors(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    found = kept(peer_models.outputs(variant, model))
    lengths = projected(mt.load(folder), peer_models.gradients(variant, model))
    found["gradients"] = np.array(list(lengths.values()), np.float32)
    shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    return {"config": about, "tensors": shapes, "gradients": list(lengths)}, found


def main() -> None:
    told, values = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}, {}
    if VALUES.exists():
        values = dict(read_safetensors(VALUES))
    for variant in sys.argv[1:] or VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            told[variant], found = golden(variant, Path(folder) / "model")
        values = {name: value for name, value in values.items() if name.partition("/")[0] != variant}
        values |= {f"{variant}/{name}": value for name, value in found.items()}
    told["transformers"] = transformers.__version__
    lines = [f"{json.dumps(name)}: {json.dumps(told[name], separators=(',', ':'))}" for name in sorted(told)]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    VALUES.write_bytes(b"".join(bytes(part) for part in encode_safetensors(values)))


if __name__ == "__main__":
    main()
