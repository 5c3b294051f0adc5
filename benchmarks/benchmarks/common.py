"""What the benchmarks share."""

import time

import numpy as np

from mini_tfm import _core

LIBRARIES = ["mini_tfm", "torch"]
PAIRS = 7


def normal(*shape, seed=0):
    """float32 from a standard normal distribution. Written to, so that its pages are there."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def import_torch():
    """torch with as many threads as ours. Where it is not installed, the benchmark is left out."""
    try:
        import torch
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    torch.set_num_threads(_core.get_num_threads())
    return torch


def in_double(value):
    """Real arrays in float64, whatever else as it is."""
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def relative_error(got, want):
    """max|got - want| / max|want| over arrays (or numbers), or over the worst of several."""
    if isinstance(got, tuple | list):
        return max(relative_error(g, w) for g, w in zip(got, want, strict=True))
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), np.finfo(np.float32).tiny))


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ratio(ours, theirs, pairs=PAIRS):
    """Our time over theirs, the median of pairs taken one after the other: both drift with the machine, their ratio less."""
    ours(), theirs()
    return float(np.median([seconds(ours) / seconds(theirs) for _ in range(pairs)]))


class Sgemm:
    """The machine's peak in arithmetic: scipy's BLAS on square matrices. Its threads are by default as many as ours."""

    side = 1024
    flops = 2 * side**3

    def __init__(self):
        from scipy.linalg.blas import sgemm

        self.sgemm, self.out = sgemm, np.zeros((self.side, self.side), np.float32, order="F")
        self.a, self.b = (np.asfortranarray(normal(self.side, self.side, seed=seed)) for seed in (1, 2))
        self()

    def __call__(self):
        self.sgemm(1.0, self.a, self.b, c=self.out, overwrite_c=1)


class Reading:
    """The machine's peak in reading memory: a matrix far larger than any cache times a vector, in all threads."""

    rows, columns = 16384, 4096
    n_bytes = 4 * rows * columns

    def __init__(self):
        from scipy.linalg.blas import sgemv

        self.matrix = np.full((self.rows, self.columns), 0.5, np.float32, order="F")
        self.sgemv, self.vector = sgemv, normal(self.columns)
        self()

    def __call__(self):
        self.sgemv(1.0, self.matrix, self.vector)


def share_of_sgemm(call, flops):
    """How much of the sgemm peak a call of so many flops reaches, in percent."""
    limit = Sgemm()
    return 100 * flops / limit.flops / ratio(call, limit)


def share_of_reading(call, n_bytes):
    """How much of the read bandwidth a call that moves so many bytes reaches, in percent."""
    limit = Reading()
    return 100 * n_bytes / limit.n_bytes / ratio(call, limit)


class _Kernel:
    """A kernel at several sizes: `make` gives its inputs, `ours` and `theirs` what computes the same from them.

    `ours` is handed the compiled kernels or, for the error, their float64 twins.
    """

    params = ([], LIBRARIES)
    param_names = ["size", "library"]

    def setup(self, size, library):
        if library == "torch":
            torch = import_torch()
            inputs = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in self.make(size)]
            self.call = lambda: self.theirs(torch, *inputs)
        else:
            inputs = self.make(size)
            self.call = lambda: self.ours(_core, *inputs)
        self.call()

    def make(self, size):
        raise NotImplementedError

    def ours(self, kernels, *inputs):
        raise NotImplementedError

    def theirs(self, torch, *inputs):
        raise NotImplementedError

    def part(self, *inputs):
        """What the error is measured on: all, unless that would take too long in float64."""
        return inputs

    def time_kernel(self, size, library):
        self.call()

    def track_error_kernel(self, size, library):
        from mini_tfm import reference

        inputs = self.part(*self.make(size))
        want = self.ours(reference, *(in_double(x) for x in inputs))
        if library == "mini_tfm":
            return relative_error(self.ours(_core, *inputs), want)
        torch = import_torch()
        got = self.theirs(torch, *(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in inputs))
        got = tuple(x.numpy() for x in got) if isinstance(got, tuple | list) else got.numpy()
        return relative_error(got, want)

    track_error_kernel.unit = "max |error| / max |value|"


class _AgainstTorch:
    """Our time over torch's for the kernel `kernel`: below 1 is quicker than torch."""

    kernel = _Kernel
    param_names = ["size"]

    def setup(self, size):
        self.theirs, self.ours = self.kernel(), self.kernel()
        self.theirs.setup(size, "torch")
        self.ours.setup(size, "mini_tfm")

    def track_ratio_torch(self, size):
        return ratio(self.ours.call, self.theirs.call)

    track_ratio_torch.unit = "times torch's time"
