"""The door `mini_tfm._core` and its twins: the same names, the same signatures, something of ours for each of them."""

import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
from core.samples import IN_NUMPY, NAMES, SETTINGS, arrays_in, call, sample
from helpers import in_a_process

from mini_tfm import _core, reference

FUNCTIONS = sorted(name for name, value in vars(reference).items() if inspect.isfunction(value) and not name.startswith("_"))


def test_every_name_behind_the_door_has_a_twin_and_the_reverse():
    assert set(_core.__all__) == set(reference.__all__) == {*FUNCTIONS, "Block", "BlockGrad", "Choice", "Feed", "PackedWeight", "Program"}
    assert all(hasattr(module, name) for module in (_core, reference) for name in module.__all__)


def test_every_kernel_has_a_sample():
    assert set(NAMES) | SETTINGS | IN_NUMPY == set(FUNCTIONS)
    for name in NAMES:
        assert list(sample(name, "float32")) == list(inspect.signature(getattr(reference, name)).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_has_its_twins_signature_and_a_docstring(name):
    kernel, twin = (inspect.signature(getattr(module, name)).parameters.values() for module in (_core, reference))
    assert [(p.name, p.kind, p.default) for p in kernel] == [(p.name, p.kind, p.default) for p in twin]
    assert getattr(_core, name).__doc__ and getattr(reference, name).__doc__


def test_programs_have_their_twins_methods_and_docstrings():
    for name in ("note", "run", "run_greedily", "run_beams", "ready", "hopeless", "batch"):
        assert hasattr(_core.Program, name) and hasattr(reference.Program, name)
    assert _core.Program.__doc__ and reference.Program.__doc__


def test_blocks_are_shared():
    """So that a Block made for the one is taken by the other."""
    assert _core.Block is reference.Block and _core.BlockGrad is reference.BlockGrad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_twin_is_typed_for_both(name):
    """The door has no stub: to a type checker it is the twins."""
    signature = inspect.signature(getattr(reference, name))
    assert inspect.Signature.empty not in {signature.return_annotation, *(p.annotation for p in signature.parameters.values())}


def test_the_door_fails_to_import_without_a_kernel_for_each_twin():
    program = """
import mini_tfm.reference
mini_tfm.reference.__all__.append("a_twin_alone")
import mini_tfm._core
"""
    done = in_a_process(program, check=False, MINI_TFM_ISA="")
    assert done.returncode and "a_twin_alone" in done.stderr and "AttributeError" in done.stderr


def test_show_config_tells_what_computes():
    config, twin = _core.show_config(), reference.show_config()
    assert config.keys() == twin.keys()
    assert config["isa"] in config["isas"] and config["num_threads"] == _core.get_num_threads()
    json.dumps(config)
    wanted = os.environ.get("MINI_TFM_ISA")
    assert not wanted or config["isa"] == wanted


RUN_EVERYTHING = """
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[2])
import numpy as np
from core.samples import NAMES, arrays_in, call, sample
from mini_tfm import _core
results = {}
for name in NAMES:
    for dtype in ("float32", "float64"):
        found = call(_core, name, sample(name, dtype))
        for i, array in enumerate(arrays_in(found) or found):
            results[f"{name} {dtype} {i}"] = array
np.savez(sys.argv[1], isa=_core.show_config()["isa"], **results)
"""


@pytest.mark.parametrize("isa", [*_core.show_config()["isas"][1:], "reference", ""])
def test_every_instruction_set_agrees_with_the_twins(tmp_path, isa):
    """In a process of its own, for the choice is made at import. The empty name is the best that runs here."""
    in_a_process(RUN_EVERYTHING, tmp_path / "results.npz", Path(__file__).parents[1], MINI_TFM_ISA=isa)
    with np.load(tmp_path / "results.npz") as results:
        assert str(results["isa"]) == (isa or _core.show_config()["isas"][0]) or os.environ.get("MINI_TFM_ISA")
        for name in NAMES:
            for dtype in ("float32", "float64"):
                found = call(reference, name, sample(name, dtype))
                for i, wanted in enumerate(arrays_in(found) or found):
                    largest = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros_like(wanted)).max()
                    actual = results[f"{name} {dtype} {i}"]
                    np.testing.assert_allclose(actual, wanted, rtol=0, atol=100 * np.finfo(dtype).eps * largest, err_msg=name)


@pytest.mark.parametrize("isa", ["avx1024", "BASELINE", "../avx2"])
def test_an_unknown_instruction_set_is_refused(isa):
    done = in_a_process("import mini_tfm._core", check=False, MINI_TFM_ISA=isa)
    assert done.returncode and "MINI_TFM_ISA: expected reference or one that this processor runs (" in done.stderr
    assert f"got {isa!r}" in done.stderr


def test_the_reference_needs_no_compiled_code():
    program = "import sys; sys.modules['mini_tfm._core.kernels'] = None; from mini_tfm import _core; print(_core.show_config()['isa'])"
    done = in_a_process(program, MINI_TFM_ISA="reference")
    assert done.stdout.strip() == "reference"


def test_without_the_compiled_code_the_door_says_what_to_do():
    """A module that is missing, not one that fails in another way, which must not be hidden."""
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "mini_tfm._core.kernels":
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Missing())
import mini_tfm._core
"""
    done = in_a_process(program, check=False, MINI_TFM_ISA="")
    assert done.returncode and "ImportError" in done.stderr
    assert f"are not built in {Path(_core.__file__).parents[2]}. Build them there with `pip install -e .`" in done.stderr
    assert "after `pip install .`, leave that folder" in done.stderr
