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
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("kind", hostile.CASES)
def test_a_file_that_asks_for_too_much_is_refused(kind, endings):
    assert endings[kind].startswith(("InvalidValue: ", "FileProblem: ")), endings[kind]
    assert len(endings[kind]) < 1200 and "\n" not in endings[kind]
    if not kind.startswith("option"):
        assert any(name in endings[kind] for name in (".json: ", ".safetensors: ", "/m: ")), "which file?"
