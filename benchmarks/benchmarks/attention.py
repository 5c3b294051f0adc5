"""Attention, forward and backward: speed, error, the share of the sgemm peak, and peak memory."""

import contextlib
import ctypes
import inspect
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from . import machine
from .common import Side, Workers, _AgainstTorch, _Kernel, in_double, library, needs, normal, share, thread_count

MIB = 2**20


class Problem(NamedTuple):
    """B x H x T x S x D and what is said besides, as in "4 x 8 x 128 x 512 x 64, causal, bias"."""

    b: int
    h: int
    t: int
    s: int
    d: int
    options: frozenset = frozenset()

    @classmethod
    def of(cls, text):
        shape, *options = text.split(", ")
        return cls(*map(int, re.findall(r"\d+", shape)), frozenset(options))

    @property
    def causal(self):
        return "causal" in self.options

    def arrays(self):
        """q, k, v."""
        return (
            normal(self.b, self.h, self.t, self.d),
            normal(self.b, self.h, self.s, self.d, seed=1),
            normal(self.b, self.h, self.s, self.d, seed=2),
        )

    def lengths(self):
        """Between half of the keys and all, the same for every library; None where all rows are full."""
        if "lengths" not in self.options:
            return None
        return np.random.default_rng(3).integers((self.s + 1) // 2, self.s + 1, self.b)

    def scores(self):
        """How many there are to compute: those that are neither in the future nor beyond a row's length."""
        queries, offset = np.arange(self.t), self.s - self.t
        seen = np.clip(queries + 1 + offset, 0, self.s) if self.causal else np.full(self.t, self.s)
        lengths = self.lengths()
        rows = np.full(self.b, self.s) if lengths is None else lengths
        return self.h * int(sum(np.minimum(seen, row).sum() for row in rows))


FORWARD = [
    "1 x 4 x 1 x 1 x 32",
    "1 x 8 x 16 x 16 x 64",
    "1 x 8 x 64 x 64 x 64",
    "1 x 8 x 128 x 128 x 64",
    "1 x 8 x 512 x 512 x 64",
    "1 x 8 x 512 x 512 x 128",
    "1 x 16 x 1024 x 1024 x 64",
    "1 x 8 x 2048 x 2048 x 64",
    "1 x 4 x 4096 x 4096 x 32",
    "4 x 6 x 256 x 256 x 32",
    "8 x 8 x 128 x 128 x 64",
    "32 x 12 x 64 x 64 x 32",
    # causal
    "1 x 8 x 16 x 16 x 64, causal",
    "4 x 8 x 128 x 128 x 64, causal",
    "1 x 8 x 512 x 512 x 128, causal",
    "1 x 8 x 2048 x 2048 x 64, causal",
    "1 x 4 x 8192 x 8192 x 32, causal",
    # rows of different lengths
    "32 x 12 x 64 x 64 x 32, lengths",
    "16 x 4 x 32 x 32 x 128, lengths",
    "8 x 8 x 128 x 128 x 64, lengths",
    "4 x 8 x 512 x 512 x 64, lengths",
    "8 x 8 x 256 x 256 x 64, causal, lengths",
    # an additive bias
    "1 x 8 x 128 x 128 x 64, bias",
    "4 x 6 x 256 x 256 x 32, bias",
    "1 x 8 x 1024 x 1024 x 64, bias",
    "8 x 12 x 128 x 128 x 64, bias, lengths",
    # other keys than queries
    "2 x 4 x 7 x 33 x 64",
    "2 x 16 x 100 x 77 x 128",
    "4 x 8 x 16 x 512 x 64",
    "8 x 8 x 32 x 128 x 64, lengths",
    "1 x 8 x 8 x 4096 x 64",
    "4 x 8 x 128 x 512 x 64, causal",
    "1 x 8 x 64 x 1024 x 64, causal",
    # one query
    "32 x 8 x 1 x 64 x 64",
    "8 x 8 x 1 x 512 x 64, lengths",
    "1 x 16 x 1 x 1024 x 128",
]
KEPT = ["1 x 9 x 1 x 1024 x 64", "1 x 9 x 1 x 8192 x 64"]  # heads as SmolLM2-135M has them, of which three share keys
FROM_MEMORY = 2**28  # bytes of keys and values that calls go through in turn: more than any cache of the processor holds
ONE_QUERY = [f"{b} x 8 x 1 x {s} x 64" for b in (1, 8) for s in (512, 1024, 2048, 4096, 8192)]
RELATIVE = ["1 x 8 x 128 x 128 x 64", "4 x 8 x 512 x 512 x 64", "1 x 8 x 512 x 512 x 64, causal", "1 x 8 x 2048 x 2048 x 64"]
BACKWARD = [
    "2 x 4 x 7 x 33 x 64",
    "1 x 8 x 128 x 128 x 64",
    "16 x 4 x 128 x 128 x 32, causal",
    "8 x 8 x 128 x 128 x 64, causal",
    "4 x 6 x 256 x 256 x 32, lengths",
    "1 x 8 x 512 x 512 x 128",
    "4 x 8 x 512 x 512 x 64, causal",
    "4 x 8 x 128 x 512 x 64",
    "1 x 8 x 1024 x 1024 x 64",
    "1 x 8 x 2048 x 2048 x 64, causal",
]
TRAINED_BIAS = ["4 x 8 x 128 x 128 x 64", "4 x 8 x 256 x 256 x 64, causal", "1 x 8 x 1024 x 1024 x 64"]
DROPOUT = ["16 x 4 x 128 x 128 x 32", "4 x 8 x 256 x 256 x 64, causal", "1 x 8 x 1024 x 1024 x 64"]
P, SEED = 0.1, 12345
SQUARE = ["1 x 8 x 2048 x 2048 x 64", "1 x 8 x 2048 x 2048 x 64, causal"]


def torch_masks(torch, problem, bias):
    """What torch's user would hand to scaled_dot_product_attention, made once: {how: arguments}.

    A mask of booleans and one of numbers where either does; is_causal where it means what we mean, which is as many keys
    as queries.
    """
    lengths = problem.lengths()
    if lengths is None and bias is None and (not problem.causal or problem.t == problem.s):
        return {"": {"is_causal": problem.causal}}
    seen = torch.ones(1, 1, 1, problem.s, dtype=torch.bool)
    if lengths is not None:
        seen = (torch.arange(problem.s) < torch.from_numpy(lengths)[:, None])[:, None, None]
    if problem.causal:
        seen = seen & torch.ones(problem.t, problem.s, dtype=torch.bool).tril(problem.s - problem.t)
    if bias is not None and bool(seen.all()):
        return {"bias": {"attn_mask": bias}}
    numbers = torch.zeros(()) if bias is None else bias
    ways = {"float mask": {"attn_mask": numbers.masked_fill(~seen, -math.inf)}}
    if bias is None:
        ways["bool mask"] = {"attn_mask": seen.expand(problem.b, 1, problem.t, problem.s)}
    return ways


def in_float64(q, k, v, bias, causal, lengths, heads, queries):
    """The formula, for some heads and queries of the first and the last batch row: what `picked` takes out of a result."""
    q, k, v = (in_double(x[[0, -1]][:, heads]) for x in (q, k, v))
    n_queries, n_keys = q.shape[2], k.shape[2]
    scores = q[:, :, queries] @ np.swapaxes(k, 2, 3) / math.sqrt(q.shape[3])
    if bias is not None:
        scores += np.broadcast_to(bias, (len(bias), bias.shape[1], n_queries, n_keys))[[0, -1]][:, heads][:, :, queries]
    if causal:
        scores[:, :, np.arange(n_keys) > np.arange(n_queries)[queries, None] + n_keys - n_queries] = -np.inf
    if lengths is not None:
        scores = np.where(np.arange(n_keys) < lengths[[0, -1], None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ v / weights.sum(axis=-1, keepdims=True)


class Forward(_Kernel):
    """By the public function of each library."""

    params = (FORWARD, ["mini_tfm", "torch"])
    heads, queries = [0, -1], slice(-128, None)  # of which the error is measured

    def make(self, size):
        problem = Problem.of(size)
        bias = normal(1, problem.h, problem.t, problem.s, seed=3) if "bias" in problem.options else None
        return (*problem.arrays(), bias, problem)

    def work(self, size):
        return 4 * Problem.of(size).scores() * Problem.of(size).d

    def mini_tfm(self, kernels, q, k, v, bias, problem):
        from mini_tfm import attention

        causal, lengths = problem.causal, problem.lengths()
        return lambda: attention(q, k, v, bias=bias, causal=causal, lengths=lengths)

    def torch(self, torch, q, k, v, bias, problem):
        attention = torch.nn.functional.scaled_dot_product_attention
        return {how: lambda mask=mask: attention(q, k, v, **mask) for how, mask in torch_masks(torch, problem, bias).items()}

    def exact(self, q, k, v, bias, problem):
        return in_float64(q, k, v, bias, problem.causal, problem.lengths(), self.heads, self.queries)

    def sample(self, out):
        return out[[0, -1]][:, self.heads][:, :, self.queries]


class OneQuery(Forward):
    """Decoding: one query over many keys. Bytes, as it is the keys and values that have to be read."""

    params = (ONE_QUERY, Forward.params[1])
    unit = "B"

    def work(self, size):
        problem = Problem.of(size)
        return 4 * 2 * problem.b * problem.h * problem.s * problem.d


class KeptKeys(_Kernel):
    """A token of decoding over keys and values as a cache keeps them. The error is that of rounding them, too."""

    params = (KEPT, ["float32", "bfloat16", "int8"])
    param_names = ["size", "dtype"]
    unit = "B"
    tolerance = 0.05

    def make(self, size):
        problem = Problem.of(size)
        return problem.arrays()[0], *(normal(problem.b, problem.h // 3, problem.s, problem.d, seed=seed) for seed in (1, 2)), problem

    def work(self, size):
        """As if they were float32, so that what is narrower seems faster than memory."""
        problem = Problem.of(size)
        return 4 * 2 * problem.b * problem.h // 3 * problem.s * problem.d

    def ways(self, size, dtype):
        kernels, (q, k, v, problem) = library("mini_tfm"), self.make(size)
        needs(kernels, "keep_rows")
        kept = []
        for x in (k, v):
            as_kept = {"float32": (x.shape, np.float32), "bfloat16": (x.shape, np.uint16), "int8": ((*x.shape[:3], problem.d + 4), np.int8)}
            store = np.empty(*as_kept[dtype])
            try:
                kernels.keep_rows(store, 0, x)
            except (ValueError, TypeError) as error:
                raise NotImplementedError(f"{dtype}: {error}") from None
            kept.append(store)
        n = min(1000, -(-FROM_MEMORY // (2 * kept[0].nbytes)))
        blocks = itertools.cycle([kernels.Block(*(x.copy() for x in kept)) for _ in range(n)])
        return {"": lambda: kernels.attention(q, [next(blocks)], problem.d**-0.5)[0]}

    def exact(self, q, k, v, problem):
        k, v = (np.repeat(x, 3, axis=1) for x in (k, v))
        return in_float64(q, k, v, None, False, None, slice(None), slice(None))

    def sample(self, out):
        return out[[0, -1]]


class RelativeBias(Forward):
    """A bias that depends on the distance alone: a table read through strides; torch is given the dense one."""

    params = (RELATIVE, Forward.params[1])

    def make(self, size):
        problem = Problem.of(size)
        return (*problem.arrays(), normal(problem.h, problem.t + problem.s - 1, seed=3), problem)

    def _strided(self, table, problem):
        from mini_tfm.ops import DistanceBias

        return DistanceBias(table, problem.t, problem.s).strided(table)

    def mini_tfm(self, kernels, q, k, v, table, problem):
        return super().mini_tfm(kernels, q, k, v, self._strided(table, problem), problem)

    def torch(self, torch, q, k, v, table, problem):
        distance = torch.arange(problem.s) - torch.arange(problem.t)[:, None] + problem.t - 1
        return super().torch(torch, q, k, v, table[:, distance][None].contiguous(), problem)

    def exact(self, q, k, v, table, problem):
        return super().exact(q, k, v, self._strided(table, problem), problem)


class ForwardAndBackward(_Kernel):
    """Both: torch's backward cannot be had without what its forward keeps. dq, dk, dv."""

    params = (BACKWARD, ["mini_tfm", "torch"])
    gradient = True
    options: dict = {}
    torch_options: dict = {}

    def make(self, size):
        problem = Problem.of(size)
        return (*problem.arrays(), None, normal(problem.b, problem.h, problem.t, problem.d, seed=4), problem)

    def work(self, size):
        """Of the two products forward and five backward, 2 D for each score."""
        return 14 * Problem.of(size).scores() * Problem.of(size).d

    def _block(self, kernels, k, v, bias, problem):
        return kernels.Block(k, v, bias=bias, causal=problem.causal, lengths=problem.lengths())

    def mini_tfm(self, kernels, q, k, v, bias, dout, problem):
        block, scale = self._block(kernels, k, v, bias, problem), problem.d**-0.5

        def call():
            out, lse = kernels.attention(q, [block], scale, **self.options)
            dq, (grads,) = kernels.attention_backward(dout, out, lse, q, [block], scale, **self.options)
            return (dq, grads.dk, grads.dv) if grads.dbias is None else (dq, grads.dk, grads.dv, grads.dbias)

        return call

    def torch(self, torch, q, k, v, bias, dout, problem):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        ways = {}
        for how, mask in torch_masks(torch, problem, bias).items():

            def call(mask=mask):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **mask, **self.torch_options)
                return torch.autograd.grad(out, leaves, dout)

            ways[how] = call
        return ways

    def exact(self, q, k, v, bias, dout, problem):
        """One head, as it does not depend on the others, and of all batch rows, whose bias is the same."""
        from mini_tfm import reference

        q, k, v, dout = (x[:, :1].copy() for x in (q, k, v, dout))
        bias = None if bias is None else bias[:, :1].copy()
        return ForwardAndBackward.mini_tfm(self, reference, *map(in_double, (q, k, v, bias, dout)), problem)()

    def sample(self, gradients):
        return tuple(x[:, :1] for x in gradients)


class ForwardAndBackwardTrainedBias(ForwardAndBackward):
    """The bias (1, H, T, S) has a gradient, too, with which torch leaves its fused kernel."""

    params = (TRAINED_BIAS, ForwardAndBackward.params[1])

    def make(self, size):
        problem = Problem.of(size)
        q, k, v, _, dout, problem = super().make(size)
        return q, k, v, normal(1, problem.h, problem.t, problem.s, seed=3), dout, problem

    def _block(self, kernels, k, v, bias, problem):
        block = super()._block(kernels, k, v, bias, problem)
        block.needs_dbias = True
        return block

    def torch(self, torch, q, k, v, bias, dout, problem):
        """torch takes either is_causal or a mask: what is hidden has to be added to the bias in each step."""
        leaves = [x.requires_grad_() for x in (q, k, v, bias)]
        hidden = torch.full((problem.t, problem.s), -math.inf).triu(problem.s - problem.t + 1) if problem.causal else None

        def call():
            mask = bias if hidden is None else bias + hidden
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return torch.autograd.grad(out, leaves, dout)

        return call


class ForwardAndBackwardDropout(ForwardAndBackward):
    """Of attention weights, which takes torch off its fused kernel. It draws other numbers, so that only ours is checked here."""

    params = (DROPOUT, ["mini_tfm"])
    options = {"dropout": P, "seed": SEED}
    torch_options = {"dropout_p": P}

    def mini_tfm(self, kernels, *inputs):
        if "dropout" not in inspect.signature(kernels.attention).parameters:
            raise NotImplementedError("attention has no dropout")  # in commits before it had, which asv measures too
        return super().mini_tfm(kernels, *inputs)

    def exact(self, q, k, v, bias, dout, problem):
        """All of it: what is dropped depends on where a score is."""
        from mini_tfm import reference

        return self.mini_tfm(reference, *map(in_double, (q, k, v, bias, dout)), problem)()

    def sample(self, gradients):
        return gradients


class ForwardAgainstTorch(_AgainstTorch):
    kernel = Forward


class OneQueryAgainstTorch(_AgainstTorch):
    kernel = OneQuery


class RelativeBiasAgainstTorch(_AgainstTorch):
    kernel = RelativeBias


class ForwardAndBackwardAgainstTorch(_AgainstTorch):
    kernel = ForwardAndBackward


class ForwardAndBackwardTrainedBiasAgainstTorch(_AgainstTorch):
    kernel = ForwardAndBackwardTrainedBias


class ForwardAndBackwardDropoutAgainstTorch(_AgainstTorch):
    kernel = ForwardAndBackwardDropout


class ForwardShare:
    params = [SQUARE]
    param_names = ["size"]

    def track_share_of_sgemm(self, size):
        return share(Side(Forward, size, "mini_tfm"), Side(machine.Sgemm, machine.PEAK, "numpy"))

    track_share_of_sgemm.unit = "% of the sgemm peak"


def status(field):
    """Bytes of a line of /proc/self/status."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except OSError:
        raise NotImplementedError("there is no /proc/self/status") from None


def grown_by(call):
    """Bytes by which the process grew at its largest, beyond what it held before and the arrays that come out."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)  # what malloc still holds of freed memory would be used again, unseen
    before = status("VmRSS")
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as resets:
        resets.write("5")  # the peak so far is forgotten
    out = call()
    return status("VmHWM") - before - sum(x.nbytes for x in out), out


def peak_beyond(tokens, heads=1, d=64):
    """Bytes a thread that attention on so many tokens needs besides inputs and outputs: (forward, backward)."""
    kernels = library("mini_tfm")

    def problem(tokens):
        q, k, v, dout = (normal(1, heads, tokens, d, seed=seed) for seed in range(4))
        return q, [kernels.Block(k, v)], dout

    def run(q, blocks, dout):
        forward, (out, lse) = grown_by(lambda: kernels.attention(q, blocks, d**-0.5))

        def call():
            dq, (grads,) = kernels.attention_backward(dout, out, lse, q, blocks, d**-0.5)
            return dq, grads.dk, grads.dv

        return forward / kernels.get_num_threads(), grown_by(call)[0] / kernels.get_num_threads()

    run(*problem(300))  # the threads and what libraries hold are there before anything is measured
    return run(*problem(tokens))


def peak_in_a_process(tokens, n_threads):
    worker = Workers.start(n_threads)
    try:
        return worker.ask("run", peak_beyond, tokens)
    finally:
        worker.close()


class Long:
    """Peak RAM with q, k, v of so many tokens (4 MiB each at 16,384): the (T, S) matrix would be 1 GiB there."""

    params = [[1024, 16384]]
    param_names = ["tokens"]

    def setup(self, tokens):
        kernels = library("mini_tfm")
        self.q, k, v = (normal(1, 1, tokens, 64, seed=seed) for seed in range(3))
        self.blocks = [kernels.Block(k, v)]
        self.kernels = kernels

    def peakmem_forward(self, tokens):
        self.kernels.attention(self.q, self.blocks, 0.125)

    def peakmem_forward_and_backward(self, tokens):
        out, lse = self.kernels.attention(self.q, self.blocks, 0.125)
        self.kernels.attention_backward(out, out, lse, self.q, self.blocks, 0.125)

    def track_beyond_arrays_forward(self, tokens):
        return peak_in_a_process(tokens, thread_count())[0]

    def track_beyond_arrays_backward(self, tokens):
        return peak_in_a_process(tokens, thread_count())[1]

    track_beyond_arrays_forward.unit = track_beyond_arrays_backward.unit = "bytes a thread"
