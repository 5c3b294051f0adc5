"""Generation: one token at a time, with a cache of keys and values.

options.py    how tokens are chosen, when to stop: names and meanings of Hugging Face's `generate`
sampling.py   from scores to one token a row
cache.py      keys and values of what was decoded
session.py    decoding steps
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_WHERE = {"GenerationOptions": ".options", "generate": ".session"}

__all__ = ["GenerationOptions", "generate"]

if TYPE_CHECKING:
    from .options import GenerationOptions
    from .session import generate


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the command line reads options.py without NumPy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
