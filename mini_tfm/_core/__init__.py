"""The one door to the compiled layer: `from mini_tfm import _core`.

The contract. Every function here takes and returns C-contiguous NumPy arrays, float32 or float64, all of one dtype in
one call, with int64 integers and bool masks. Strided reals are copied; a wrong type, rank, shape or range is refused
with `InvalidType` or `InvalidValue` before a pointer is taken. No input changes, other than those that a name or a
docstring calls in place. Zero-sized arrays are legal. A result has the same bits for any number of threads, and a batch
row the same bits in any company. Ctrl-C stops products, attention, searches and losses between two tiles: the exception is
raised as ever, and what was to be written is undefined. A bank that `search` goes through stays where it lies, in a mapped
file say, whatever its strides, and may be float16 or int8; so do its uint8 codes, which `encode_rows` makes, in NumPy
everywhere. The same functions in NumPy are `mini_tfm.reference`; they say what is computed.

    kernels.h         the list of kernels, a line each: what else C needs is made of it
    core.h            what they take, and their tables, one for each instruction set and real
    families/*.c      the kernels, one family a file, written once
    families/*.pxi    what Python calls, beside the C it calls: checks, pointers, GIL
    simd.h            vectors, exp and erf for one instruction set
    instances/        one translation unit for each instruction set and real, flags.toml says how it is compiled; all.h
                      includes the families; emulated.h is AVX-512 for tests on processors without it
    dispatch.c        which instances this processor runs
    threads.c         OpenMP, behind one helper; threads.py: how many to start with
    kernels.pyx       the extension: plain.pxi (the quick checks), config.pxi (instruction sets, threads), the families

The names are those of the twins (`mini_tfm.reference.__all__`), and so are the types: a twin's annotations are the kernel's.

`MINI_TFM_ISA` forces one of the instruction sets that run here (`show_config()["isas"]`), or `reference` for the NumPy
twins in place of C. docs/instruction-sets.md says which there are and how each is tested.
"""

import os
import threading
from typing import TYPE_CHECKING

from mini_tfm import reference
from mini_tfm.errors import InvalidValue

_isa = os.environ.get("MINI_TFM_ISA") or None

if not TYPE_CHECKING:  # a type checker takes all that the twins offer
    __all__ = reference.__all__

if TYPE_CHECKING or _isa == "reference":
    from mini_tfm.reference import *  # noqa: F403
else:
    # Waiting threads spin for about 0.5 ms, not libgomp's 10 ms: docs/decisions/spinning-threads.md. It reads this when it is loaded.
    _unset = "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ
    if _unset:
        os.environ["GOMP_SPINCOUNT"] = "20000"
    try:
        import mini_tfm._core.kernels as _kernels
    except ModuleNotFoundError as error:
        if error.name != "mini_tfm._core.kernels":
            raise
        _checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        raise ImportError(
            f"mini_tfm: the compiled kernels are not built in {_checkout}. Build them there with `pip install -e .`; or, after"
            " `pip install .`, leave that folder: Python imports what lies in it, and not what was installed"
            " (MINI_TFM_ISA=reference runs the slow NumPy twins without the kernels)"
        ) from error
    finally:
        if _unset:
            del os.environ["GOMP_SPINCOUNT"]
    globals().update({name: getattr(_kernels, name) for name in reference.__all__})
    from mini_tfm._core.threads import default_num_threads as _default_num_threads

    if not _kernels._choose_isa(_isa):
        raise InvalidValue(
            f"MINI_TFM_ISA: expected reference or one that this processor runs ({', '.join(_kernels.show_config()['isas'])}), got {_isa!r}"
        )
    _kernels._set_default_threads(_default_num_threads())
    _kernels._watch_signals(threading.main_thread().ident)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_kernels._after_fork)
