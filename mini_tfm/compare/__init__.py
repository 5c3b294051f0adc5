"""Memories side by side: trained from a common start, measured, reported. `mini-tfm demo` and `compare` run it.

experiment.py       the same model, text and steps; one memory after another
  -> training.py    the common start, then each memory (processes.py)
saved.py            a saved model with several memories
  -> measure.py     one memory on held-out text
       -> tasks/    what is measured, one file a task
report.py           an experiment as one HTML file (plot.py)
machine.py          the machine that figures are measured on
"""

from .tasks.recall import Recall

__all__ = ["Recall"]
