"""The adapters of `adapters.py` as PEFT makes, trains, saves and reads them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import peer_models
from adapters import ADAMW, ADAPTED, N_STEPS, RATE, filled
from published import VARIANTS, samples


def make(variant: str, folder: Path, **changes):
    """The PEFT model of a variant, filled; the model beneath is saved into folder/model, the adapters into folder/adapter."""
    import peft
    import torch

    model = peft.get_peft_model(peer_models.make(variant, folder / "model"), peft.LoraConfig(**{**ADAPTED[variant], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(filled(name.replace(".default.", "."), tuple(parameter.shape))))
    model.save_pretrained(folder / "adapter")
    return model


def read(variant: str, model: Path, adapter: Path):
    """The adapters of a folder beside a saved model; a tensor missing or too much is an error."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(peer_models.read(variant, model), adapter).eval()


def outputs(variant: str, model) -> dict[str, np.ndarray]:
    return peer_models.outputs(variant, model.base_model.model)


def trained(variant: str, model) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `adapters.trained`; changes by PEFT's names in a file. Without dropout, as `model` is."""
    import torch

    source, lengths, target = (torch.from_numpy(array) for array in samples(model.config.vocab_size))
    mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
    given = {"input_ids": target} if VARIANTS[variant][1] == "decoder" else {"input_ids": source, "attention_mask": mask}
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.detach().clone() for name, one in parameters.items()}
    optimizer, losses = torch.optim.AdamW(parameters.values(), lr=RATE, **ADAMW), []
    for _ in range(N_STEPS):
        loss = model(**given, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses), {re.sub(r"\.default\.", ".", name): (one.detach() - before[name]).numpy() for name, one in parameters.items()}
