"""A strategy checked in a process of its own: one that ends it, never comes back or prints fails a check, and does nothing worse.

`check_apart` is the parent's side. The child runs `_main`; its results, one line of JSON a check, have a pipe of their own, as
what it prints is a fault.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from ..errors import InvalidValue, MiniTfmError, shown


class Result(NamedTuple):
    """Of one check: what failed, a line each, and how long it took, in seconds."""

    check: str
    failures: list[str]
    seconds: float


MOST_BYTES = 4 << 30  # of address space that the child may take beyond what it begins with


def check_apart(memory: str, checks: Sequence[str], *, limit: float) -> Iterator[Result]:
    """The result of each of the `checks` (see CHECKS) on a strategy, given as text, as it comes; `limit`: seconds for each.

    A file that its option `path` names is neither read nor written: the checks have some of their own. Where the check `runs` fails it
    is the last. Raises InvalidValue if the strategy cannot be made from its text.
    """
    left = list(checks)
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _main; _main()"
    while left:
        with tempfile.TemporaryDirectory() as files:
            command, environment = [sys.executable, "-P", "-c", program, memory, *left], {**os.environ, "TMPDIR": files}
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, env=environment) as child:
                try:
                    for result in _results(child, list(left), limit):
                        left.remove(result.check)
                        yield result
                        if result.check == "runs" and result.failures:
                            return
                finally:
                    child.kill()


def _results(child: subprocess.Popen, checks: Sequence[str], limit: float) -> Iterator[Result]:
    """What the child says; of the check at which it ended, or after `limit` seconds had not, that it did."""
    assert child.stdout is not None
    pipe, said = child.stdout.fileno(), b""
    for check in checks:
        begun = time.monotonic()
        while b"\n" not in said:
            ready, _, _ = select.select([pipe], [], [], max(0.0, begun + limit - time.monotonic()))
            if not ready:
                yield Result(check, [f"expected it to end within {limit:g} s, it was still at work"], time.monotonic() - begun)
                return
            more = os.read(pipe, 1 << 16)
            if not more:
                code = child.wait()
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                yield Result(check, [f"expected the process to go on, it ended with {how}"], time.monotonic() - begun)
                return
            said += more
        line, _, said = said.partition(b"\n")
        told = json.loads(line)
        if "refused" in told:
            raise InvalidValue(told["refused"])
        yield Result(told["check"], told["failures"], told["seconds"])


def _main() -> None:
    """The child. Ctrl-C is for the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    memory, *checks = sys.argv[1:]
    with tempfile.TemporaryFile("w+b") as printed:
        os.dup2(printed.fileno(), 1)
        for check in checks:
            print(json.dumps(_result(memory, check, printed)), file=results, flush=True)
    os._exit(0)  # what a strategy has registered for the end of the process is not asked


def _limit_memory() -> None:
    """A strategy that eats memory gets a MemoryError, where the system tells what is taken."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = taken + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _result(memory: str, check: str, printed: IO[bytes]) -> dict[str, Any]:
    from .checks import check_memory
    from .trial import CheckFailed

    begun, failures = time.monotonic(), list[str]()
    try:
        check_memory(memory, only=[check])
    except CheckFailed as error:
        failures = [line.strip().removeprefix(check).strip() for line in str(error).splitlines()[1:-1]]
    except MiniTfmError as error:  # it cannot be made
        return {"refused": str(error)}
    except BaseException as error:
        failures = [f"expected no error, got {type(error).__name__}: {error}"]
    gc.collect()  # what failed may still hold files in memory, of which there is not much
    sys.stdout.flush()
    if printed.tell() or os.fstat(printed.fileno()).st_size:
        printed.seek(0)
        failures.append(f"expected nothing on standard output, got {shown(printed.read(1000).decode(errors='replace'))}")
        printed.seek(0)
        printed.truncate()
    return {"check": check, "failures": failures, "seconds": time.monotonic() - begun}
