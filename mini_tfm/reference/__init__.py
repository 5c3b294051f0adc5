"""Every compiled kernel again in plain NumPy: the specification, the oracle of the tests, and the fallback.

A twin has the name, the signature, the checks and the errors of the kernel it stands for; it computes in float64 and
returns the dtype it was given. One file a family:

    linear       gemm                               embedding   token rows, sinusoidal and rotary positions
    packed       packed weights, products with them
    softmax      softmax, log_softmax, backward     loss        cross entropy, forward and backward
    norm         layer_norm, rms_norm, backward     optimizer   adamw, sum_of_squares
    elementwise  activations, dropout               search      exact top-k by inner product
    attention    Block, attention and its backward  threads     the twins of the thread settings

`MINI_TFM_ISA=reference` puts them behind the door `mini_tfm._core` in place of the compiled ones.
"""

from mini_tfm.reference.attention import Block, BlockGrad, attention, attention_backward, attention_mass
from mini_tfm.reference.elementwise import activation, activation_backward, dropout
from mini_tfm.reference.embedding import embedding, embedding_backward, rotary, sinusoidal_positions
from mini_tfm.reference.linear import gemm
from mini_tfm.reference.loss import (
    cross_entropy,
    cross_entropy_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from mini_tfm.reference.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from mini_tfm.reference.optimizer import adamw, sum_of_squares
from mini_tfm.reference.packed import PackedWeight, linear_top_k, pack, packed_linear
from mini_tfm.reference.search import encode_rows, search
from mini_tfm.reference.softmax import log_softmax, softmax, softmax_backward
from mini_tfm.reference.threads import get_num_threads, set_num_threads, show_config

__all__ = [
    "Block",
    "BlockGrad",
    "PackedWeight",
    "activation",
    "activation_backward",
    "adamw",
    "attention",
    "attention_backward",
    "attention_mass",
    "cross_entropy",
    "cross_entropy_backward",
    "dropout",
    "embedding",
    "embedding_backward",
    "encode_rows",
    "gemm",
    "get_num_threads",
    "layer_norm",
    "layer_norm_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_top_k",
    "log_softmax",
    "pack",
    "packed_linear",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "search",
    "set_num_threads",
    "show_config",
    "sinusoidal_positions",
    "softmax",
    "softmax_backward",
    "sum_of_squares",
]
