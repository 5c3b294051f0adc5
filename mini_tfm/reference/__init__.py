"""Every compiled kernel again in plain NumPy: the specification, the oracle of the tests, and the fallback.

A twin has the name, the signature, the checks and the errors of the kernel it stands for; it computes in float64 and
returns the dtype it was given. One file a family:

    linear       gemm                               embedding   token rows, sinusoidal and rotary positions
    packed       packed weights, products with them
    softmax      softmax, log_softmax, backward     loss        cross entropy, forward and backward
    norm         layer_norm, rms_norm, backward     optimizer   adamw, sum_of_squares
    elementwise  activations, sums, dropout         search      exact top-k by inner product
    attention    attention and its backward         threads     the twins of the thread settings
    checksum     whether an array has changed       program     a decoding step run again
    kept         rows in bfloat16 and int8              types       what the compiled kernels share: Block, ...

The `__all__` of these files together are the names behind the door `mini_tfm._core`, which fails to import without a compiled
function for each; `MINI_TFM_ISA=reference` puts the twins themselves behind it.
"""

from typing import TYPE_CHECKING

from mini_tfm.reference.attention import *
from mini_tfm.reference.checksum import *
from mini_tfm.reference.elementwise import *
from mini_tfm.reference.embedding import *
from mini_tfm.reference.linear import *
from mini_tfm.reference.loss import *
from mini_tfm.reference.norm import *
from mini_tfm.reference.optimizer import *
from mini_tfm.reference.packed import *
from mini_tfm.reference.program import *
from mini_tfm.reference.search import *
from mini_tfm.reference.softmax import *
from mini_tfm.reference.threads import *
from mini_tfm.reference.types import *

if not TYPE_CHECKING:  # a type checker takes a name from a star import, and would not see through this
    __all__ = sorted(name for name, value in globals().items() if callable(value) and not name.startswith("_"))
