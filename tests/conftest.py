"""Hypothesis gives the same examples on every run; MINI_TFM_TEST_EXAMPLES=10 gives ten times as many. `pytest -n auto` uses all cores."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `import helpers` from any test, whatever the folder pytest is started in

# Processes that tests start import the package that is installed, as this one does: not the sources in the folder that
# pytest was started in, where nothing is compiled after `pip install .`
os.environ["PYTHONSAFEPATH"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait leave the processor to the other workers
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What does not depend on the data is stated in the profile; a test that is dear asks `helpers.examples` for fewer.
settings.register_profile(
    "mini_tfm",
    derandomize=True,
    deadline=None,
    max_examples=max(1, int(20 * float(os.environ.get("MINI_TFM_TEST_EXAMPLES", "1")))),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mini_tfm")


def pytest_collection_finish(session):
    """What was collected stays to the end: whoever looks for garbage in a test is not to look through thousands of tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def short_streams(monkeypatch, request):
    """The kit's check of long streams with fewer segments, but in tests marked long: it takes a third of the kit's time."""
    if request.node.get_closest_marker("long") is None:
        monkeypatch.setattr("mini_tfm.testing.habits.MANY_SEGMENTS", 40)
