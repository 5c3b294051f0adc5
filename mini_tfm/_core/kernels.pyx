"""The compiled kernels: every function checks its arguments, takes pointers, releases the GIL and calls C.

The checks are those of the NumPy twins (`mini_tfm.reference`), whose docstrings say what each kernel computes.
"""

cimport numpy as cnp
from libc.float cimport DBL_MAX
from libc.math cimport sqrt
from libc.stdlib cimport calloc, free, llabs
from libc.string cimport memset

import numpy as np

from mini_tfm import reference
from mini_tfm.errors import InvalidType
from mini_tfm.reference import Block, BlockGrad, _checks


cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)


cnp.import_array()
mt_choose_isa(NULL)


cdef inline void *ptr(cnp.ndarray x) noexcept:
    """Where a checked array's values are."""
    return cnp.PyArray_DATA(x)


cdef inline void *ptr_or_null(x) noexcept:
    return NULL if x is None else cnp.PyArray_DATA(<cnp.ndarray>x)


cdef inline mt_rows rows_of(cnp.ndarray x) noexcept:
    """The rows of a checked array (B, H, N, D)."""
    cdef mt_rows rows
    cdef int axis
    rows.at = cnp.PyArray_DATA(x)
    for axis in range(3):
        rows.stride[axis] = cnp.PyArray_STRIDE(x, axis) // cnp.PyArray_ITEMSIZE(x)
    return rows


cdef object rows_like(cnp.ndarray x):
    """A new array (B, H, N, D) of x's shape and dtype; if x's heads lie side by side, as products leave them, so do its own."""
    cdef cnp.npy_intp *n = cnp.PyArray_DIMS(x)
    cdef cnp.npy_intp[4] swapped = [n[0], n[2], n[1], n[3]]
    if llabs(cnp.PyArray_STRIDE(x, 1)) < llabs(cnp.PyArray_STRIDE(x, 2)):
        return cnp.PyArray_SwapAxes(cnp.PyArray_EMPTY(4, swapped, cnp.PyArray_TYPE(x), 0), 1, 2)
    return cnp.PyArray_EMPTY(4, n, cnp.PyArray_TYPE(x), 0)


cdef inline const mt_kernels_table *c_for(cnp.ndarray x) noexcept:
    """The kernels for x's dtype, float32 or float64."""
    return mt_kernels(cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64)


# The short way past the checks, for what is nearly always given: each says that `_checks` would pass its argument as it is.
# Everything else takes the long way, where errors and copies are made.


cdef inline bint plain(x) noexcept:
    """A plain C-contiguous, aligned array of float32 or float64."""
    return (
        cnp.PyArray_CheckExact(x)
        and (cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_FLOAT64)
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
    )


cdef inline bint plain_rows(x) noexcept:
    """As `plain`, with a last axis."""
    return plain(x) and cnp.PyArray_NDIM(<cnp.ndarray>x) >= 1


cdef inline bint plain_like(y, cnp.ndarray x) noexcept:
    """As `plain`, with x's dtype and shape."""
    return plain(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(<cnp.ndarray>y, x)


cdef inline bint plain_vector(y, cnp.ndarray x, ptrdiff_t n) noexcept:
    """As `plain`, with x's dtype and shape (n,)."""
    return (
        plain(y)
        and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_NDIM(<cnp.ndarray>y) == 1
        and cnp.PyArray_DIM(<cnp.ndarray>y, 0) == n
    )


cdef inline bint plain_number(x, double low) noexcept:
    """A finite Python float >= low."""
    return type(x) is float and low <= <double>x <= DBL_MAX


cdef inline ptrdiff_t last_axis(cnp.ndarray x) noexcept:
    return cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)


cdef inline ptrdiff_t n_rows(cnp.ndarray x) noexcept:
    """Product of the leading axes."""
    cdef ptrdiff_t n = 1
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(x) - 1):
        n *= cnp.PyArray_DIM(x, axis)
    return n


cdef inline bint plain_result(y, cnp.ndarray x, ptrdiff_t n) noexcept:
    """As `plain`, with x's dtype and shape, but for a last axis of n."""
    cdef int axis
    if not (plain(y) and cnp.PyArray_TYPE(<cnp.ndarray>y) == cnp.PyArray_TYPE(x) and cnp.PyArray_NDIM(<cnp.ndarray>y) == cnp.PyArray_NDIM(x)):
        return False
    for axis in range(cnp.PyArray_NDIM(x) - 1):
        if cnp.PyArray_DIM(<cnp.ndarray>y, axis) != cnp.PyArray_DIM(x, axis):
            return False
    return last_axis(y) == n


cdef inline bint plain_bool(x) noexcept:
    return x is True or x is False


cdef inline bint written_apart(cnp.ndarray out, x) noexcept:
    """Whether `out`, plain, may be written, and shares no memory with x, plain or None."""
    if not cnp.PyArray_ISWRITEABLE(out):
        return False
    if x is None:
        return True
    cdef char *at = <char *>cnp.PyArray_DATA(out)
    cdef char *other = <char *>cnp.PyArray_DATA(<cnp.ndarray>x)
    return at + cnp.PyArray_NBYTES(out) <= other or other + cnp.PyArray_NBYTES(<cnp.ndarray>x) <= at


cdef inline cnp.ndarray new_result(cnp.ndarray x, ptrdiff_t n):
    """An array of x's dtype and shape, but for a last axis of n; not filled."""
    cdef cnp.npy_intp shape[64]
    cdef int axis, last = cnp.PyArray_NDIM(x) - 1
    for axis in range(last):
        shape[axis] = cnp.PyArray_DIM(x, axis)
    shape[last] = n
    return cnp.PyArray_EMPTY(last + 1, shape, cnp.PyArray_TYPE(x), 0)


cdef inline cnp.ndarray new_like(cnp.ndarray x):
    """An array of x's dtype and shape, not filled."""
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef inline cnp.ndarray new_vector(cnp.ndarray x, cnp.npy_intp n):
    """An array of x's dtype and shape (n,), not filled."""
    return cnp.PyArray_EMPTY(1, &n, cnp.PyArray_TYPE(x), 0)


cdef int no_memory_if(int failed) except -1:
    if failed:
        raise MemoryError("mini_tfm: no memory for a kernel's workspace")
    return 0


# Matrix product


cdef bint plain_product(a, b, bint t_a, bint t_b, out, bint add, bias) noexcept:
    if not (plain(a) and plain(b) and cnp.PyArray_NDIM(a) == 2 and cnp.PyArray_NDIM(b) == 2 and cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(b)):
        return False
    if cnp.PyArray_DIM(a, 1 - t_a) != cnp.PyArray_DIM(b, t_b):
        return False
    if bias is not None and (add or not plain_vector(bias, a, cnp.PyArray_DIM(b, 1 - t_b))):
        return False
    if out is None:
        return not add
    return (
        plain(out)
        and cnp.PyArray_NDIM(out) == 2
        and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(a)
        and cnp.PyArray_DIM(out, 0) == cnp.PyArray_DIM(a, t_a)
        and cnp.PyArray_DIM(out, 1) == cnp.PyArray_DIM(b, 1 - t_b)
        and written_apart(out, a)
        and written_apart(out, b)
        and written_apart(out, bias)
    )


def gemm(a, b, *, trans_a=False, trans_b=False, out=None, accumulate=False, bias=None, bfloat16=False):
    """out (M, N) = op(a) @ op(b) + bias, or out += ... when `accumulate`; bfloat16: a and b rounded to it."""
    cdef int t_a, t_b, add, failed, rounds
    cdef ptrdiff_t m, n, k
    if plain_bool(trans_a) and plain_bool(trans_b) and plain_bool(accumulate) and plain_product(a, b, trans_a, trans_b, out, accumulate, bias):
        t_a, t_b, add = trans_a, trans_b, accumulate
        m, k, n = cnp.PyArray_DIM(a, t_a), cnp.PyArray_DIM(a, 1 - t_a), cnp.PyArray_DIM(b, 1 - t_b)
    else:
        a, b, t_a, t_b, add, bias, m, n, k = _checks.gemm(a, b, trans_a, trans_b, out, accumulate, bias)
    rounds = bfloat16 is not False and _checks.bfloat16(bfloat16, "a", a)
    if out is None:
        out = np.empty((m, n), a.dtype)
    cdef const mt_kernels_table *c = c_for(a)
    cdef void *pa = ptr(a)
    cdef void *pb = ptr(b)
    cdef void *po = ptr(out)
    cdef void *pc = ptr_or_null(bias)
    with nogil:
        failed = (c.gemm_bfloat16 if rounds else c.gemm)(pa, pb, po, m, n, k, t_a, t_b, add, pc)
    no_memory_if(failed)
    return out


# Softmax


ctypedef enum SoftmaxKind:
    PLAIN
    LOGARITHM


cdef object softmax_rows(x, out, SoftmaxKind kind):
    if not plain_rows(x):
        x = _checks.real("x", x, min_ndim=1)
    y = new_like(x) if out is None else _checks.optional_output(out, x, ("x", x))
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        if kind == PLAIN:
            c.softmax(px, py, n, d)
        else:
            c.log_softmax(px, py, n, d)
    return y


def softmax(x, *, out=None):
    """exp(x) / sum exp(x) over the last axis; a row of -inf gives zeros.

    Here and in what else takes one, `out` is an array for the (first) result, of its shape; None: a new one.
    """
    return softmax_rows(x, out, PLAIN)


def log_softmax(x, *, out=None):
    """x - log sum exp(x) over the last axis; a row of -inf stays -inf."""
    return softmax_rows(x, out, LOGARITHM)


def softmax_backward(y, dy, *, out=None):
    """dx = y * (dy - sum(y * dy))."""
    if not (plain_rows(y) and plain_like(dy, y)):
        y = _checks.real("y", y, min_ndim=1)
        dy = _checks.real("dy", dy, like=y, shape=y.shape)
    dx = new_like(y) if out is None else _checks.optional_output(out, y, ("y", y), ("dy", dy))
    cdef ptrdiff_t n = n_rows(y)
    cdef ptrdiff_t d = last_axis(y)
    cdef const mt_kernels_table *c = c_for(y)
    cdef void *py = ptr(y)
    cdef void *pdy = ptr(dy)
    cdef void *pdx = ptr(dx)
    with nogil:
        c.softmax_backward(py, pdy, pdx, n, d)
    return dx


# Norms


def layer_norm(x, weight, bias, eps, *, out=None):
    """y, mean (N,), rstd (N,); y = (x - mean) * rstd * weight + bias."""
    if not (
        plain_rows(x)
        and plain_vector(weight, x, last_axis(x))
        and (bias is None or plain_vector(bias, x, last_axis(x)))
        and plain_number(eps, 0.0)
    ):
        x, weight, bias, eps = _checks.layer_norm(x, weight, bias, eps)
    cdef double epsilon = eps
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    if out is not None:
        _checks.optional_output(out, x, ("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)]))
    y, mean, rstd = new_like(x) if out is None else out, new_vector(x, n), new_vector(x, n)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *pb = ptr_or_null(bias)
    cdef void *py = ptr(y)
    cdef void *pm = ptr(mean)
    cdef void *pr = ptr(rstd)
    with nogil:
        c.layer_norm(px, pw, pb, epsilon, py, pm, pr, n, d)
    return y, mean, rstd


cdef inline bint plain_norm_backward(dy, x, weight, rstd) noexcept:
    return (
        plain_rows(x) and plain_like(dy, x) and plain_vector(weight, x, last_axis(x)) and plain_vector(rstd, x, n_rows(x))
    )


def layer_norm_backward(dy, x, weight, mean, rstd, *, out=None):
    """dx, dweight (d,), dbias (d,)."""
    cdef int failed
    if not (plain_norm_backward(dy, x, weight, rstd) and plain_like(mean, rstd)):
        dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
        mean = _checks.real("mean", mean, like=x, shape=rstd.shape)
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    if out is not None:
        _checks.optional_output(out, x, ("dy", dy), ("x", x), ("weight", weight), ("mean", mean), ("rstd", rstd))
    dx, dweight, dbias = new_like(x) if out is None else out, new_like(weight), new_like(weight)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *pdy = ptr(dy)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *pm = ptr(mean)
    cdef void *pr = ptr(rstd)
    cdef void *pdx = ptr(dx)
    cdef void *pdw = ptr(dweight)
    cdef void *pdb = ptr(dbias)
    with nogil:
        failed = c.layer_norm_backward(pdy, px, pw, pm, pr, pdx, pdw, pdb, n, d)
    no_memory_if(failed)
    return dx, dweight, dbias


def rms_norm(x, weight, eps, *, out=None):
    """y, rstd (N,); y = x * rstd * weight."""
    if not (plain_rows(x) and plain_vector(weight, x, last_axis(x)) and plain_number(eps, 0.0)):
        x, weight, eps = _checks.rms_norm(x, weight, eps)
    cdef double epsilon = eps
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    if out is not None:
        _checks.optional_output(out, x, ("x", x), ("weight", weight))
    y, rstd = new_like(x) if out is None else out, new_vector(x, n)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *py = ptr(y)
    cdef void *pr = ptr(rstd)
    with nogil:
        c.rms_norm(px, pw, epsilon, py, pr, n, d)
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd, *, out=None):
    """dx, dweight (d,)."""
    cdef int failed
    if not plain_norm_backward(dy, x, weight, rstd):
        dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    if out is not None:
        _checks.optional_output(out, x, ("dy", dy), ("x", x), ("weight", weight), ("rstd", rstd))
    dx, dweight = new_like(x) if out is None else out, new_like(weight)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *pdy = ptr(dy)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *pr = ptr(rstd)
    cdef void *pdx = ptr(dx)
    cdef void *pdw = ptr(dweight)
    with nogil:
        failed = c.rms_norm_backward(pdy, px, pw, pr, pdx, pdw, n, d)
    no_memory_if(failed)
    return dx, dweight


# Element by element


cdef dict KINDS = {kind: _checks.activation_kind(kind) for kind in _checks.ACTIVATIONS}


cdef int kind_number(kind) except -1:
    return KINDS[kind] if type(kind) is str and kind in KINDS else _checks.activation_kind(kind)


def activation(x, kind, *, out=None):
    """y = kind(x), kind one of "relu", "gelu", "gelu_tanh", "silu"."""
    if not plain(x):
        x = _checks.real("x", x)
    cdef int number = kind_number(kind)
    y = new_like(x) if out is None else _checks.optional_output(out, x, ("x", x))
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        c.activation(px, py, n, number)
    return y


def activation_backward(x, dy, kind, *, out=None):
    """dx = dy * kind'(x)."""
    if not (plain(x) and plain_like(dy, x)):
        x = _checks.real("x", x)
        dy = _checks.real("dy", dy, like=x, shape=x.shape)
    cdef int number = kind_number(kind)
    dx = new_like(x) if out is None else _checks.optional_output(out, x, ("x", x), ("dy", dy))
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *pdy = ptr(dy)
    cdef void *pdx = ptr(dx)
    with nogil:
        c.activation_backward(px, pdy, pdx, n, number)
    return dx


def dropout(x, p, seed):
    """x / (1 - p) where the hash of (seed, flat index) keeps the element, else 0; on dy it is its own backward."""
    cdef double probability
    cdef uint64_t key
    x, probability, key = _checks.dropout(x, p, seed)
    y = new_like(x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        c.dropout(px, py, n, probability, key)
    return y


# Embedding and positions


cdef inline bint plain_ids(x, ptrdiff_t high) noexcept:
    """A plain C-contiguous, aligned array of int64 from 0 to high - 1."""
    if not (
        cnp.PyArray_CheckExact(x)
        and cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.NPY_INT64
        and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x)
    ):
        return False
    cdef const int64_t *at = <const int64_t *>ptr(x)
    cdef ptrdiff_t i
    cdef bint outside = False
    for i in range(cnp.PyArray_SIZE(x)):
        outside |= <uint64_t>at[i] >= <uint64_t>high
    return not outside


def embedding(table, ids):
    """Rows of table (V, d) at ids (...): (..., d)."""
    weights = table
    if not (plain(table) and cnp.PyArray_NDIM(table) == 2 and plain_ids(ids, cnp.PyArray_DIM(table, 0))):
        weights, ids = _checks.embedding(table, ids)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(ids)
    cdef ptrdiff_t d = last_axis(weights)
    out = np.empty((*ids.shape, d), weights.dtype)
    cdef const mt_kernels_table *c = c_for(weights)
    cdef void *pt = ptr(weights)
    cdef const int64_t *pi = <const int64_t *>ptr(ids)
    cdef void *po = ptr(out)
    with nogil:
        c.embedding(pt, pi, po, n, d)
    return out


def embedding_backward(ids, dout, dtable):
    """dtable (V, d)[ids] += dout (..., d), in place. Returns dtable."""
    ids, dout = _checks.embedding_backward(ids, dout, dtable)
    cdef ptrdiff_t n = ids.size
    cdef ptrdiff_t d = dtable.shape[1]
    cdef const mt_kernels_table *c = c_for(dout)
    cdef const int64_t *pi = <const int64_t *>ptr(ids)
    cdef void *pd = ptr(dout)
    cdef void *pt = ptr(dtable)
    with nogil:
        c.embedding_backward(pi, pd, pt, n, d)
    return dtable


def sinusoidal_positions(n, d_model, dtype=np.float32):
    """The paper's table (n, d_model): sin at even columns, cos at odd, computed in double."""
    cdef ptrdiff_t rows, d
    cdef int failed
    rows, d, dtype = _checks.sinusoidal_positions(n, d_model, dtype)
    out = np.empty((rows, d), dtype)
    cdef const mt_kernels_table *c = c_for(out)
    cdef void *po = ptr(out)
    with nogil:
        failed = c.sinusoidal_positions(po, rows, d)
    no_memory_if(failed)
    return out


def rotary(x, positions, base=10000.0, inverse=False):
    """x (B, H, T, D) turned by its positions (T,) or (B, T), pairs (i, i + D/2); `inverse` turns back."""
    cdef double b
    cdef int back, failed
    x, positions, b, back = _checks.rotary(x, positions, base, inverse)
    y = rows_like(x)
    cdef ptrdiff_t batch, heads, length, d
    batch, heads, length, d = x.shape
    cdef int per_row = positions.ndim == 2
    cdef const mt_kernels_table *c = c_for(x)
    cdef mt_rows px = rows_of(x)
    cdef const int64_t *pp = <const int64_t *>ptr(positions)
    cdef mt_rows py = rows_of(y)
    with nogil:
        failed = c.rotary(&px, pp, per_row, b, back, &py, batch, heads, length, d)
    no_memory_if(failed)
    return y


# Loss and optimizer


def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0):
    """losses (N,), lse (N,) of logits (N, V) against targets (N,); 0 in ignored rows."""
    cdef int64_t ignored
    cdef double smoothing
    logits, targets, ignored, smoothing = _checks.cross_entropy(logits, targets, ignore_index, label_smoothing)
    cdef ptrdiff_t n, vocab
    n, vocab = logits.shape
    losses, lse = np.empty(n, logits.dtype), np.empty(n, logits.dtype)
    cdef const mt_kernels_table *c = c_for(logits)
    cdef void *px = ptr(logits)
    cdef const int64_t *pt = <const int64_t *>ptr(targets)
    cdef void *po = ptr(losses)
    cdef void *pl = ptr(lse)
    with nogil:
        c.cross_entropy(px, pt, ignored, smoothing, po, pl, n, vocab)
    return losses, lse


def cross_entropy_backward(logits, targets, lse, dlosses, ignore_index=-100, label_smoothing=0.0):
    """dlogits (N, V) = (softmax(logits) - smoothed one-hot) * dlosses."""
    cdef int64_t ignored
    cdef double smoothing
    logits, targets, ignored, smoothing = _checks.cross_entropy(logits, targets, ignore_index, label_smoothing)
    lse = _checks.real("lse", lse, like=logits, shape=targets.shape)
    dlosses = _checks.real("dlosses", dlosses, like=logits, shape=targets.shape)
    cdef ptrdiff_t n, vocab
    n, vocab = logits.shape
    dlogits = np.empty_like(logits)
    cdef const mt_kernels_table *c = c_for(logits)
    cdef void *px = ptr(logits)
    cdef const int64_t *pt = <const int64_t *>ptr(targets)
    cdef void *pl = ptr(lse)
    cdef void *pd = ptr(dlosses)
    cdef void *po = ptr(dlogits)
    with nogil:
        c.cross_entropy_backward(px, pt, pl, pd, ignored, smoothing, po, n, vocab)
    return dlogits


cdef mt_output_layer output_layer(x, weight, targets, bias, bfloat16):
    """The arrays of a checked output layer; its numbers are the caller's."""
    cdef mt_output_layer layer
    layer.bfloat16 = bfloat16 is not False and _checks.bfloat16(bfloat16, "x", x)
    layer.x, layer.weight, layer.bias = ptr(x), ptr(weight), ptr_or_null(bias)
    layer.targets = <const int64_t *>ptr(targets)
    layer.n, layer.d = x.shape
    return layer


def linear_cross_entropy(
    x, weight, targets, *, bias=None, transposed=False, ignore_index=-100, label_smoothing=0.0, chunk=1024, bfloat16=False
):
    """losses (N,), lse (N,) of the logits x (N, d) weight (d, V) + bias (V,), which are never there all at once."""
    cdef int failed
    checked = _checks.linear_cross_entropy(x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk)
    x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk, vocab = checked
    cdef mt_output_layer layer = output_layer(x, weight, targets, bias, bfloat16)
    layer.vocab, layer.chunk, layer.transposed = vocab, chunk, transposed
    layer.ignore_index, layer.label_smoothing = ignore_index, label_smoothing
    losses, lse = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *po = ptr(losses)
    cdef void *pl = ptr(lse)
    with nogil:
        failed = c.linear_cross_entropy(&layer, po, pl)
    no_memory_if(failed)
    return losses, lse


def linear_cross_entropy_backward(
    x, weight, targets, lse, dlosses, dweight=None, *,
    bias=None, transposed=False, ignore_index=-100, label_smoothing=0.0, chunk=1024, bfloat16=False
):
    """dx (N, d), dweight, dbias (V,) or None: dweight, of weight's shape, is added to in place unless it is None."""
    cdef int failed
    checked = _checks.linear_cross_entropy(x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk)
    x, weight, targets, bias, transposed, ignore_index, label_smoothing, chunk, vocab = checked
    lse, dlosses = _checks.linear_cross_entropy_backward(x, weight, targets, bias, lse, dlosses, dweight)
    cdef mt_output_layer layer = output_layer(x, weight, targets, bias, bfloat16)
    layer.vocab, layer.chunk, layer.transposed = vocab, chunk, transposed
    layer.ignore_index, layer.label_smoothing = ignore_index, label_smoothing
    dx, dbias = np.empty_like(x), None if bias is None else np.empty_like(bias)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *pl = ptr(lse)
    cdef void *pd = ptr(dlosses)
    cdef void *pdx = ptr(dx)
    cdef void *pdw = ptr_or_null(dweight)
    cdef void *pdb = ptr_or_null(dbias)
    with nogil:
        failed = c.linear_cross_entropy_backward(&layer, pl, pd, pdx, pdw, pdb)
    no_memory_if(failed)
    return dx, dweight, dbias


def adamw(param, grad, m, v, *, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0):
    """One AdamW step on flat arrays; param, m and v change in place. `step` counts from 1."""
    cdef double rate, b1, b2, epsilon, decay, scale
    cdef int64_t at
    checked = _checks.adamw(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    grad, rate, b1, b2, epsilon, decay, at, scale = checked
    cdef ptrdiff_t n = param.size
    cdef const mt_kernels_table *c = c_for(param)
    cdef void *pp = ptr(param)
    cdef void *pg = ptr(grad)
    cdef void *pm = ptr(m)
    cdef void *pv = ptr(v)
    with nogil:
        c.adamw(pp, pg, pm, pv, n, rate, b1, b2, epsilon, decay, at, scale)


def sum_of_squares(x):
    """sum(x * x) over everything, accumulated in double: a float."""
    if not plain(x):
        x = _checks.real("x", x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef double total = 0.0
    cdef int failed
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    with nogil:
        failed = c.sum_of_squares(px, n, &total)
    no_memory_if(failed)
    return total


# Search


def search(queries, bank, k, valid=None, *, scales=None, codes=None):
    """The k best rows of bank (Bq, M, d) for queries (Bq, N, d): scores, index (Bq, N, k), best first; -1 where none is left."""
    cdef ptrdiff_t wanted, batch, n, m, d
    cdef int failed, axis
    cdef mt_bank c_bank
    queries, bank, wanted, valid, scales, codes, c_bank.kind = _checks.search(queries, bank, k, valid, scales, codes)
    batch, n, d = queries.shape
    m = bank.shape[1]
    for axis in range(3):
        c_bank.stride[axis] = cnp.PyArray_STRIDE(bank, axis)
    c_bank.rows = ptr(bank)
    c_bank.scales = <const float *>ptr_or_null(scales)
    c_bank.valid = <const uint8_t *>ptr_or_null(valid)
    c_bank.codes = <const uint8_t *>ptr_or_null(codes)
    for axis in range(2):
        c_bank.code_stride[axis] = 0 if codes is None else cnp.PyArray_STRIDE(codes, axis)
    scores, index = np.empty((batch, n, wanted), queries.dtype), np.empty((batch, n, wanted), np.int64)
    cdef const mt_kernels_table *c = c_for(queries)
    cdef void *pq = ptr(queries)
    cdef void *ps = ptr(scores)
    cdef int64_t *pi = <int64_t *>ptr(index)
    with nogil:
        failed = c.search(pq, &c_bank, ps, pi, batch, n, m, d, wanted)
    no_memory_if(failed)
    return scores, index


# Attention


cdef void fill_strides(ptrdiff_t *stride, cnp.ndarray x) noexcept:
    """x's four strides in elements."""
    cdef int axis
    for axis in range(4):
        stride[axis] = cnp.PyArray_STRIDE(x, axis) // cnp.PyArray_ITEMSIZE(x)


cdef class Blocks:
    """The C form of checked Blocks. Owns the C array, and keeps alive what its pointers point into."""

    cdef mt_block *at
    cdef list kept

    def __cinit__(self, q, list blocks):
        cdef mt_block *c
        self.kept = []
        self.at = <mt_block *>calloc(len(blocks) + 1, sizeof(mt_block))
        if self.at == NULL:
            raise MemoryError("mini_tfm: no memory for the blocks of an attention")
        for i, block in enumerate(blocks):
            c = &self.at[i]
            self.kept.append(block)
            c.k, c.v = rows_of(block.k), rows_of(block.v)
            c.kv_heads, c.source = block.k.shape[1], block.k.shape[2]
            c.valid = <const uint8_t *>ptr_or_null(block.valid)
            c.lengths = <const int64_t *>ptr_or_null(block.lengths)
            c.index = <const int64_t *>ptr_or_null(block.index)
            c.width = c.source if block.index is None else block.index.shape[3]
            c.offset, c.causal, c.prefix = block.offset, block.causal, block.prefix
            c.window = 0 if block.window is None else block.window
            if block.bias is not None:
                c.bias = ptr(block.bias)
                fill_strides(c.bias_stride, block.bias)
            if block.dbias is not None:
                view = _checks.writeable_view(block.dbias, (*q.shape[:3], c.width))
                self.kept.append(view)
                c.dbias = ptr(view)
                fill_strides(c.dbias_stride, view)

    def __dealloc__(self):
        free(self.at)


cdef mt_attention_sizes attention_sizes(q, blocks, double scale, double dropout, uint64_t seed):
    cdef mt_attention_sizes sizes
    sizes.batch, sizes.heads, sizes.length, sizes.d = q.shape
    sizes.n_blocks = len(blocks)
    sizes.scale, sizes.dropout, sizes.seed = scale, dropout, seed
    return sizes


def attention(q, blocks, scale, *, dropout=0.0, seed=0):
    """out (B, H, T, D), lse (B, H, T) of queries q (B, H, T, D) over all blocks in one softmax; a share of the weights dropped."""
    cdef int failed
    q, blocks, scale, dropout, seed = _checks.attention(q, blocks, scale, dropout, seed)
    out, lse = rows_like(q), np.empty(q.shape[:3], q.dtype)
    cdef Blocks c_blocks = Blocks(q, blocks)
    cdef mt_attention_sizes sizes = attention_sizes(q, blocks, scale, dropout, seed)
    cdef const mt_kernels_table *c = c_for(q)
    cdef mt_rows pq = rows_of(q)
    cdef mt_rows po = rows_of(out)
    cdef void *pl = ptr(lse)
    with nogil:
        failed = c.attention(&pq, c_blocks.at, &sizes, &po, pl)
    no_memory_if(failed)
    return out, lse


cdef inline bint fill_bias(mt_block *block, cnp.ndarray q, bias) noexcept:
    """The bias's pointer and strides, if it broadcasts to the scores as it is."""
    cdef int axis
    cdef cnp.npy_intp n
    cdef cnp.npy_intp[4] shape
    if not (cnp.PyArray_CheckExact(bias) and cnp.PyArray_TYPE(<cnp.ndarray>bias) == cnp.PyArray_TYPE(q)):
        return False
    if cnp.PyArray_NDIM(<cnp.ndarray>bias) != 4 or not cnp.PyArray_ISALIGNED(<cnp.ndarray>bias):
        return False
    shape[0], shape[1], shape[2], shape[3] = cnp.PyArray_DIM(q, 0), cnp.PyArray_DIM(q, 1), cnp.PyArray_DIM(q, 2), block.width
    for axis in range(4):
        n = cnp.PyArray_DIM(<cnp.ndarray>bias, axis)
        if n != shape[axis] and n != 1 or cnp.PyArray_STRIDE(<cnp.ndarray>bias, axis) % cnp.PyArray_ITEMSIZE(<cnp.ndarray>bias):
            return False
        block.bias_stride[axis] = (
            0 if n == 1 else cnp.PyArray_STRIDE(<cnp.ndarray>bias, axis) // cnp.PyArray_ITEMSIZE(<cnp.ndarray>bias)
        )
    block.bias = ptr(<cnp.ndarray>bias)
    return True


def _attention_at_once(q, k, v, bias, causal, window, lengths, scale):
    """`mt.attention` without Block, checks in Python, lse: some microseconds less. None: the arguments need the long way."""
    cdef mt_block block
    cdef mt_attention_sizes sizes
    cdef int failed, axis
    cdef ptrdiff_t at
    if not (plain(q) and plain(k) and plain(v) and cnp.PyArray_NDIM(q) == 4 and cnp.PyArray_NDIM(k) == 4):
        return None
    if cnp.PyArray_TYPE(q) != cnp.PyArray_TYPE(k) or not plain_like(v, k) or (causal is not True and causal is not False):
        return None
    memset(&block, 0, sizeof(block))
    sizes.batch, sizes.heads = cnp.PyArray_DIM(q, 0), cnp.PyArray_DIM(q, 1)
    sizes.length, sizes.d = cnp.PyArray_DIM(q, 2), cnp.PyArray_DIM(q, 3)
    block.kv_heads, block.source = cnp.PyArray_DIM(k, 1), cnp.PyArray_DIM(k, 2)
    if cnp.PyArray_DIM(k, 0) != sizes.batch or cnp.PyArray_DIM(k, 3) != sizes.d or block.kv_heads == 0 or sizes.d == 0:
        return None
    if sizes.heads % block.kv_heads:
        return None
    block.k, block.v, block.width, block.offset = rows_of(k), rows_of(v), block.source, block.source - sizes.length
    block.causal = causal is True
    if window is not None:
        if type(window) is not int or not 1 <= window <= 2**60:
            return None
        block.window = window
    if lengths is not None:
        if not (cnp.PyArray_CheckExact(lengths) and cnp.PyArray_TYPE(<cnp.ndarray>lengths) == cnp.NPY_INT64):
            return None
        if not cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>lengths) or cnp.PyArray_NDIM(<cnp.ndarray>lengths) != 1:
            return None
        if cnp.PyArray_DIM(<cnp.ndarray>lengths, 0) != sizes.batch:
            return None
        block.lengths = <const int64_t *>ptr(<cnp.ndarray>lengths)
        for at in range(sizes.batch):
            if not 0 <= block.lengths[at] <= block.source:
                return None
    if bias is not None and not fill_bias(&block, q, bias):
        return None
    if scale is None:
        sizes.scale = 1.0 / sqrt(<double>sizes.d)
    elif type(scale) is float and -DBL_MAX <= <double>scale <= DBL_MAX:
        sizes.scale = scale
    else:
        return None
    sizes.n_blocks, sizes.dropout, sizes.seed = 1, 0.0, 0
    out = new_like(q)
    cdef const mt_kernels_table *c = c_for(q)
    cdef mt_rows pq = rows_of(q)
    cdef mt_rows po = rows_of(out)
    with nogil:
        failed = c.attention(&pq, &block, &sizes, &po, NULL)
    no_memory_if(failed)
    return out


def attention_backward(dout, out, lse, q, blocks, scale, needs=None, *, dropout=0.0, seed=0):
    """dq (B, H, T, D) and one BlockGrad a block; needs: one bool a block, False leaves out dk and dv."""
    cdef int failed
    checked = _checks.attention_backward(dout, out, lse, q, blocks, scale, needs, dropout, seed)
    dout, out, lse, q, blocks, scale, needs, dropout, seed = checked
    dq = rows_like(q)
    cdef Blocks c_blocks = Blocks(q, blocks)
    grads = []
    for i, block in enumerate(blocks):
        dk, dv = (rows_like(block.k), rows_like(block.v)) if needs[i] else (None, None)
        if needs[i]:
            c_blocks.at[i].dk, c_blocks.at[i].dv = rows_of(dk), rows_of(dv)
        grads.append(BlockGrad(dk, dv, block.dbias))
    cdef mt_attention_sizes sizes = attention_sizes(q, blocks, scale, dropout, seed)
    cdef const mt_kernels_table *c = c_for(q)
    cdef mt_rows pd = rows_of(dout)
    cdef mt_rows po = rows_of(out)
    cdef void *pl = ptr(lse)
    cdef mt_rows pq = rows_of(q)
    cdef mt_rows pdq = rows_of(dq)
    with nogil:
        failed = c.attention_backward(&pd, &po, pl, &pq, c_blocks.at, &sizes, &pdq)
    no_memory_if(failed)
    return dq, grads


def attention_mass(q, block, lse, scale, asking):
    """(B, S): the weights that each row of the block received from the queries asking (B, T), summed over heads."""
    cdef int failed
    q, block, lse, scale, asking = _checks.attention_mass(q, block, lse, scale, asking)
    mass = np.empty((q.shape[0], block.k.shape[2]), q.dtype)
    cdef Blocks c_blocks = Blocks(q, [block])
    cdef mt_attention_sizes sizes = attention_sizes(q, [block], scale, 0.0, 0)
    cdef const mt_kernels_table *c = c_for(q)
    cdef mt_rows pq = rows_of(q)
    cdef void *pl = ptr(lse)
    cdef const uint8_t *pa = <const uint8_t *>ptr(asking)
    cdef void *pm = ptr(mass)
    with nogil:
        failed = c.attention_mass(&pq, c_blocks.at, &sizes, pl, pa, pm)
    no_memory_if(failed)
    return mass


# Threads and configuration


def set_num_threads(n):
    """From now on kernels use up to n threads."""
    mt_set_threads(_checks.thread_count(n), False)


def get_num_threads():
    """How many threads the next kernel may use: 1 in a forked child and in a build without OpenMP."""
    return mt_get_threads()


def _set_default_threads(int n):
    """As set_num_threads, but threadpoolctl's limit on OpenMP still holds."""
    mt_set_threads(n, True)


def _after_fork():
    mt_after_fork()


def _choose_isa(name):
    """Chooses an instruction set by name, or the best that runs here (None). False: there is no such one here."""
    if name is None:
        return mt_choose_isa(NULL) == 0
    encoded = name.encode()
    return mt_choose_isa(encoded) == 0


cdef list isa_names(bint built):
    names = []
    while mt_isa_name(len(names), built) != NULL:
        names.append(mt_isa_name(len(names), built).decode())
    return names


def show_config():
    """What computes: the instruction set in use, those that run here, those built in, OpenMP, threads, compiler."""
    return {
        "isa": mt_kernels(0).isa.decode(),
        "isas": isa_names(False),
        "isas_built": isa_names(True),
        "emulated": [name for name in isa_names(False) if mt_is_emulated(name.encode())],
        "openmp": bool(mt_has_openmp()),
        "num_threads": mt_get_threads(),
        "compiler": MT_COMPILER.decode(),
    }


cdef extern from *:
    """
    #if defined(__clang__)
    #define MT_COMPILER "clang " __clang_version__
    #else
    #define MT_COMPILER "gcc " __VERSION__
    #endif
    """
    const char *MT_COMPILER


include "packed.pxi"
