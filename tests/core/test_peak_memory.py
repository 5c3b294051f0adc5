"""No (T, S) matrix is ever in memory: at T = S = 16,384 it would take 1 GiB."""

import json
import sys
from pathlib import Path

import pytest
from helpers import in_a_process

from mini_tfm import _core

MIB = 2**20

# Prints by how many bytes the process grew at most, beyond what it held before, in each of forward and backward.
PROGRAM = """
import json, sys
import numpy as np
from mini_tfm import _core

n_threads, length, d, bias_kind, causal = json.loads(sys.argv[1])
_core.set_num_threads(n_threads)
rng = np.random.default_rng(0)

def problem(length):
    q, k, v, dout = (rng.standard_normal((1, 1, length, d), np.float32) for _ in range(4))
    table = rng.standard_normal((1, 2 * length), np.float32)
    dtable = np.zeros_like(table)
    def view(table):
        step = table.strides[1]
        return np.lib.stride_tricks.as_strided(table[:, length - 1:], (1, 1, length, length), (0, 0, -step, step))
    bias = {"bias": view(table), "dbias": view(dtable)} if bias_kind == "distance" else {}
    return q, [_core.Block(k, v, causal=causal, **bias)], dout

def memory(which):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

def run(q, blocks, dout):
    before = memory("VmRSS")
    out, lse = _core.attention(q, blocks, 0.125)
    forward = memory("VmHWM") - before
    before = memory("VmRSS")
    _core.attention_backward(dout, out, lse, q, blocks, 0.125)
    return forward, memory("VmHWM") - before

run(*problem(300))  # the threads and what the libraries hold are there before anything is measured
print(json.dumps(run(*problem(length))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="the twins do make the matrix")
@pytest.mark.skipif(_core.show_config()["isa"] in _core.show_config()["emulated"], reason="half a minute, and the memory of any other")
@pytest.mark.parametrize("bias, causal", [(None, True), pytest.param("distance", False, marks=pytest.mark.long)])
def test_attention_at_16384(bias, causal):
    """Less than 16 MiB a thread beyond what comes out: 4 MiB forward, 12 MiB backward."""
    assert Path("/proc/self/status").exists()
    n_threads = 2 if _core.show_config()["openmp"] else 1
    forward, backward = json.loads(in_a_process(PROGRAM, json.dumps([n_threads, 16384, 64, bias, causal])).stdout)
    assert forward - 4.1 * MIB < n_threads * 16 * MIB
    assert backward - 12 * MIB < n_threads * 16 * MIB


OUTPUT_LAYER = """
import sys
import numpy as np
from mini_tfm import _core

_core.set_num_threads(int(sys.argv[1]))
rng = np.random.default_rng(0)

def memory(which):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

def run(vocab, transposed):
    shape = (vocab, 16) if transposed else (16, vocab)
    x, weight, bias = rng.standard_normal((1024, 16), np.float32), rng.standard_normal(shape, np.float32), np.zeros(vocab, np.float32)
    targets, dweight = rng.integers(0, vocab, 1024), np.ones_like(weight)
    before = memory("VmRSS")
    losses, lse = _core.linear_cross_entropy(x, weight, targets, bias=bias, transposed=transposed)
    _core.linear_cross_entropy_backward(x, weight, targets, lse, losses, dweight, bias=bias, transposed=transposed)
    return memory("VmHWM") - before

run(300, True)
print(max(run(50_000, True), run(50_000, False)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(_core.show_config()["isa"] == "reference", reason="the twins do make the logits")
def test_the_logits_of_an_output_layer_are_never_there():
    """1,024 x 50,000 of them would take 195 MiB; a chunk takes 4."""
    n_threads = 2 if _core.show_config()["openmp"] else 1
    # What is freed goes back at once: it is not to count what malloc keeps for later.
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    assert int(in_a_process(OUTPUT_LAYER, n_threads, **freed).stdout) < 24 * MIB
