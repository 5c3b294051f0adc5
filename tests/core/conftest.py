"""Every test of a kernel runs on the compiled one and on its NumPy twin; MINI_TFM_ISA says which compiled one."""

from importlib import import_module

import numpy as np
import pytest

IMPLEMENTATIONS = {"compiled": "mini_tfm._core", "twin": "mini_tfm.reference"}


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def core(request):
    return import_module(IMPLEMENTATIONS[request.param])


@pytest.fixture(scope="session", params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def threads():
    """The compiled layer, whose number of threads is put back afterwards."""
    from mini_tfm import _core

    before = _core.get_num_threads()
    yield _core
    _core.set_num_threads(before)
