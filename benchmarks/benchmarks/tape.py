"""The tape: what it costs an operation beyond the arithmetic, forward and backward together, on arrays so small that it is seen.

Each of the two computations is 200 operations and is written twice: on Vars, and directly in NumPy with the gradients by
hand, the same arithmetic. What the first takes longer, divided by 200, is the tape.
"""

import numpy as np

from mini_tfm.autodiff import Var, backward

from .common import normal, relative_error, seconds

OPERATIONS = 200
REPEATS, NUMBER = 40, 5


class Chain:
    """x = x * a, x = x + b, a hundred times, on (4,)."""

    arrays = {"x": normal(4), "a": np.float32([0.9, 1.1, -0.95, 1.0]), "b": normal(4, seed=1)}

    @staticmethod
    def taped(x, a, b):
        for _ in range(OPERATIONS // 2):
            x = x * a
            x = x + b
        return x

    @staticmethod
    def direct(x, a, b, dx, da, db):
        kept = []
        for _ in range(OPERATIONS // 2):
            kept.append(x)
            x = x * a
            x = x + b
        dy = np.ones_like(x)
        for x in reversed(kept):
            db += dy
            da += dy * x
            dy = dy * a
        dx += dy


class Mix:
    """A gated, normalised layer of ten operations, twenty times, on (8, 16)."""

    arrays = {"x": normal(8, 16), "g": normal(16, seed=1), "w": normal(16, 16, seed=3) / np.float32(4)}

    @staticmethod
    def taped(x, g, w):
        for _ in range(OPERATIONS // 10):
            hidden = np.tanh(x * g) @ w
            scores = np.exp(hidden[:, :8] * np.float32(0.3))
            shares = scores / scores.sum(axis=1, keepdims=True)
            x = np.concatenate([shares, shares], axis=1) + x
        return x

    @staticmethod
    def direct(x, g, w, dx, dg, dw):
        kept = []
        for _ in range(OPERATIONS // 10):
            tanh = np.tanh(x * g)
            hidden = tanh @ w
            scores = np.exp(hidden[:, :8] * np.float32(0.3))
            total = scores.sum(axis=1, keepdims=True)
            shares = scores / total
            kept.append((x, tanh, scores, total, shares))
            x = np.concatenate([shares, shares], axis=1) + x
        dy = np.ones_like(x)
        for x, tanh, scores, total, shares in reversed(kept):
            dshares = dy[:, :8] + dy[:, 8:]
            dtotal = (-dshares * shares / total).sum(axis=1, keepdims=True)
            dscores = dshares / total + dtotal
            dhidden = np.zeros_like(x)
            dhidden[:, :8] = dscores * scores * np.float32(0.3)
            dw += tanh.T @ dhidden
            dsum = dhidden @ w.T * (1 - tanh * tanh)
            dg += (dsum * x).sum(axis=0)
            dy = dy + dsum * g
        dx += dy


COMPUTATIONS = {"chain (4,)": Chain, "mix (8, 16)": Mix}


class Tape:
    params = list(COMPUTATIONS)
    param_names = ["computation"]

    def setup(self, name):
        self.of = COMPUTATIONS[name]

    def taped(self):
        leaves = {key: Var(value, np.zeros_like(value)) for key, value in self.of.arrays.items()}
        backward(self.of.taped(**leaves))
        return [leaf.grad for leaf in leaves.values()]

    def direct(self):
        grads = [np.zeros_like(value) for value in self.of.arrays.values()]
        self.of.direct(*self.of.arrays.values(), *grads)
        return grads

    def time_taped(self, name):
        self.taped()

    def track_overhead(self, name):
        """Of the shortest times of either, which are taken in turn."""
        times = [(_several(self.taped), _several(self.direct)) for _ in range(REPEATS)]
        taped, direct = np.min(times, axis=0) / NUMBER
        return 1e6 * (taped - direct) / OPERATIONS

    track_overhead.unit = "microseconds an operation"

    def track_error(self, name):
        """Of the gradients, held against those by hand."""
        return relative_error(self.taped(), self.direct())

    track_error.unit = "max |error| / max |value|"


def _several(call):
    return seconds(lambda: [call() for _ in range(NUMBER)])
