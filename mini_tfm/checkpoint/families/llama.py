"""Llama (arXiv 2302.13971, 2407.21783) and the decoders built as it is: SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ...config import Config, RotaryScaling
from ...errors import InvalidValue
from .fields import Fields, their_activation
from .sources import Source, linear

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
PREFIXES = ("model.",)
BARE = ("lm_head.weight",)
UNUSED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq", r"lm_head\.weight")


def recognises(about: Mapping[str, Any]) -> bool:
    return about.get("model_type") in TYPES


def config_of(about: Mapping[str, Any], where: str, names: Collection[str]) -> Config:
    f, kind = Fields(about, where), about["model_type"]
    is_gemma = kind.startswith("gemma")
    layers, heads = f.layers("num_hidden_layers", 32), f.integer("num_attention_heads", 32, least=1)
    d_model = f.integer("hidden_size", 4096, least=1)
    d_head = f.integer("head_dim", 256 if is_gemma else 128 if kind == "qwen3" else max(d_model // heads, 1), least=1)
    vocab_size = f.integer("vocab_size")
    f.only("pretraining_tp", 1)
    f.only("use_bidirectional_attention", False)
    f.only("no_rope_layers", [], why="layers without positions")
    f.only("num_local_experts", why="mixtures of experts")
    if kind == "qwen2":
        biased: tuple[str, ...] = ("q", "k", "v")
    else:
        biased = ("q", "k", "v", "o") if f.flag("attention_bias", False) else ()
    biased += ("in", "gate", "out") if f.flag("mlp_bias", False) else ()
    rotary = _rotary(f, layers, d_head)
    query = f.positive("query_pre_attn_scalar", 256) if is_gemma else d_head
    bos, eos = f.first_id("bos_token_id", 1), f.first_id("eos_token_id", 2)
    scaling = rotary.get("rotary_scaling")
    stretched = rotary.pop("stretched", _yarn_stretch(scaling.factor) if scaling is not None and scaling.kind == "yarn" else 1.0)
    return f.config(
        lambda: Config(
            vocab_size=vocab_size,
            d_model=d_model,
            n_heads=heads,
            n_kv_heads=f.integer("num_key_value_heads", heads),
            d_head=d_head,
            n_encoder_layers=0,
            n_decoder_layers=layers,
            d_ff=f.integer("intermediate_size", 11008),
            gated=True,
            attention_scale=query**-0.5 * stretched**2,  # yarn makes queries and keys longer: the same
            attention_cap=f.number("attn_logit_softcapping", 0) or None,
            output_cap=f.number("final_logit_softcapping", 0) or None,
            activation=f.activation("hidden_activation" if is_gemma else "hidden_act", "gelu_pytorch_tanh" if is_gemma else "silu"),
            norm="rms",
            norm_position="sandwich" if is_gemma else "pre",
            norm_eps=f.number("rms_norm_eps", 1e-6),
            qk_norm=kind in ("qwen3", "gemma3_text"),
            bias=biased or False,
            positions="rotary",
            context_length=f.integer("max_position_embeddings", 2048),
            embedding_scale=is_gemma,
            tie_embeddings="lm_head.weight" not in names and f.flag("tie_word_embeddings", is_gemma),
            framed_by_tokenizer=True,
            pad_id=f.integer("pad_token_id", eos),
            bos_id=bos,
            eos_id=eos,
            **rotary,
        )
    )


def _rotary(f: Fields, layers: int, d_head: int) -> dict[str, Any]:
    """Fields of positions: Transformers 5 has them in `rope_parameters`, before it was `rope_theta` and `rope_scaling`."""
    about = f.about
    given = about.get("rope_parameters") or about.get("rope_scaling") or {}
    local: Mapping[str, Any] = {}
    if isinstance(given, Mapping) and "full_attention" in given:  # by the kind of layer
        given, local = given["full_attention"], given.get("sliding_attention") or {}
    if not isinstance(given, Mapping) or not isinstance(local, Mapping):
        f.faults.append(f"field 'rope_parameters': expected a mapping, got {given!r:.80}")
        return {}
    scaling = Fields({**given, "rope_type": given.get("rope_type", given.get("type", "default"))}, f.where)
    kind = scaling.about["rope_type"]
    found: dict[str, Any] = {"rotary_base": float(scaling.number("rope_theta", f.number("rope_theta", 10000.0)))}
    share = scaling.positive("partial_rotary_factor", f.positive("partial_rotary_factor", 1.0))
    if share != 1.0 and not scaling.faults:
        found["rotary_dims"] = int(d_head * share)
    if kind in ("linear", "llama3", "yarn"):
        scaling.only("truncate", True)
        scaling.only("mscale", why="use attention_factor")
        original = scaling.integer("original_max_position_embeddings", f.integer("max_position_embeddings", 2048))
        numbers = {
            ours: float(scaling.number(theirs, default))
            for ours, theirs, default in (
                ("factor", "factor", 1.0),
                ("low_factor", "low_freq_factor", 1.0),
                ("high_factor", "high_freq_factor", 4.0),
                ("beta_fast", "beta_fast", 32.0),
                ("beta_slow", "beta_slow", 1.0),
            )
        }
        if not scaling.faults:
            try:
                found["rotary_scaling"] = RotaryScaling(kind=kind, original_positions=original, **numbers)
            except InvalidValue as error:
                f.faults.append(f"field 'rope_parameters': {str(error).removeprefix('Config: rotary_scaling: ')}")
        if kind == "yarn" and "attention_factor" in scaling:
            found["stretched"] = scaling.positive("attention_factor", 1.0)
    elif kind != "default":
        f.faults.append(f"field 'rope_parameters': the type {kind!r:.40} is not supported, only default, linear, llama3 and yarn")
    f.faults += [f"field 'rope_parameters': {fault}" for fault in scaling.faults]
    return found | _windows(f, layers, local)


def _yarn_stretch(factor: float) -> float:
    """By what queries and keys become longer (arXiv 2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1


def _windows(f: Fields, layers: int, local: Mapping[str, Any]) -> dict[str, Any]:
    window, kinds = f.about.get("sliding_window"), f.about.get("layer_types")
    if window is None or f.about.get("use_sliding_window") is False:
        return {}
    found: dict[str, Any] = {"window": f.integer("sliding_window")}
    if isinstance(kinds, list):
        if len(kinds) != layers or not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
            f.faults.append(f"field 'layer_types': expected sliding_attention or full_attention for {layers} layers, got {kinds!r:.80}")
            return {}
        found["local_layers"] = tuple(number for number, kind in enumerate(kinds) if kind == "sliding_attention")
        if not found["local_layers"]:
            return {}
    elif f.about["model_type"] == "qwen2" or f.about["model_type"] == "qwen3":
        found["local_layers"] = tuple(range(f.integer("max_window_layers", layers), layers))
        if not found["local_layers"]:
            return {}
    elif f.about["model_type"] == "gemma2":
        found["local_layers"] = tuple(range(0, layers, 2))
    elif f.about["model_type"] == "gemma3_text":
        every = f.integer("sliding_window_pattern", 6, least=1)
        found["local_layers"] = tuple(i for i in range(layers) if (i + 1) % every)
    if f.about["model_type"] == "gemma3_text":
        own = Fields(local, f.where)
        own.only("rope_type", "default")
        found["local_rotary_base"] = float(own.number("rope_theta", f.number("rope_local_base_freq", 10000.0)))
        f.faults += [f"field 'rope_parameters': of sliding_attention: {fault}" for fault in own.faults]
    return found


def sources(config: Config) -> dict[str, Source]:
    is_gemma, plus = config.norm_position == "sandwich", 1.0 if config.norm_position == "sandwich" else 0.0  # its norms hold w - 1
    found = {"embedding.weight": Source("embed_tokens.weight"), "decoder.norm.weight": Source("norm.weight", plus=plus)}
    for i in range(config.n_decoder_layers):
        ours, theirs = f"decoder.{i}.", f"layers.{i}."
        for part in "qkvo":
            found |= linear(f"{ours}attention.{part}", f"{theirs}self_attn.{part}_proj", config.has_bias(part))
        for part in "qk" if config.qk_norm else "":
            found[f"{ours}attention.{part}_norm.weight"] = Source(f"{theirs}self_attn.{part}_norm.weight", plus=plus)
        for part, name in (("in", "up"), ("gate", "gate"), ("out", "down")):
            found |= linear(f"{ours}feed_forward.{part}", f"{theirs}mlp.{name}_proj", config.has_bias(part))
        norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
        if is_gemma:
            norms = {
                "attention_norm": "input_layernorm",
                "attention_output_norm": "post_attention_layernorm",
                "feed_forward_norm": "pre_feedforward_layernorm",
                "feed_forward_output_norm": "post_feedforward_layernorm",
            }
        found |= {f"{ours}{name}.weight": Source(f"{theirs}{one}.weight", plus=plus) for name, one in norms.items()}
    if not config.tie_embeddings:
        found["output.weight"] = Source("lm_head.weight", True)
    return found


def about_of(config: Config) -> dict[str, Any]:
    if config.norm_position == "sandwich":
        kind = "gemma3_text" if config.qk_norm else "gemma2"
    else:
        kind = "qwen3" if config.qk_norm else "qwen2" if config.bias == ("q", "k", "v") else "llama"
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}
    about: dict[str, Any] = {
        "model_type": kind,
        "architectures": [names[kind] + "ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "num_hidden_layers": config.n_decoder_layers,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    about["hidden_activation" if kind.startswith("gemma") else "hidden_act"] = their_activation(config.activation, "gelu_pytorch_tanh")
    if kind in ("llama", "qwen3"):
        about["attention_bias"] = config.has_bias("q")
        about["mlp_bias"] = config.has_bias("in")
    if config.rotary_dims != config.d_head:
        about["partial_rotary_factor"] = config.rotary_dims / config.d_head  # type: ignore[operator]
    if scaling := config.rotary_scaling:
        about["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            about["rope_scaling"]["original_max_position_embeddings"] = scaling.original_positions
        if scaling.kind == "llama3":
            about["rope_scaling"] |= {"low_freq_factor": scaling.low_factor, "high_freq_factor": scaling.high_factor}
        if scaling.kind == "yarn":
            about["rope_scaling"] |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            stretched = (config.attention_scale * config.d_head**0.5) ** 0.5  # type: ignore[operator]
            if not math.isclose(stretched, _yarn_stretch(scaling.factor), rel_tol=1e-12):
                about["rope_scaling"]["attention_factor"] = stretched
    if config.window is not None:
        about |= {"sliding_window": config.window, "use_sliding_window": True}
        if config.local_layers is not None:
            local = config.local_layers
            about["layer_types"] = ["sliding_attention" if i in local else "full_attention" for i in range(config.n_decoder_layers)]
        elif kind == "llama":
            about |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    if kind.startswith("gemma"):
        about["query_pre_attn_scalar"] = round(config.attention_scale**-2)  # type: ignore[operator]
        about |= {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.output_cap}
        if config.local_rotary_base is not None:
            about["rope_local_base_freq"] = config.local_rotary_base
    return about
