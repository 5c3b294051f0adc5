"""Processes of an experiment: each trains or measures one memory, and ends at once when something goes wrong."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

_steps: Any = None  # in a training process: the queue on which each step is reported


def step_queue() -> Any:
    """A queue on which training processes report the loss of each step (`report_step`)."""
    return multiprocessing.get_context("spawn").Queue()


@contextlib.contextmanager
def processes(workers: int, steps: Any = None) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool. An exception inside, Ctrl-C above all, ends its processes instead of waiting for them.

    steps: a `step_queue`, for processes that report steps.
    """
    context = multiprocessing.get_context("spawn")  # a fork would not survive the threads of this process
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(steps,)) as pool:
        try:
            yield pool
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def report_step(loss: float) -> None:
    _steps.put(loss)


def _begin(steps: Any) -> None:
    """A child leaves Ctrl-C to its parent, which ends it."""
    global _steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _steps = steps
