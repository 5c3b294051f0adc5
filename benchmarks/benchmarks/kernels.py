"""The other kernels, one a class."""

import numpy as np

from .common import LIBRARIES, _AgainstTorch, _Kernel, normal, share_of_reading, share_of_sgemm


class Softmax(_Kernel):
    params = ([(64, 1000), (4096, 512)], LIBRARIES)

    def make(self, size):
        return (normal(*size),)

    def ours(self, kernels, x):
        return kernels.softmax(x)

    def theirs(self, torch, x):
        return torch.softmax(x, -1)


class LayerNorm(_Kernel):
    params = ([(64, 512), (4096, 512)], LIBRARIES)

    def make(self, size):
        return normal(*size), normal(size[1], seed=1), normal(size[1], seed=2)

    def ours(self, kernels, x, weight, bias):
        return kernels.layer_norm(x, weight, bias, 1e-5)[0]

    def theirs(self, torch, x, weight, bias):
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)


class LayerNormForwardAndBackward(LayerNorm):
    def ours(self, kernels, x, weight, bias):
        y, mean, rstd = kernels.layer_norm(x, weight, bias, 1e-5)
        return kernels.layer_norm_backward(y, x, weight, mean, rstd)

    def theirs(self, torch, x, weight, bias):
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        y = super().theirs(torch, *leaves)
        return torch.autograd.grad(y, leaves, y.detach())


class RmsNorm(_Kernel):
    params = ([(64, 512), (4096, 512)], LIBRARIES)

    def make(self, size):
        return normal(*size), normal(size[1], seed=1)

    def ours(self, kernels, x, weight):
        return kernels.rms_norm(x, weight, 1e-5)[0]

    def theirs(self, torch, x, weight):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)


class Gemm(_Kernel):
    """(m, k) times (k, n)."""

    params = ([(1, 512, 2048), (64, 512, 2048), (1024, 1024, 1024)], LIBRARIES)

    def make(self, size):
        m, k, n = size
        return normal(m, k), normal(k, n, seed=1)

    def ours(self, kernels, a, b):
        return kernels.gemm(a, b)

    def theirs(self, torch, a, b):
        return a @ b


class CrossEntropy(_Kernel):
    """(rows, vocabulary), with its gradient."""

    params = ([(64, 1000), (512, 8000)], LIBRARIES)

    def make(self, size):
        return normal(*size), np.random.default_rng(0).integers(0, size[1], size[0])

    def ours(self, kernels, logits, targets):
        losses, lse = kernels.cross_entropy(logits, targets)
        share = np.full(len(logits), 1 / len(logits), logits.dtype)
        return losses.mean(), kernels.cross_entropy_backward(logits, targets, lse, share)

    def theirs(self, torch, logits, targets):
        leaf = logits.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, targets)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class SinusoidalPositions(_Kernel):
    params = ([(128, 128), (4096, 512)], ["mini_tfm"])

    def make(self, size):
        return size

    def ours(self, kernels, n, d_model):
        return kernels.sinusoidal_positions(n, d_model)

    def track_error_kernel(self, size, library):
        """In units of the last place of 1: both sides of the usual error would be rounded to float32 alike."""
        from mini_tfm import reference

        return float(np.max(np.abs(self.call() - reference.sinusoidal_positions(*size, dtype=np.float64))))

    track_error_kernel.unit = "max |error|"


class Search(_Kernel):
    """The best 32 of (rows, d) for so many queries: (queries, rows, d)."""

    params = ([(1, 20_000, 256), (64, 20_000, 256)], LIBRARIES)

    def make(self, size):
        queries, rows, d = size
        return normal(1, queries, d), normal(1, rows, d, seed=1)

    def ours(self, kernels, queries, bank):
        return kernels.search(queries, bank, 32)[0]

    def theirs(self, torch, queries, bank):
        return torch.topk(queries @ bank.mT, 32, dim=-1)[0]


class AdamW(_Kernel):
    """A step on so many weights, in place."""

    params = ([10_000, 5_000_000], LIBRARIES)

    def make(self, size):
        return normal(size), normal(size, seed=1), normal(size, seed=2) * 0.1, normal(size, seed=3) ** 2

    def ours(self, kernels, param, grad, m, v):
        kernels.adamw(param, grad, m, v, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.01, step=10)
        return param, m, v

    def theirs(self, torch, param, grad, m, v):
        step = torch.tensor(9.0)  # it counts before it steps
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False}
        torch._fused_adamw_([param], [grad], [m], [v], [], [step + 1], **options)
        return param, m, v


class SoftmaxAgainstTorch(_AgainstTorch):
    params, kernel = [Softmax.params[0]], Softmax


class LayerNormAgainstTorch(_AgainstTorch):
    params, kernel = [LayerNorm.params[0]], LayerNorm


class LayerNormForwardAndBackwardAgainstTorch(_AgainstTorch):
    params, kernel = [LayerNorm.params[0]], LayerNormForwardAndBackward


class RmsNormAgainstTorch(_AgainstTorch):
    params, kernel = [RmsNorm.params[0]], RmsNorm


class GemmAgainstTorch(_AgainstTorch):
    params, kernel = [Gemm.params[0]], Gemm


class CrossEntropyAgainstTorch(_AgainstTorch):
    params, kernel = [CrossEntropy.params[0]], CrossEntropy


class SearchAgainstTorch(_AgainstTorch):
    params, kernel = [Search.params[0]], Search


class AdamWAgainstTorch(_AgainstTorch):
    params, kernel = [AdamW.params[0]], AdamW


class Shares:
    """Of the machine's limits, at the largest size."""

    def setup(self):
        self.at_work = {}
        for kernel in (Gemm, Softmax, LayerNorm, AdamW, Search):
            self.at_work[kernel] = kernel()

    def _call(self, kernel):
        self.at_work[kernel].setup(kernel.params[0][-1], "mini_tfm")
        return self.at_work[kernel].call

    def track_gemm_share_of_sgemm(self):
        m, k, n = Gemm.params[0][-1]
        return share_of_sgemm(self._call(Gemm), 2 * m * k * n)

    def track_search_share_of_sgemm(self):
        queries, rows, d = Search.params[0][-1]
        return share_of_sgemm(self._call(Search), 2 * queries * rows * d)

    def track_softmax_share_of_reading(self):
        rows, width = Softmax.params[0][-1]
        return share_of_reading(self._call(Softmax), 2 * 4 * rows * width)  # read, written

    def track_layer_norm_share_of_reading(self):
        rows, width = LayerNorm.params[0][-1]
        return share_of_reading(self._call(LayerNorm), 2 * 4 * rows * width)

    def track_adamw_share_of_reading(self):
        return share_of_reading(self._call(AdamW), 7 * 4 * AdamW.params[0][-1])  # four read, three written

    track_gemm_share_of_sgemm.unit = track_search_share_of_sgemm.unit = "% of the sgemm peak"
    track_softmax_share_of_reading.unit = track_layer_norm_share_of_reading.unit = "% of the read bandwidth"
    track_adamw_share_of_reading.unit = "% of the read bandwidth"
