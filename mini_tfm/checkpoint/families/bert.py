"""Encoders: BERT (arXiv 1810.04805) and MiniLM, RoBERTa and XLM-R, DistilBERT (arXiv 1910.01108)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...config import Config
from .fields import Fields, their_activation
from .sources import Source, linear, norm

TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
BARE = ()
PREFIXES = ("", "bert.", "roberta.", "distilbert.")
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # as BERT's first files have them
UNUSED = (r"embeddings\.(position|token_type)_ids", r"pooler\..*", r"(cls|lm_head|classifier|pre_classifier|vocab_\w+|qa_outputs)(\..*)?")
_DISTILBERT = {  # its names of the parts of a layer
    "self.query": "q_lin", "self.key": "k_lin", "self.value": "v_lin", "output.dense": "out_lin"
}  # fmt: skip


def recognises(about: Mapping[str, Any]) -> bool:
    return about.get("model_type") in TYPES


def config_of(about: Mapping[str, Any], where: str, names: Collection[str]) -> Config:
    f, kind = Fields(about, where), about["model_type"]
    is_distilbert = kind == "distilbert"
    f.only("position_embedding_type", "absolute")
    f.only("is_decoder", False)
    f.only("add_cross_attention", False)
    f.only("sinusoidal_pos_embds", False, True)  # they are in the file all the same
    pad = f.integer("pad_token_id", 0 if kind in ("bert", "distilbert") else 1)
    offset = pad + 1 if kind in ("roberta", "xlm-roberta", "camembert") else 0
    bos, eos = (
        (f.integer("bos_token_id", 101), f.first_id("eos_token_id", 102))
        if offset == 0
        else (f.integer("bos_token_id", 0), f.first_id("eos_token_id", 2))
    )
    vocab_size = f.integer("vocab_size", 30522)
    size = {
        "d_model": f.integer("dim", 768) if is_distilbert else f.integer("hidden_size", 768),
        "n_heads": f.integer("n_heads", 12) if is_distilbert else f.integer("num_attention_heads", 12),
        "n_encoder_layers": f.layers("n_layers", 6) if is_distilbert else f.layers("num_hidden_layers", 12),
        "d_ff": f.integer("hidden_dim", 3072) if is_distilbert else f.integer("intermediate_size", 3072),
        "activation": f.activation("activation" if is_distilbert else "hidden_act", "gelu"),
        "token_types": 0 if is_distilbert else f.integer("type_vocab_size", 2),
    }
    return f.config(
        lambda: Config(
            vocab_size=vocab_size,
            n_decoder_layers=0,
            norm_position="post",
            norm_eps=f.number("layer_norm_eps", 1e-12),
            positions="learned",
            max_positions=f.integer("max_position_embeddings", 512) - offset,
            position_offset=offset,
            embedding_norm=True,
            embedding_scale=False,
            framed_by_tokenizer=True,
            pad_id=pad,
            bos_id=min(bos, vocab_size - 1),
            eos_id=min(eos, vocab_size - 1),
            **size,
        )
    )


def sources(config: Config) -> dict[str, Source]:
    is_distilbert = not config.token_types
    found = {
        "embedding.weight": Source("embeddings.word_embeddings.weight"),
        "encoder.positions.weight": Source("embeddings.position_embeddings.weight"),
        **norm("encoder.embedding_norm", "embeddings.LayerNorm"),
    }
    if config.token_types:
        found["encoder.token_types.weight"] = Source("embeddings.token_type_embeddings.weight")
    for i in range(config.n_encoder_layers):
        ours = f"encoder.{i}."
        theirs = f"transformer.layer.{i}." if is_distilbert else f"encoder.layer.{i}."
        for part, name in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("o", "output.dense")):
            found |= linear(f"{ours}attention.{part}", theirs + "attention." + (_DISTILBERT[name] if is_distilbert else name))
        found |= norm(f"{ours}attention_norm", theirs + ("sa_layer_norm" if is_distilbert else "attention.output.LayerNorm"))
        found |= linear(f"{ours}feed_forward.in", theirs + ("ffn.lin1" if is_distilbert else "intermediate.dense"))
        found |= linear(f"{ours}feed_forward.out", theirs + ("ffn.lin2" if is_distilbert else "output.dense"))
        found |= norm(f"{ours}feed_forward_norm", theirs + ("output_layer_norm" if is_distilbert else "output.LayerNorm"))
    return found


def about_of(config: Config) -> dict[str, Any]:
    activation = their_activation(config.activation)
    common = {"vocab_size": config.vocab_size, "pad_token_id": config.pad_id, "bos_token_id": config.bos_id, "eos_token_id": config.eos_id}
    common["max_position_embeddings"] = config.max_positions + config.position_offset
    if not config.token_types:
        return common | {
            "model_type": "distilbert",
            "architectures": ["DistilBertModel"],
            "dim": config.d_model,
            "n_heads": config.n_heads,
            "n_layers": config.n_encoder_layers,
            "hidden_dim": config.d_ff,
            "activation": activation,
        }
    name = "roberta" if config.position_offset else "bert"
    return common | {
        "model_type": name,
        "architectures": ["RobertaModel" if config.position_offset else "BertModel"],
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_encoder_layers,
        "intermediate_size": config.d_ff,
        "hidden_act": activation,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types,
    }
