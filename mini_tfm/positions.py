"""What positions are made of: the sinusoidal table and the frequencies of rotary positions, as published models have them."""

from __future__ import annotations

import math

import numpy as np

from . import _core
from .config import Config, RotaryScaling


def sinusoids(n: int, d_model: int, kind: str, dtype: np.dtype) -> np.ndarray:
    """The table (n, d_model) that is added to embeddings.

    kind: "interleaved", the paper's (arXiv 1706.03762, section 3.5); "halves", its sines, then its cosines, as MarianMT has
    them; "fairseq", the same with frequencies from 1 to 1 / 10000, both included, and 0 in an odd last column (M2M100).
    """
    if kind != "fairseq":
        table = _core.sinusoidal_positions(n, d_model, dtype=dtype)
        return table if kind == "interleaved" else np.concatenate([table[:, 0::2], table[:, 1::2]], axis=1)
    half = d_model // 2
    angles = np.arange(n)[:, None] * np.exp(-math.log(10000.0) / max(half - 1, 1) * np.arange(half))
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros((n, d_model % 2))], axis=1).astype(dtype)


def rotary_frequencies(config: Config, is_local: bool = False) -> np.ndarray:
    """The angle (rotary_dims / 2,), float64, by which each pair of a head's numbers turns from one position to the next.

    base ** (-2 i / rotary_dims) (arXiv 2104.09864, section 3.2.2), changed as `rotary_scaling` says. is_local: of a layer that
    attends within a window.
    """
    n = config.rotary_dims
    assert n  # filled in by Config
    base = config.local_rotary_base if is_local and config.local_rotary_base is not None else config.rotary_base
    # Rounded once: NumPy's power in double may be off by 4 units in the last place, which positions multiply.
    frequencies = (np.longdouble(base) ** (-2.0 * np.arange(n // 2) / n)).astype(np.float64)
    if config.rotary_scaling is None or (is_local and config.local_rotary_base is not None):
        return frequencies
    return scaled_frequencies(frequencies, config.rotary_scaling, base)


def scaled_frequencies(frequencies: np.ndarray, scaling: RotaryScaling, base: float) -> np.ndarray:
    """Frequencies (n / 2,), base ** (-2 i / n), as `scaling` changes them."""
    n, divided = 2 * len(frequencies), frequencies / scaling.factor
    if scaling.kind == "linear":
        return divided
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # over all positions the model began with
    if scaling.kind == "llama3":
        kept = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
    else:  # section 3.2 of the paper counts pairs, not turns, and rounds to whole ones

        def pair_of(turns: float) -> float:
            return n * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = max(math.floor(pair_of(scaling.beta_fast)), 0), min(math.ceil(pair_of(scaling.beta_slow)), n - 1)
        kept = 1 - np.clip((np.arange(n // 2) - first) / max(last - first, 0.001), 0, 1)
    return frequencies * kept + divided * (1 - kept)
