"""Tasks: what is measured of a memory, one file a task.

base.py     what a task must offer, and the held-out text it measures on
text.py     bits per byte of whole documents, with speed and size of the state
recall.py   is a fact from several segments back still known?

A new task is one more file with a `Task`, its class in `TASKS`, and its figures as fields of `Result` (../experiment.py).
"""

from .base import HeldOut, Task
from .recall import Recall
from .text import Text

TASKS = (Recall,)  # made with a tokenizer; beside `Text`, which every model can do

__all__ = ["TASKS", "HeldOut", "Recall", "Task", "Text"]
