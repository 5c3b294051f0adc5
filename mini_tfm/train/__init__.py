"""Training: one step, the loop around it, and a run on disk. docs/training.md shows it.

    trainer.py            Trainer: one optimizer step
      -> backpropagation.py   gradients through the segments of a batch: kept, computed again, truncated
      -> optimizer.py         AdamW on flat arenas, schedules
    loop.py               Trainer.fit: validation, early stopping, logs.py, checkpoints
    run_folder.py         a run on disk, and back; average.py: the mean of several of its models
    options.py            the options of both: types, defaults, limits, help
    arguments.py          the arguments of a step as a checked batch
    parallel.py           several processes over MPI; interrupts.py: Ctrl-C when nothing is half done

Batches come from mini_tfm.data; its names can be imported from here, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_DATA = (
    *("Batch", "Corpus", "Curriculum", "Mixture", "NextSegment", "Pairs", "Permutation", "SpanDenoising", "TextFiles", "TextStreams"),
    *("build_token_cache", "open_token_cache", "token_cache"),
)
_WHERE = {"Trainer": ".trainer", **dict.fromkeys(_DATA, "..data")}

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
    "Trainer",
    "build_token_cache",
    "open_token_cache",
    "token_cache",
]

if TYPE_CHECKING:
    from ..data import (
        Batch,
        Corpus,
        Curriculum,
        Mixture,
        NextSegment,
        Pairs,
        Permutation,
        SpanDenoising,
        TextFiles,
        TextStreams,
        build_token_cache,
        open_token_cache,
        token_cache,
    )
    from .trainer import Trainer


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: the command line reads options.py without NumPy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
