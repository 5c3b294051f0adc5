"""The small models of `published.py` as Transformers makes and runs them: what the goldens and the tests beside it ask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from published import VARIANTS, samples, tensor

N_NEW = 12  # tokens that are generated


def make(variant: str, folder: Path, **changes):
    """The model of a variant, filled and saved into `folder`; changes: fields of its configuration."""
    import torch
    import transformers

    model_type, kind, fields = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(model_type, **{**fields, **changes})
    model = _auto(kind).from_config(config, attn_implementation="eager").eval()
    if kind == "seq2seq" and fields.get("tie_word_embeddings") is False:  # Transformers 5 begins every T5 tied
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]  # sinusoids are not
        for name, parameter in trained + [each for each in model.named_buffers() if each[0] == "final_logits_bias"]:
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    model.save_pretrained(folder)
    return model


def _auto(kind: str):
    import transformers

    return getattr(transformers, {"seq2seq": "AutoModelForSeq2SeqLM", "decoder": "AutoModelForCausalLM", "encoder": "AutoModel"}[kind])


def read(variant: str, folder: Path, **options):
    """A saved folder, as Transformers reads it."""
    return _auto(VARIANTS[variant][1]).from_pretrained(folder, attn_implementation="eager", **options).eval()


def outputs(variant: str, model) -> dict[str, np.ndarray]:
    """Encoder states, where there is an encoder, logits (B, T, V) of the target, and the tokens that it goes on with."""
    import torch

    kind, found = VARIANTS[variant][1], {}
    source, lengths, target = (torch.from_numpy(array) for array in samples(model.config.vocab_size))
    mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        if kind != "decoder":
            encoder = model.get_encoder() if kind == "seq2seq" else model
            states = encoder(input_ids=source, attention_mask=mask).last_hidden_state
            found["encoded"] = (states * mask[..., None]).numpy()
        if kind != "encoder":
            found["logits"] = _logits(kind, model, source, mask, target).numpy()
            found["greedy"] = greedy(kind, model, source[:1], mask[:1])
    return found


def _logits(kind, model, source, mask, target):
    import torch

    if kind == "decoder":
        return model(input_ids=target).logits
    start = torch.full((len(target), 1), model.config.decoder_start_token_id)
    inputs = torch.cat([start, target[:, :-1]], 1)
    return model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs).logits


def greedy(kind, model, source, mask) -> np.ndarray:
    """(N_NEW,) tokens, no end among them."""
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": N_NEW, "use_cache": False}
    no_end = {"eos_token_id": None, "forced_eos_token_id": None, "forced_bos_token_id": None, "bad_words_ids": None}
    made = model.generate(source, attention_mask=mask, pad_token_id=model.config.pad_token_id or 0, **options, **no_end)
    return made[0, -N_NEW:].numpy()


def gradients(variant: str, model) -> dict[str, np.ndarray]:
    """Of sum(output * R), R as `direction` has it: by the names of the weights."""
    import torch
    from published import direction

    kind = VARIANTS[variant][1]
    source, lengths, target = (torch.from_numpy(array) for array in samples(model.config.vocab_size))
    mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
    model.zero_grad()
    if kind == "encoder":
        output = model(input_ids=source, attention_mask=mask).last_hidden_state * mask[..., None]
    else:
        output = _logits(kind, model, source, mask, target)
    (output * torch.from_numpy(direction(tuple(output.shape)))).sum().backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
