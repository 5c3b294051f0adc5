"""GPT-2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...config import Config
from .fields import Fields, their_activation
from .sources import Source, norm

TYPES = ("gpt2",)
PREFIXES = ("transformer.",)
BARE = ("lm_head.weight",)
UNUSED = (r"h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight")


def recognises(about: Mapping[str, Any]) -> bool:
    return about.get("model_type") in TYPES


def config_of(about: Mapping[str, Any], where: str, names: Collection[str]) -> Config:
    f = Fields(about, where)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.only("add_cross_attention", False)
    d_model, eos, vocab_size = f.integer("n_embd", 768), f.first_id("eos_token_id", 50256), f.integer("vocab_size", 50257)
    is_scaled = f.flag("scale_attn_weights", True)
    return f.config(
        lambda: Config(
            vocab_size=vocab_size,
            d_model=d_model,
            n_heads=f.integer("n_head", 12),
            n_encoder_layers=0,
            n_decoder_layers=f.layers("n_layer", 12),
            d_ff=f.integer("n_inner", 4 * d_model),
            attention_scale=None if is_scaled else 1.0,
            activation=f.activation("activation_function", "gelu_new"),
            norm_eps=f.number("layer_norm_epsilon", 1e-5),
            positions="learned",
            max_positions=f.integer("n_positions", 1024),
            embedding_scale=False,
            tie_embeddings=f.flag("tie_word_embeddings", True),
            framed_by_tokenizer=True,
            pad_id=f.integer("pad_token_id", min(eos, vocab_size - 1)),
            bos_id=f.integer("bos_token_id", min(eos, vocab_size - 1)),
            eos_id=min(eos, vocab_size - 1),
        )
    )


def sources(config: Config) -> dict[str, Source]:
    d = config.d_model
    found = {"embedding.weight": Source("wte.weight"), "decoder.positions.weight": Source("wpe.weight")}
    for i in range(config.n_decoder_layers):
        ours, theirs = f"decoder.{i}.", f"h.{i}."
        for number, part in enumerate("qkv"):  # its matrices are (d_in, d_out), as ours
            for kind in ("weight", "bias"):
                found[f"{ours}attention.{part}.{kind}"] = Source(f"{theirs}attn.c_attn.{kind}", part=(number * d, (number + 1) * d))
        for part, name in (("attention.o", "attn.c_proj"), ("feed_forward.in", "mlp.c_fc"), ("feed_forward.out", "mlp.c_proj")):
            found |= {f"{ours}{part}.{kind}": Source(f"{theirs}{name}.{kind}") for kind in ("weight", "bias")}
        found |= norm(f"{ours}attention_norm", f"{theirs}ln_1") | norm(f"{ours}feed_forward_norm", f"{theirs}ln_2")
    found |= norm("decoder.norm", "ln_f")
    if not config.tie_embeddings:
        found["output.weight"] = Source("lm_head.weight", True)
    return found


def about_of(config: Config) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_layer": config.n_decoder_layers,
        "n_inner": config.d_ff,
        "n_positions": config.max_positions,
        "activation_function": their_activation(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }
