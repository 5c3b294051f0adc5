"""The compiled kernels: every function checks its arguments, takes pointers, releases the GIL and calls C.

The checks are those of the NumPy twins (`mini_tfm.reference`), whose docstrings say what each kernel computes. What is nearly
always given, plain arrays and numbers, is checked here in C (`plain_...`); all else takes the long way through
`reference/_checks.py`, where errors and copies are made. A family is a file beside its C: it declares the C functions that it
calls, says what its plain arguments are, and offers the functions.
"""

cimport numpy as cnp
from libc.float cimport DBL_MAX
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport INT32_MAX, INT64_MAX, INT64_MIN, int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, llabs
from libc.string cimport memcpy

import threading

import numpy as np

from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.reference import _checks
from mini_tfm.reference import types as reference_types
from mini_tfm.reference.types import Block, BlockGrad, Choice, Feed

cnp.import_array()

include "plain.pxi"
include "config.pxi"
include "program.pxi"
include "families/linear.pxi"
include "families/packed.pxi"
include "families/softmax.pxi"
include "families/norm.pxi"
include "families/elementwise.pxi"
include "families/embedding.pxi"
include "families/loss.pxi"
include "families/optimizer.pxi"
include "families/checksum.pxi"
include "families/search.pxi"
include "families/attention.pxi"
