"""Tiny files that ask for huge work end in one clear error, in bounded memory and time."""

import json
import subprocess
import sys

import hostile
import pytest


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    command = [sys.executable, hostile.__file__, str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=hostile.SECONDS * 10)
    assert done.returncode == 0, done.stderr
    return {name: result for name, *result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("kind", hostile.CASES)
def test_a_file_that_asks_for_too_much_is_refused(kind, endings):
    ending, seconds, grown, size = endings[kind]
    assert ending.startswith(("InvalidValue: ", "FileProblem: ")), ending
    assert len(ending) < 1200 and "\n" not in ending
    if not kind.startswith("option"):
        assert any(name in ending for name in (".json: ", ".safetensors: ", "/m: ")), "which file?"
    assert seconds <= hostile.CPU_SECONDS + hostile.CPU_SECONDS_A_BYTE * size
    assert grown <= hostile.MOST_BYTES + hostile.MOST_BYTES_A_BYTE * size, f"{grown >> 20} MB for a file of {size >> 10} kB"
