"""Data: from files to the batch of a training step. docs/training-data.md shows it.

sources.py      text files, lines of JSON, pairs: a fault is reported with its file and line
  -> corpus.py  documents of token ids behind each other, in RAM or mapped from a token cache (cache.py)
  -> packing.py documents cut into segments, laid out in rows, in an order of permutation.py
  -> objectives.py, streams.py   the batch of a step: next segment, spans left out, pairs; random places (batches.py)
  -> mixtures.py                 objectives by weight, and a curriculum of more segments
"""

from .batches import Batch
from .cache import build_token_cache, open_token_cache, token_cache
from .corpus import Corpus
from .mixtures import Curriculum, Mixture
from .objectives import NextSegment, Pairs, SpanDenoising
from .permutation import Permutation
from .sources import TextFiles
from .streams import TextStreams

__all__ = [
    "Batch",
    "Corpus",
    "Curriculum",
    "Mixture",
    "NextSegment",
    "Pairs",
    "Permutation",
    "SpanDenoising",
    "TextFiles",
    "TextStreams",
    "build_token_cache",
    "open_token_cache",
    "token_cache",
]
