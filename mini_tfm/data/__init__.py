"""Data: from files to the batch of a training step. docs/training-data.md shows it.

sources.py          text files, lines of JSON, pairs; an error names the file and the line
  -> corpus.py      documents of token ids in one flat array: in RAM, or mapped from a token cache (cache.py)
  -> packing.py     documents cut into segments and laid out in rows, in the order of permutation.py
  -> objectives.py  the batch of a step (batches.py): next segment, masked spans, pairs
     streams.py     the same from random places of the documents
  -> mixtures.py    objectives by weight, and a curriculum of more and more segments
checks.py           numbers as arguments: Python's or NumPy's
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
