"""The conformance kit: what every memory strategy must keep, as checks that its author can run.

    from mini_tfm.testing import check_memory

    def test_my_memory():
        check_memory("my_memory:size=8")

    checks.py      check_memory, and the table of the checks
    outputs.py     checks of what a strategy does to the outputs, a function each
    gradients.py   of training with it
    habits.py      of what shows late, at other sizes, or not in the outputs
    apart.py       the same in a process of its own, for a strategy that nobody knows yet
    topics.py      whether it helps, on small models that were trained
    trial.py       the tiny models they run on, and a reader that goes through them segment by segment

Give small options: a window of 512 rows is never full in a check of thirty tokens.
"""

from .checks import CHECKS, check_memory
from .trial import CheckFailed

__all__ = ["CHECKS", "CheckFailed", "check_memory"]
