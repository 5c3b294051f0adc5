# Attention over blocks of keys and values


cdef extern from "core.h" nogil:
    int mt_attention(
        int is_double, const mt_rows *q, const mt_block *blocks, const mt_attention_sizes *sizes, const mt_rows *out,
        void *lse
    )
    int mt_attention_backward(
        int is_double, const mt_rows *dout, const mt_rows *out, const void *lse, const mt_rows *q, const mt_block *blocks,
        const mt_attention_sizes *sizes, const mt_rows *dq
    )
    int mt_attention_mass(
        int is_double, const mt_rows *q, const mt_block *block, const mt_attention_sizes *sizes, const void *lse,
        const uint8_t *asking, void *mass
    )


cdef double CAP_LEAST, CAP_MOST
CAP_LEAST, CAP_MOST = _checks.CAPS


# A block, one group of its fields at a time: whether they are plain; if so they are filled in. What pointers point into is kept
# alive in `kept`, for others may change the Block while the GIL is released.


cdef bint take_rows(mt_block *c, block, cnp.ndarray q, list kept) except -1:
    k, v, valid, lengths, owners = block.k, block.v, block.valid, block.lengths, block.owners
    if not (plain_kept(k, q) and plain_heads_of(v, cnp.PyArray_TYPE(k)) and cnp.PyArray_SAMESHAPE(v, k)):
        return False
    cdef ptrdiff_t batch = cnp.PyArray_DIM(q, 0)
    cdef ptrdiff_t heads = cnp.PyArray_DIM(q, 1)
    c.kv_heads, c.source = cnp.PyArray_DIM(k, 1), cnp.PyArray_DIM(k, 2)
    c.kept = kept_as(k)
    if owners is not None and not take_owners(c, owners, batch, cnp.PyArray_DIM(k, 0), kept):
        return False
    if (owners is None and cnp.PyArray_DIM(k, 0) != batch) or last_axis(k) != kept_axis(k, q) or (c.kv_heads == 0) != (heads == 0):
        return False
    if c.kv_heads and heads % c.kv_heads:
        return False
    c.k, c.v = rows_of(k), rows_of(v)
    kept.append(k)
    kept.append(v)
    if valid is not None:
        if not plain_mask(valid, batch, c.source):
            return False
        c.valid = <const uint8_t *>ptr(valid)
        kept.append(valid)
    if lengths is not None:
        if not (plain_integers(lengths) and cnp.PyArray_NDIM(lengths) == 1 and cnp.PyArray_DIM(lengths, 0) == batch):
            return False
        if not all_within(lengths, 0, c.source + 1):
            return False
        c.lengths = <const int64_t *>ptr(lengths)
        kept.append(lengths)
    return True


cdef bint take_owners(mt_block *c, owners, ptrdiff_t batch, ptrdiff_t rows, list kept) except -1:
    cdef ptrdiff_t i
    if not (
        cnp.PyArray_CheckExact(owners) and cnp.PyArray_TYPE(<cnp.ndarray>owners) == cnp.NPY_INT64
        and cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray>owners) and cnp.PyArray_NDIM(<cnp.ndarray>owners) == 2
        and cnp.PyArray_DIM(<cnp.ndarray>owners, 0) == batch and cnp.PyArray_DIM(<cnp.ndarray>owners, 1) == c.source
        and (c.source <= 1 or cnp.PyArray_STRIDE(<cnp.ndarray>owners, 1) == sizeof(int64_t))
    ):
        return False
    c.owners, c.owners_ld = <const int64_t *>ptr(owners), cnp.PyArray_STRIDE(<cnp.ndarray>owners, 0) // <ptrdiff_t>sizeof(int64_t)
    for i in range(batch):
        if not within(c.owners + i * c.owners_ld, c.source, 0, rows):
            return False
    kept.append(owners)
    return True


cdef bint take_order(mt_block *c, block, ptrdiff_t length) except -1:
    causal, window, offset = block.causal, block.window, block.offset
    if not (plain_bool(causal) and plain_integer(block.prefix, 0, c.source, &c.prefix)):
        return False
    c.causal, c.window, c.offset = causal is True, 0, c.source - length
    if window is not None and not plain_integer(window, 1, 2**60, &c.window):
        return False
    if offset is not None and not plain_integer(offset, -(2**60), 2**60, &c.offset):
        return False
    return c.prefix == 0 or (c.causal and c.window == 0)


cdef bint take_index(mt_block *c, index, cnp.ndarray q, list kept) except -1:
    c.width = c.source
    if index is None:
        return True
    if c.causal or c.window or c.kept != MT_KEPT_REAL or c.owners != NULL or not (plain_integers(index) and cnp.PyArray_NDIM(index) == 4 and same_leading(index, q, 3)):
        return False
    if not all_within(index, -1, c.source):
        return False
    c.width, c.index = cnp.PyArray_DIM(index, 3), <const int64_t *>ptr(index)
    kept.append(index)
    return True


cdef bint take_scores(ptrdiff_t *stride, x, cnp.ndarray q, ptrdiff_t width) noexcept:
    """The strides of x, of any, broadcast to scores (B, H, T, width): 0 along an axis that it does not have."""
    if not (
        cnp.PyArray_CheckExact(x) and cnp.PyArray_TYPE(<cnp.ndarray>x) == cnp.PyArray_TYPE(q)
        and cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray>x) and cnp.PyArray_NDIM(<cnp.ndarray>x) <= 4
    ):
        return False
    cdef int axis, missing = 4 - cnp.PyArray_NDIM(<cnp.ndarray>x)
    cdef ptrdiff_t n, step, item = cnp.PyArray_ITEMSIZE(<cnp.ndarray>x)
    for axis in range(4):
        stride[axis] = 0
        if axis < missing:
            continue
        n, step = cnp.PyArray_DIM(<cnp.ndarray>x, axis - missing), cnp.PyArray_STRIDE(<cnp.ndarray>x, axis - missing)
        if step % item or (n != 1 and n != (width if axis == 3 else cnp.PyArray_DIM(q, axis))):
            return False
        if n != 1:
            stride[axis] = step // item
    return True


cdef bint take_bias(mt_block *c, block, cnp.ndarray q, list kept) except -1:
    bias, dbias, needs_dbias = block.bias, block.dbias, block.needs_dbias
    if not plain_bool(needs_dbias):
        return False
    if bias is None:
        return dbias is None and needs_dbias is False
    if not take_scores(c.bias_stride, bias, q, c.width):
        return False
    c.bias = ptr(bias)
    kept.append(bias)
    return dbias is None or take_dbias(c, dbias, q, kept)


cdef bint take_dbias(mt_block *c, dbias, cnp.ndarray q, list kept) except -1:
    if not take_scores(c.dbias_stride, dbias, q, c.width) or not cnp.PyArray_ISWRITEABLE(dbias):
        return False
    c.dbias = ptr(dbias)
    kept.append(dbias)
    return True


cdef class AttentionCall:
    """What a call of attention gives to C. Owns the C blocks, and keeps alive what their pointers point into."""

    cdef mt_attention_sizes sizes
    cdef mt_rows q
    cdef mt_block *blocks
    cdef list kept

    def __cinit__(self):
        self.blocks = NULL

    def __dealloc__(self):
        free(self.blocks)

    cdef bint take(self, q, blocks, scale, dropout, seed, cap, bint forward=False) except -1:
        """Whether all is plain; if so it is filled in. forward: of a call that gives the output alone."""
        cdef ptrdiff_t i, n
        if not (plain_heads(q) and (type(blocks) is list or type(blocks) is tuple)):
            return False
        if not (plain_number(scale, -DBL_MAX) and plain_share(dropout) and plain_seed(seed, &self.sizes.seed)):
            return False
        if not (cap is None or plain_number(cap, CAP_LEAST) and <double>cap <= CAP_MOST):
            return False
        n, self.kept = len(blocks), [q]
        self.sizes.batch, self.sizes.heads = cnp.PyArray_DIM(q, 0), cnp.PyArray_DIM(q, 1)
        self.sizes.length, self.sizes.d = cnp.PyArray_DIM(q, 2), cnp.PyArray_DIM(q, 3)
        self.sizes.n_blocks, self.sizes.scale, self.sizes.dropout = n, scale, dropout
        self.sizes.cap = 0.0 if cap is None else cap
        self.q = rows_of(q)
        free(self.blocks)
        self.blocks = <mt_block *>calloc(n + 1, sizeof(mt_block))
        if self.blocks == NULL:
            raise MemoryError("mini_tfm: no memory for the blocks of an attention")
        for i in range(n):
            if not self.take_block(&self.blocks[i], blocks[i], q):
                return False
            if not forward and (self.blocks[i].kept != MT_KEPT_REAL or self.blocks[i].owners != NULL):
                return False
        return True

    cdef bint take_block(self, mt_block *c, block, cnp.ndarray q) except -1:
        return (
            type(block) is Block
            and take_rows(c, block, q, self.kept)
            and take_order(c, block, self.sizes.length)
            and take_index(c, block.index, q, self.kept)
            and take_bias(c, block, q, self.kept)
        )


def attention(q, blocks, scale, *, dropout=0.0, seed=0, cap=None):
    """out (B, H, T, D), lse (B, H, T) of queries q (B, H, T, D) over all blocks in one softmax; a share of the weights dropped."""
    cdef int failed
    cdef AttentionCall given = AttentionCall()
    if not given.take(q, blocks, scale, dropout, seed, cap, True):
        q, blocks, scale, dropout, seed, cap = _checks.attention(q, blocks, scale, dropout, seed, cap)
        checked_if(given.take(q, blocks, scale, dropout, seed, cap, True))
    out, lse = rows_like(q), new_leading(q, cnp.NPY_FLOAT64)
    cdef bint wide = is_double(q)
    cdef mt_rows po = rows_of(out)
    cdef void *pl = ptr(lse)
    with nogil:
        failed = mt_attention(wide, &given.q, given.blocks, &given.sizes, &po, pl)
    raise_if(failed)
    note_attention(&given.q, given.blocks, &given.sizes, wide, out, lse, given.kept)
    return out, lse


cdef bint plain_forward(dout, out, lse, cnp.ndarray q) noexcept:
    """What the forward gave for q, and the gradient of it."""
    return (
        plain_heads_like(dout, q) and plain_heads_like(out, q)
        and plain_double(lse, q, 3)
    )


cdef bint plain_needs(needs, ptrdiff_t n) except -1:
    return needs is None or (type(needs) is list and len(needs) == n and all([plain_bool(need) for need in needs]))


cdef object block_grad(mt_block *c, block, bint needed, cnp.ndarray q, list kept):
    """Arrays for one block's gradients, which C is told of."""
    dk = dv = None
    if needed:
        dk, dv = rows_like(block.k), rows_like(block.v)
        c.dk, c.dv = rows_of(dk), rows_of(dv)
    dbias = block.dbias
    if dbias is None and block.needs_dbias:
        dbias = np.zeros(block.bias.shape, block.bias.dtype)
        checked_if(take_dbias(c, dbias, q, kept))
    return BlockGrad(dk, dv, dbias)


def attention_backward(dout, out, lse, q, blocks, scale, needs=None, *, dropout=0.0, seed=0, cap=None):
    """dq (B, H, T, D) and one BlockGrad a block; needs: one bool a block, False leaves out dk and dv."""
    cdef int failed
    cdef ptrdiff_t i
    cdef AttentionCall given = AttentionCall()
    if not (given.take(q, blocks, scale, dropout, seed, cap) and plain_forward(dout, out, lse, q) and plain_needs(needs, len(blocks))):
        checked = _checks.attention_backward(dout, out, lse, q, blocks, scale, needs, dropout, seed, cap)
        dout, out, lse, q, blocks, scale, needs, dropout, seed, cap = checked
        checked_if(given.take(q, blocks, scale, dropout, seed, cap))
    dq = rows_like(q)
    grads = []
    for i in range(given.sizes.n_blocks):
        grads.append(block_grad(&given.blocks[i], blocks[i], needs is None or needs[i], q, given.kept))
    cdef bint wide = is_double(q)
    cdef mt_rows pd = rows_of(dout)
    cdef mt_rows po = rows_of(out)
    cdef void *pl = ptr(lse)
    cdef mt_rows pdq = rows_of(dq)
    with nogil:
        failed = mt_attention_backward(wide, &pd, &po, pl, &given.q, given.blocks, &given.sizes, &pdq)
    raise_if(failed)
    return dq, grads


def attention_mass(q, block, lse, scale, asking, *, cap=None):
    """(B, S): the weights that each row of the block received from the queries asking (B, T), summed over heads."""
    cdef int failed
    cdef AttentionCall given = AttentionCall()
    if not (
        given.take(q, (block,), scale, 0.0, 0, cap)
        and plain_forward(q, q, lse, q)
        and plain_mask(asking, given.sizes.batch, given.sizes.length)
    ):
        q, block, lse, scale, asking, cap = _checks.attention_mass(q, block, lse, scale, asking, cap)
        checked_if(given.take(q, (block,), scale, 0.0, 0, cap))
    cdef cnp.ndarray mass = new_matrix(q, given.sizes.batch, given.blocks[0].source)
    cdef bint wide = is_double(q)
    cdef void *pl = ptr(lse)
    cdef const uint8_t *pa = <const uint8_t *>ptr(asking)
    cdef void *pm = ptr(mass)
    with nogil:
        failed = mt_attention_mass(wide, &given.q, given.blocks, &given.sizes, pl, pa, pm)
    raise_if(failed)
    return mass
