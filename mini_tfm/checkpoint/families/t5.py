"""T5 (arXiv 1910.10683), T5 1.1 and Flan-T5, mT5 (arXiv 2010.11934) and ByT5 (arXiv 2105.13626)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...config import Config
from .fields import ACTIVATIONS, Fields, their_activation
from .sources import Source, linear

TYPES = ("t5", "mt5")
PREFIXES = ("",)
BARE = ()
UNUSED = (r"(en|de)coder\.embed_tokens\.weight", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")


def recognises(about: Mapping[str, Any]) -> bool:
    return about.get("model_type") in TYPES


def config_of(about: Mapping[str, Any], where: str, names: Collection[str]) -> Config:
    f = Fields(about, where)
    layers = f.layers("num_layers", 6)
    gate, _, kind = (
        f.about.get("feed_forward_proj", "relu").rpartition("-") if isinstance(about.get("feed_forward_proj", ""), str) else ("", "", "")
    )
    kind = "gelu_new" if (gate, kind) == ("gated", "gelu") else kind
    if gate not in ("", "gated") or kind not in ACTIVATIONS:
        f.faults.append(
            f"field 'feed_forward_proj': {about['feed_forward_proj']!r:.80} is not supported, only relu, gelu, gated-gelu and the like"
        )
    # Told to be tied, T5 scales its outputs, and mT5, whose files say either, does not. The tensors say whether it is tied.
    is_scaled = f.flag("tie_word_embeddings", True) and about["model_type"] == "t5"
    d_model = f.integer("d_model", 512, least=1)
    return f.config(
        lambda: Config(
            vocab_size=f.integer("vocab_size", 32128),
            d_model=d_model,
            n_heads=f.integer("num_heads", 8),
            d_head=f.integer("d_kv", 64),
            d_ff=f.integer("d_ff", 2048),
            n_encoder_layers=layers,
            n_decoder_layers=f.layers("num_decoder_layers", layers),
            attention_scale=1.0,
            activation=ACTIVATIONS.get(kind, "relu"),
            gated=gate == "gated",
            norm="rms",
            norm_position="pre",
            norm_eps=f.number("layer_norm_epsilon", 1e-6),
            bias=False,
            positions="relative",
            relative_buckets=f.integer("relative_attention_num_buckets", 32),
            relative_max_distance=f.integer("relative_attention_max_distance", 128),
            tie_embeddings="lm_head.weight" not in names,
            output_scale=d_model**-0.5 if f.flag("scale_decoder_outputs", is_scaled) else None,
            embedding_scale=False,
            framed_by_tokenizer=True,
            pad_id=f.integer("pad_token_id", 0),
            bos_id=f.integer("decoder_start_token_id", f.integer("pad_token_id", 0)),
            eos_id=f.first_id("eos_token_id", 1),
        )
    )


def sources(config: Config) -> dict[str, Source]:
    found = {"embedding.weight": Source("shared.weight")}
    for stack, n in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        if n == 0:
            continue
        found[f"{stack}.relative_bias.weight"] = Source(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for i in range(n):
            ours, theirs = f"{stack}.{i}.", f"{stack}.block.{i}.layer."
            sites = [("attention", "SelfAttention")] + ([("cross", "EncDecAttention")] if stack == "decoder" else [])
            for number, (site, name) in enumerate(sites):
                for part in "qkvo":
                    found |= linear(f"{ours}{site}.{part}", f"{theirs}{number}.{name}.{part}", bias=False)
                found[f"{ours}{site}_norm.weight"] = Source(f"{theirs}{number}.layer_norm.weight")
            feed_forward = f"{theirs}{len(sites)}.DenseReluDense."
            parts = (("in", "wi_1"), ("gate", "wi_0"), ("out", "wo")) if config.gated else (("in", "wi"), ("out", "wo"))
            for part, name in parts:
                found |= linear(f"{ours}feed_forward.{part}", feed_forward + name, bias=False)
            found[f"{ours}feed_forward_norm.weight"] = Source(f"{theirs}{len(sites)}.layer_norm.weight")
        found[f"{stack}.norm.weight"] = Source(f"{stack}.final_layer_norm.weight")
    if not config.tie_embeddings:
        found["output.weight"] = Source("lm_head.weight", True)
    return found


def about_of(config: Config) -> dict[str, Any]:
    kind = their_activation(config.activation)
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_head,
        "d_ff": config.d_ff,
        "num_heads": config.n_heads,
        "num_layers": config.n_encoder_layers,
        "num_decoder_layers": config.n_decoder_layers,
        "feed_forward_proj": ("gated-gelu" if kind in ("gelu_new", "gelu") else f"gated-{kind}") if config.gated else kind,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "tie_word_embeddings": config.output_scale is not None,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
    }
