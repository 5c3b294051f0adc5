"""Properties that are tried with few examples at each change, with many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROPERTIES = 10  # times as many examples
MODELS = 25


def passes(times, *tests):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis and not long", "-p", "no:cacheprovider", *map(str, tests)]
    done = subprocess.run(command, env={**os.environ, "MINI_TFM_TEST_EXAMPLES": str(times)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.long
def test_every_property_of_the_core():
    passes(PROPERTIES, TESTS / "core")


@pytest.mark.long
def test_a_thousand_models_are_saved_loaded_and_saved():
    passes(MODELS, TESTS / "checkpoint" / "test_models.py")
