"""Generation: one token at a time, with a cache of keys and values.

batch.py          token ids in, token ids out
segments.py       a text longer than a segment: the next one begins in time
options.py        how tokens are chosen, when to stop: names and meanings of Hugging Face's `generate`
  rules.py        what the options mean for one search: processors in their order, ends
    penalties.py  what may be said, and what costs something: a processor a class
    regex.py      text that matches a regular expression
    sampling.py   from scores to a draw: a processor a class
    stops.py      stop strings, functions of a user
steps.py          searches at work: one, or many in one session
search.py         which tokens a session goes on with: the best, or drawn
  beams.py        beam search
  speculative.py  greedy search that checks several guesses at a time
  scores.py       log-probabilities, and the best of them
  results.py      what a search has found
  session.py      a decoding session: streams in, out, reordered, joined
    cache.py      keys and values of what was decoded
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {"Generated": ".results", "GenerationOptions": ".options", "Session": ".session", "generate": ".batch"}

__all__ = ["Generated", "GenerationOptions", "Session", "generate"]

if TYPE_CHECKING:
    from .batch import generate
    from .options import GenerationOptions
    from .results import Generated
    from .session import Session


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the command line reads options.py without NumPy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
