"""The other kernels, one a class: products with their epilogues, search, rows (softmax and norms), loss, positions, AdamW."""

import inspect
import itertools

import numpy as np

from . import machine
from .common import LIBRARIES, Side, _AgainstFaiss, _AgainstNumpy, _AgainstTorch, _Kernel, in_double, needs, normal, ratio, share

# Matrix products


class Gemm(_Kernel):
    """(m, k) times (k, n), into an array that is there; NumPy's is OpenBLAS."""

    params = (
        [
            *[(side, side, side) for side in (256, 512, 1024, 2048)],
            *[(128, 512, 512), (128, 512, 2048), (128, 2048, 512)],  # T5-small
            *[(1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384)],  # MiniLM
            *[(512, 768, 768), (512, 768, 3072), (512, 3072, 768)],  # BART-base
        ],
        ["mini_tfm", "numpy", "torch"],
    )

    def make(self, size):
        m, k, n = size
        return normal(m, k), normal(k, n, seed=1)

    def work(self, size):
        m, k, n = size
        return 2 * m * k * n

    def mini_tfm(self, kernels, a, b):
        out = np.zeros((len(a), b.shape[1]), a.dtype)
        return lambda: kernels.gemm(a, b, out=out)

    def numpy(self, numpy, a, b):
        out = np.zeros((len(a), b.shape[1]), a.dtype)
        return lambda: numpy.matmul(a, b, out=out)

    def torch(self, torch, a, b):
        out = torch.zeros(len(a), b.shape[1])
        return lambda: torch.matmul(a, b, out=out)

    def exact(self, a, b):
        return in_double(a) @ in_double(b)


class PackedLinear(_Kernel):
    """(rows, d_in, d_out, dtype of the weights, epilogue), the weights packed before. NumPy: OpenBLAS, then its own passes in place."""

    params = (
        [
            (128, 512, 512, "float32", "residual"),  # T5-small
            (128, 512, 2048, "float32", "relu"),
            (128, 2048, 512, "float32", "residual"),
            (1024, 384, 1536, "float32", "gelu"),  # MiniLM
            (1024, 1536, 384, "float32", "residual"),
            (512, 768, 3072, "float32", "gelu"),  # BART-base
            (512, 3072, 768, "float32", "residual"),
            (128, 512, 2048, "float32", "silu"),
        ],
        ["mini_tfm", "numpy", "torch"],
    )

    def make(self, size):
        rows, d_in, d_out, dtype, epilogue = size
        weight, bias = normal(d_in, d_out, seed=1) * np.float32(d_in**-0.5), normal(d_out, seed=2)
        return normal(rows, d_in), weight, bias, normal(rows, d_out, seed=3) if epilogue == "residual" else None, dtype, epilogue

    def work(self, size):
        return 2 * size[0] * size[1] * size[2]

    def mini_tfm(self, kernels, x, weight, bias, residual, dtype, epilogue):
        needs(kernels, "pack", "packed_linear")
        packed, activation = kernels.pack(weight, dtype=dtype), None if epilogue in ("none", "residual") else epilogue
        out = np.zeros((len(x), weight.shape[1]), x.dtype)
        return lambda: kernels.packed_linear(x, packed, bias, activation=activation, residual=residual, out=out)

    def numpy(self, numpy, x, weight, bias, residual, dtype, epilogue):
        from scipy.special import erf

        out, other = (numpy.zeros((len(x), weight.shape[1]), x.dtype) for _ in range(2))
        half, root = numpy.float32(0.5), numpy.float32(0.5**0.5)

        def relu():
            numpy.maximum(out, 0, out=out)

        def gelu():
            numpy.multiply(out, root, out=other)
            erf(other, out=other)
            other.__iadd__(1)
            out.__imul__(half)
            out.__imul__(other)

        def silu():
            numpy.negative(out, out=other)
            numpy.exp(other, out=other)
            other.__iadd__(1)
            numpy.divide(out, other, out=out)

        after = {"none": lambda: None, "residual": lambda: numpy.add(out, residual, out=out), "relu": relu, "gelu": gelu, "silu": silu}

        def call():
            numpy.matmul(x, weight, out=out)
            numpy.add(out, bias, out=out)
            after[epilogue]()
            return out

        return call

    def torch(self, torch, x, weight, bias, residual, dtype, epilogue):
        functional = torch.nn.functional
        weight = weight.T.contiguous()  # as torch keeps it
        out = torch.zeros(len(x), len(weight))
        fresh = {
            "none": lambda y: y,
            "residual": lambda y: y + residual,
            "relu": functional.relu,
            "gelu": functional.gelu,
            "silu": functional.silu,
        }[epilogue]
        in_place = {
            "none": lambda y: y,
            "residual": lambda y: y.add_(residual),
            "relu": functional.relu_,
            "gelu": torch.ops.aten.gelu_,
            "silu": lambda y: functional.silu(y, inplace=True),
        }[epilogue]
        return {
            "": lambda: fresh(functional.linear(x, weight, bias)),
            "in place": lambda: in_place(functional.linear(x, weight, bias)),
            "addmm, in place": lambda: in_place(torch.addmm(bias, x, weight.T, out=out)),
        }

    def exact(self, x, weight, bias, residual, dtype, epilogue):
        from scipy.special import erf

        y = in_double(x) @ in_double(weight) + in_double(bias)
        if epilogue == "residual":
            return y + in_double(residual)
        of = {
            "none": lambda y: y,
            "relu": lambda y: np.maximum(y, 0),
            "gelu": lambda y: y * 0.5 * (1 + erf(y * 0.5**0.5)),
            "silu": lambda y: y / (1 + np.exp(-y)),
        }
        return of[epilogue](y)


class Gemv(PackedLinear):
    """Decoding: few rows, so that reading the weights is the work. (rows, d_in, d_out, dtype of the weights, epilogue)."""

    params = (
        [
            (rows, 512, d_out, dtype, "none")
            for dtype in ("float32", "bfloat16", "int8")
            for d_out in (2048, 32128)
            for rows in (1, 2, 4, 8)
        ],
        ["mini_tfm", "numpy", "torch"],
    )
    unit = "B"
    tolerance = 0.05  # of int8, against the weights as they were

    def work(self, size):
        """Of the weights alone."""
        return size[1] * size[2] * {"float32": 4, "bfloat16": 2, "int8": 1}[size[3]]

    def note(self, size, seconds):
        """With more rows it is arithmetic that bounds, not memory."""
        return f"{2 * size[0] * size[1] * size[2] / seconds / 1e9:.0f} GFLOP/s"


class Int8(PackedLinear):
    """The same product by weights of eight bits."""

    params = (
        [(rows, d_in, d_out, "int8", "none") for rows in (32, 256) for d_in, d_out in ((512, 2048), (768, 3072), (1024, 4096))],
        ["mini_tfm"],
    )
    tolerance = 0.05


class Cold(_Kernel):
    """The same product by many weights in turn, so that each is in no cache, as a decoding step finds them: (rows, d_in, d_out, dtype,
    MB of weights). With other weights, those of a small model stay in a cache."""

    params = (
        [
            (rows, 512, 2048, dtype, mb)
            for dtype, mb in (("float32", 160), ("bfloat16", 160), ("int8", 160), ("int8", 40))
            for rows in (1, 4, 32)
        ],
        ["mini_tfm"],
    )
    unit = "B"
    tolerance = 0.05

    def make(self, size):
        rows, d_in, d_out, dtype, _ = size
        return normal(rows, d_in), normal(d_in, d_out, seed=1) * np.float32(d_in**-0.5), dtype, self.count(size)

    def count(self, size):
        return max(1, round(size[4] * 1e6 / Gemv().work(size)))

    def work(self, size):
        return self.count(size) * Gemv().work(size)

    def note(self, size, seconds):
        return Gemv().note(size, seconds / self.count(size))

    def mini_tfm(self, kernels, x, weight, dtype, count):
        needs(kernels, "pack", "packed_linear")
        packed, out = [kernels.pack(weight, dtype=dtype) for _ in range(count)], np.empty((len(x), weight.shape[1]), np.float32)

        def call():
            for each in packed:
                kernels.packed_linear(x, each, out=out)
            return out

        return call

    def exact(self, x, weight, dtype, count):
        return in_double(x) @ in_double(weight)


class LinearTopK(_Kernel):
    """The best k of x times the output layer, (rows, d_in, d_out, dtype, k): logits that need never be written."""

    params = ([(rows, 512, 32128, dtype, 4) for dtype in ("float32", "int8") for rows in (1, 8)], ["mini_tfm", "numpy", "torch"])
    unit = "B"
    tolerance = 0.05

    def make(self, size):
        rows, d_in, d_out, dtype, k = size
        return normal(rows, d_in), normal(d_in, d_out, seed=1) * np.float32(d_in**-0.5), dtype, k

    def work(self, size):
        return Gemv().work(size)

    def note(self, size, seconds):
        return Gemv().note(size, seconds)

    def mini_tfm(self, kernels, x, weight, dtype, k):
        needs(kernels, "pack", "linear_top_k")
        packed = kernels.pack(weight, dtype=dtype)
        return lambda: kernels.linear_top_k(x, packed, k)

    def numpy(self, numpy, x, weight, dtype, k):
        out = numpy.zeros((len(x), weight.shape[1]), x.dtype)

        def call():
            numpy.matmul(x, weight, out=out)
            best = numpy.argpartition(out, -k, axis=1)[:, -k:]
            values = numpy.take_along_axis(out, best, 1)
            order = numpy.argsort(-values, axis=1)
            return numpy.take_along_axis(values, order, 1), numpy.take_along_axis(best, order, 1)

        return call

    def torch(self, torch, x, weight, dtype, k):
        weight = weight.T.contiguous()
        return lambda: torch.topk(torch.nn.functional.linear(x, weight), k)

    def exact(self, x, weight, dtype, k):
        return np.sort(in_double(x) @ in_double(weight), axis=1)[:, : -k - 1 : -1]

    def value(self, result):
        return result[0]


# Search


class Search(_Kernel):
    """The best 32 rows by inner product: (queries, rows, d, dtype of the bank). NumPy: a product, then argpartition.

    "float32 and codes": ours has codes of the rows, made before, which peers have no use for.
    """

    params = (
        [
            (queries, 200_000, 512, dtype)
            for dtype in ("float32", "float16", "int8", "float32 and codes", "float16 and codes")
            for queries in ((1,) if "codes" in dtype else (1, 64))
        ],
        ["mini_tfm", "numpy", "faiss", "torch"],
    )
    unit = "B"
    k = 32
    tolerance = 0.02  # of faiss's own int8

    def make(self, size):
        queries, rows, d, dtype = size
        bank, scales = normal(rows, d, seed=1), None
        if dtype.startswith("float16"):
            bank = bank.astype(np.float16)
        elif dtype == "int8":
            scales = np.max(np.abs(bank), axis=1) / np.float32(127)
            bank = np.rint(bank / scales[:, None]).astype(np.int8)
        return normal(queries, d), bank, scales, "codes" in dtype

    def work(self, size):
        """Of the bank, read once."""
        return size[1] * size[2] * {"float32": 4, "float16": 2, "int8": 1}[size[3].split()[0]]

    @staticmethod
    def values(bank, scales, dtype=np.float32):
        return bank.astype(dtype) if scales is None else bank.astype(dtype) * scales.astype(dtype)[:, None]

    def mini_tfm(self, kernels, queries, bank, scales, coded):
        if bank.dtype != np.float32 and "scales" not in inspect.signature(kernels.search).parameters:
            raise NotImplementedError("search has no banks of less than 32 bits")  # in commits before it had, which asv measures too
        options = {} if scales is None else {"scales": scales[None]}
        if coded:
            needs(kernels, "encode_rows")
            options["codes"] = kernels.encode_rows(bank[None])
        queries, bank = queries[None], bank[None]
        return lambda: kernels.search(queries, bank, self.k, **options)

    def numpy(self, numpy, queries, bank, scales, coded):
        k, bank_t = self.k, self.values(bank, scales).T

        def call():
            scores = queries @ bank_t
            best = numpy.argpartition(scores, -k, axis=1)[:, -k:]
            values = numpy.take_along_axis(scores, best, 1)
            order = numpy.argsort(-values, axis=1)
            return numpy.take_along_axis(values, order, 1), numpy.take_along_axis(best, order, 1)

        return call

    def faiss(self, faiss, queries, bank, scales, coded):
        """Flat, or its scalar quantizer of as many bits."""
        if bank.dtype == np.float32:
            index = faiss.IndexFlatIP(bank.shape[1])
        else:
            of = faiss.ScalarQuantizer.QT_fp16 if bank.dtype == np.float16 else faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexScalarQuantizer(bank.shape[1], of, faiss.METRIC_INNER_PRODUCT)
        values = self.values(bank, scales)
        index.train(values)
        index.add(values)
        return lambda: index.search(queries, self.k)

    def torch(self, torch, queries, bank, scales, coded):
        bank = bank.float() if scales is None else bank.float() * scales[:, None]
        return lambda: torch.topk(queries @ bank.T, self.k)

    def exact(self, queries, bank, scales, coded):
        queries = in_double(queries)
        scores = np.concatenate([queries @ self.values(*part, np.float64).T for part in self._parts(bank, scales)], axis=1)
        return np.sort(scores, axis=1)[:, : -self.k - 1 : -1]

    @staticmethod
    def _parts(bank, scales, rows=20_000):
        return [(bank[i : i + rows], None if scales is None else scales[i : i + rows]) for i in range(0, len(bank), rows)]

    def value(self, result):
        return result[0].reshape(-1, self.k)


# Rows


class _Rows(_Kernel):
    """(rows, width): within a core's second cache, within the third. Bytes: read once, written once.

    (rows, width, n): n inputs in turn, of the same values, so that none is in a cache when its turn comes, and one array for the
    results: with fresh pages for each it is mostly their clearing by the operating system that is timed.
    """

    params = ([(64, 512), (256, 384), (1024, 512), (8000, 1024, 6)], LIBRARIES)
    unit = "B"

    def work(self, size):
        return 2 * 4 * size[0] * size[1]

    def make(self, size):
        rows, width, n = (*size, 1)[:3]
        return np.stack([normal(rows, width)] * n), *(normal(width, seed=seed) for seed in range(1, 1 + self.vectors))

    def mini_tfm(self, kernels, x, *vectors):
        inputs, call = itertools.cycle(x), self.ours(kernels, *vectors)
        if len(x) > 1 and "out" in inspect.signature(kernels.softmax).parameters:
            out = np.zeros_like(x[0])
            return lambda: call(next(inputs), out=out)
        return lambda: call(next(inputs))

    def torch(self, torch, x, *vectors):
        inputs, call = itertools.cycle(x.unbind()), self.theirs(torch, *vectors)
        return lambda: call(next(inputs))

    def exact(self, x, *vectors):
        return self.value(super().exact(x[:1], *vectors))


class Softmax(_Rows):
    vectors = 0

    def ours(self, kernels):
        return kernels.softmax

    def theirs(self, torch):
        return lambda x: torch.softmax(x, -1)


class LayerNorm(_Rows):
    vectors = 2

    def ours(self, kernels, weight, bias):
        return lambda x, **into: kernels.layer_norm(x, weight, bias, 1e-5, **into)

    def theirs(self, torch, weight, bias):
        return lambda x: torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def value(self, result):
        return result[0] if isinstance(result, tuple) else result


class RmsNorm(LayerNorm):
    vectors = 1

    def ours(self, kernels, weight):
        return lambda x, **into: kernels.rms_norm(x, weight, 1e-5, **into)

    def theirs(self, torch, weight):
        return lambda x: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)


class LayerNormForwardAndBackward(_Kernel):
    params = ([(64, 512), (4096, 512)], LIBRARIES)
    unit = "B"
    gradient = True

    def make(self, size):
        return normal(*size), normal(size[1], seed=1), normal(size[1], seed=2)

    def work(self, size):
        """Read x, written y; read x and dy, written dx."""
        return 5 * 4 * size[0] * size[1]

    def mini_tfm(self, kernels, x, weight, bias):
        def call():
            y, mean, rstd = kernels.layer_norm(x, weight, bias, 1e-5)
            return kernels.layer_norm_backward(y, x, weight, mean, rstd)

        return call

    def torch(self, torch, x, weight, bias):
        leaves = [each.requires_grad_() for each in (x, weight, bias)]

        def call():
            y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)
            return torch.autograd.grad(y, leaves, y.detach())

        return call


# Loss, positions, optimizer


class CrossEntropy(_Kernel):
    """(rows, vocabulary), with its gradient. Bytes: logits read twice, gradients written."""

    params = ([(64, 1000), (512, 8000)], LIBRARIES)
    unit = "B"
    gradient = True

    def make(self, size):
        return normal(*size), np.random.default_rng(0).integers(0, size[1], size[0])

    def work(self, size):
        return 3 * 4 * size[0] * size[1]

    def mini_tfm(self, kernels, logits, targets):
        def call():
            losses, lse = kernels.cross_entropy(logits, targets)
            share = np.full(len(logits), 1 / len(logits), logits.dtype)
            return losses.mean(), kernels.cross_entropy_backward(logits, targets, lse, share)

        return call

    def torch(self, torch, logits, targets):
        leaf = logits.requires_grad_()

        def call():
            loss = torch.nn.functional.cross_entropy(leaf, targets)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return call


class SinusoidalPositions(_Kernel):
    params = ([(128, 128), (4096, 512)], ["mini_tfm"])

    def make(self, size):
        return size

    def mini_tfm(self, kernels, n, d_model):
        return lambda: kernels.sinusoidal_positions(n, d_model)

    def error(self, result, inputs):
        """In units of the last place of 1: both sides of the usual error would be rounded to float32 alike."""
        from mini_tfm import reference

        return float(np.max(np.abs(result - reference.sinusoidal_positions(*inputs, dtype=np.float64))))


class AdamW(_Kernel):
    """A step on so many weights, in place. Bytes: four arrays read, three written."""

    params = ([10_000, 5_000_000], LIBRARIES)
    unit = "B"
    in_place = True

    def make(self, size):
        return normal(size), normal(size, seed=1), normal(size, seed=2) * 0.1, normal(size, seed=3) ** 2

    def work(self, size):
        return 7 * 4 * size

    def mini_tfm(self, kernels, param, grad, m, v):
        def call():
            kernels.adamw(param, grad, m, v, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.01, step=10)
            return param, m, v

        return call

    def torch(self, torch, param, grad, m, v):
        step = torch.tensor(9.0)  # it counts before it steps
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}

        def call():
            torch._fused_adamw_([param], [grad], [m], [v], [], [step + 1], **options)
            return param, m, v

        return call


# Against others, and against the machine


class GemmAgainstTorch(_AgainstTorch):
    kernel = Gemm


class GemmAgainstNumpy(_AgainstNumpy):
    kernel = Gemm


class PackedLinearAgainstTorch(_AgainstTorch):
    kernel = PackedLinear


class PackedLinearAgainstNumpy(_AgainstNumpy):
    kernel = PackedLinear


class GemvAgainstTorch(_AgainstTorch):
    kernel = Gemv


class LinearTopKAgainstTorch(_AgainstTorch):
    kernel = LinearTopK


class SearchAgainstTorch(_AgainstTorch):
    kernel = Search


class SearchAgainstNumpy(_AgainstNumpy):
    kernel = Search


class SearchAgainstFaiss(_AgainstFaiss):
    kernel = Search


class SoftmaxAgainstTorch(_AgainstTorch):
    kernel = Softmax


class LayerNormAgainstTorch(_AgainstTorch):
    kernel = LayerNorm


class RmsNormAgainstTorch(_AgainstTorch):
    kernel = RmsNorm


class LayerNormForwardAndBackwardAgainstTorch(_AgainstTorch):
    kernel = LayerNormForwardAndBackward


class CrossEntropyAgainstTorch(_AgainstTorch):
    kernel = CrossEntropy


class AdamWAgainstTorch(_AgainstTorch):
    kernel = AdamW


class Int8AgainstFloat32:
    """Ours against ours."""

    params = [Int8.params[0]]
    param_names = ["size"]

    def track_ratio_float32(self, size):
        return ratio(Side(Int8, size, "mini_tfm"), Side(Int8, (*size[:3], "float32", size[4]), "mini_tfm"))

    track_ratio_float32.unit = "times as fast as our float32"


class GemvShare:
    params = [Gemv.params[0]]
    param_names = ["size"]

    def track_share_of_reading(self, size):
        """As many bytes as the weights have."""
        return share(Side(Gemv, size, "mini_tfm"), Side(machine.Reading, Gemv().work(size), "numpy"))

    track_share_of_reading.unit = "% of the read bandwidth"


class GemmShare:
    params = [Gemm.params[0][:4]]
    param_names = ["size"]

    def track_share_of_sgemm(self, size):
        return share(Side(Gemm, size, "mini_tfm"), Side(machine.Sgemm, machine.PEAK, "numpy"))

    track_share_of_sgemm.unit = "% of the sgemm peak"


class StreamShare:
    """What reads and writes each number once, or nearly, beyond the caches."""

    of = {kernel.__name__: kernel for kernel in (Softmax, LayerNorm, RmsNorm, AdamW)}
    params = [list(of)]
    param_names = ["kernel"]

    def track_share_of_copying(self, name):
        kernel, size = self.of[name], self.of[name].params[0][-1]
        return share(Side(kernel, size, "mini_tfm"), Side(machine.Copying, machine.BEYOND, "numpy"))

    track_share_of_copying.unit = "% of the bandwidth of a copy"
