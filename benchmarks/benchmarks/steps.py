"""A step at a time: decoding a token, training a small model, the loss of a large vocabulary. Where Python's share shows."""

import numpy as np

import mini_tfm as mt
from mini_tfm import _core, ops
from mini_tfm.autodiff import Var, backward
from mini_tfm.generate.session import Session
from mini_tfm.stream import Stream

from .common import normal, relative_error, seconds

T5_SMALL = {
    "vocab_size": 32128, "d_model": 512, "n_heads": 8, "d_ff": 2048, "n_encoder_layers": 6, "n_decoder_layers": 6,
    "norm": "rms", "bias": False, "positions": "relative", "embedding_scale": False,
}  # fmt: skip
SMALL = {"vocab_size": 259, "d_model": 64, "n_heads": 4, "n_encoder_layers": 1, "n_decoder_layers": 1, "segment_length": 32}
STEPS = 64


class DecodingStep:
    """One new token of a model of T5-small's shape, greedily, behind a source of 32 tokens; random weights."""

    params = [1, 4]
    param_names = ["batch"]
    timeout = 300

    def setup(self, batch):
        model = mt.Transformer(mt.Config(**T5_SMALL), seed=0)
        stream = Stream(model, None, batch)
        stream.open(np.random.default_rng(0).integers(3, T5_SMALL["vocab_size"], (batch, 32)), np.full(batch, 32))
        self.session, self.tokens = Session(stream), np.zeros((batch, 1), np.int64)
        self.steps()

    def step(self):
        self.tokens = self.session.best(self.session.step(self.tokens))[:, None]

    def steps(self):
        for _ in range(STEPS):
            self.step()

    def time_step(self, batch):
        self.step()

    def track_outside_kernels(self, batch):
        """What a step takes beyond its kernels, which are called again with what it gave them; the least of each."""
        calls, step, kernels = [], [], []
        for _ in range(STEPS):
            step.append(seconds(self.step))
            with recorded(calls):
                self.step()
            kernels.append(seconds(lambda: [call(*args, **kwargs) for call, args, kwargs in calls]))
            calls.clear()
        return 100 * max(0.0, 1 - np.min(kernels) / np.min(step))  # on a busy machine either may be late

    track_outside_kernels.unit = "% of the step"


class recorded:
    """Writes down every call of a kernel: (function, arguments, keywords)."""

    def __init__(self, calls):
        self.calls, self.kept = calls, {}

    def __enter__(self):
        for name in _core.__all__:
            if callable(function := getattr(_core, name)) and not isinstance(function, type):
                self.kept[name] = function
                setattr(_core, name, self._writing(function))

    def _writing(self, function):
        def call(*args, **kwargs):
            self.calls.append((function, args, kwargs))
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(_core, name, function)


class SmallTrainingStep:
    """(batch, segments, tokens) of source and of target through a model of d 64 with 1 + 1 layers."""

    params = [[(1, 2, 8), (2, 2, 16), (4, 2, 32)]]
    param_names = ["shape"]

    def setup(self, shape):
        self.trainer = mt.Trainer(mt.Transformer(mt.Config(**SMALL), seed=0), learning_rate=1e-3)
        self.tokens = np.random.default_rng(0).integers(3, SMALL["vocab_size"], shape)
        for _ in range(10):
            self.trainer.step(self.tokens, self.tokens)

    def time_step(self, shape):
        self.trainer.step(self.tokens, self.tokens)


class OutputLoss:
    """Cross-entropy of x W^T, (tokens, 512) by (32,128, 512), and both gradients: with all logits in RAM, and with none."""

    params = ([256, 1024], ["logits", "none"])
    param_names = ["tokens", "kept"]
    timeout = 300

    def setup(self, tokens, kept):
        n_classes, d = T5_SMALL["vocab_size"], T5_SMALL["d_model"]
        self.x, self.weight = normal(tokens, d), normal(n_classes, d, seed=1) / np.float32(50)
        self.targets = np.random.default_rng(2).integers(0, n_classes, tokens)
        self.weights = np.ones(tokens, np.float32)
        self.kept, ops.LOGITS_BYTES = ops.LOGITS_BYTES, 1 << 62 if kept == "logits" else 0

    def teardown(self, tokens, kept):
        ops.LOGITS_BYTES = self.kept

    def loss(self, dtype=np.float32):
        leaves = Var(self.x.astype(dtype, copy=False)), Var(self.weight.astype(dtype, copy=False))
        loss = ops.output_loss(*leaves, self.targets, self.weights, transposed=True)
        backward(loss)
        return float(loss.value), *(leaf.grad for leaf in leaves)

    def time_loss(self, tokens, kept):
        self.loss()

    def peakmem_loss(self, tokens, kept):
        self.loss()

    def track_error_loss(self, tokens, kept):
        return relative_error(self.loss(), self.loss(np.float64))

    track_error_loss.unit = "max |error| / max |value|"
