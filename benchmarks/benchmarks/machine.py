"""What the machine can do at most: the other figures are read against these."""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

from .common import Prepared, _Task, library, normal, thread_count

MIB = 2**20
TRIES = 7
BEYOND = 256 * MIB  # a working set beyond all caches
PEAK = 2048  # the side of the matrices whose product is the peak that shares are of
SIZES = [MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]  # bytes, from a core's cache to far beyond all of them


def _in_threads(function, *arrays):
    """A call of `function` on the arrays cut into as many pieces as there are threads; NumPy's loops release the GIL."""
    pieces = list(zip(*(np.array_split(x, thread_count()) for x in arrays), strict=True))
    if len(pieces) == 1:
        return lambda: function(*arrays)
    pool = ThreadPoolExecutor(len(pieces) - 1)

    def call():
        others = [pool.submit(function, *piece) for piece in pieces[1:]]
        function(*pieces[0])
        for each in others:
            each.result()

    return call


class _Limit(_Task):
    """What NumPy and scipy's BLAS reach, in the quickest way they have."""

    def setup(self, size, library):
        self.prepared = Prepared(self, size, library)

    def _rate(self, size):
        return self.work(size) / min(self.prepared.burst() for _ in range(TRIES)) / 1e9

    def make(self, size):
        return (size,)


class Sgemm(_Limit):
    """Arithmetic: OpenBLAS's product of square matrices of this side."""

    params = ([512, 1024, 2048], ["numpy"])

    def work(self, side):
        return 2 * side**3

    def numpy(self, _, side):
        from scipy.linalg.blas import sgemm

        a, b = (np.asfortranarray(normal(side, side, seed=seed)) for seed in (1, 2))
        out = np.zeros((side, side), np.float32, order="F")
        a_t = np.ascontiguousarray(a).T  # the same numbers in column order once more, for the product with a transposed factor
        return {
            "sgemm": lambda: sgemm(1.0, a, b, c=out, overwrite_c=1),
            "sgemm, one transposed": lambda: sgemm(1.0, a_t, b, c=out, overwrite_c=1, trans_a=1),
        }

    def track_peak(self, size, library):
        return self._rate(size)

    track_peak.unit = "GFLOP/s"


class Reading(_Limit):
    """Reading so many bytes once."""

    params = (SIZES, ["numpy"])
    unit = "B"

    def work(self, n_bytes):
        return n_bytes

    def numpy(self, _, n_bytes):
        from scipy.linalg.blas import sdot, sgemv

        flat = np.full(n_bytes // 4, 0.5, np.float32)
        width = 1024
        matrix = flat[: len(flat) // width * width].reshape(-1, width).T  # column order, (width, columns)
        columns = normal(matrix.shape[1])
        row = normal(width)
        ways = {"sdot": lambda: sdot(flat, flat), "maximum": lambda: np.max(flat), "maximum, in pieces": _in_threads(np.max, flat)}
        if matrix.size == flat.size:
            ways["sgemv"] = lambda: sgemv(1.0, matrix, columns)
            ways["sgemv, transposed"] = lambda: sgemv(1.0, matrix, row, trans=1)
        return ways

    def track_bandwidth(self, size, library):
        return self._rate(size)

    track_bandwidth.unit = "GB/s"


class Copying(_Limit):
    """Reading so many bytes and writing as many: both count, and both are among the working set of `size` bytes."""

    params = (SIZES, ["numpy"])
    unit = "B"

    def work(self, n_bytes):
        return n_bytes

    def numpy(self, _, n_bytes):
        half = n_bytes // 8
        x, y = np.full(half, 0.5, np.float32), np.full(half, 0.25, np.float32)

        def copy(x, y):
            np.copyto(y, x)

        def negative(x, y):
            np.negative(x, out=y)

        whole = {f.__name__: lambda f=f: f(x, y) for f in (copy, negative)}
        return whole | {f"{f.__name__}, in pieces": _in_threads(f, x, y) for f in (copy, negative) if thread_count() > 1}

    def track_bandwidth(self, size, library):
        return self._rate(size)

    track_bandwidth.unit = "GB/s"


def processor():
    """What this machine is: {what: text}, as far as Linux says so."""

    def lines(path):
        try:
            return Path(path).read_text().splitlines()
        except OSError:
            return []

    names = [line.partition(":")[2].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")]
    caches = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size, shared = ("".join(lines(folder / name)) for name in ("level", "type", "size", "shared_cpu_list"))
        if kind != "Instruction":
            caches.append(f"L{level} {size}" + (f" (processors {shared})" if shared not in ("", "0") else ""))
    wanted = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimd", "asimddp")
    flags = {word for line in lines("/proc/cpuinfo") if line.startswith(("flags", "Features")) for word in line.split()}
    memory = [int(line.split()[1]) / 2**20 for line in lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "processors for this process": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "caches": ", ".join(caches) or "unknown",
        "instruction sets": ", ".join(name for name in wanted if name in flags) or "unknown",
        "memory": f"{memory[0]:.0f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


class Others:
    """How much of a processor everything else on this machine uses, and the hypervisor takes, while something is measured."""

    def __init__(self, processes):
        """`processes` gives the ids of those that do not count, beside this one."""
        self.processes, self.other, self.elapsed = processes, 0.0, 0.0
        self.before = self._now()

    def _now(self):
        """Seconds: of the clock, of all processors at work, of ours at work. None where there is no /proc."""
        tick = 100  # of the numbers in /proc, whatever the kernel's own
        try:
            busy = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            ours = 0
            for process in (os.getpid(), *self.processes()):
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                ours += int(fields[11]) + int(fields[12])
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft, stolen = busy
        return time.monotonic(), (user + nice + system + interrupts + soft + stolen) / tick, ours / tick

    def begin(self):
        self.before = self._now()

    def end(self):
        after = self._now()
        if self.before is not None and after is not None:
            elapsed, busy, ours = (b - a for a, b in zip(self.before, after, strict=True))
            self.other += max(0.0, busy - ours)
            self.elapsed += elapsed

    def share(self):
        """Of one processor, in percent; None where it is not known."""
        return 100 * self.other / self.elapsed if self.elapsed else None


def describe(name):
    """A library in this process: its version and settings. For a worker."""
    module = library(name)
    told = [f"{name} {getattr(module, '__version__', None) or metadata.version(name)}"]
    if name == "mini_tfm":
        told += [f"{key} {value}" for key, value in module.show_config().items() if key != "num_threads"]
    elif name == "torch":
        build = module.__config__.show().splitlines()
        told += [line.strip(" -") for line in build if any(word in line for word in ("Math Kernel", "MKL-DNN", "capability"))]
    elif name == "faiss":
        told.append(module.get_compile_options().strip())
    elif name == "numpy":
        import scipy.linalg.blas

        told.append(f"scipy {scipy.__version__}")
    return ", ".join([*told, *pools()])


def pools():
    """OpenBLAS's name in this process. That a pool has another number of threads than was asked for is an error."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    found = threadpool_info()
    wrong = [pool for pool in found if pool["num_threads"] != thread_count()]
    if wrong:
        raise RuntimeError(f"expected {thread_count()} threads in each pool, got {wrong}")
    return [f"{pool['internal_api']} {pool['version']} for {pool['architecture']}" for pool in found if pool["user_api"] == "blas"]
