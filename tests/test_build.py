"""The build: OpenMP as asked for, messages that help, and packages that carry what they should."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mini_tfm
from mini_tfm import _core

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests stand alone, there is nothing to build here")
PACKAGES = ("mini_tfm", "plugins")
SOURCES = (".c", ".h", ".pyx", ".pxi")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a checkout holds: a build writes into its folder, and several would meet."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".so":
            shutil.copy2(path, copy)
    for name in (*PACKAGES, "tests", ".ci", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    for name, text in (("README.md", "# mini_tfm\n"), ("LICENSE", "BSD\n"), ("CHANGELOG.md", "# Changes\n")):
        if not (copy / name).exists():
            (copy / name).write_text(text)
    return copy


def run(tree, *command, **environment):
    """A command in the tree, with the compiler's choices taken from `environment` alone. A copy's own package is used in it."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("MINI_TFM_OPENMP", "MINI_TFM_ISA", "CC", "CFLAGS", "PYTHONPATH")
    }
    clean["PYTHONSAFEPATH"] = "1" if tree == ROOT else ""
    return subprocess.run([sys.executable, *command], cwd=tree, env={**clean, **environment}, capture_output=True, text=True, timeout=900)


def built(tree, what, to):
    """Calls the build backend, without the isolation that needs a network: the file it made."""
    to.mkdir(exist_ok=True)
    done = run(tree, "-c", f"import sys; from setuptools import build_meta; build_meta.{what}(sys.argv[1])", str(to))
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = to.iterdir()
    return made


def files_in(folder, *suffixes):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name.endswith(suffixes) and path.is_file()}


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return built(tree, "build_sdist", tmp_path_factory.mktemp("sdist"))


def names_in_sdist(sdist):
    with tarfile.open(sdist) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


def test_the_openmp_flag_matches_what_was_built():
    if _core.show_config()["isa"] == "reference":
        pytest.skip("nothing compiled is in use")
    from mini_tfm._core import kernels

    binary = Path(kernels.__file__).read_bytes()
    assert _core.show_config()["openmp"] == (b"GOMP_parallel" in binary or b"__kmpc_fork_call" in binary)


def test_the_version_is_stated_once_more_and_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mini_tfm.__version__


def test_entry_points_name_what_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in project["entry-points"]["mini_tfm"].values():
        package, module = target.split(".")
        assert package == "mini_tfm_plugins" and (ROOT / "plugins" / f"{module}.py").exists()


def test_every_source_is_in_the_sdist(sdist):
    held = names_in_sdist(sdist)
    for package in PACKAGES:
        expected = {f"{package}/{name}" for name in files_in(ROOT / package, ".py", *SOURCES, "py.typed")}
        assert not expected - {"mini_tfm/_core/kernels.c"} - held
    assert {"setup.py", "pyproject.toml", "tests/test_build.py", "tests/core/naive.py"} <= held


def test_what_the_tests_of_the_docs_read_is_in_the_sdist(sdist):
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages | {"README.md", "CONTRIBUTING.md", "noxfile.py", ".ci/run", "benchmarks/README.md"} <= names_in_sdist(sdist)


def test_nothing_made_by_a_build_is_in_the_sdist(sdist):
    assert not [name for name in names_in_sdist(sdist) if re.search(r"\.so$|\.py[co]$|__pycache__|kernels\.c$|^build/", name)]


def test_the_packages_carry_types_and_no_sources(tree, tmp_path):
    """What a wheel takes besides the extension."""
    done = run(tree, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check_contents(files_in(tmp_path, ""))


def check_contents(held):
    expected = {f"mini_tfm/{name}" for name in files_in(ROOT / "mini_tfm", ".py", "py.typed")}
    expected |= {
        f"mini_tfm_plugins/{path.name}" for path in (ROOT / "plugins").iterdir() if path.suffix == ".py" or path.name == "py.typed"
    }
    if (ROOT / "plugins" / "template").exists():
        expected |= {f"mini_tfm_plugins/template/{name}" for name in files_in(ROOT / "plugins" / "template", ".py", ".toml", ".md")}
    assert not expected - held
    assert {"mini_tfm/py.typed", "mini_tfm_plugins/py.typed"} <= held
    assert not [name for name in held if name.endswith(SOURCES) or name.startswith("tests")]


def test_a_wrong_openmp_choice_is_refused(tree):
    done = run(tree, "setup.py", "build_ext", MINI_TFM_OPENMP="yes")
    assert done.returncode
    assert "MINI_TFM_OPENMP: expected auto, 0 or 1, got 'yes'" in done.stderr


def test_openmp_that_does_not_work_is_told(tree, tmp_path):
    """A compiler that knows everything but -fopenmp: 1 refuses, and says what was tried."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) echo "no OpenMP here" >&2; exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    done = run(tree, "setup.py", "build_ext", MINI_TFM_OPENMP="1", CC=str(compiler), LDSHARED=f"{compiler} -shared")
    assert done.returncode
    assert "MINI_TFM_OPENMP=1, but a program with -fopenmp did not build and run" in done.stderr


def test_without_a_compiler_the_message_says_what_to_install(tree):
    done = run(tree, "setup.py", "build_ext", CC="/nonexistent/cc")
    assert done.returncode and "Traceback" not in done.stderr
    for system in ("apt install gcc python3-dev", "xcode-select --install"):
        assert system in done.stderr


@pytest.mark.long
def test_the_sdist_alone_builds_a_wheel_that_works(sdist, tmp_path):
    """Unpacked, built, unpacked again: the extension computes with the source tree out of reach."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    wheel = built(source, "build_wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    check_contents({name for name in names if ".dist-info/" not in name})
    assert len([name for name in names if name.startswith("mini_tfm/_core/kernels.") and name.endswith(".so")]) == 1
    shutil.rmtree(source)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import mini_tfm, numpy; from mini_tfm import _core; " \
              "print(mini_tfm.__file__, _core.show_config()['isa'], _core.softmax(numpy.zeros(2)))"  # fmt: skip
    done = run(tmp_path, "-c", program, str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout and "[0.5 0.5]" in done.stdout


@pytest.mark.long
def test_a_build_without_openmp_passes_the_tests_of_the_core(tree):
    done = run(tree, "setup.py", "-q", "build_ext", "--inplace", MINI_TFM_OPENMP="0")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(tree, "-c", "from mini_tfm import _core; print(_core.__file__, _core.show_config()['openmp'])")
    assert done.stdout.split() == [str(tree / "mini_tfm" / "_core" / "__init__.py"), "False"]
    # Programs that tests start are to find the copy, too, not what is installed.
    done = run(tree, "-m", "pytest", "-q", "tests/core", "-p", "no:cacheprovider", PYTHONPATH=str(tree))
    assert done.returncode == 0, done.stdout[-10_000:]


@pytest.mark.long
@pytest.mark.parametrize("isa", ["reference", *_core.show_config()["isas"][1:]])
def test_every_instruction_set_passes_the_tests_of_the_core(isa):
    """The best one is what the tests run on anyway."""
    done = run(ROOT, "-m", "pytest", "-q", "tests/core", "-p", "no:cacheprovider", MINI_TFM_ISA=isa)
    assert done.returncode == 0, done.stdout[-10_000:]
