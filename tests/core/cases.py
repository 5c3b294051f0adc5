"""What the generated cases are drawn from. Values come from a seeded generator: Hypothesis chooses shapes, kinds, layouts."""

import numpy as np
import pytest
from helpers import LAYOUTS, laid_out
from hypothesis import strategies as st

from mini_tfm import _core

# Around the widths of vectors and tiles, where tails begin and end.
EDGES = (31, 32, 33, 63, 64, 65, 100, 129)

sizes = st.one_of(st.integers(1, 20), st.sampled_from(EDGES))
sizes_or_none = st.one_of(st.integers(0, 20), st.sampled_from(EDGES))
leading = st.lists(st.integers(1, 5), max_size=3).map(tuple)
seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
scales = st.sampled_from([1e-3, 1.0, 30.0])

compiled_alone = pytest.mark.skipif(
    _core.show_config()["isa"] == "reference", reason="promised of the compiled kernels: the twins copy, and their BLAS promises no bits"
)


class Values:
    """Random arrays of one dtype, each in the layout asked for."""

    def __init__(self, seed, dtype, layout="contiguous"):
        self.rng, self.dtype, self.layout = np.random.default_rng(seed), np.dtype(dtype), layout

    def real(self, *shape, scale=1.0):
        """Normal, times `scale`."""
        return laid_out((self.rng.standard_normal(shape) * scale).astype(self.dtype), self.layout)

    def positive(self, *shape, scale=1.0):
        return laid_out((self.rng.uniform(0.1, 1.0, shape) * scale).astype(self.dtype), self.layout)

    def whole(self, *shape, low=-3, high=4):
        """Small whole numbers as reals: sums and products of them are exact."""
        return laid_out(self.rng.integers(low, high, shape).astype(self.dtype), self.layout)

    def integers(self, low, high, *shape):
        return laid_out(np.asarray(self.rng.integers(low, high, shape)), self.layout)

    def mask(self, *shape, share=0.7):
        return laid_out(self.rng.random(shape) < share, self.layout)
