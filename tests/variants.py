"""Tiny models of every architecture, with no weight left at zero or one, and the differences gradients are held against."""

from collections.abc import Callable, Mapping

import numpy as np

from mini_tfm.config import Config, RotaryScaling
from mini_tfm.transformer import Transformer

SIZES = {"vocab_size": 13, "d_model": 8, "n_heads": 2, "n_encoder_layers": 2, "n_decoder_layers": 2, "d_ff": 12}
RELATIVE = {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 6}

VARIANTS: dict[str, dict] = {
    "paper": {"norm_position": "post"},
    "pre norm": {},
    "learned": {"positions": "learned", "max_positions": 40, "norm_position": "post"},
    "rotary": {"positions": "rotary"},
    "relative": RELATIVE,
    "no positions": {"positions": "none"},
    "rms": {"norm": "rms"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "silu": {"activation": "silu"},
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "d_head": 3},
    "unequal": {**RELATIVE, "n_heads": 4, "decoder_n_heads": 2, "decoder_n_kv_heads": 1, "decoder_d_head": 3, "attention_scale": 0.7},
    "untied": {"tie_embeddings": False},
    "no bias": {"bias": False},
    "t5": {**RELATIVE, "norm": "rms", "bias": False, "embedding_scale": False, "attention_scale": 1.0, "tie_embeddings": False},
    "encoder only": {"n_decoder_layers": 0, "norm_position": "post", "positions": "learned", "max_positions": 40, "activation": "gelu"},
    "encoder only, relative": {**RELATIVE, "n_decoder_layers": 0},
    "decoder only": {"n_encoder_layers": 0},
    "decoder only, llama": {
        "n_encoder_layers": 0,
        "positions": "rotary",
        "norm": "rms",
        "activation": "silu",
        "bias": False,
        "tie_embeddings": False,
        "embedding_scale": False,
        "n_heads": 4,
        "n_kv_heads": 1,
        "d_head": 2,
    },
    "decoder only, relative": {**RELATIVE, "n_encoder_layers": 0},
    "gated": {"gated": True, "activation": "gelu_tanh"},
    "sandwich": {"norm_position": "sandwich", "norm": "rms"},
    "norms of outputs": {"norm_position": "output", "final_norm": False, "decoder_d_ff": 6},
    "bert": {
        "n_decoder_layers": 0,
        "norm_position": "post",
        "positions": "learned",
        "max_positions": 40,
        "position_offset": 2,
        "token_types": 2,
        "embedding_norm": True,
        "activation": "gelu",
        "embedding_scale": False,
    },
    "bart": {
        "norm_position": "post",
        "final_norm": True,
        "positions": "learned",
        "max_positions": 40,
        "position_offset": 2,
        "embedding_norm": True,
        "output_bias": True,
    },
    "marian": {"norm_position": "post", "sinusoids": "halves", "activation": "silu", "output_bias": True, "output_scale": 0.4},
    "ssru": {"decoder_mixer": "ssru", "norm_position": "post", "sinusoids": "fairseq", "output_bias": True},
    "ssru, relative": {**RELATIVE, "decoder_mixer": "ssru", "bias": False},
    "decoder only, ssru": {"n_encoder_layers": 0, "decoder_mixer": "ssru"},
    "continues": {"continues_source": True, "positions": "rotary"},
    "m2m100": {"sinusoids": "fairseq", "position_offset": 2},
    "decoder only, qwen": {
        "n_encoder_layers": 0,
        "positions": "rotary",
        "norm": "rms",
        "activation": "silu",
        "gated": True,
        "bias": ("q", "v"),
        "qk_norm": True,
        "rotary_dims": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_head": 4,
        "rotary_scaling": RotaryScaling(kind="yarn", factor=4.0, original_positions=64),
    },
    "decoder only, gemma": {
        "n_encoder_layers": 0,
        "positions": "rotary",
        "norm": "rms",
        "gated": True,
        "bias": False,
        "window": 3,
        "local_layers": (0,),
        "local_rotary_base": 20.0,
        "rotary_scaling": RotaryScaling(kind="llama3", factor=8.0, original_positions=16),
        "output_cap": 2.0,
        "attention_cap": 1.5,
    },
}


def tiny_model(variant: str = "pre norm", *, seed: int = 0, dtype: object = np.float64, **changes: object) -> Transformer:
    """A model of `variant` whose weights are all random, those of norms around 1: each one counts in the result."""
    model = Transformer(Config(**{**SIZES, **VARIANTS[variant], **changes}), seed=seed, dtype=np.float64)
    rng = np.random.default_rng(seed)
    for name, weight in model.weights.items():
        spread = 0.5 if "positions" in name or "relative" in name else 0.2 if weight.ndim == 1 else 0.0
        model.weights[name] = (weight + spread * rng.standard_normal(weight.shape)).astype(dtype)
    return Transformer(model.config, dtype=dtype, weights=model.weights)


def tokens(rng: np.random.Generator, *shape: int, vocab_size: int = SIZES["vocab_size"]) -> np.ndarray:
    return rng.integers(3, vocab_size, shape)


def assert_gradients(
    loss: Callable[[Mapping[str, np.ndarray]], float],
    weights: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> None:
    """Each array's gradient, along one random direction, equals the central difference of `loss` there (float64).

    One array at a time, so that no small gradient hides behind a large one. tolerance: relative to the gradient's
    norm times the direction's; the central difference itself errs by about step ** 2 and eps / step = 2e-11. Where
    a corner of a relu lies inside the step, one a hundred times smaller, and as much less exact, decides.
    """
    rng = np.random.default_rng(seed)
    for name, weight in weights.items():
        assert weight.dtype == np.float64, f"{name}: differences need float64"
        direction = rng.standard_normal(weight.shape)
        told = float(np.sum(gradients[name] * direction))
        size = float(np.linalg.norm(gradients[name])) * float(np.linalg.norm(direction))
        slopes = []
        for step, looser in ((1e-5, 1), (1e-7, 10)):
            ahead = loss({**weights, name: weight + step * direction})
            behind = loss({**weights, name: weight - step * direction})
            slopes.append((ahead - behind) / (2 * step))
            if abs(slopes[-1] - told) <= looser * (tolerance * (size + abs(slopes[-1])) + 1e-8):
                break
        else:
            raise AssertionError(f"{name}: the slope is {slopes[0]:.9g} ({slopes[1]:.9g}), the gradient says {told:.9g}")
