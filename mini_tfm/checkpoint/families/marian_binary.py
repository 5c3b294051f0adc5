"""Marian's Transformers as its own files have them (checkpoint/marian.py): of Bergamot, of Firefox's translations, of OPUS-MT.

The fast ones have a decoder without self-attention, with SSRU in its place (see `model.SSRU`). `about` is what the file's YAML says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import Config
from .fields import Fields
from .sources import Source

PREFIXES = ("",)
BARE = ()
UNUSED = (r".*_QuantMultA",)  # scales of activations, for products of int8
MIXERS = {"self-attention": "attention", "rnn": "ssru"}


def config_of(about: Mapping[str, Any], where: str) -> Config:
    """The architecture. Raises InvalidValue naming the file and every option at fault."""
    f = Fields(about, where)
    f.only("type", "transformer")
    f.only("tied-embeddings-all", True, why="one table of embeddings")
    f.only("transformer-decoder-autoreg", *MIXERS)
    if about.get("transformer-decoder-autoreg") == "rnn":
        f.only("dec-cell", "ssru")
        f.only("layer-normalization", False)
        f.only("transformer-rnn-projection", False)
    f.only("transformer-preprocess", "", "d", why="norms behind the residual")
    f.only("transformer-postprocess", "dan", "an", why="norms behind the residual")
    f.only("transformer-postprocess-emb", "", "d")
    f.only("transformer-postprocess-top", "", "d")
    f.only("transformer-ffn-activation", "relu", "swish")
    f.only("transformer-ffn-depth", 2)
    f.only("transformer-decoder-ffn-depth", 0, 2)
    f.only("transformer-tied-layers", [])
    f.only("input-types", [])
    f.only("lemma-dim-emb", 0)
    for name in ("train-position-embeddings", "no-projection", "pool"):
        f.only("transformer-" + name, False)
    for name in ("ulr", "output-omit-bias"):
        f.only(name, False)
    sizes = about.get("dim-vocabs")
    if not isinstance(sizes, list) or len(sizes) != 2 or type(sizes[0]) is not int or sizes[0] != sizes[1]:
        f.faults.append(f"field 'dim-vocabs': expected one size of both vocabularies, got {sizes!r:.80}")
        sizes = [1]
    d_ff = f.integer("transformer-dim-ffn", 2048)
    return f.config(
        lambda: Config(
            vocab_size=sizes[0] + 1,  # and the token that a decoder begins with
            d_model=f.integer("dim-emb"),
            n_heads=f.integer("transformer-heads", 8),
            n_encoder_layers=f.layers("enc-depth", 6),
            n_decoder_layers=f.layers("dec-depth", 6),
            d_ff=d_ff,
            decoder_d_ff=f.integer("transformer-decoder-dim-ffn", 0) or d_ff,
            decoder_mixer=MIXERS.get(about.get("transformer-decoder-autoreg", "self-attention"), "attention"),
            activation=f.activation("transformer-ffn-activation", "swish"),
            norm_position="post",
            norm_eps=1e-6,
            sinusoids="fairseq",
            output_bias=True,
            framed_by_tokenizer=True,
            pad_id=sizes[0],
            bos_id=sizes[0],
            eos_id=0,
        )
    )


def sources(config: Config) -> dict[str, Source]:
    found = {"embedding.weight": Source("Wemb"), "output.bias": Source("decoder_ff_logit_out_b", row=True)}
    for stack, n in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        for i in range(n):
            ours, theirs = f"{stack}.{i}.", f"{stack}_l{i + 1}_"
            if stack == "encoder" or config.decoder_mixer == "attention":
                found |= _attention(ours + "attention", theirs + "self")
            else:
                found[ours + "ssru.in.weight"] = Source(theirs + "rnn_W")
                found |= _linear(ours + "ssru.forget", theirs + "rnn_", "f") | _norm(ours + "ssru_norm", theirs + "rnn_ffn")
            if stack == "decoder":
                found |= _attention(ours + "cross", theirs + "context")
            found |= _linear(ours + "feed_forward.in", theirs + "ffn_", "1") | _linear(ours + "feed_forward.out", theirs + "ffn_", "2")
            found |= _norm(ours + "feed_forward_norm", theirs + "ffn_ffn")
    return found


def _attention(ours: str, theirs: str) -> dict[str, Source]:
    found = _norm(ours + "_norm", theirs + "_Wo")
    for part in "qkvo":
        found |= _linear(f"{ours}.{part}", theirs + "_", part)
    return found


def _linear(ours: str, theirs: str, end: str) -> dict[str, Source]:
    return {ours + ".weight": Source(f"{theirs}W{end}"), ours + ".bias": Source(f"{theirs}b{end}", row=True)}


def _norm(ours: str, theirs: str) -> dict[str, Source]:
    return {ours + ".weight": Source(theirs + "_ln_scale", row=True), ours + ".bias": Source(theirs + "_ln_bias", row=True)}
