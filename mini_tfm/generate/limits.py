"""How many tokens a model reads at once."""

from __future__ import annotations

from ..config import Config
from ..errors import InvalidValue


def segment_limit(config: Config, segment_length: int | None) -> int | None:
    """Tokens that a decoder's segment may have. None: no limit, as for a model trained on whole sequences without a table."""
    if config.segment_length is not None:
        return segment_length
    return config.max_positions if config.positions == "learned" else config.context_length


def too_long(name: str, n_tokens: int, limit: int, config: Config) -> InvalidValue:
    way = "give a memory, which reads text of any length: memory='window', --memory window" if config.has_decoder else "cut it into parts"
    return InvalidValue(f"{name}: has {n_tokens} tokens, and the model reads at most {limit} at once; shorten it, or {way}")
