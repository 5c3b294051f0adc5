"""The extension, and the OpenMP probe. Everything else is in pyproject.toml.

MINI_TFM_OPENMP=auto (default) uses OpenMP where a program built with it runs, 0 builds without, 1 refuses to build without.
For tests only: MINI_TFM_EMULATE=1 makes the AVX-512 instances out of AVX2, MINI_TFM_CHECKS=1 has Cython check indices.
"""

import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCE = "mini_tfm/_core"
HELLO = '#include <stdio.h>\nint main(void) { printf("%d", 1); return 0; }\n'
HELLO_OPENMP = "#include <stdio.h>\n#include <omp.h>\nint main(void) { int n = 0;\n#pragma omp parallel for reduction(+:n)\n" \
               "for (int i = 0; i < 9; i++) n += omp_get_max_threads() > 0;\nprintf(\"%d\", n); return n != 9; }\n"  # fmt: skip
NO_COMPILER = """mini_tfm needs a C compiler (gcc or clang) and Python's headers, and a trial program did not build: {}
  Debian, Ubuntu: apt install gcc python3-dev    Fedora: dnf install gcc python3-devel
  Alpine: apk add gcc musl-dev python3-dev       macOS: xcode-select --install"""


class BuildWithOpenMP(build_ext):
    def build_extensions(self):
        wanted = os.environ.get("MINI_TFM_OPENMP", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"MINI_TFM_OPENMP: expected auto, 0 or 1, got {wanted!r}")
        problem = self.trial(HELLO, [])
        if problem:
            sys.exit(NO_COMPILER.format(problem))
        problem = "MINI_TFM_OPENMP=0" if wanted == "0" else self.trial(HELLO_OPENMP, ["-fopenmp"])
        if problem and wanted == "1":
            sys.exit(f"MINI_TFM_OPENMP=1, but a program with -fopenmp did not build and run: {problem}")
        print(f"mini_tfm: building {f'without OpenMP ({problem})' if problem else 'with OpenMP (-fopenmp)'}")
        openmp = [] if problem else ["-fopenmp"]
        self.extensions[0].extra_link_args += openmp
        compile_one, compile_all = self.compiler._compile, self.compiler.compile
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
            begun = []

            def together(*arguments, **options):
                objects = compile_all(*arguments, **options)
                for each in begun:
                    each.result()  # raises what the compiler said
                return objects

            # Each instance has flags of its own, and there is no public way to that; nor to compile several files at once.
            self.compiler._compile = lambda obj, src, ext, cc, post, pp: begun.append(
                pool.submit(compile_one, obj, src, ext, cc, post + openmp + FLAGS.get(src, []), pp)
            )
            self.compiler.compile = together
            super().build_extensions()

    def trial(self, program, flags):
        """Compiles, links and runs the program: None, or what went wrong. Only running tells that the library is there."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, "trial", output_dir=folder, extra_postargs=flags)
                subprocess.run([str(Path(folder, "trial"))], check=True, capture_output=True, timeout=60)
            except Exception as error:  # distutils, the compiler and the program each raise their own
                return str(error) or type(error).__name__
        return None


EMULATE, CHECKS = (os.environ.get(f"MINI_TFM_{name}") == "1" for name in ("EMULATE", "CHECKS"))
flags = tomllib.loads(Path(SOURCE, "instances", "flags.toml").read_text())
isas = flags.get(platform.machine().replace("arm64", "aarch64"), flags["other"]) | (flags["emulated"] if EMULATE else {})
FLAGS = {str(path): own for isa, own in isas.items() for path in sorted(Path(SOURCE, "instances").glob(f"{isa}_f*.c"))}
kernels = Extension(
    "mini_tfm._core.kernels",
    [*[f"{SOURCE}/{name}" for name in ("kernels.pyx", "dispatch.c", "program.c", "room.c", "threads.c")], *FLAGS],
    depends=[str(path) for suffix in ("c", "h", "pxi") for path in Path(SOURCE).rglob(f"*.{suffix}")],
    include_dirs=[numpy.get_include(), SOURCE],
    define_macros=[("MINI_TFM_EMULATE", f"{EMULATE:d}"), *[(f"HAS_{isa.upper()}", "1") for isa in isas]],
    extra_compile_args=flags["always"],
)
directives = {"language_level": 3, "embedsignature": True} | dict.fromkeys(["boundscheck", "wraparound", "initializedcheck"], CHECKS)
setup(
    packages=[*find_packages(".", include=["mini_tfm", "mini_tfm.*"]), "mini_tfm_plugins"],
    package_dir={"mini_tfm": "mini_tfm", "mini_tfm_plugins": "plugins"},
    package_data={"mini_tfm": ["py.typed", "testing/models/*/*"], "mini_tfm_plugins": ["py.typed", "template/**/*"]},
    ext_modules=cythonize([kernels], compiler_directives=directives, build_dir="build/cython"),
    cmdclass={"build_ext": BuildWithOpenMP},
)
