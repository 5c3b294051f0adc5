"""Folders with mutations load or are refused: no crash, no hang, no error but ours, no memory past a limit."""

import subprocess
import sys

import mutations
import pytest


def check(folder, seed, count, seconds):
    command = [sys.executable, mutations.__file__, str(folder), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    last = done.stdout.splitlines()[-1:]
    panics = "the Rust of `tokenizers` prints its panics"
    assert done.returncode == 0, f"ended with {done.returncode} at mutation {last} ({panics}):\n{done.stderr[-3000:]}"
    assert last[0].startswith(f"{seed + count - 1} ")


def test_500_mutations(tmp_path):
    check(tmp_path, 0, 500, 600)


@pytest.mark.long
def test_20_000_mutations(tmp_path):
    check(tmp_path, 1000, 20_000, 7200)
