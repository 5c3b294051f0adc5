"""Threads: the same bits for any number of them, several Python threads at once, forks, and how many there are at first."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from core.attention_cases import FEATURES, drawn_case, only_row
from core.cases import Values
from core.samples import NAMES, arrays_in, call, sample
from helpers import assert_same_bits, in_a_process

from mini_tfm import _core
from mini_tfm.reference import Block

needs_openmp = pytest.mark.skipif(not _core.show_config()["openmp"], reason="built without OpenMP: there is one thread")


needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or _core.show_config()["isa"] == "reference", reason="no fork here, or no threads of ours to lose in it"
)


def copied(results):
    return [np.array(array) for array in arrays_in(results) or results]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_for_any_number_of_threads(threads, dtype, name):
    results = []
    for n in (1, 2, 2, 3, 4, 8):  # two twice: the same call again
        threads.set_num_threads(n)
        results.append(copied(call(threads, name, sample(name, dtype, big=True))))
    for other in results[1:]:
        assert_same_bits(other, results[0])


# Sizes in which heads, queries or keys are what there is to share out.
SHAPES = [(1, 1, 1, 1, 600), (1, 1, 1, 200, 200), (1, 2, 1, 300, 70), (3, 4, 2, 3, 900), (1, 8, 8, 2, 1500), (2, 6, 3, 129, 65),
          (1, 4, 1, 6, 1100), (1, 3, 3, 1, 5000), (4, 2, 1, 96, 385)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature", ["causal window", "prefix", "distance bias", "per key bias", "masked index", "blocks", "everything"])
def test_attention_has_the_same_bits(threads, feature, shape):
    """Forward, backward with dropout, and mass, over 54 cases."""
    batch, heads, kv_heads, length, source = shape
    results = []
    for n in (1, 2, 3, 4, 8):
        threads.set_num_threads(n)
        values = Values(source, "float32")
        case = drawn_case(feature, values, batch, heads, kv_heads, length, source, 32)
        tables = case.ask_for_dbias(lambda shape: np.zeros(shape, np.float32))
        drops = {"dropout": 0.1 * (length % 2), "seed": 3}
        out, lse = threads.attention(case.q, case.blocks, case.scale, **drops)
        backward = threads.attention_backward(values.real(*case.q.shape), out, lse, case.q, case.blocks, case.scale, **drops)
        asking = values.mask(batch, length)
        masses = [threads.attention_mass(case.q, block, lse, case.scale, asking) for block in case.blocks]
        results.append(copied([out, lse, backward, tables, masses]))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("feature", ["causal", "masked index", "blocks"])
def test_a_batch_row_has_the_same_bits_alone_and_shared_out(threads, feature):
    """Alone it is cut by queries and keys, in a batch by heads."""
    values = Values(0, "float32")
    case = drawn_case(feature, values, 5, 2, 1, 230, 310, 16)
    dout = values.real(*case.q.shape)
    out, lse = threads.attention(case.q, case.blocks, case.scale)
    threads.set_num_threads(2)
    dq, grads = threads.attention_backward(dout, out, lse, case.q, case.blocks, case.scale)
    for n in (1, 2, 4):
        threads.set_num_threads(n)
        row, blocks = np.s_[3:4], [only_row(block, 3) for block in case.blocks]
        assert_same_bits(threads.attention(case.q[row], blocks, case.scale), (out[row], lse[row]))
        row_dq, row_grads = threads.attention_backward(dout[row], out[row], lse[row], case.q[row], blocks, case.scale)
        assert_same_bits(row_dq, dq[row])
        for part, whole in zip(row_grads, grads, strict=True):
            assert_same_bits((part.dk, part.dv), (whole.dk[row], whole.dv[row]))


@pytest.mark.parametrize("shape", [(700, 3, 700), (3, 3000, 3), (1, 900, 900), (900, 900, 1), (513, 511, 257), (64, 4096, 64)])
def test_gemm_has_the_same_bits(threads, dtype, shape):
    m, k, n = shape
    values = Values(0, dtype)
    a, b = values.real(m, k), values.real(k, n)
    for trans_a, trans_b in np.ndindex(2, 2):
        stored = a.T.copy() if trans_a else a, b.T.copy() if trans_b else b
        results = []
        for n_threads in (1, 2, 3, 4):
            threads.set_num_threads(n_threads)
            results.append(threads.gemm(*stored, trans_a=bool(trans_a), trans_b=bool(trans_b)))
        for other in results[1:]:
            assert_same_bits(other, results[0])


def test_twenty_training_steps_have_the_same_bits(threads):
    """A layer, its loss and its optimizer, by hand."""

    def trained(n_threads):
        threads.set_num_threads(n_threads)
        values = Values(0, "float32")
        x, targets, weight = values.real(300, 128), values.integers(0, 200, 300), values.real(128, 200)
        m, v = np.zeros(weight.size, np.float32), np.zeros(weight.size, np.float32)
        for step in range(1, 21):
            logits = threads.gemm(threads.softmax(x), weight)
            losses, lse = threads.cross_entropy(logits, targets, -100, 0.1)
            dlogits = threads.cross_entropy_backward(logits, targets, lse, np.full(300, 1 / 300, np.float32), -100, 0.1)
            dweight = threads.gemm(threads.softmax(x), dlogits, trans_a=True).reshape(-1)
            scale = 1.0 / max(1.0, threads.sum_of_squares(dweight) ** 0.5)
            threads.adamw(
                weight.reshape(-1), dweight, m, v, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=step, grad_scale=scale
            )
        return [weight, losses]

    expected = trained(1)
    for n_threads in (2, 3, 4):
        assert_same_bits(trained(n_threads), expected)


@needs_openmp
def test_set_and_get(threads):
    for n in (1, 3, 2):
        threads.set_num_threads(n)
        assert threads.get_num_threads() == n == threads.show_config()["num_threads"]


@needs_openmp
def test_several_threads_are_used(threads):
    """Not only counted: the process has them afterwards."""
    program = """
import os, sys
import numpy as np
from mini_tfm import _core
before = len(os.listdir("/proc/self/task"))
_core.set_num_threads(3)
_core.softmax(np.ones((2000, 2000), np.float32))
print(len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads in /proc")
    assert int(in_a_process(program).stdout) == 2


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors on Linux")
@pytest.mark.parametrize("bound, kept_off", [(False, 1), (True, 0)])
def test_workers_are_kept_off_their_callers_processor(bound, kept_off):
    """Where the user has not placed threads. The caller's own processors, and those of other threads, stay as they are."""
    program = """
import os, threading
import numpy as np
from mini_tfm import _core
ids = lambda: {int(each) for each in os.listdir("/proc/self/task")}
event = threading.Event()
other = threading.Thread(target=event.wait)
other.start()
before, allowed = ids(), os.sched_getaffinity(0)
_core.set_num_threads(2)
for _ in range(20):
    _core.softmax(np.ones((500, 500), np.float32))
[worker] = ids() - before
event.set()
print(len(allowed - os.sched_getaffinity(worker)), *{len(allowed - os.sched_getaffinity(each)) for each in (0, other.native_id)})
"""
    everywhere = ",".join(map(str, os.sched_getaffinity(0)))
    asked = {"OMP_PROC_BIND": "true", "OMP_PLACES": f"{{{everywhere}}}"} if bound else {}
    assert in_a_process(program, **asked).stdout.split() == [str(kept_off), "0"]


@needs_openmp
@pytest.mark.parametrize("asked, expected", [("1", 1), ("3", 3), ("2,1", 2)])
def test_omp_num_threads_is_honoured(asked, expected):
    assert int(in_a_process("from mini_tfm import _core; print(_core.get_num_threads())", OMP_NUM_THREADS=asked).stdout) == expected


@pytest.mark.parametrize("asked", ["", "0", "-3", "many", "4097", "1000000", "9" * 30, "9" * 10_000])
def test_the_default_is_what_the_process_may_use(asked):
    """Also where OMP_NUM_THREADS asks for what no process should have, and that is said."""
    from mini_tfm._core.threads import default_num_threads

    def no_quota(path):
        raise OSError

    def half_a_processor(path):
        return "50000 100000"

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for read, expected in ((no_quota, processors), (half_a_processor, 1), (lambda path: "max 100000", processors)):
        told = pytest.warns(
            UserWarning, match=rf"OMP_NUM_THREADS: expected a number from 1 to 4096, got '.{{1,40}}.*'; mini_tfm uses {expected} "
        )
        with told if asked else contextlib.nullcontext() as told:
            assert default_num_threads({"OMP_NUM_THREADS": asked}, read) == expected
        assert not asked or len(str(told[0].message)) < 200


@needs_openmp
def test_a_number_of_threads_that_is_no_number_of_threads_fails_nothing():
    program = "import warnings; warnings.simplefilter('ignore'); from mini_tfm import _core; print(_core.get_num_threads())"
    assert 1 <= int(in_a_process(program, OMP_NUM_THREADS="9" * 5000).stdout) <= os.cpu_count()


STARVED = """
import resource, sys
import numpy as np
from mini_tfm import _core
x = np.ones((1000, 1000), np.float32)
with open("/proc/self/statm") as sizes:
    here = int(sizes.read().split()[0]) * resource.getpagesize()
_core.set_num_threads(16)
resource.setrlimit(resource.RLIMIT_AS, (here + (100 << 20), resource.RLIM_INFINITY))
y = _core.gemm(x, x)
assert (y == 1000).all()
print(_core.get_num_threads())
_core.set_num_threads(16)
print(_core.get_num_threads())
"""


@needs_openmp
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_where_no_more_threads_can_be_had_fewer_compute():
    """The stacks of 15 threads do not fit into what is left of the address space; OpenMP's own library would end the process."""
    fewer, again = map(int, in_a_process(STARVED).stdout.split())
    assert 1 <= fewer < 16 and again == 16


STOPPED = """
import os, signal, sys, threading
import numpy as np
from mini_tfm import _core
from mini_tfm.reference import Block

name = sys.argv[1]
def real(*shape):
    return np.full(shape, 0.01, np.float32)
if name == "gemm":
    a = real(6000, 6000)
    call = lambda: _core.gemm(a, a)
elif name == "attention":
    q = real(1, 1, 60000, 64)
    call = lambda: _core.attention(q, [Block(q, q)], 0.1)
elif name == "attention_few":
    q, k = real(4000, 8, 4, 64), np.broadcast_to(real(1, 1, 6000, 64), (4000, 8, 6000, 64))
    call = lambda: _core.attention(q, [Block(k, k)], 0.1)
elif name == "attention_backward":
    q, lse = real(1, 1, 40000, 64), np.zeros((1, 1, 40000))
    call = lambda: _core.attention_backward(q, q, lse, q, [Block(q, q)], 0.1)
elif name == "attention_mass":
    q, lse = real(1, 1, 60000, 64), np.zeros((1, 1, 60000))
    call = lambda: _core.attention_mass(q, Block(q, q), lse, 0.1, np.ones((1, 60000), bool))
elif name == "linear_cross_entropy":
    x, w, t = real(4000, 512), real(200000, 512), np.zeros(4000, np.int64)
    call = lambda: _core.linear_cross_entropy(x, w, t, transposed=True)
elif name == "search":
    q, bank = real(1, 4000, 64), real(1, 400000, 64)
    call = lambda: _core.search(q, bank, 5)
elif name == "packed_linear":
    x, w = real(30000, 3000), _core.pack(real(3000, 3000))
    call = lambda: _core.packed_linear(x, w)

# The first signal sends the second: a kernel that lets none through until it ends has run to its end by then.
seen = []
def interrupt():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
def handler(*_):
    seen.append(1)
    if len(seen) > 1:
        raise KeyboardInterrupt
    interrupt()
small = np.random.default_rng(0).standard_normal((300, 300), np.float32)
for n_threads in (1, 2):
    _core.set_num_threads(n_threads)
    seen.clear()
    signal.signal(signal.SIGINT, handler)
    interrupt()
    try:
        call()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("it ran to its end")
    except KeyboardInterrupt:
        print("stopped")
    # What it left behind is whole, and the next call is as good as ever.
    np.testing.assert_allclose(_core.gemm(small, small), small.astype(float) @ small, atol=1e-3)
"""


@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="of the compiled kernels: NumPy's own cannot be stopped")
@pytest.mark.parametrize(
    "name",
    ["gemm", "attention", "attention_few", "attention_backward", "attention_mass", "linear_cross_entropy", "search", "packed_linear"],
)
def test_ctrl_c_does_not_wait_for_a_kernel(name):
    """Each would take seconds, with one thread and with two."""
    assert in_a_process(STOPPED, name).stdout.split() == ["stopped"] * 2


def quota_of(files):
    """The default for a file system of `files`, on a machine with processors to spare."""
    from mini_tfm._core.threads import _quota

    def read(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    return _quota(read)


def test_quotas_of_control_groups():
    mount = "/sys/fs/cgroup"
    inside = {"/proc/self/cgroup": "0::/user/job/step\n"}
    assert quota_of({}) is None
    assert quota_of({f"{mount}/cpu.max": "150000 100000\n"}) == 1.5  # a container: its own group looks like the root
    assert quota_of({"/proc/self/cgroup": "0::/\n", f"{mount}/cpu.max": "max 100000\n"}) is None
    assert quota_of(inside | {f"{mount}/user/job/step/cpu.max": "200000 100000\n"}) == 2
    # The least of those above holds too.
    above = {f"{mount}/user/job/step/cpu.max": "max 100000\n", f"{mount}/user/job/cpu.max": "300000 100000\n"}
    assert quota_of(inside | above | {f"{mount}/user/cpu.max": "700000 100000\n"}) == 3
    # A path of the host's, of which only the mount is to be seen.
    assert quota_of(inside | {f"{mount}/cpu.max": "50000 100000\n"}) == 0.5


def test_quotas_of_control_groups_version_1():
    hierarchies = "4:memory:/other\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
    for mount in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"):
        for folder in ("", "/docker", "/docker/abc"):
            files = {"/proc/self/cgroup": hierarchies, f"{mount}{folder}/cpu.cfs_quota_us": "250000\n"}
            assert quota_of(files) is None  # without a period it says nothing
            assert quota_of(files | {f"{mount}{folder}/cpu.cfs_period_us": "100000\n"}) == 2.5
            unlimited = files | {f"{mount}{folder}/cpu.cfs_quota_us": "-1\n", f"{mount}{folder}/cpu.cfs_period_us": "100000\n"}
            assert quota_of(unlimited) is None
    # Both versions at once: version 2 beside it, without a processor controller of its own.
    both = {"/proc/self/cgroup": hierarchies + "0::/docker/abc\n", "/sys/fs/cgroup/cpu/docker/cpu.cfs_quota_us": "100000\n"}
    assert quota_of(both | {"/sys/fs/cgroup/cpu/docker/cpu.cfs_period_us": "100000\n"}) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "1:2", "::::", "0:cpu:not a path", "0::/\n0::/a/b\n"])
def test_odd_control_groups_set_no_quota(text):
    assert quota_of({"/proc/self/cgroup": text, "/sys/fs/cgroup/cpu.max": text}) is None


@needs_openmp
def test_the_default_is_within_affinity():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    assert in_a_process(f"{one}\nfrom mini_tfm import _core; print(_core.get_num_threads())").stdout.strip() == "1"


@needs_openmp
def test_omp_thread_limit_is_honoured():
    program = "from mini_tfm import _core; _core.set_num_threads(5); print(_core.get_num_threads())"
    assert in_a_process(program, OMP_THREAD_LIMIT="3").stdout.strip() == "3"
    assert in_a_process(program).stdout.strip() == "5"


@needs_openmp
def test_the_environment_is_left_alone():
    """What libgomp is to read while it is loaded, and what it was told by others."""
    program = "import os; before = dict(os.environ); from mini_tfm import _core; print(dict(os.environ) == before)"
    for told in ({}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        assert in_a_process(program, **told).stdout.strip() == "True"


@needs_openmp
def test_threadpoolctl_limits_the_default():
    """Not a number that was asked for by name."""
    program = """
import threadpoolctl
from mini_tfm import _core
with threadpoolctl.threadpool_limits(1):
    print(_core.get_num_threads())
    _core.set_num_threads(2)
    print(_core.get_num_threads())
"""
    assert in_a_process(program, OMP_NUM_THREADS="3").stdout.split() == ["1", "2"]


def test_python_threads_do_not_disturb_each_other(threads):
    """Eight at once, with different work in each: every result has the bits of the quiet run."""
    threads.set_num_threads(2)
    names = [name for name in NAMES if name != "sinusoidal_positions"]

    def run(seed):
        return [copied(call(threads, name, sample(name, "float32", seed=seed))) for name in names] + big(seed)

    def big(seed):
        values = Values(seed, "float32")
        q, k = values.real(1, 2, 150, 32), values.real(1, 2, 150, 32)
        return [[threads.gemm(values.real(200, 150), values.real(150, 90))], list(threads.attention(q, [Block(k, k, causal=True)], 0.2))]

    quiet = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            assert_same_bits(list(pool.map(run, range(8))), quiet)


def test_the_blas_of_numpy_has_its_threads_back(threads):
    """Inside a gemm its pool is held at one thread; afterwards it is what it was, whoever came and went meanwhile."""
    values = Values(0, "float32")
    a, b = values.real(300, 300), values.real(300, 300)

    def pools():
        return [(pool["filepath"], pool["num_threads"]) for pool in threadpoolctl.threadpool_info()]

    threads.gemm(a, b)
    before = pools()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: threads.gemm(a, b), range(40)))
    assert pools() == before


FORK = """
import os, signal, sys, warnings
import numpy as np
from mini_tfm import _core
_core.set_num_threads(4)
rng = np.random.default_rng(0)
a, q = rng.standard_normal((500, 500), np.float32), rng.standard_normal((1, 4, 200, 32), np.float32)
def work():
    out, _ = _core.attention(q, [_core.Block(q, q, causal=True)], 0.2)
    return _core.gemm(a, a).tobytes() + out.tobytes() + _core.softmax(a).tobytes()
expected = work()
warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside threads, which is what is tried here
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if work() == expected and _core.get_num_threads() == 1 else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert work() == expected
assert _core.get_num_threads() == int(sys.argv[2])
"""


@needs_fork
def test_a_forked_child_computes_and_the_parent_goes_on():
    in_a_process(FORK, 20, 4 if _core.show_config()["openmp"] else 1)


@pytest.mark.long
@needs_fork
def test_two_hundred_forks():
    in_a_process(FORK, 200, 4 if _core.show_config()["openmp"] else 1, timeout=600)


TORCH = """
import sys, warnings
import numpy as np
for name in sys.argv[1:]:
    if name == "torch":
        import torch
    else:
        from mini_tfm import _core
torch.set_num_threads(2)
_core.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((500, 400), np.float32)
expected, theirs = _core.softmax(x), torch.from_numpy(x)
for _ in range(200):
    np.testing.assert_allclose(torch.softmax(theirs, -1).numpy(), expected, atol=1e-6)
    assert (_core.softmax(x) == expected).all()
"""


@pytest.mark.parametrize("order", [("torch", "mini_tfm"), ("mini_tfm", "torch")])
def test_beside_pytorch(order):
    """In one process, whichever comes first, their regions taking turns."""
    if find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    in_a_process(TORCH, *order, PYTHONWARNINGS="default")


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("seed", range(20))
def test_many_shapes_have_the_same_bits(threads, feature, seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 4)) * 2, 2, int(rng.integers(1, 300)), int(rng.integers(1, 600)))
    test_attention_has_the_same_bits(threads, feature, shape)
