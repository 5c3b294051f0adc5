"""How tokens are chosen and when generation stops. Names and meanings are those of Hugging Face's `generate`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import InvalidType, InvalidValue


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How tokens are chosen and when generation stops.

    max_new_tokens: at most so many. do_sample: draw instead of taking the likeliest. temperature: divides the
    scores. top_k: draw among the k likeliest, 0 for all. top_p: among the fewest whose probabilities add up to
    it (arXiv 1904.09751). seed: of the draws; None differs from call to call. stop_at_eos: end a row at eos_id,
    which is left out. num_beams: only 1 so far.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_at_eos: bool = True
    num_beams: int = 1

    def __post_init__(self) -> None:
        faults = []
        for name, low, high in (("max_new_tokens", 0, None), ("top_k", 0, None), ("num_beams", 1, 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
                wanted = f"{low}, the only one so far" if high is not None else f"an integer of at least {low}"
                faults.append(f"{name}: expected {wanted}, got {value!r}")
        for name in ("do_sample", "stop_at_eos"):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < float("inf"):
            faults.append(f"temperature: expected a number above 0 (do_sample=False takes the likeliest), got {self.temperature!r}")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            faults.append(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            faults.append(f"seed: expected None or an integer of at least 0, got {self.seed!r}")
        if faults:
            raise InvalidValue("generate: " + "; ".join(faults))

    @classmethod
    def of(cls, options: dict[str, Any]) -> GenerationOptions:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InvalidType(f"generate: unknown option {unknown[0]!r}; it takes {', '.join(known)}")
        return cls(**options)
