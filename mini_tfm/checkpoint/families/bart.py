"""BART (arXiv 1910.13461) and what is built as it is: mBART, Pegasus, MarianMT, M2M100 and NLLB."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...config import Config
from .fields import Fields, their_activation
from .sources import Source, linear, norm

# What the types differ in: where norms are, and what positions are.
TYPES: dict[str, dict[str, Any]] = {
    "bart": {"norm_position": "post", "embedding_norm": True, "positions": "learned", "position_offset": 2, "output_bias": True},
    "mbart": {"norm_position": "pre", "embedding_norm": True, "positions": "learned", "position_offset": 2, "output_bias": True},
    "pegasus": {"norm_position": "pre", "positions": "sinusoidal", "sinusoids": "halves", "output_bias": True},
    "marian": {"norm_position": "post", "positions": "sinusoidal", "sinusoids": "halves", "output_bias": True},
    "m2m_100": {"norm_position": "pre", "positions": "sinusoidal", "sinusoids": "fairseq", "position_offset": 2},
}
ARCHITECTURES = {
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration",
    "marian": "MarianMTModel",
    "m2m_100": "M2M100ForConditionalGeneration",
}
PREFIXES = ("model.",)
BARE = ("final_logits_bias", "lm_head.weight")  # names that never have the prefix
UNUSED = (
    r"(en|de)coder\.embed_tokens\.weight",
    r"(en|de)coder\.embed_positions\.(weight|_float_tensor)",
    r"lm_head\.weight",
    r"final_logits_bias",
)


def recognises(about: Mapping[str, Any]) -> bool:
    return about.get("model_type") in TYPES


def config_of(about: Mapping[str, Any], where: str, names: Collection[str]) -> Config:
    f = Fields(about, where)
    kind = TYPES[about["model_type"]]
    f.only("share_encoder_decoder_embeddings", True, why="one table of embeddings")
    f.only("tie_word_embeddings", True, why="the output layer is the embedding")
    f.only("normalize_embedding", bool(kind.get("embedding_norm")))
    f.only("normalize_before", kind["norm_position"] == "pre")
    f.only("static_position_embeddings", kind["positions"] == "sinusoidal")
    pad = f.integer("pad_token_id", 1)
    return f.config(
        lambda: Config(
            vocab_size=f.integer("vocab_size"),
            d_model=f.integer("d_model", 1024),
            n_heads=f.integer("encoder_attention_heads", 16),
            decoder_n_heads=f.integer("decoder_attention_heads", 16),
            n_encoder_layers=f.layers("encoder_layers", 12),
            n_decoder_layers=f.layers("decoder_layers", 12),
            d_ff=f.integer("encoder_ffn_dim", 4096),
            decoder_d_ff=f.integer("decoder_ffn_dim", 4096),
            activation=f.activation("activation_function", "gelu"),
            **_length(kind, f.integer("max_position_embeddings", 1024)),
            embedding_scale=f.flag("scale_embedding", about["model_type"] == "m2m_100"),
            framed_by_tokenizer=True,
            pad_id=pad,
            bos_id=f.integer("decoder_start_token_id", f.first_id("eos_token_id", 2)),
            eos_id=f.first_id("eos_token_id", 2),
            **kind,
        )
    )


def _length(kind: Mapping[str, Any], n: int) -> dict[str, Any]:
    return {"max_positions" if kind["positions"] == "learned" else "context_length": n}


def sources(config: Config) -> dict[str, Source]:
    found = {"embedding.weight": Source("shared.weight")}
    if config.output_bias:
        found["output.bias"] = Source("final_logits_bias", row=True)
    for stack, n in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        if n == 0:
            continue
        if config.positions == "learned":
            found[f"{stack}.positions.weight"] = Source(f"{stack}.embed_positions.weight")
        if config.embedding_norm:
            found |= norm(f"{stack}.embedding_norm", f"{stack}.layernorm_embedding")
        for i in range(n):
            ours, theirs = f"{stack}.{i}.", f"{stack}.layers.{i}."
            for site, name in (
                (("attention", "self_attn"), ("cross", "encoder_attn")) if stack == "decoder" else (("attention", "self_attn"),)
            ):
                for part in "qkv":
                    found |= linear(f"{ours}{site}.{part}", f"{theirs}{name}.{part}_proj")
                found |= linear(f"{ours}{site}.o", f"{theirs}{name}.out_proj")
                found |= norm(f"{ours}{site}_norm", f"{theirs}{name}_layer_norm")
            found |= linear(f"{ours}feed_forward.in", f"{theirs}fc1") | linear(f"{ours}feed_forward.out", f"{theirs}fc2")
            found |= norm(f"{ours}feed_forward_norm", f"{theirs}final_layer_norm")
        if config.final_norm:
            found |= norm(f"{stack}.norm", f"{stack}.layer_norm")
    return found


def about_of(config: Config) -> dict[str, Any]:
    keys = ("norm_position", "embedding_norm", "positions", "position_offset", "output_bias")
    ours = {key: getattr(config, key) for key in keys} | ({"sinusoids": config.sinusoids} if config.positions == "sinusoidal" else {})
    defaults = {"embedding_norm": False, "position_offset": 0, "output_bias": False}
    fitting = [name for name, kind in TYPES.items() if {**defaults, **kind} == ours]
    name = fitting[0]
    return {
        "model_type": name,
        "architectures": [ARCHITECTURES[name]],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "encoder_attention_heads": config.n_heads,
        "decoder_attention_heads": config.heads("decoder").n_heads,
        "encoder_layers": config.n_encoder_layers,
        "decoder_layers": config.n_decoder_layers,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.decoder_d_ff,
        "activation_function": their_activation(config.activation),
        "max_position_embeddings": config.max_positions if config.positions == "learned" else config.context_length,
        "scale_embedding": config.embedding_scale,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "tie_word_embeddings": True,
    }
