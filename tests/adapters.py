"""Small models of `published.py` with LoRA adapters: what PEFT is asked for, and the same of our model.

Adapters are filled as weights are, by a function of a tensor's name and shape: a golden holds none.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from published import samples, summary, tensor

from mini_tfm.checkpoint.safetensors import encode_safetensors
from mini_tfm.train import Trainer

GOLDENS, VALUES = (Path(__file__).parent / "checkpoint" / f"lora.{kind}" for kind in ("json", "safetensors"))
N_STEPS = 3
# eps: a gradient that is nothing but rounding must not become a whole step.
RATE, ADAMW = 1e-2, {"betas": (0.9, 0.98), "eps": 1e-4, "weight_decay": 0.1}

# Variant -> fields of PEFT's LoraConfig.
ADAPTED: dict[str, dict] = {
    "llama": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "qwen2": {"r": 2, "lora_alpha": 2, "target_modules": r".*layers\.1\..*_proj"},
    "gemma3": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "gaussian"},
    "t5": {"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"]},
    "t5-v1.1": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "marian": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"},
    "bart": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"], "use_rslora": True, "lora_dropout": 0.1},
    "bert": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}


def filled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name: what A and B add is about half of what the weight gives."""
    return (tensor(name, shape) * (0.5 if ".lora_A." in name else math.sqrt(shape[-1] / 2))).astype(np.float32)


def write_adapter(folder: Path, about: dict, tensors: dict[str, np.ndarray]) -> None:
    """A folder as PEFT writes one."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "adapter_model.safetensors").write_bytes(b"".join(bytes(part) for part in encode_safetensors(tensors, {"format": "pt"})))


def trained(model) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The losses of N_STEPS of AdamW, and what they add to every A and B, by our names."""
    source, lengths, target = samples(model.config.vocab_size)
    before = {name: weight.copy() for name, weight in model.weights.items() if name.endswith((".a", ".b"))}
    trainer = Trainer(model, learning_rate=RATE, schedule="constant", clip=None, **ADAMW)
    for _ in range(N_STEPS):
        trainer.step(source, target, lengths) if model.config.has_encoder else trainer.step(None, target)
    return np.array(trainer.losses), {name: model.weights[name] - weight for name, weight in before.items()}


def summaries(changes: dict[str, np.ndarray]) -> np.ndarray:
    """(tensors, 2): of each in order of the names, its length and its product with fixed numbers."""
    return np.array([summary(name, changes[name], 0) for name in sorted(changes)], np.float32)
