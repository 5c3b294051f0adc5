"""Instruction sets: the vectors that the kernels are made of, those of AVX-512 on every machine, and how one is chosen.

docs/instruction-sets.md says how the others are tested. tests/core/vectors.c holds what is expected of vectors.
"""

import os
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from helpers import in_a_process

import mini_tfm as mt
from mini_tfm import _core

SOURCE = Path(__file__).parents[2] / "mini_tfm" / "_core"  # what is installed has no sources
FLAGS = tomllib.loads((SOURCE / "instances/flags.toml").read_text()) if (SOURCE / "instances/flags.toml").exists() else {}
CONFIG = _core.show_config()
COMPILER = shlex.split(os.environ.get("CC", "cc"))
needs_sources = pytest.mark.skipif(not FLAGS or not shutil.which(COMPILER[0]), reason="there are no sources here, or no compiler")
NATIVE = [isa for isa in CONFIG["isas"] if isa not in ["reference", *CONFIG["emulated"]]]


def macros_of(isa):
    """What the instance's own file defines."""
    lines = (SOURCE / f"instances/{isa}_f32.c").read_text().splitlines()
    return ["-D" + "=".join(line.split()[1:]) for line in lines if line.startswith("#define") and "REAL_IS_DOUBLE" not in line]


@needs_sources
@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("isa, emulated", [*((isa, False) for isa in NATIVE), ("avx512", True)])
def test_vectors(tmp_path, isa, emulated, real):
    """Those that run here, and those of AVX-512 emulated, which are then the same text on other registers."""
    if emulated and "avx2" not in NATIVE:
        pytest.skip("what is emulated is made of AVX2, which does not run here")
    (flags,) = [FLAGS["emulated"][isa]] if emulated else [machine[isa] for machine in FLAGS.values() if isa in machine][:1]
    choice = [f"-DREAL_IS_DOUBLE={int(real == 'double')}", f"-DMINI_TFM_EMULATE={int(emulated)}", *macros_of(isa)]
    warnings = ["-Wall", "-Werror", "-Wno-unused-function"]
    source = Path(__file__).with_name("vectors.c")
    command = [*COMPILER, *FLAGS["always"], *flags, *warnings, *choice, f"-I{SOURCE}", str(source), "-o", str(tmp_path / "vectors"), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "vectors"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_sources
def test_what_is_built_is_what_the_flags_name():
    if CONFIG["isa"] != "reference":
        machines = [set(FLAGS[machine]) for machine in ("x86_64", "aarch64", "other")]
        assert set(CONFIG["isas_built"]) in machines
    files = {path.stem for path in (SOURCE / "instances").glob("*.c")}
    named = {isa for machine in ("x86_64", "aarch64", "other") for isa in FLAGS[machine]}
    refined = {"avx512vnni", "avx512bf16", "avx512amx", "neondot"}  # other tables, with better kernels for float here and there
    assert files == {f"{isa}_{real}" for isa in named for real in ("f32", "f64") if real == "f32" or isa not in refined}


def test_what_runs_is_built_and_the_best_comes_first():
    assert set(CONFIG["isas"]) <= set(CONFIG["isas_built"]) and set(CONFIG["emulated"]) <= set(CONFIG["isas"])
    assert CONFIG["isas"][0] not in CONFIG["emulated"]
    program = "from mini_tfm import _core; print(_core.show_config()['isa'])"
    assert in_a_process(program, MINI_TFM_ISA="").stdout.split() == CONFIG["isas"][:1] or CONFIG["isa"] == "reference"


@pytest.mark.parametrize("isa", [isa for isa in CONFIG["isas_built"] if isa not in CONFIG["isas"]])
def test_what_does_not_run_here_is_refused(isa):
    done = in_a_process("import mini_tfm._core", check=False, MINI_TFM_ISA=isa)
    assert done.returncode and f"this processor runs ({', '.join(CONFIG['isas'])}), got {isa!r}" in done.stderr


def test_show_config_prints_them(capsys):
    mt.show_config()
    printed = capsys.readouterr().out
    assert all(isa in printed for isa in CONFIG["isas_built"])
    assert ("emulated" in printed) == (CONFIG["isa"] in CONFIG["emulated"])
