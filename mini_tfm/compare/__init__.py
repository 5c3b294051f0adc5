"""Memories side by side: trained from a common start, measured, reported. `mini-tfm demo` and `compare` run it.

experiment.py   the same model, text and steps; one memory after another
tasks/          what is measured, one file a task
report.py       an experiment as one HTML file
"""

from .tasks.recall import Recall

__all__ = ["Recall"]
