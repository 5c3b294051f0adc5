"""Training: what a model is trained on, how, and the task that shows whether its memory remembers (recall.py).

    files (sources.py) -> tokens in RAM or in a mapped file (corpus.py, cache.py)
      -> segments in rows (packing.py, in an order of shuffle.py) -> an objective's batches (objectives.py, data.py)
      -> mixed, and of more segments as training goes on (plan.py) -> Trainer.fit (fitting.py: the loop, logs, checkpoints)
      -> Trainer.step (trainer.py) -> gradients of a batch's segments (walk.py, segments.py) -> AdamW (optimizer.py)

docs/training-data.md shows the first half, docs/training.md the second.
"""

from .cache import build_token_cache, open_token_cache, token_cache
from .corpus import Corpus
from .data import Batch, TextStreams
from .objectives import NextSegment, Pairs, SpanDenoising
from .plan import Curriculum, Mixture
from .recall import Recall
from .shuffle import Permutation
from .sources import TextFiles
from .trainer import Trainer

__all__ = [
    "Batch",
    "Corpus",
    "Curriculum",
    "Mixture",
    "NextSegment",
    "Pairs",
    "Permutation",
    "Recall",
    "SpanDenoising",
    "TextFiles",
    "TextStreams",
    "Trainer",
    "build_token_cache",
    "open_token_cache",
    "token_cache",
]
