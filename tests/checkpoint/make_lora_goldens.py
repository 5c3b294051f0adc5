"""Writes lora.json and lora.safetensors: what PEFT computes with the adapters of `adapters.py`, and what it makes of them in training.

    python tests/checkpoint/make_lora_goldens.py

Run where torch, transformers and peft are installed. lora.json has the `adapter_config.json` and the names and shapes of the tensors
that PEFT wrote, and the versions; lora.safetensors a part of the outputs, the losses of a few steps of AdamW, and two numbers of what
these add to each tensor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import transformers

import mini_tfm as mt
from mini_tfm.checkpoint.peft import places_of
from mini_tfm.checkpoint.safetensors import encode_safetensors, read_safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))
import peer_adapters
from adapters import ADAPTED, GOLDENS, VALUES, summaries
from published import VARIANTS, kept


def golden(variant: str, folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    model = peer_adapters.make(variant, folder)
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    if isinstance(about["target_modules"], list):
        about["target_modules"].sort()  # PEFT keeps a set
    tensors = read_safetensors(folder / "adapter" / "adapter_model.safetensors")
    found = kept(peer_adapters.outputs(variant, model))
    if VARIANTS[variant][1] != "encoder":
        found["losses"], changes = peer_adapters.trained(variant, model)
        theirs = places_of(mt.load(folder / "model").config, changes)
        found["changes"] = summaries({ours: changes[name] for ours, name in theirs.items()})
    return {"config": about, "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}}, found


def main() -> None:
    told, values = {"peft": peft.__version__, "transformers": transformers.__version__}, {}
    for variant in ADAPTED:
        with tempfile.TemporaryDirectory() as folder:
            told[variant], found = golden(variant, Path(folder))
        values |= {f"{variant}/{name}": value for name, value in found.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(told[name], separators=(',', ':'))}" for name in sorted(told)]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    VALUES.write_bytes(b"".join(bytes(part) for part in encode_safetensors(values)))


if __name__ == "__main__":
    main()
