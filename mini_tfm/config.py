"""Config: every architecture the library can run, as one frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from typing import Any

from .errors import SHOWN_CHARACTERS, InvalidValue, shown
from .options import option, plain

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
NORMS = ("layer", "rms")
NORM_POSITIONS = ("post", "pre")
POSITIONS = ("sinusoidal", "learned", "rotary", "relative", "none")

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
}
MAX_WEIGHT_COUNT = 1 << 36
SHOWN_FAULTS = 8  # of unknown fields in an error


@dataclass(frozen=True, kw_only=True)
class Config:
    """One Transformer, as in arXiv 1706.03762, and its common variants.

    `n_encoder_layers=0` makes a decoder-only model (no cross-attention), `n_decoder_layers=0` an
    encoder-only one. Fields left at None are derived and filled in: `n_kv_heads` (= n_heads),
    `d_head` (= d_model / n_heads), `d_ff` (= 4 d_model), `attention_scale` (= 1 / sqrt(d_head)).

    The paper's model is the default, but for `norm_position`, which is "pre" (section 5.4 of the paper
    normalises after the residual, "post"; before it trains without a long warm-up, arXiv 2002.04745).

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
    bias: bool = True  # of the linear layers; layer norm always has its own
    positions: str = option("sinusoidal", "Kind of positions: sinusoidal, learned, rotary, relative or none.")
    max_positions: int = 4096  # rows of the learned table; the other kinds have no limit
    rotary_base: float = 10000.0
    relative_buckets: int = 32  # arXiv 1910.10683, section 2.1
    relative_max_distance: int = 128
    tie_embeddings: bool = True  # output layer = transposed input embedding (section 3.4)
    embedding_scale: bool = True  # embeddings are multiplied by sqrt(d_model) (section 3.4)
    pad_id: int = 0
    bos_id: int = 1  # the decoder's first input, and the source of a document's first segment
    eos_id: int = 2
    segment_length: int | None = None  # tokens; set where the model was trained on streams of segments

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        faults = _type_faults(self)
        if not faults:
            faults = _range_faults(self)
        if not faults:
            if self.d_head is None and self.d_model % self.n_heads:
                faults.append(f"d_model: expected a multiple of n_heads = {self.n_heads} (or a given d_head), got {self.d_model}")
            self._fill("n_kv_heads", self.n_heads)
            self._fill("d_head", self.d_model // self.n_heads)
            self._fill("d_ff", 4 * self.d_model)
            self._fill("attention_scale", float(self.d_head or 1) ** -0.5)
            faults += _relation_faults(self)
        if faults:
            raise InvalidValue("Config: " + "; ".join(faults))

    def _fill(self, name: str, value: float) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

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
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed; what was derived from a changed field must be given again."""
        return dataclasses.replace(self, **changes)

    @property
    def has_encoder(self) -> bool:
        return self.n_encoder_layers > 0

    @property
    def has_decoder(self) -> bool:
        return self.n_decoder_layers > 0


def _type_faults(config: Config) -> list[str]:
    faults = []
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        if kind.startswith("bool"):
            good = isinstance(value, bool)
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
        least = 0 if name in ("n_encoder_layers", "n_decoder_layers") else 1
        if value is not None and not least <= value <= limit:
            faults.append(f"{name}: expected {least} to {limit}, got {shown(value)}")
    for name, allowed in (
        ("activation", ACTIVATIONS),
        ("norm", NORMS),
        ("norm_position", NORM_POSITIONS),
        ("positions", POSITIONS),
    ):
        if getattr(config, name) not in allowed:
            faults.append(f"{name}: expected one of {', '.join(allowed)}, got {shown(getattr(config, name))}")
    for name in ("norm_eps", "rotary_base", "attention_scale"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            faults.append(f"{name}: expected a positive number, got {value}")
    return faults


def _relation_faults(config: Config) -> list[str]:
    faults = []
    if not config.has_encoder and not config.has_decoder:
        faults.append("n_encoder_layers, n_decoder_layers: expected at least one of them above 0")
    if config.n_heads % config.n_kv_heads:  # type: ignore[operator]
        faults.append(f"n_kv_heads: expected a divisor of n_heads = {config.n_heads}, got {config.n_kv_heads}")
    if config.positions == "rotary" and config.d_head % 2:  # type: ignore[operator]
        faults.append(f"d_head: expected an even number with rotary positions, got {config.d_head}")
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
    layer = config.d_model * (4 * config.n_heads * config.d_head + 2 * config.d_ff)  # type: ignore[operator]
    tables = config.vocab_size * (1 if config.tie_embeddings else 2) + (2 * config.max_positions if config.positions == "learned" else 0)
    count = tables * config.d_model + layer * (config.n_encoder_layers + 2 * config.n_decoder_layers)
    if count > MAX_WEIGHT_COUNT:
        faults.append(f"vocab_size, d_model, d_ff, max_positions, layers: expected at most {MAX_WEIGHT_COUNT} weights, got {count}")
    return faults
