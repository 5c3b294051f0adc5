"""What the benchmarks share: how a time is taken, how two are compared, what an error is.

Two libraries are compared in pairs, A B A B ..., and what is reported is the median of the pairs' ratios, the peer's time
over ours: above 1 is faster than the peer. Both sides of a pair drift with the machine, their ratio less. What makes the
two sides even:

- Each computes in a process of its own (`Worker`), as its users run it, with its threads set before it is loaded. In one
  process they would share: torch and this package both ask for libgomp.so.1 and the first one loaded serves both. Ours lets
  waiting threads sleep, torch's lets them spin, so that whichever comes first decides for the other. Measured on 2 threads:
  with ours first torch takes 1.3 times as long for 8 x 8 x 128 x 128 x 64 and 1.4 for 1 x 8 x 16 x 16 x 64.
- Threads that wait spin before they sleep, torch's and faiss's some 10 ms, those of OpenBLAS 110 (14 here, which changes
  nothing but how long a pair takes), and would take the processor from the other side. So a side gives its answer only
  when its process has stopped using processor time (`settle`); nobody is timed beside another's spinning threads.
- After that pause caches hold something else and threads are asleep: a burst begins with calls that are not timed, and the
  timed ones follow without a pause, so that each library finds its own threads as a loop of its calls would. Of a few
  repetitions, each of at least a millisecond, the quickest counts.
- glibc's malloc gives memory back to the system when more is free than twice the largest array that was ever freed, and asks for
  it again, page by page, in the next call: a call of 4 ms that makes arrays of 2 MB takes 12 then. So a worker begins by giving
  back a large array (`GIVEN_BACK`), whatever its library; which sizes came before makes no difference from then on.
- Where a library can be called in several ways, the quickest on this machine and size is chosen first (`Prepared`).
"""

import contextlib
import importlib
import math
import os
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIBRARIES = ["mini_tfm", "torch"]
PAIRS, ENOUGH, PATIENCE = 15, 5, 12.0  # seconds, beyond which a comparison ends when it has enough pairs
REPETITION = 1e-3  # seconds that a repetition takes at least: a tick of the clock and a late interrupt are little in it
QUIET = 0.012  # seconds: longer than a tick of the kernel, by which it counts the time of other threads
GIVEN_BACK = 31 * 2**20  # bytes: close to the most of which malloc learns, 32 MB
OPENBLAS_SPINS = "25"  # for 2^25 turns of the clock, 14 ms: longer than anything that lies between two calls in a burst
NOT_PASSED_ON = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
FASTER = "times as fast as the peer (its time / ours)"


def normal(*shape, seed=0):
    """float32 from a standard normal distribution, repeated after a prime number of values, as drawing many takes long."""
    return np.resize(np.random.default_rng([seed, *shape]).standard_normal(min(math.prod(shape), 999_983), np.float32), shape)


def thread_count():
    """What a library is to use in this process: OMP_NUM_THREADS, or all processors there are for it."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def library(name):
    """What computes under this name, or NotImplementedError, at which asv leaves a benchmark out.

    Ours is imported here and not above: a process that measures torch must not have its OpenMP.
    """
    if name == "mini_tfm":
        from mini_tfm import _core

        return _core
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise NotImplementedError(f"{name} is not installed") from None
    if name in ("transformers", "sentence_transformers"):
        library("torch")  # which computes for them
    elif name == "torch":
        module.set_num_threads(thread_count())
    elif name == "faiss":
        module.omp_set_num_threads(thread_count())
    return module


def needs(kernels, *names):
    """Leaves a benchmark out where the kernels, of an older commit for one, lack something."""
    for name in names:
        if not hasattr(kernels, name):
            raise NotImplementedError(f"there is no {name}")


# Errors


def in_double(value):
    """Real arrays in float64, whatever else as it is."""
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def relative_error(got, want):
    """max|got - want| / max|want| over arrays (or numbers), or over the worst of several."""
    if isinstance(got, tuple | list):
        return max(relative_error(g, w) for g, w in zip(got, want, strict=True))
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"a result of shape {got.shape}, expected {want.shape}")
    return float(np.max(np.abs(got - want), initial=0.0) / max(np.max(np.abs(want), initial=0.0), np.finfo(np.float32).tiny))


def as_arrays(result):
    """torch's tensors as arrays, through tuples."""
    if isinstance(result, tuple | list):
        return tuple(as_arrays(each) for each in result)
    if isinstance(result, np.ndarray | np.generic | int | float):
        return result
    return result.detach().numpy()


# Times


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Plan(NamedTuple):
    """`warm` calls that are not timed, then `repeats` repetitions of `number` calls."""

    warm: int
    number: int
    repeats: int


def plan(call):
    """For a call of whatever length: at least 3 ms are timed, and of long calls not more than is worth waiting for."""
    call()  # what happens only once
    number, taken = 1, seconds(call)
    while taken < REPETITION:
        number *= 4
        began = time.perf_counter()
        for _ in range(number):
            call()
        taken = time.perf_counter() - began
    one = taken / number
    number = max(1, math.ceil(REPETITION / one))
    repetition = number * one
    repeats = 3 if repetition < 0.01 else 2 if repetition < 0.06 else 1
    return Plan(number if repetition < 0.06 else 0, number, repeats)


def burst(call, warm, number, repeats):
    """Seconds a call, the quickest of the repetitions."""
    for _ in range(warm):
        call()
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(number):
            call()
        best = min(best, time.perf_counter() - began)
    return best / number


def settle(limit=1.0):
    """Waits until this process's threads use no more processor time, at most `limit` seconds. One thread leaves none behind."""
    if thread_count() == 1:
        return
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 4:
            return


class Ratio(NamedTuple):
    """The peer's time over ours: the median of the pairs and their quartiles; the median times of each, in seconds."""

    median: float
    low: float
    high: float
    ours: float
    theirs: float
    pairs: int
    times: tuple = ()  # (ours, theirs) of each pair

    @classmethod
    def of(cls, times):
        array = np.array(times)
        low, median, high = np.percentile(array[:, 1] / array[:, 0], [25, 50, 75])
        return cls(float(median), float(low), float(high), *map(float, np.median(array, axis=0)), len(times), tuple(times))


def interleaved(ours, theirs, pairs, warm=2):
    """The Ratio of two functions that give seconds, called in turn. The first `warm` pairs do not count.

    Where one side takes very long, as few as ENOUGH pairs do: the Ratio says how many there were.
    """
    for _ in range(warm):
        ours(), theirs()
    times: list = []
    ends = time.monotonic() + PATIENCE
    while len(times) < pairs and (len(times) < ENOUGH or time.monotonic() < ends):
        times.append((ours(), theirs()))
    return Ratio.of(times)


# What is measured


class _Task:
    """Something computed, at several sizes, by several libraries.

    `make` gives its inputs. A method with a library's name is handed that library and the inputs, as torch's tensors where
    it is torch, and gives the function that is timed, or several under the names of the ways they go; what is done before
    the clock runs is done in that method. `value` is what the results of all libraries have in common; `exact` computes in
    float64 what `sample` picks of that.
    """

    params = ([], LIBRARIES)
    param_names = ["size", "library"]
    unit = "FLOP"  # of `work`, or "B"
    gradient = False  # torch needs its tape, so that inference_mode is not among the ways
    in_place = False  # a call goes on from what the one before has left
    tolerance = 1e-3  # an error beyond it is wrong, not fast

    def make(self, size):
        raise NotImplementedError

    def work(self, size):
        """Multiplications and additions that have to be done, or bytes that have to be moved."""
        raise NotImplementedError

    def note(self, size, seconds):
        """What else there is to say of our time."""
        return ""

    def mini_tfm(self, kernels, *inputs):
        raise NotImplementedError

    def exact(self, *inputs):
        from mini_tfm import reference

        return self.mini_tfm(reference, *(in_double(x) for x in inputs))()

    def value(self, result):
        return result

    def sample(self, value):
        return value

    def ways(self, size, name):
        module, inputs = library(name), self.make(size)
        if name == "torch":
            inputs = [module.from_numpy(x) if isinstance(x, np.ndarray) else x for x in inputs]
        made = getattr(self, name)(module, *inputs)
        return made if isinstance(made, dict) else {"": made}

    def first(self, size, name):
        """What a first call gives."""
        return as_arrays(next(iter(self.ways(size, name).values()))())

    def error(self, result, inputs):
        return relative_error(self.sample(self.value(result)), self.exact(*inputs))


class _Kernel(_Task):
    """A task as asv runs it, with its time and its error."""

    def setup(self, size, library):
        self.prepared = Prepared(self, size, library)
        self.call = self.prepared.call

    def teardown(self, size, library):
        if hasattr(self, "prepared"):
            self.prepared.close()

    def time_kernel(self, size, library):
        self.call()

    def track_error_kernel(self, size, library):
        return self.error(self.first(size, library), self.make(size))

    track_error_kernel.unit = "max |error| / max |value|"


class Prepared:
    """A task at a size by a library, ready to be timed: inputs made, called once, in the way that is quickest here."""

    def __init__(self, task, size, name):
        self.task = task
        ways = [(how, call, contextlib.nullcontext) for how, call in task.ways(size, name).items()]
        if name == "torch" and not task.gradient:
            ways += [(f"{how} inference_mode".strip(), call, library("torch").inference_mode) for how, call, _ in ways]
        tried = [self._try(call, context, len(ways) > 1) for _, call, context in ways]
        (self.how, self.call, context), (self.plan, _) = min(zip(ways, tried, strict=True), key=lambda each: each[1][1])
        self.held = contextlib.ExitStack()
        self.held.enter_context(context())

    def _try(self, call, context, timed):
        with context():
            planned = plan(call)
            return planned, burst(call, *planned) if timed else 0.0

    def burst(self):
        return burst(self.call, *self.plan)

    def close(self):
        self.held.close()


class Side(NamedTuple):
    """Of a comparison: a class of tasks, a size, the name of a library."""

    task: type
    size: Any
    library: str


class _Server:
    """What a worker does when asked."""

    side = prepared = None

    def prepare(self, task, size, name):
        side = Side(task, size, name)
        if side != self.side:
            self.drop()
            self.prepared, self.side = Prepared(task(), size, name), side
        settle()
        return self.prepared.how, self.prepared.plan.repeats

    def burst(self, tries=1):
        taken = min(self.prepared.burst() for _ in range(tries))
        settle()
        return taken

    def result(self):
        task = self.prepared.task
        result = task.first(*self.side[1:]) if task.in_place else as_arrays(self.prepared.call())
        settle()
        return result

    def drop(self):
        if self.prepared is not None:
            self.prepared.close()
        self.side = self.prepared = None

    def run(self, function, *arguments):
        return function(*arguments)


class Worker:
    """A process that computes with so many threads. Its libraries have the settings that they come with: what holds OpenBLAS to the
    kernels of an older processor is not passed on."""

    def __init__(self, n_threads):
        mine, its = Pipe()
        environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
        environment.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(n_threads)))
        environment["OPENBLAS_THREAD_TIMEOUT"] = OPENBLAS_SPINS
        program = "import sys; sys.path.insert(0, sys.argv[1]); from benchmarks.common import _serve; _serve(int(sys.argv[2]))"
        folder = str(Path(__file__).parents[1])  # -P: the package that is installed, not what lies in the folder we are in
        command = [sys.executable, "-P", "-c", program, folder, str(its.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[its.fileno()], env=environment, stdin=subprocess.DEVNULL)
        its.close()
        self.connection = mine

    def ask(self, name, *arguments):
        self.connection.send((name, arguments))
        try:
            problem, answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"the process that measures ended with exit code {self.process.wait()}") from None
        if problem is not None:
            raise NotImplementedError(answer) if problem == "left out" else RuntimeError(answer)
        return answer

    def close(self):
        self.connection.close()
        self.process.wait()


def _serve(descriptor):
    np.empty(GIVEN_BACK, np.uint8)  # and freed at once
    server, connection = _Server(), Connection(descriptor)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = None, getattr(server, name)(*arguments)
        except NotImplementedError as error:
            answer = "left out", str(error) or "not there"
        except Exception:  # told where it was asked for
            answer = "failed", traceback.format_exc()
        connection.send(answer)


class Workers:
    """One process for each side of a comparison, library and number of threads; they stay for the next comparison, until `renew`."""

    start = Worker

    def __init__(self):
        self.all = {}

    def get(self, role, name, n_threads):
        key = role, name, n_threads
        if key not in self.all:
            self.all[key] = self.start(n_threads)
        return self.all[key]

    def processes(self):
        return [worker.process.pid for worker in self.all.values()]

    def ready(self, ours, theirs, n_threads):
        """A Worker for each of the two Sides, started if need be."""
        return [self.get(role, side.library, n_threads) for role, side in enumerate((ours, theirs))]

    def compare(self, ours, theirs, n_threads=None, pairs=None):
        """The Ratio of two Sides, in which way each was called, and a Worker for each, which can be asked for its result."""
        workers = self.ready(ours, theirs, n_threads or thread_count())
        hows, repeats = zip(*(worker.ask("prepare", *side) for worker, side in zip(workers, (ours, theirs), strict=True)), strict=True)
        settle()  # this process may have computed in float64
        calls = [lambda worker=worker: worker.ask("burst") for worker in workers]
        # The scheduler takes some bursts to give each thread a processor; calls that take long have been through that by then.
        return interleaved(*calls, pairs or PAIRS, warm=2 if max(repeats) > 1 else 0), hows, workers

    def __enter__(self):
        return self

    def renew(self):
        """The next comparison has new processes."""
        for worker in self.all.values():
            worker.close()
        self.all = {}

    def __exit__(self, *_):
        self.renew()


def ratio(ours, theirs, pairs=None):
    """The median ratio of two Sides, each in a new process."""
    with Workers() as workers:
        return workers.compare(ours, theirs, pairs=pairs)[0].median


def share(ours, limit, pairs=None):
    """How much of what `limit` does in the same time `ours` does, in percent."""
    amounts = [side.task().work(side.size) for side in (ours, limit)]
    return 100 * ratio(ours, limit, pairs) * amounts[0] / amounts[1]


class _Against:
    """The ratio of a peer's time to ours, for the task `kernel` at its sizes."""

    kernel = _Task
    peer = "torch"
    pairs = None
    param_names = ["size"]
    timeout = 300

    def __init_subclass__(cls):
        if "kernel" in vars(cls):
            cls.params = [cls.kernel.params[0]]

    def setup(self, size):
        library(self.peer)

    def _ratio(self, size):
        return ratio(Side(self.kernel, size, "mini_tfm"), Side(self.kernel, size, self.peer), self.pairs)


class _AgainstTorch(_Against):
    def track_ratio_torch(self, size):
        return self._ratio(size)

    track_ratio_torch.unit = FASTER


class _AgainstNumpy(_Against):
    peer = "numpy"

    def track_ratio_numpy(self, size):
        return self._ratio(size)

    track_ratio_numpy.unit = FASTER


class _AgainstFaiss(_Against):
    peer = "faiss"

    def track_ratio_faiss(self, size):
        return self._ratio(size)

    track_ratio_faiss.unit = FASTER
