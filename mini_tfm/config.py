"""Config: every architecture the library can run, as one frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import SHOWN_CHARACTERS, InvalidValue, shown
from .options import option, plain

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
NORMS = ("layer", "rms")
NORM_POSITIONS = ("post", "pre", "sandwich", "output")
POSITIONS = ("sinusoidal", "learned", "rotary", "relative", "none")
SINUSOIDS = ("interleaved", "halves", "fairseq")
DECODER_MIXERS = ("attention", "ssru")
BIASED = ("q", "k", "v", "o", "in", "gate", "out")

# Far above any real model, far below what makes an allocation hang: a config file is not trusted.
LIMITS = {
    "vocab_size": 1 << 22,
    "d_model": 1 << 16,
    "n_heads": 1 << 10,
    "n_kv_heads": 1 << 10,
    "d_head": 1 << 12,
    "n_encoder_layers": 1 << 10,
    "n_decoder_layers": 1 << 10,
    "d_ff": 1 << 20,
    "max_positions": 1 << 24,
    "segment_length": 1 << 20,
    "relative_buckets": 1 << 12,
    "relative_max_distance": 1 << 20,
    "decoder_d_ff": 1 << 20,
    "decoder_n_heads": 1 << 10,
    "decoder_n_kv_heads": 1 << 10,
    "decoder_d_head": 1 << 12,
    "rotary_dims": 1 << 12,
    "position_offset": 1 << 12,
    "token_types": 1 << 12,
    "window": 1 << 24,
    "context_length": 1 << 24,
}
_MAY_BE_0 = ("n_encoder_layers", "n_decoder_layers", "position_offset", "token_types")
MAX_WEIGHT_COUNT = 1 << 36
SHOWN_FAULTS = 8  # of unknown fields in an error


class Heads(NamedTuple):
    """The heads of attention at a site."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    attention_scale: float


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Rotary frequencies for more positions than a model began with.

    kind: "linear" (arXiv 2306.15595) divides all by `factor`; "llama3" (arXiv 2407.21783) the low ones; "yarn"
    (arXiv 2309.00071) goes from one to the other. original_positions: what the model began with.
    """

    kind: str
    factor: float
    original_positions: int = 4096
    low_factor: float = 1.0  # llama3: wavelengths above original_positions / low_factor are divided
    high_factor: float = 4.0  # llama3: below original_positions / high_factor they stay
    beta_fast: float = 32.0  # yarn: rotations over original_positions, from which on a frequency stays
    beta_slow: float = 1.0  # yarn: below which it is divided

    def __post_init__(self) -> None:
        faults = _type_faults(self)
        if not faults:
            if self.kind not in ("linear", "llama3", "yarn"):
                faults.append(f"kind: expected linear, llama3 or yarn, got {self.kind!r}")
            if not 1 <= self.original_positions <= LIMITS["max_positions"]:
                faults.append(f"original_positions: expected 1 to {LIMITS['max_positions']}, got {self.original_positions}")
            if not self.factor >= 1:
                faults.append(f"factor: expected a number of at least 1, got {self.factor}")
            for low, high in (("low_factor", "high_factor"), ("beta_slow", "beta_fast")):
                if not 0 < getattr(self, low) < getattr(self, high):
                    faults.append(f"{low}, {high}: expected 0 < {low} < {high}, got {getattr(self, low)} and {getattr(self, high)}")
        if faults:
            raise InvalidValue("Config: rotary_scaling: " + "; ".join(faults))


@dataclass(frozen=True, kw_only=True, repr=False)
class Config:
    """One Transformer, as in arXiv 1706.03762, and its common variants.

    `n_encoder_layers=0` makes a decoder-only model (no cross-attention), `n_decoder_layers=0` an
    encoder-only one. Fields left at None are derived and filled in: `n_kv_heads` (= n_heads),
    `d_head` (= d_model / n_heads), `d_ff` (= 4 d_model), `attention_scale` (= 1 / sqrt(d_head)).

    The paper's model is the default, but for `norm_position`, which is "pre" (section 5.4 of the paper
    normalises after the residual, "post"; before it trains without a long warm-up, arXiv 2002.04745;
    "sandwich" does so before and after each sublayer, "output" after it, before the residual is added).

    What published models do otherwise is one field each, at its usual value by default. A model's file and its `repr` name
    these only where they differ.

    Raises InvalidValue that lists every field at fault.
    """

    vocab_size: int
    d_model: int = option(128, "Width of the model: numbers per token.")
    n_heads: int = option(4, "Attention heads.")
    n_encoder_layers: int = option(2, "Encoder layers; 0: a decoder-only model.")
    n_decoder_layers: int = option(2, "Decoder layers.")
    d_ff: int | None = option(None, "Width of the feed-forward layers; default: 4 d_model.")
    n_kv_heads: int | None = None
    d_head: int | None = None
    attention_scale: float | None = None
    activation: str = "relu"
    norm: str = "layer"
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    bias: bool | tuple[str, ...] = True  # of the linear layers, or which of q, k, v, o, in, gate, out; layer norm always has its own
    positions: str = option("sinusoidal", "Kind of positions: sinusoidal, learned, rotary, relative or none.")
    max_positions: int = 4096  # rows of the learned table; the other kinds have no limit
    rotary_base: float = 10000.0
    relative_buckets: int = 32  # arXiv 1910.10683, section 2.1
    relative_max_distance: int = 128
    tie_embeddings: bool = True  # output layer = transposed input embedding (section 3.4)
    embedding_scale: bool = True  # embeddings are multiplied by sqrt(d_model) (section 3.4)
    pad_id: int = 0
    bos_id: int = 1  # the decoder's first input (but see `continues_source`), and the source of a document's first segment
    eos_id: int = 2
    segment_length: int | None = None  # tokens; set where the model was trained on streams of segments
    # What published models do otherwise. Feed-forward:
    gated: bool = False  # (activation(x W_gate) * x W_in) W_out (arXiv 2002.05202)
    decoder_d_ff: int | None = None  # where the decoder's differs
    # Heads of the decoder, to itself and to the encoder, where they differ from the encoder's; `heads(site)` has those of a site:
    decoder_n_heads: int | None = None
    decoder_n_kv_heads: int | None = None
    decoder_d_head: int | None = None
    decoder_attention_scale: float | None = None
    # How the decoder's tokens see those before them: by self-attention, or by a recurrence, SSRU (see `model.SSRU`):
    decoder_mixer: str = "attention"
    # Norms:
    embedding_norm: bool = False  # of the sum of embeddings
    final_norm: bool | None = None  # at the end of a stack; default: unless norm_position is "post"
    qk_norm: bool = False  # RMS norm of every head's queries and keys, before they are rotated
    # Positions:
    sinusoids: str = "interleaved"  # columns of the table: the paper's; sines, then cosines; or fairseq's frequencies
    position_offset: int = 0  # rows of the learned or sinusoidal table before the one of the first token
    rotary_dims: int | None = None  # of a head's numbers, the first so many are rotated; default: all
    rotary_scaling: RotaryScaling | None = None
    window: int | None = None  # keys that a decoder's query sees in its own segment
    local_layers: tuple[int, ...] | None = None  # the decoder layers that `window` is for; default: all
    local_rotary_base: float | None = None  # theirs; rotary_scaling is for the others then
    attention_cap: float | None = None  # scores become cap tanh(scores / cap) (arXiv 2408.00118)
    # Embeddings and output:
    token_types: int = 0  # embeddings of the kind of a token, of which an encoder's are all of kind 0
    output_bias: bool = False
    output_scale: float | None = None  # multiplies the last hidden states
    output_cap: float | None = None  # of the logits, as `attention_cap`
    # Text:
    context_length: int | None = None  # tokens that it was trained to see at once, where positions have no table
    continues_source: bool = False  # the decoder's first input is not bos but the source's last token, from which its text goes on
    framed_by_tokenizer: bool = False  # special tokens around a text are the tokenizer's; the library puts no bos before a prompt

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        faults = _type_faults(self)
        if not faults:
            faults = _range_faults(self)
        if not faults:
            if self.d_head is None and self.d_model % self.n_heads:
                faults.append(f"d_model: expected a multiple of n_heads = {self.n_heads} (or a given d_head), got {self.d_model}")
            n = self.decoder_n_heads
            if n is not None and self.decoder_d_head is None and self.d_model % n:
                faults.append(f"d_model: expected a multiple of decoder_n_heads = {n} (or a given decoder_d_head), got {self.d_model}")
            self._fill("n_kv_heads", self.n_heads)
            self._fill("d_head", self.d_model // self.n_heads)
            self._fill("d_ff", 4 * self.d_model)
            self._fill("attention_scale", float(self.d_head or 1) ** -0.5)
            for name, usual in self._usual_decoder_heads().items():
                if getattr(self, name) == usual:  # so that models with the same heads are equal
                    object.__setattr__(self, name, None)
            self._fill("decoder_d_ff", self.d_ff)
            self._fill("final_norm", self.norm_position != "post")
            self._fill("rotary_dims", self.d_head)
            faults += _relation_faults(self)
        if faults:
            raise InvalidValue("Config: " + "; ".join(faults))

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _usual_decoder_heads(self) -> dict[str, Any]:
        """What the decoder's fields mean where they are None: the encoder's heads or, of another number, as many as d_model holds."""
        n, d_head = self.decoder_n_heads or self.n_heads, self.d_head
        usual = {"decoder_n_heads": self.n_heads, "decoder_n_kv_heads": self.n_kv_heads, "decoder_d_head": d_head}
        if n != self.n_heads:
            usual |= {"decoder_n_kv_heads": n, "decoder_d_head": self.d_model // n}
        own = self.decoder_d_head or usual["decoder_d_head"]
        return {**usual, "decoder_attention_scale": self.attention_scale if own == d_head else float(own or 1) ** -0.5}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Config:
        """The config of a mapping (a file's JSON); unknown or missing fields are errors that name them."""
        if not isinstance(fields, dict):
            raise InvalidValue(f"Config: expected a mapping of fields, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [str(name) for name in fields if name not in known]
        if unknown:
            named = []
            for name in unknown[:SHOWN_FAULTS]:
                hint = difflib.get_close_matches(name[:SHOWN_CHARACTERS], known, 1)
                named.append(shown(name) + (f" (did you mean {hint[0]!r}?)" if hint else ""))
            more = f" and {len(unknown) - len(named)} more" if len(unknown) > len(named) else ""
            raise InvalidValue(f"Config: unknown field {', '.join(named)}{more}")
        if "vocab_size" not in fields:
            raise InvalidValue("Config: field 'vocab_size' is missing")
        scaling = fields.get("rotary_scaling")
        if isinstance(scaling, dict):
            known = {field.name for field in dataclasses.fields(RotaryScaling)}
            if unknown := [str(name) for name in scaling if name not in known]:
                raise InvalidValue(f"Config: rotary_scaling: unknown field {unknown[0]!r}")
            if missing := [name for name in ("kind", "factor") if name not in scaling]:
                raise InvalidValue(f"Config: rotary_scaling: field {missing[0]!r} is missing")
            fields = {**fields, "rotary_scaling": RotaryScaling(**scaling)}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: what differs from a model without later fields, so that earlier releases read it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name in self._told()}

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={getattr(self, name)!r}' for name in self._told())})"

    def _told(self) -> list[str]:
        """The fields that every model has, and the others where they say something."""
        names = [field.name for field in dataclasses.fields(self)]
        return names[: names.index("gated")] + self.later()

    def later(self) -> list[str]:
        """The fields of published models that say something here."""
        usual = {"decoder_d_ff": self.d_ff, "final_norm": self.norm_position != "post", "rotary_dims": self.d_head}
        names = [field.name for field in dataclasses.fields(self)]
        first = names.index("gated")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in names[first:] if getattr(self, name) != usual.get(name, defaults[name])]

    def has_bias(self, part: str) -> bool:
        """Whether linear layers called `part` (one of q, k, v, o, in, gate, out) have a bias."""
        return self.bias if isinstance(self.bias, bool) else part in self.bias

    def heads(self, site: str) -> Heads:
        """The heads at a site, "encoder", "decoder" or "cross"."""
        if site == "encoder":
            return Heads(self.n_heads, self.n_kv_heads, self.d_head, self.attention_scale)  # type: ignore[arg-type]
        usual = self._usual_decoder_heads()
        return Heads(*(usual[name] if getattr(self, name) is None else getattr(self, name) for name in usual))

    def is_local(self, layer: int) -> bool:
        """Whether a decoder layer's queries see `window` keys only."""
        return self.window is not None and (self.local_layers is None or layer in self.local_layers)

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed; what was derived from a changed field must be given again."""
        return dataclasses.replace(self, **changes)

    @property
    def has_encoder(self) -> bool:
        return self.n_encoder_layers > 0

    @property
    def has_decoder(self) -> bool:
        return self.n_decoder_layers > 0


def _type_faults(config: Config | RotaryScaling) -> list[str]:
    faults = []
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        if isinstance(value, tuple) and "tuple" in kind:
            wanted = str if "tuple[str" in kind else int
            good = all(type(each) is wanted for each in value)
        elif kind.startswith("bool"):
            good = isinstance(value, bool)
        elif kind.startswith("RotaryScaling"):
            good = isinstance(value, RotaryScaling)
        elif kind.startswith("int"):
            good = isinstance(value, int) and not isinstance(value, bool)
        elif kind.startswith("float"):
            good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        else:
            good = isinstance(value, str)
        if not good:
            faults.append(f"{field.name}: expected {kind}, got {shown(value)}")
    return faults


def _range_faults(config: Config) -> list[str]:
    faults = []
    for name, limit in LIMITS.items():
        value = getattr(config, name)
        least = 0 if name in _MAY_BE_0 else 1
        if value is not None and not least <= value <= limit:
            faults.append(f"{name}: expected {least} to {limit}, got {shown(value)}")
    for name, allowed in (
        ("activation", ACTIVATIONS),
        ("norm", NORMS),
        ("norm_position", NORM_POSITIONS),
        ("positions", POSITIONS),
        ("sinusoids", SINUSOIDS),
        ("decoder_mixer", DECODER_MIXERS),
    ):
        if getattr(config, name) not in allowed:
            faults.append(f"{name}: expected one of {', '.join(allowed)}, got {shown(getattr(config, name))}")
    scales = ("attention_scale", "decoder_attention_scale", "output_scale")
    for name in (*scales, "norm_eps", "rotary_base", "local_rotary_base", "attention_cap", "output_cap"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            faults.append(f"{name}: expected a positive number, got {value}")
    if not isinstance(config.bias, bool) and (wrong := [part for part in config.bias if part not in BIASED]):
        faults.append(f"bias: expected True, False or some of {', '.join(BIASED)}, got {wrong[0]!r}")
    return faults


def _relation_faults(config: Config) -> list[str]:
    faults = []
    if not config.has_encoder and not config.has_decoder:
        faults.append("n_encoder_layers, n_decoder_layers: expected at least one of them above 0")
    if config.n_heads % config.n_kv_heads:  # type: ignore[operator]
        faults.append(f"n_kv_heads: expected a divisor of n_heads = {config.n_heads}, got {config.n_kv_heads}")
    decoder = config.heads("decoder")
    if decoder.n_heads % decoder.n_kv_heads:
        faults.append(f"decoder_n_kv_heads: expected a divisor of decoder_n_heads = {decoder.n_heads}, got {decoder.n_kv_heads}")
    if config.positions == "rotary" and decoder.d_head != config.d_head:
        faults.append(f"decoder_d_head: expected d_head = {config.d_head} with rotary positions, got {decoder.d_head}")
    if config.positions == "rotary" and config.d_head % 2 and config.rotary_dims == config.d_head:  # type: ignore[operator]
        faults.append(f"d_head: expected an even number with rotary positions, got {config.d_head}")
    elif (config.rotary_dims % 2 and config.positions == "rotary") or config.rotary_dims > config.d_head:  # type: ignore[operator]
        faults.append(f"rotary_dims: expected an even number of at most d_head = {config.d_head}, got {config.rotary_dims}")
    if config.rotary_scaling is not None and config.rotary_scaling.kind == "yarn" and config.rotary_base <= 1:
        faults.append(f"rotary_base: expected more than 1 with yarn, got {config.rotary_base}")
    if config.local_layers and not all(0 <= layer < config.n_decoder_layers for layer in config.local_layers):
        faults.append(f"local_layers: expected 0 to n_decoder_layers - 1 = {config.n_decoder_layers - 1}, got {config.local_layers!r}")
    for name in ("local_layers", "local_rotary_base"):
        if getattr(config, name) is not None and config.window is None:
            faults.append(f"{name}: expected None without a window, got {getattr(config, name)!r}")
    if config.decoder_mixer != "attention":
        if not config.has_decoder:
            faults.append(f"decoder_mixer: expected 'attention' without decoder layers, got {config.decoder_mixer!r}")
        if config.window is not None:
            faults.append(f"window: expected None with decoder_mixer={config.decoder_mixer!r}, which has no keys, got {config.window}")
    if config.continues_source and not (config.has_encoder and config.has_decoder):
        faults.append("continues_source: expected False without an encoder and a decoder, got True")
    if config.positions == "relative" and (config.relative_buckets < 4 or config.relative_buckets % 4):
        faults.append(f"relative_buckets: expected a multiple of 4, got {config.relative_buckets}")
    if config.positions == "relative" and config.relative_max_distance <= config.relative_buckets // 2:
        faults.append(
            f"relative_max_distance: expected more than relative_buckets / 2 = {config.relative_buckets // 2},"
            f" got {config.relative_max_distance}"
        )
    for name in ("pad_id", "bos_id", "eos_id"):
        if not 0 <= getattr(config, name) < config.vocab_size:
            faults.append(f"{name}: expected 0 to vocab_size - 1 = {config.vocab_size - 1}, got {shown(getattr(config, name))}")
    d_ff = max(config.d_ff, config.decoder_d_ff)  # type: ignore[type-var]
    heads = max(n * d_head for n, _, d_head, _ in map(config.heads, ("encoder", "decoder")))
    layer = config.d_model * (4 * heads + (3 if config.gated else 2) * d_ff)  # type: ignore[operator]
    tables = config.vocab_size * (1 if config.tie_embeddings else 2) + config.token_types
    tables += 2 * (config.max_positions + config.position_offset) if config.positions == "learned" else 0
    count = tables * config.d_model + layer * (config.n_encoder_layers + 2 * config.n_decoder_layers)
    if count > MAX_WEIGHT_COUNT:
        faults.append(f"vocab_size, d_model, d_ff, max_positions, layers: expected at most {MAX_WEIGHT_COUNT} weights, got {count}")
    return faults
