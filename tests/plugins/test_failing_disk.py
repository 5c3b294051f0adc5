"""Whichever call of LMDB's fails or writes half, a store is what it was or has the new rows whole, here and for another process."""

import errno
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).parent / "failing_disk.c"
WAYS = {"full": errno.ENOSPC, "broken": errno.EIO, "half": -1}

EACH = """
import ctypes, os, shutil, sys
import numpy as np
from mini_tfm.errors import FileProblem
from mini_tfm_plugins.rows_lmdb import LmdbRows

disk, way, what, folder = ctypes.CDLL(None), int(sys.argv[1]), sys.argv[2], sys.argv[3]


def rows(n, value):
    return {"b": (np.full((n, 64), value, np.float32), np.arange(n))}


def inside(path):
    '''The first value of each row, as another process would read it.'''
    store = LmdbRows(path)
    with store.reading("doc", "b", store.counts("doc").get("b", 0)) as chunks:
        return [float(value) for hidden, _ in chunks for value in hidden[(hidden == hidden[:, :1]).all(axis=1), 0]]


def make(path):
    LmdbRows(path).open(64, "model")


def prepare(path):
    make(path)
    LmdbRows(path).append("doc", rows(1500, 1.0))
    LmdbRows(path).append("other", rows(700, 1.0))


CALLS = {
    "append": lambda store: store.append("doc", rows(900, 2.0)),
    "delete": lambda store: store.delete("doc"),
    "compact": lambda store: store.compact(),
    "open": lambda store: store.open(64, "model"),
}
AFTER = {"append": [1.0] * 1500 + [2.0] * 900, "delete": [], "compact": [1.0] * 1500, "open": []}
BEFORE = [] if what == "open" else [1.0] * 1500


def attempt(number):
    path = os.path.join(folder, f"{what}{number}", "rows.mdb")
    os.makedirs(os.path.dirname(path))
    if what != "open":
        prepare(path)
    store, told = LmdbRows(path), False
    disk.fail_at(number, way)
    try:
        CALLS[what](store)
    except FileProblem as error:
        told = True
        assert path in str(error), error
    asked = disk.n_asked()
    disk.fail_at(-1, 0)
    assert set(os.listdir(os.path.dirname(path))) <= {"rows.mdb", "rows.mdb-lock"}, os.listdir(os.path.dirname(path))
    if what == "open":
        make(path)
    found = inside(path)
    assert found == BEFORE or found == AFTER[what], (number, len(found))
    assert told or found == AFTER[what], number
    if (child := os.fork()) == 0:  # what is on the disk, not what this process has of it
        os._exit(0 if inside(path) == found else 1)
    assert os.waitpid(child, 0)[1] == 0, number
    CALLS[what](store)  # the cause is gone: the same object does it
    again = inside(path)
    assert again in (AFTER[what], found + [2.0] * 900), (number, len(again))
    shutil.rmtree(os.path.dirname(path))
    return told, number < asked


number = told = 0
while (ended := attempt(number))[1]:
    told += ended[0]
    number += 1
print(number, told)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    made = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", SHIM, "-o", made, "-ldl"], check=True)
    return made


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None, reason="needs glibc and a C compiler")
@pytest.mark.parametrize("what", ["append", "delete", "compact", "open"])
@pytest.mark.parametrize("way", WAYS)
def test_whichever_call_fails_the_store_is_whole(way, what, shim, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EACH, str(WAYS[way]), what, str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls, told = map(int, done.stdout.split())
    assert calls >= 3 and told >= 1, (calls, told)  # data, a sync, the page that says what counts
