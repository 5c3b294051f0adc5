"""The options of Trainer and of `fit`: each is defined here once, with its default, limits and help."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..options import Options, option


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = value if isinstance(value, tuple) and value else (value,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError
    return patterns


SCHEDULES = ("cosine", "linear", "inverse_sqrt", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerOptions(Options):
    """The optimizer, regularization and gradient computation. The fields have the same order as in training.json."""

    owner: ClassVar[str] = "Trainer"

    learning_rate: float = option(1e-3, "Peak learning rate, reached after the warm-up.", at_least=0)
    schedule: str = option(
        "cosine",
        "Learning rate after the warm-up: cosine and linear decay to 0 at the last step, inverse_sqrt falls as 1 / sqrt(step),"
        " constant does not change.",
        choices=SCHEDULES,
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises to its peak.", at_least=0, unit="STEPS")
    total_steps: int | None = option(None, "The step at which training ends and schedules reach 0.", at_least=1, unit="STEPS", cli=False)
    weight_decay: float = option(0.01, "Decoupled weight decay, of matrices only (arXiv 1711.05101).", at_least=0)
    betas: tuple[float, float] = option((0.9, 0.98), "AdamW's decay rates of the two moments.", at_least=0, below=1, cli=False)
    eps: float = option(1e-9, "AdamW's term that prevents division by zero.", at_least=1e-37, cli=False)
    clip: float | None = option(1.0, "Maximum norm of the gradient; None: no limit.", at_least=0, unit="NORM")
    dropout: float = option(
        0.0,
        "Dropout rate of embeddings and sublayer outputs (arXiv 1706.03762, section 5.4); also of attention weights and hidden layers,"
        " unless they have their own rate.",
        at_least=0,
        below=1,
        unit="RATE",
    )
    attention_dropout: float | None = option(None, "Dropout rate of attention weights; default: dropout.", at_least=0, below=1, unit="RATE")
    ff_dropout: float | None = option(
        None, "Dropout rate of the feed-forward hidden layer; default: dropout.", at_least=0, below=1, unit="RATE"
    )
    lora_dropout: float = option(0.0, "Dropout rate of what LoRA adapters read.", at_least=0, below=1, unit="RATE")
    label_smoothing: float = option(
        0.0, "Share of the target probability spread over all tokens (arXiv 1706.03762, section 5.4).", at_least=0, below=1, unit="SHARE"
    )
    source_dropout: float = option(
        0.0,
        "Probability of hiding a segment's source from the decoder, which then sees only the memory. Trains a memory to keep what is"
        " needed later.",
        at_least=0,
        below=1,
        unit="SHARE",
    )
    bptt_segments: int | None = option(
        None, "Stop gradients after this many segments; default: backpropagate through all.", at_least=1, unit="SEGMENTS"
    )
    recompute: bool = option(
        False,
        "Recompute each segment in the backward pass: the same gradients, bit for bit, in the RAM of one segment, for about a third"
        " more time.",
    )
    bfloat16: bool = option(
        False,
        "Round the factors of matrix products to bfloat16 (arXiv 1710.03740); the rest stays float32. About twice as fast where the"
        " processor supports it, no gain elsewhere.",
    )
    gradient_accumulation_steps: int = option(
        1, "Split each batch into this many parts and add up their gradients: less RAM, the same step.", at_least=1, unit="PARTS"
    )
    early_stopping_patience: int | None = option(
        None, "Stop after this many validations in a row without a better loss.", at_least=1, unit="VALIDATIONS"
    )
    early_stopping_threshold: float = option(
        0.0, "A loss counts as better if it is below the best by more than this, in nats per token.", at_least=0, unit="NATS"
    )
    trainable: tuple[str, ...] | None = option(
        None,
        "Train only the weights whose names match one of these patterns, such as memory.* or decoder.*.q.*; all others are frozen."
        " Default: all, or beside LoRA adapters these and memories' parameters.",
        read=_patterns,
        expected="a name of a weight, a pattern such as memory.* or several",
        unit="PATTERN",
    )
    seed: int = option(0, "Seed of dropout and of a memory's initial weights.", at_least=0, cli=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """Validation, checkpoints and logs. A run remembers them: an option that is not given keeps its value."""

    owner: ClassVar[str] = "fit"

    validate_every: int = option(100, "Steps between validations.", at_least=1, unit="STEPS")
    validation_batches: int = option(4, "Number of validation batches.", at_least=1, cli=False)
    save_every: int | None = option(None, "Steps between saves of the run.", at_least=1, unit="STEPS")
    save_total_limit: int = option(
        0, "Number of recent saves whose models are also kept, in checkpoint-STEP inside the folder.", at_least=0, unit="MODELS"
    )
    save_best: bool = option(False, "Keep the model with the best validation loss, in best inside the folder.")
    jsonl_log: str | None = option(None, "Append one JSON line per step to this file.", path=True, unit="FILE")
    csv_log: str | None = option(None, "Append one CSV line per step to this file.", path=True, unit="FILE")
    tensorboard_log: str | None = option(
        None, "Write TensorBoard event files into this folder (needs tensorboardX).", path=True, unit="DIR"
    )
