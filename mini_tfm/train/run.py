"""What a run is to the loop around its steps and to the folder it is saved in: the parts of a Trainer that they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.batches import Batch
from ..memory.base import Memory
from ..text.tokenizers import Tokenizer
from ..transformer import Transformer
from .optimizer import AdamW
from .options import FitOptions, TrainerOptions
from .parallel import Alone


class Run(Protocol):
    """A Trainer; what its fields hold is said there."""

    options: TrainerOptions
    fit_options: FitOptions
    model: Transformer
    memory: Memory | None
    tokenizer: Tokenizer | None
    communicator: Alone
    optimizer: AdamW
    step_count: int
    losses: list[float]
    tokens_seen: int
    seconds: float
    gradient_norm: float
    memory_loss: float | None
    validations: list[list[Any]]
    best: list[Any] | None
    data_state: dict[str, Any] | None
    batch_digest: str | None
    resumed: bool
    saved: tuple[int, Path] | None

    @property
    def learning_rate(self) -> float: ...

    @property
    def stopped_early(self) -> bool: ...

    def step(
        self, source: Any, target: Any, source_lengths: Any = None, target_lengths: Any = None, weights: np.ndarray | None = None,
        begins: Any = None,
    ) -> float: ...  # fmt: skip

    def evaluate(self, batch: Batch) -> float: ...

    def weight_of(self, batch: Batch) -> float: ...

    def save(self, folder: str | Path) -> None: ...
