"""What the project checks, one session each: `nox --list` names them, `nox -s lint types` runs two.

A session that needs the package builds it from a copy of the tree: setuptools reuses what it finds in build/, whatever flags that was
compiled with. CONTRIBUTING.md says which session a change needs; `.ci/run` runs those that must pass.
"""

import platform
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
EXTRAS = PROJECT["optional-dependencies"]
CODE = ["mini_tfm", "plugins", "tests", "benchmarks", "setup.py", "noxfile.py", ".ci"]
PYTEST = ["pytest", "-q", "-n", "auto", "-p", "no:cacheprovider"]
CORE_AND_CALLERS = ["tests/core", "tests/test_model.py", "tests/train/test_trainer.py", "tests/memory/test_run.py"]
# An instruction set that replaces only some kernels of another one is tested by the tests of those kernels.
PARTIAL = ("avx512amx", "avx512bf16", "avx512vnni", "neondot")
OF_PARTIAL = ("every_kernel", "linear", "bfloat16", "packed", "loss", "special_values", "threads")
OF_REFERENCE = ["tests/core/test_every_kernel.py", "tests/core/test_public_kernels.py", "tests/test_model.py", "tests/test_pipeline.py"]

nox.options.sessions = ["lint", "types"]


def copy_of_source(session):
    """The tree without what git ignores, in the session's temporary folder, where the session goes on."""
    copy = Path(session.create_tmp()).resolve() / "source"
    shutil.rmtree(copy, ignore_errors=True)
    ignored = [Path(line).name for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    session.chdir(copy)
    return copy


def install_package(session, extras="test", **environment):
    """A fresh build from a copy of the tree, where the session goes on."""
    copy_of_source(session)
    session.install(f".[{extras}]", env=environment)


def from_core(session, expression):
    """A list that the compiled layer reports, as words."""
    program = f"from mini_tfm import _core; print(*({expression}))"
    return session.run("python", "-P", "-c", program, silent=True).split()


def tests_of(isa):
    return [f"tests/core/test_{name}.py" for name in OF_PARTIAL] if isa in PARTIAL else ["tests/core"]


@nox.session
def tests(session):
    """The README's test command in a fresh environment; arguments go to pytest."""
    install_package(session)
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session
def lint(session):
    """ruff: faults, and the format."""
    session.install(*[need for need in EXTRAS["dev"] if need.startswith("ruff")])
    session.run("ruff", "check", *CODE)
    session.run("ruff", "format", "--check", *CODE)


@nox.session
def types(session):
    """mypy; nothing is compiled."""
    session.install(*PROJECT["dependencies"], *[need for need in EXTRAS["dev"] if need.startswith("mypy")])
    session.run("mypy")


@nox.session
def docs(session):
    """The README and docs/: their code runs, their links lead somewhere, docs/command-line.md is what the commands say."""
    install_package(session)
    session.run(*PYTEST, "tests/test_docs.py", "tests/test_settings.py", *session.posargs)


@nox.session
@nox.parametrize("variant", [nox.param(name, id=name) for name in ("serial", "instruction-sets", "emulated")])
def core(session, variant):
    """The core in another build: without OpenMP and with Cython's checks; each instruction set and NumPy; emulated AVX-512."""
    {"serial": serial, "instruction-sets": instruction_sets, "emulated": emulated}[variant](session)


def serial(session):
    install_package(session, MINI_TFM_OPENMP="0", MINI_TFM_CHECKS="1")
    if from_core(session, "[_core.show_config()[name] for name in ('openmp', 'num_threads')]") != ["False", "1"]:
        session.error("MINI_TFM_OPENMP=0: expected a build without OpenMP, on one thread")
    session.run(*PYTEST, *CORE_AND_CALLERS)


def instruction_sets(session):
    """All but the best one, which the tests run on anyway, and the NumPy twins; `-- tests` runs the whole fast suite on each."""
    install_package(session)
    for isa in from_core(session, "_core.show_config()['isas'][1:]"):
        session.run(*PYTEST, *(session.posargs or [*tests_of(isa), "tests/test_model.py"]), env={"MINI_TFM_ISA": isa})
    session.run(*PYTEST, *OF_REFERENCE, env={"MINI_TFM_ISA": "reference"})


def emulated(session):
    if platform.machine() not in ("x86_64", "AMD64"):
        session.skip("AVX-512 is emulated with AVX2, which this processor does not have")
    install_package(session, MINI_TFM_EMULATE="1")
    if "avx2" not in from_core(session, "_core.show_config()['isas']"):
        session.skip("AVX-512 is emulated with AVX2, which this processor does not have")
    isas = from_core(session, "_core.show_config()['emulated']")
    if not isas:
        session.error("MINI_TFM_EMULATE=1: expected emulated instances, got none")
    for isa in isas:
        session.run(*PYTEST, *tests_of(isa), env={"MINI_TFM_ISA": isa})


@nox.session
def sanitize(session):
    """The core under AddressSanitizer and UndefinedBehaviorSanitizer; arguments go to pytest, in place of tests/core."""
    session.install(*PROJECT["dependencies"], *EXTRAS["test"])
    python = Path(session.bin).resolve() / "python"
    session.run(".ci/sanitize", *session.posargs, env={"PYTHON": str(python)}, external=True)


@nox.session
def benchmarks(session):
    """performance.py --quick to the terminal; `nox -s benchmarks -- --only gemm` for one section."""
    install_package(session, "peers")
    session.run("python", "benchmarks/performance.py", "--quick", *session.posargs)


@nox.session
def coverage(session):
    """The lines of Python that the fast tests reach, least covered last."""
    install_package(session, "test,dev")
    session.run(*PYTEST, "--cov", "--cov-report=term-missing", *session.posargs)


@nox.session
def package(session):
    """sdist -> wheel -> an empty environment, with the tree that they were made from out of reach."""
    session.install(*[need for need in EXTRAS["dev"] if need.startswith("build")])
    folder = Path(session.create_tmp()).resolve()
    for name in ("dist", "user", "empty"):
        shutil.rmtree(folder / name, ignore_errors=True)
    source = copy_of_source(session)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), ".", silent=True)
    shutil.copy(source / ".ci" / "first_steps.py", folder)
    (folder / "empty").mkdir()
    session.chdir(folder / "empty")
    shutil.rmtree(source)
    session.run("python", "-m", "venv", str(folder / "user"))
    user = folder / "user" / "bin"
    (wheel,) = (folder / "dist").glob("*.whl")
    session.run(str(user / "pip"), "install", "--quiet", str(wheel), external=True)
    session.run(str(user / "mini-tfm"), "info", external=True)
    session.run(str(user / "mini-tfm"), "plugins", "check", "window:size=8", external=True)
    session.run(str(user / "python"), "-P", "-W", "error", str(folder / "first_steps.py"), external=True)
