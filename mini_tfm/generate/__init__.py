"""Generation: one token at a time, with a cache of keys and values.

batch.py       token ids in, token ids out
options.py     how tokens are chosen, when to stop: names and meanings of Hugging Face's `generate`
segments.py    a text longer than a segment: the next one begins in time
search.py      which tokens a session goes on with: greedy, or drawn
  session.py   a decoding session: streams in, out, reordered, joined
    cache.py   keys and values of what was decoded
  sampling.py  from scores to one token: a processor a class
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {"GenerationOptions": ".options", "Session": ".session", "generate": ".batch"}

__all__ = ["GenerationOptions", "Session", "generate"]

if TYPE_CHECKING:
    from .batch import generate
    from .options import GenerationOptions
    from .session import Session


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the command line reads options.py without NumPy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
