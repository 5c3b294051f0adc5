"""How tokens are chosen and when generation stops. Names and meanings follow Hugging Face's `generate`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(Options):
    """The options of `generate`. Raises InvalidValue that lists every option at fault."""

    owner: ClassVar[str] = "generate"

    max_new_tokens: int = option(64, "Maximum number of tokens to generate.", at_least=0, unit="TOKENS")
    do_sample: bool = option(False, "Sample instead of taking the most likely token; top_k, top_p and temperature imply it.")
    top_k: int = option(0, "Sample from the k most likely tokens; 0: all.", at_least=0, unit="TOKENS")
    temperature: float = option(
        1.0, "Divide the scores by this: below 1 sharpens, above 1 flattens.", above=0, hint="do_sample=False takes the most likely token"
    )
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens whose probabilities add up to this (arXiv 1904.09751).",
        above=0,
        at_most=1,
        unit="SHARE",
    )
    seed: int | None = option(None, "Sampling seed; without it every call differs.", at_least=0)
    stop_at_eos: bool = option(True, "End a sequence at eos_id, which is not returned.", cli=False)
    num_beams: int = option(1, "Number of beams.", at_least=1, at_most=1, hint="beam search is not supported yet", cli=False)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: an option that only a draw can heed asks for one."""
        return self.do_sample or self.top_k > 0 or self.top_p < 1 or self.temperature != 1
