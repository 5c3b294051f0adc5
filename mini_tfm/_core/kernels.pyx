"""The compiled kernels: every function checks its arguments, takes pointers, releases the GIL and calls C.

The checks are those of the NumPy twins (`mini_tfm.reference`), whose docstrings say what each kernel computes.
"""

cimport numpy as cnp
from libc.stdlib cimport calloc, free

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


cdef inline const mt_kernels_table *c_for(cnp.ndarray x) noexcept:
    """The kernels for x's dtype, float32 or float64."""
    return mt_kernels(cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64)


cdef int no_memory_if(int failed) except -1:
    if failed:
        raise MemoryError("mini_tfm: no memory for a kernel's workspace")
    return 0


# Matrix product


def gemm(a, b, *, trans_a=False, trans_b=False, out=None, accumulate=False):
    """out (M, N) = op(a) @ op(b), or out += ... when `accumulate`."""
    cdef int t_a, t_b, add, failed
    cdef ptrdiff_t m, n, k
    a, b, t_a, t_b, add, m, n, k = _checks.gemm(a, b, trans_a, trans_b, out, accumulate)
    if out is None:
        out = np.empty((m, n), a.dtype)
    cdef const mt_kernels_table *c = c_for(a)
    cdef void *pa = ptr(a)
    cdef void *pb = ptr(b)
    cdef void *po = ptr(out)
    with nogil:
        failed = c.gemm(pa, pb, po, m, n, k, t_a, t_b, add)
    no_memory_if(failed)
    return out


# Softmax


ctypedef enum SoftmaxKind:
    PLAIN
    LOGARITHM


cdef object softmax_rows(x, SoftmaxKind kind):
    x = _checks.real("x", x, min_ndim=1)
    y = np.empty_like(x)
    cdef ptrdiff_t n, d
    n, d = _checks.rows(x)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        if kind == PLAIN:
            c.softmax(px, py, n, d)
        else:
            c.log_softmax(px, py, n, d)
    return y


def softmax(x):
    """exp(x) / sum exp(x) over the last axis; a row of -inf gives zeros."""
    return softmax_rows(x, PLAIN)


def log_softmax(x):
    """x - log sum exp(x) over the last axis; a row of -inf stays -inf."""
    return softmax_rows(x, LOGARITHM)


def softmax_backward(y, dy):
    """dx = y * (dy - sum(y * dy))."""
    y = _checks.real("y", y, min_ndim=1)
    dy = _checks.real("dy", dy, like=y, shape=y.shape)
    dx = np.empty_like(y)
    cdef ptrdiff_t n, d
    n, d = _checks.rows(y)
    cdef const mt_kernels_table *c = c_for(y)
    cdef void *py = ptr(y)
    cdef void *pdy = ptr(dy)
    cdef void *pdx = ptr(dx)
    with nogil:
        c.softmax_backward(py, pdy, pdx, n, d)
    return dx


# Norms


def layer_norm(x, weight, bias, eps):
    """y, mean (N,), rstd (N,); y = (x - mean) * rstd * weight + bias."""
    cdef double epsilon
    x, weight, bias, epsilon = _checks.layer_norm(x, weight, bias, eps)
    cdef ptrdiff_t n, d
    n, d = _checks.rows(x)
    y, mean, rstd = np.empty_like(x), np.empty(n, x.dtype), np.empty(n, x.dtype)
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


def layer_norm_backward(dy, x, weight, mean, rstd):
    """dx, dweight (d,), dbias (d,)."""
    cdef int failed
    dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
    mean = _checks.real("mean", mean, like=x, shape=rstd.shape)
    cdef ptrdiff_t n, d
    n, d = _checks.rows(x)
    dx, dweight, dbias = np.empty_like(x), np.empty_like(weight), np.empty_like(weight)
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


def rms_norm(x, weight, eps):
    """y, rstd (N,); y = x * rstd * weight."""
    cdef double epsilon
    x, weight, epsilon = _checks.rms_norm(x, weight, eps)
    cdef ptrdiff_t n, d
    n, d = _checks.rows(x)
    y, rstd = np.empty_like(x), np.empty(n, x.dtype)
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *py = ptr(y)
    cdef void *pr = ptr(rstd)
    with nogil:
        c.rms_norm(px, pw, epsilon, py, pr, n, d)
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd):
    """dx, dweight (d,)."""
    cdef int failed
    dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
    cdef ptrdiff_t n, d
    n, d = _checks.rows(x)
    dx, dweight = np.empty_like(x), np.empty_like(weight)
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


def activation(x, kind):
    """y = kind(x), kind one of "relu", "gelu", "gelu_tanh", "silu"."""
    x = _checks.real("x", x)
    cdef int number = _checks.activation_kind(kind)
    y = np.empty_like(x)
    cdef ptrdiff_t n = x.size
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        c.activation(px, py, n, number)
    return y


def activation_backward(x, dy, kind):
    """dx = dy * kind'(x)."""
    x = _checks.real("x", x)
    dy = _checks.real("dy", dy, like=x, shape=x.shape)
    cdef int number = _checks.activation_kind(kind)
    dx = np.empty_like(x)
    cdef ptrdiff_t n = x.size
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
    y = np.empty_like(x)
    cdef ptrdiff_t n = x.size
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        c.dropout(px, py, n, probability, key)
    return y


# Embedding and positions


def embedding(table, ids):
    """Rows of table (V, d) at ids (...): (..., d)."""
    weights, ids = _checks.embedding(table, ids)
    cdef ptrdiff_t n = ids.size
    cdef ptrdiff_t d = weights.shape[1]
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
    rows, d, dtype = _checks.sinusoidal_positions(n, d_model, dtype)
    out = np.empty((rows, d), dtype)
    cdef const mt_kernels_table *c = c_for(out)
    cdef void *po = ptr(out)
    with nogil:
        c.sinusoidal_positions(po, rows, d)
    return out


def rotary(x, positions, base=10000.0, inverse=False):
    """x (B, H, T, D) turned by its positions (T,) or (B, T), pairs (i, i + D/2); `inverse` turns back."""
    cdef double b
    cdef int back, failed
    x, positions, b, back = _checks.rotary(x, positions, base, inverse)
    y = np.empty_like(x)
    cdef ptrdiff_t batch, heads, length, d
    batch, heads, length, d = x.shape
    cdef int per_row = positions.ndim == 2
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    cdef const int64_t *pp = <const int64_t *>ptr(positions)
    cdef void *py = ptr(y)
    with nogil:
        failed = c.rotary(px, pp, per_row, b, back, py, batch, heads, length, d)
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
    x = _checks.real("x", x)
    cdef ptrdiff_t n = x.size
    cdef double total = 0.0
    cdef int failed
    cdef const mt_kernels_table *c = c_for(x)
    cdef void *px = ptr(x)
    with nogil:
        failed = c.sum_of_squares(px, n, &total)
    no_memory_if(failed)
    return total


# Search


def search(queries, bank, k, valid=None):
    """The k best rows of bank (Bq, M, d) for queries (Bq, N, d): scores, index (Bq, N, k), best first; -1 where none is left."""
    cdef ptrdiff_t wanted, batch, n, m, d
    cdef int failed
    queries, bank, wanted, valid = _checks.search(queries, bank, k, valid)
    batch, n, d = queries.shape
    m = bank.shape[1]
    scores, index = np.empty((batch, n, wanted), queries.dtype), np.empty((batch, n, wanted), np.int64)
    cdef const mt_kernels_table *c = c_for(queries)
    cdef void *pq = ptr(queries)
    cdef void *pb = ptr(bank)
    cdef const uint8_t *pv = <const uint8_t *>ptr_or_null(valid)
    cdef void *ps = ptr(scores)
    cdef int64_t *pi = <int64_t *>ptr(index)
    with nogil:
        failed = c.search(pq, pb, pv, ps, pi, batch, n, m, d, wanted)
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
            c.k, c.v = ptr(block.k), ptr(block.v)
            c.kv_heads, c.source = block.k.shape[1], block.k.shape[2]
            c.valid = <const uint8_t *>ptr_or_null(block.valid)
            c.lengths = <const int64_t *>ptr_or_null(block.lengths)
            c.index = <const int64_t *>ptr_or_null(block.index)
            c.width = c.source if block.index is None else block.index.shape[3]
            c.offset, c.causal = block.offset, block.causal
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


cdef mt_attention_sizes attention_sizes(q, blocks, double scale):
    cdef mt_attention_sizes sizes
    sizes.batch, sizes.heads, sizes.length, sizes.d = q.shape
    sizes.n_blocks = len(blocks)
    sizes.scale = scale
    return sizes


def attention(q, blocks, scale):
    """out (B, H, T, D), lse (B, H, T) of queries q (B, H, T, D) over all blocks in one softmax."""
    cdef int failed
    q, blocks, scale = _checks.attention(q, blocks, scale)
    out, lse = np.empty_like(q), np.empty(q.shape[:3], q.dtype)
    cdef Blocks c_blocks = Blocks(q, blocks)
    cdef mt_attention_sizes sizes = attention_sizes(q, blocks, scale)
    cdef const mt_kernels_table *c = c_for(q)
    cdef void *pq = ptr(q)
    cdef void *po = ptr(out)
    cdef void *pl = ptr(lse)
    with nogil:
        failed = c.attention(pq, c_blocks.at, &sizes, po, pl)
    no_memory_if(failed)
    return out, lse


def attention_backward(dout, out, lse, q, blocks, scale, needs=None):
    """dq (B, H, T, D) and one BlockGrad a block; needs: one bool a block, False leaves out dk and dv."""
    cdef int failed
    dout, out, lse, q, blocks, scale, needs = _checks.attention_backward(dout, out, lse, q, blocks, scale, needs)
    dq = np.empty_like(q)
    cdef Blocks c_blocks = Blocks(q, blocks)
    grads = []
    for i, block in enumerate(blocks):
        dk, dv = (np.empty_like(block.k), np.empty_like(block.k)) if needs[i] else (None, None)
        c_blocks.at[i].dk, c_blocks.at[i].dv = ptr_or_null(dk), ptr_or_null(dv)
        grads.append(BlockGrad(dk, dv, block.dbias))
    cdef mt_attention_sizes sizes = attention_sizes(q, blocks, scale)
    cdef const mt_kernels_table *c = c_for(q)
    cdef void *pd = ptr(dout)
    cdef void *po = ptr(out)
    cdef void *pl = ptr(lse)
    cdef void *pq = ptr(q)
    cdef void *pdq = ptr(dq)
    with nogil:
        failed = c.attention_backward(pd, po, pl, pq, c_blocks.at, &sizes, pdq)
    no_memory_if(failed)
    return dq, grads


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
