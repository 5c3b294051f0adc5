"""Generation: one token at a time, with a cache of keys and values.

options.py    how tokens are chosen, when to stop: names and meanings of Hugging Face's `generate`
sampling.py   from scores to one token a row
cache.py      keys and values of what was decoded
session.py    decoding steps
"""

from .options import GenerationOptions
from .session import generate

__all__ = ["GenerationOptions", "generate"]
