"""Training: `Trainer` (trainer.py), its optimizer and schedules (optimizer.py), batches of text (data.py), and
the task that shows whether a memory remembers (recall.py)."""

from .data import TextStreams
from .recall import Recall
from .trainer import Trainer

__all__ = ["Recall", "TextStreams", "Trainer"]
