"""Processes of an experiment: each trains or measures one memory. What one of them does or suffers stays its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_steps: Any = None  # in a process of an experiment: the queue on which it reports what it has done
TICK_SECONDS = 0.2  # how often reports are passed on


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a process has no result, in one line."""

    why: str


def each_alone(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], workers: int = 1, on_step: Callable[[Any], None] = lambda step: None
) -> list[Any]:
    """`work(*each)`, each in a process of its own, `workers` at a time: results in order, a `Failure` where one raised or died.

    on_step: called with what the processes report (`report_step`). An exception here, Ctrl-C above all, ends the processes at once.
    """
    context = multiprocessing.get_context("spawn")  # a fork would not survive the threads of this process
    found: list[Any] = [None] * len(arguments)
    waiting = list(enumerate(arguments))
    running: dict[concurrent.futures.Future, tuple[int, contextlib.ExitStack, Any]] = {}
    with contextlib.ExitStack() as everything:
        while waiting or running:
            while waiting and len(running) < workers:
                number, each = waiting.pop(0)
                # A queue each: a process that dies while it reports leaves a queue that nobody else may need.
                alone, steps = everything.enter_context(contextlib.ExitStack()), context.Queue()
                pool = alone.enter_context(_process(context, steps))
                with _without_interrupts():
                    running[pool.submit(_call, work, each)] = number, alone, steps
            done, _ = concurrent.futures.wait(running, TICK_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for _, _, steps in running.values():
                _pass_on(steps, on_step)
            for future in done:
                number, alone, steps = running.pop(future)
                found[number] = _result_of(future)
                alone.close()
                _pass_on(steps, on_step)
    return found


def report_step(step: Any) -> None:
    """In a process of `each_alone`: tells the parent about a step."""
    if _steps is not None:
        _steps.put(step)


def why(error: BaseException) -> str:
    """What ended a strategy's work, in one line."""
    if isinstance(error, SystemExit):
        return f"it ended its process (exit code {error.code}) instead of returning or raising an error"
    message = " ".join(str(error).splitlines())
    from ..errors import MiniTfmError

    return message if message and isinstance(error, MiniTfmError) else f"{type(error).__name__}: {message}".removesuffix(": ")


def _pass_on(steps: Any, on_step: Callable[[Any], None]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            on_step(steps.get_nowait())


@contextlib.contextmanager
def _process(context: Any, steps: Any) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(steps,)) as pool:
        try:
            yield pool
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(cancel_futures=True)  # its thread is to be gone when Python ends, which would wake it by a closed pipe
            raise


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits, here and in a process that is started meanwhile: one that has just begun would print where it was."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """In the child: an error becomes text, because not every exception survives the way to the parent."""
    try:
        return work(*arguments)
    except BaseException as error:  # SystemExit, too: the parent would end with its code
        if os.environ.get("MINI_TFM_DEBUG") == "1":
            traceback.print_exc()
        return Failure(why(error))


def _result_of(future: concurrent.futures.Future) -> Any:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return Failure("its process died without a word: killed, out of memory, or a crash in compiled code")
    return Failure(why(error)) if error is not None else future.result()


def _begin(steps: Any) -> None:
    """A child leaves Ctrl-C to its parent, which ends it. Standard output is the command's: what a strategy prints goes elsewhere."""
    global _steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    _steps = steps
