# Token rows and positions


cdef extern from "core.h" nogil:
    void mt_embedding(int is_double, const void *table, const int64_t *ids, void *out, ptrdiff_t n, ptrdiff_t d)
    void mt_embedding_backward(int is_double, const int64_t *ids, const void *dout, void *dtable, ptrdiff_t n, ptrdiff_t d)
    int mt_sinusoidal_positions(int is_double, void *out, ptrdiff_t n, ptrdiff_t d_model)
    int mt_rotary(
        int is_double, const mt_rows *x, const int64_t *positions, int positions_per_row, const double *frequencies_i, ptrdiff_t half,
        int inverse, const mt_rows *y, ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t length, ptrdiff_t d
    )


cdef inline bint plain_ids(x, ptrdiff_t high) noexcept:
    """Plain integers from 0 to high - 1."""
    return plain_integers(x) and all_within(x, 0, high)


def embedding(table, ids):
    """Rows of table (V, d) at ids (...): (..., d)."""
    weights = table
    if not (plain_matrix(table) and plain_ids(ids, cnp.PyArray_DIM(table, 0))):
        weights, ids = _checks.embedding(table, ids)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(ids)
    cdef ptrdiff_t d = last_axis(weights)
    out = new_array(ids, cnp.PyArray_NDIM(ids), d, cnp.PyArray_TYPE(weights))
    cdef bint wide = is_double(weights)
    cdef void *pt = ptr(weights)
    cdef const int64_t *pi = <const int64_t *>ptr(ids)
    cdef void *po = ptr(out)
    with nogil:
        mt_embedding(wide, pt, pi, po, n, d)
    return out


cdef bint plain_embedding_backward(ids, dout, dtable) noexcept:
    return (
        plain_matrix(dtable)
        and plain_ids(ids, cnp.PyArray_DIM(dtable, 0))
        and plain(dout)
        and cnp.PyArray_TYPE(dout) == cnp.PyArray_TYPE(dtable)
        and cnp.PyArray_NDIM(dout) == cnp.PyArray_NDIM(ids) + 1
        and same_leading(dout, ids, cnp.PyArray_NDIM(ids))
        and last_axis(dout) == cnp.PyArray_DIM(dtable, 1)
        and written_apart(dtable, dout)
    )


def embedding_backward(ids, dout, dtable):
    """dtable (V, d)[ids] += dout (..., d), in place. Returns dtable."""
    if not plain_embedding_backward(ids, dout, dtable):
        ids, dout = _checks.embedding_backward(ids, dout, dtable)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(ids)
    cdef ptrdiff_t d = last_axis(dtable)
    cdef bint wide = is_double(dout)
    cdef const int64_t *pi = <const int64_t *>ptr(ids)
    cdef void *pd = ptr(dout)
    cdef void *pt = ptr(dtable)
    with nogil:
        mt_embedding_backward(wide, pi, pd, pt, n, d)
    return dtable


def sinusoidal_positions(n, d_model, dtype=np.float32):
    """The paper's table (n, d_model): sin at even columns, cos at odd, computed in double."""
    cdef ptrdiff_t rows, d
    cdef int failed
    rows, d, dtype = _checks.sinusoidal_positions(n, d_model, dtype)
    out = np.empty((rows, d), dtype)
    cdef bint wide = is_double(out)
    cdef void *po = ptr(out)
    with nogil:
        failed = mt_sinusoidal_positions(wide, po, rows, d)
    raise_if(failed)
    return out


cdef bint plain_turn(x, positions, frequencies, inverse) noexcept:
    """What rotary takes: positions (T,) or (B, T), which have the lengths of x's axis 2, or of its axes 0 and 2."""
    if not (plain_heads(x) and plain_integers(positions) and plain_bool(inverse) and type(frequencies) is cnp.ndarray):
        return False
    cdef int ndim = cnp.PyArray_NDIM(positions)
    return (
        cnp.PyArray_TYPE(frequencies) == cnp.NPY_FLOAT64
        and cnp.PyArray_NDIM(frequencies) == 1
        and cnp.PyArray_IS_C_CONTIGUOUS(frequencies)
        and 2 * cnp.PyArray_DIM(frequencies, 0) <= cnp.PyArray_DIM(x, 3)
        and (ndim == 1 or ndim == 2 and cnp.PyArray_DIM(positions, 0) == cnp.PyArray_DIM(x, 0))
        and last_axis(positions) == cnp.PyArray_DIM(x, 2)
    )


def rotary(x, positions, frequencies, inverse=False):
    """x (B, H, T, D) turned by its positions (T,) or (B, T) times frequencies (n,), pairs (i, i + n); `inverse` turns back."""
    cdef int failed
    if not plain_turn(x, positions, frequencies, inverse):
        x, positions, frequencies, inverse = _checks.rotary(x, positions, frequencies, inverse)
    y = rows_like(x)
    cdef const double *f = <const double *>ptr(frequencies)
    cdef ptrdiff_t half = cnp.PyArray_DIM(frequencies, 0)
    cdef int back = inverse
    cdef ptrdiff_t batch = cnp.PyArray_DIM(x, 0)
    cdef ptrdiff_t heads = cnp.PyArray_DIM(x, 1)
    cdef ptrdiff_t length = cnp.PyArray_DIM(x, 2)
    cdef ptrdiff_t d = cnp.PyArray_DIM(x, 3)
    cdef int per_row = cnp.PyArray_NDIM(positions) == 2
    cdef bint wide = is_double(x)
    cdef mt_rows px = rows_of(x)
    cdef const int64_t *pp = <const int64_t *>ptr(positions)
    cdef mt_rows py = rows_of(y)
    with nogil:
        failed = mt_rotary(wide, &px, pp, per_row, f, half, back, &py, batch, heads, length, d)
    raise_if(failed)
    note_rotary(x, positions, frequencies, back, y)
    return y
