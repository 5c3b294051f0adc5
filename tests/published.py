"""Small models of every published family: what their `config.json` says, and weights that a counter-based generator draws.

A variant is a class of Transformers' configuration and the fields in which it differs from that class's defaults. Weights are a
function of their name and shape alone, and the generator's bits are the same in every release of NumPy: a golden holds no weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np

from mini_tfm.autodiff import Var, backward, value_of
from mini_tfm.checkpoint.families import family_for, sources
from mini_tfm.checkpoint.safetensors import encode_safetensors
from mini_tfm.stream import Stream

GOLDENS, VALUES = (Path(__file__).parent / "checkpoint" / f"goldens.{kind}" for kind in ("json", "safetensors"))

_T5 = {"d_model": 32, "d_kv": 12, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 83,
       "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}  # fmt: skip
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 44, "decoder_ffn_dim": 52, "vocab_size": 83, "max_position_embeddings": 40, "pad_token_id": 1,
         "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
_BERT = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50, "vocab_size": 91,
         "max_position_embeddings": 40}  # fmt: skip
_LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 44,
          "vocab_size": 79, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = _LLAMA | {"head_dim": 10, "num_hidden_layers": 3, "sliding_window": 4, "layer_types": _LOCAL, "query_pre_attn_scalar": 14,
                   "final_logit_softcapping": 3.0, "attn_logit_softcapping": None}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
_STRETCHED = _YARN | {"attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 0.5}

# Name -> (model type as Transformers' AutoConfig knows it, its auto class, fields).
VARIANTS: dict[str, tuple[str, str, dict]] = {
    "t5": ("t5", "seq2seq", _T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "t5-v1.1": ("t5", "seq2seq", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-v1.1-tied": ("t5", "seq2seq", _T5 | {"feed_forward_proj": "gated-silu", "scale_decoder_outputs": False}),
    "mt5": ("mt5", "seq2seq", _T5 | {"vocab_size": 97, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5-tied": ("mt5", "seq2seq", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "byt5": ("t5", "seq2seq", _T5 | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu",
                                     "tie_word_embeddings": False}),
    "bart": ("bart", "seq2seq", _BART),
    "mbart": ("mbart", "seq2seq", _BART | {"scale_embedding": True}),
    "pegasus": ("pegasus", "seq2seq", _BART | {"scale_embedding": True, "activation_function": "relu", "pad_token_id": 0, "eos_token_id": 1,
                                               "decoder_start_token_id": 0, "bos_token_id": None}),
    "marian": ("marian", "seq2seq", _BART | {"pad_token_id": 82, "decoder_start_token_id": 82, "eos_token_id": 0, "scale_embedding": True,
                                             "activation_function": "swish"}),
    "marian-relu": ("marian", "seq2seq", _BART | {"pad_token_id": 82, "decoder_start_token_id": 82, "eos_token_id": 0,
                                                  "scale_embedding": False, "activation_function": "relu"}),
    "m2m100": ("m2m_100", "seq2seq", _BART | {"scale_embedding": True, "activation_function": "relu"}),
    "bart-heads": ("bart", "seq2seq", _BART | {"encoder_attention_heads": 8, "decoder_attention_heads": 2}),
    "mbart-heads": ("mbart", "seq2seq", _BART | {"decoder_attention_heads": 1}),
    "pegasus-heads": ("pegasus", "seq2seq", _BART | {"encoder_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
                                                     "decoder_start_token_id": 0, "bos_token_id": None}),
    "marian-heads": ("marian", "seq2seq", _BART | {"encoder_attention_heads": 1, "pad_token_id": 82, "decoder_start_token_id": 82,
                                                   "eos_token_id": 0}),
    "m2m100-heads": ("m2m_100", "seq2seq", _BART | {"encoder_attention_heads": 2, "decoder_attention_heads": 8}),
    "bert": ("bert", "encoder", _BERT),
    "distilbert": ("distilbert", "encoder", {"dim": 36, "n_layers": 2, "n_heads": 3, "hidden_dim": 50, "vocab_size": 91,
                                             "max_position_embeddings": 40}),
    "distilbert-sinusoidal": ("distilbert", "encoder", {"dim": 36, "n_layers": 1, "n_heads": 3, "hidden_dim": 50, "vocab_size": 91,
                                                        "max_position_embeddings": 40, "sinusoidal_pos_embds": True}),
    "roberta": ("roberta", "encoder", _BERT | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta": ("xlm-roberta", "encoder", _BERT | {"type_vocab_size": 1, "hidden_act": "gelu_new", "vocab_size": 102}),
    "camembert": ("camembert", "encoder", _BERT | {"type_vocab_size": 1}),
    "gpt2": ("gpt2", "decoder", {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 64, "vocab_size": 79, "bos_token_id": 78,
                                 "eos_token_id": 78}),
    "gpt2-untied": ("gpt2", "decoder", {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_inner": 50, "n_positions": 64, "vocab_size": 79,
                                        "bos_token_id": 78, "eos_token_id": 78, "tie_word_embeddings": False,
                                        "activation_function": "relu"}),
    "llama": ("llama", "decoder", _LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", "decoder", _LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama-biased": ("llama", "decoder", _LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": False}),
    "llama-linear": ("llama", "decoder", _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
                                                   "tie_word_embeddings": True}),
    "llama-llama3": ("llama", "decoder", _LLAMA | {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", "decoder", _LLAMA | {"rope_parameters": _YARN, "tie_word_embeddings": True}),
    "llama-yarn-attention": ("llama", "decoder", _LLAMA | {"rope_parameters": _STRETCHED,
                                                           "tie_word_embeddings": True}),
    "mistral": ("mistral", "decoder", _LLAMA | {"sliding_window": 4, "tie_word_embeddings": False}),
    "mistral-whole": ("mistral", "decoder", _LLAMA | {"sliding_window": None, "head_dim": 6, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", "decoder", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", "decoder", _LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
                                                   "tie_word_embeddings": False}),
    "qwen3": ("qwen3", "decoder", _LLAMA | {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "decoder", _GEMMA),
    "gemma2-capped": ("gemma2", "decoder", _GEMMA | {"attn_logit_softcapping": 0.5}),
    "gemma3": ("gemma3_text", "decoder", _GEMMA | {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                                                                       "full_attention": {"rope_type": "linear", "rope_theta": 1000.0,
                                                                                          "factor": 2.0}}}),
}  # fmt: skip


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of this name, float32: norms about 1, biases small, matrices that keep the size of what they multiply."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape)).reshape(shape)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).astype(np.float32)  # -1 to 1
    if name == "final_logits_bias":
        return uniform
    if len(shape) == 1:
        return (1 + uniform / 4 if name.endswith("weight") else uniform / 4).astype(np.float32)
    if "embed" in name or name.startswith(("shared", "wte", "wpe", "transformer.w")) or "relative_attention_bias" in name:
        return uniform
    return (uniform * np.float32(math.sqrt(3 / shape[-1]))).astype(np.float32)


def samples(vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """source (2, 9), its lengths (2,), target (2, 11): ids that are no special token of any variant."""
    rng = np.random.PCG64(7)
    draw = lambda *shape: (rng.random_raw(math.prod(shape)) % np.uint64(vocab_size - 12)).astype(np.int64).reshape(shape) + 5  # noqa: E731
    return draw(2, 9), np.array([9, 6]), draw(2, 11)


def write_folder(folder: Path, about: dict, tensors: dict[str, np.ndarray]) -> None:
    """A model folder as Transformers writes one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "model.safetensors").write_bytes(b"".join(bytes(part) for part in encode_safetensors(tensors, {"format": "pt"})))


def relative_error(actual, expected) -> float:
    """The largest difference, as a part of the range of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.abs(actual - expected).max() / max(np.ptp(expected), 1e-30))


def direction(shape: tuple[int, ...]) -> np.ndarray:
    """Fixed numbers R: the gradient of sum(output * R) is a test of every path to the weights."""
    return tensor("direction", (math.prod(shape), 1)).reshape(shape)


# The same of our model


def outputs(model, n_new: int) -> dict[str, np.ndarray]:
    """Encoder states (B, S, d), logits (B, T, V) of the target, the tokens that it goes on with; what such a model has of them."""
    config, found = model.config, {}
    source, lengths, _ = samples(config.vocab_size)
    if config.has_encoder:
        found["encoded"] = model.encode(source, lengths)
    if config.has_decoder:
        found["logits"] = value_of(_logits(model, *samples(config.vocab_size))[0])
        found["greedy"] = np.array(model.generate(source[:1], lengths[:1], max_new_tokens=n_new, stop_at_eos=False)[0])
    return found


def _logits(model, source, lengths, target, weights=None):
    """Scores: of an encoder-decoder the first is that of target[:, 0], of a decoder that of target[:, 1]."""
    stream, whole = Stream(model, None, len(target), weights=weights), np.full(len(target), target.shape[1])
    if not model.config.has_encoder:
        stream.last = target[:, 0]
        target = np.roll(target, -1, axis=1)  # what it is fed is its target, shifted
    stream.open(source if model.config.has_encoder else None, lengths if model.config.has_encoder else whole)
    return stream.logits(stream.decode(target, whole)), stream


def gradients(model) -> dict[str, np.ndarray]:
    """Of sum(output * R), by our names."""
    source, lengths, target = samples(model.config.vocab_size)
    weights = {name: Var(np.ascontiguousarray(weight)) for name, weight in model.weights.items()}
    if model.config.has_decoder:
        output, _ = _logits(model, source, lengths, target, weights)
        factors = direction(output.shape)
    else:
        stream = Stream(model, None, len(source), weights=weights)
        stream.open(source, lengths)
        output = stream.encoded.hidden
        factors = direction(output.shape) * (np.arange(source.shape[1]) < lengths[:, None])[..., None]
    backward(output, grads=[factors.astype(np.float32)])
    return {name: np.zeros(var.shape, np.float32) if var.grad is None else var.grad for name, var in weights.items()}


def projected(model, theirs: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Of each weight's gradient two numbers, its length and its product with fixed numbers; theirs are read as a weight is.

    Transformers gives none to the embedding of padding that is read, which we have no reason to leave out: that row is not counted.
    """
    table = family_for(model.config)
    names = {one: name for name, one in sources.prefixed(table, theirs).items()}
    found = {}
    for ours, source in table.sources(model.config).items():
        if source.name in names:
            found[ours] = dataclasses.replace(source, plus=0.0).read(theirs[names[source.name]])
    return {name: summary(name, gradient, model.config.pad_id) for name, gradient in found.items()}


def summary(name: str, gradient: np.ndarray, pad_id: int) -> tuple[float, float]:
    gradient = np.array(gradient, np.float64)
    if name == "embedding.weight":
        gradient[pad_id] = 0
    return float(np.sqrt((gradient**2).sum())), float((gradient * tensor("summary", (gradient.size, 1)).reshape(gradient.shape)).sum())


def kept(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of outputs what a golden holds: every third place, all tokens."""
    return {name: np.ascontiguousarray(value if name == "greedy" else value[:, ::3]) for name, value in found.items()}


def worst_gradient(model, expected: dict[str, tuple[float, float]]) -> float:
    """The largest difference of such numbers, as a part of the gradient's length; one that is nothing beside the others' counts as
    a thousandth of the longest."""
    found = gradients(model)
    least = max(length for length, _ in expected.values()) / 1000
    return max(
        abs(a - e) / max(pair[0], least)
        for name, pair in expected.items()
        for a, e in zip(summary(name, found[name], model.config.pad_id), pair, strict=True)
    )
