"""Attention, forward and backward: speed, error, the share of the sgemm peak, and peak memory."""

import numpy as np

from mini_tfm import _core

from .common import LIBRARIES, _AgainstTorch, _Kernel, normal, share_of_sgemm

# (B, H, T, S, D), and what is added: a causal mask, an additive bias.
SHAPES = {
    "1 x 8 x 128 x 64": (1, 8, 128, 128, 64),
    "8 x 8 x 128 x 64": (8, 8, 128, 128, 64),
    "4 x 6 x 256 x 32, bias": (4, 6, 256, 256, 32),
    "1 x 8 x 2048 x 64, causal": (1, 8, 2048, 2048, 64),
    "1 x 8 x 1 x 2048 x 64": (1, 8, 1, 2048, 64),
}
SQUARE = [name for name in SHAPES if name != "1 x 8 x 1 x 2048 x 64"]


def flops(size):
    """Of the forward's two products; the backward has five."""
    b, h, t, s, d = SHAPES[size]
    return 4 * b * h * t * s * d * (0.5 if "causal" in size else 1)


class Forward(_Kernel):
    params = (list(SHAPES), LIBRARIES)

    def make(self, size):
        b, h, t, s, d = SHAPES[size]
        bias = normal(1, h, t, s) if "bias" in size else None
        return normal(b, h, t, d), normal(b, h, s, d, seed=1), normal(b, h, s, d, seed=2), bias, "causal" in size

    def part(self, q, k, v, bias, causal):
        """One head: it does not depend on the others."""
        q, k, v = (np.ascontiguousarray(x[:1, :1]) for x in (q, k, v))
        return q, k, v, None if bias is None else np.ascontiguousarray(bias[:, :1]), causal

    def ours(self, kernels, q, k, v, bias, causal):
        return kernels.attention(q, [kernels.Block(k, v, bias=bias, causal=causal)], q.shape[-1] ** -0.5)[0]

    def theirs(self, torch, q, k, v, bias, causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)


class ForwardShare:
    params = [SQUARE]
    param_names = ["size"]

    def setup(self, size):
        self.forward = Forward()
        self.forward.setup(size, "mini_tfm")

    def track_share_of_sgemm(self, size):
        return share_of_sgemm(self.forward.call, flops(size))

    track_share_of_sgemm.unit = "% of the sgemm peak"


class ForwardAgainstTorch(_AgainstTorch):
    params = [list(SHAPES)]
    kernel = Forward


class ForwardAndBackward(Forward):
    """Both: torch's backward cannot be had without what its forward keeps."""

    params = (SQUARE, LIBRARIES)

    def ours(self, kernels, q, k, v, bias, causal):
        blocks, scale = [kernels.Block(k, v, bias=bias, causal=causal)], q.shape[-1] ** -0.5
        out, lse = kernels.attention(q, blocks, scale)
        dq, (grads,) = kernels.attention_backward(out, out, lse, q, blocks, scale)
        return dq, grads.dk, grads.dv

    def theirs(self, torch, q, k, v, bias, causal):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = super().theirs(torch, *leaves, bias, causal)
        return torch.autograd.grad(out, leaves, out.detach())


class ForwardAndBackwardAgainstTorch(_AgainstTorch):
    params = [SQUARE]
    kernel = ForwardAndBackward


class Long:
    """Peak RAM of a process with q, k, v of so many tokens (4 MiB each at 16,384): the (T, S) matrix would be 1 GiB there."""

    params = [[1024, 16384]]
    param_names = ["tokens"]

    def setup(self, tokens):
        self.q, k, v = (normal(1, 1, tokens, 64, seed=seed) for seed in range(3))
        self.blocks = [_core.Block(k, v)]

    def peakmem_forward(self, tokens):
        _core.attention(self.q, self.blocks, 0.125)

    def peakmem_forward_and_backward(self, tokens):
        out, lse = _core.attention(self.q, self.blocks, 0.125)
        _core.attention_backward(out, out, lse, self.q, self.blocks, 0.125)
