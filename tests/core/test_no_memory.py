"""Every allocation of every kernel fails once: the call is a MemoryError, changes nothing for the next, and frees what it had."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mini_tfm import _core

HERE = Path(__file__).parent

EACH = """
import ctypes, gc, resource, sys
import numpy as np
sys.path.insert(0, {tests!r})
from core.samples import NAMES, arrays_in, call, sample
from mini_tfm import _core

shim = ctypes.CDLL(None)
_core.set_num_threads(1)  # libgomp ends the process where it gets no memory for threads


def rounds(name, big):
    arguments = sample(name, "float32", big=big)
    shim.fail_at(-1)
    good = arrays_in(call(_core, name, arguments))
    n, told = shim.n_asked(), 0
    for number in range(n):
        arguments = sample(name, "float32", big=big)
        shim.fail_at(number)
        try:
            call(_core, name, arguments)
        except MemoryError:
            told += 1
        shim.fail_at(-1)
        again = arrays_in(call(_core, name, sample(name, "float32", big=big)))
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(good, again, strict=True)), name
    return n, told


for name in NAMES:
    for big in (False, True):
        n, told = rounds(name, big)
        print(name, big, n, told)
for name in ("attention_backward", "linear_top_k"):  # a leak grows with the rounds
    for _ in range(3):
        rounds(name, True)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        rounds(name, True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024, name  # KB
"""


@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="the twins have NumPy's memory")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None, reason="needs glibc and a C compiler")
def test_every_allocation_that_fails_is_a_memory_error(tmp_path):
    shim = tmp_path / "no_memory.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", HERE / "no_memory.c", "-o", shim, "-ldl"], check=True)
    child = subprocess.run(
        [sys.executable, "-c", EACH.format(tests=str(HERE.parent))],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = [line.split() for line in child.stdout.splitlines()]
    assert sum(int(n) for *_, n, _ in found) > 40  # it asks for memory in many places
    untold = [line for line in found if line[2] != line[3]]
    assert not untold, untold
