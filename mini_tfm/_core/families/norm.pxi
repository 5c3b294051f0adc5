# Layer norm and RMS norm


cdef extern from "core.h" nogil:
    void mt_layer_norm(
        int is_double, const void *x, const void *weight, const void *bias, double eps, void *y, void *mean, void *rstd,
        ptrdiff_t n, ptrdiff_t d
    )
    int mt_layer_norm_backward(
        int is_double, const void *dy, const void *x, const void *weight, const void *mean, const void *rstd, void *dx,
        void *dweight, void *dbias, ptrdiff_t n, ptrdiff_t d
    )
    void mt_rms_norm(int is_double, const void *x, const void *weight, double eps, void *y, void *rstd, ptrdiff_t n, ptrdiff_t d)
    int mt_rms_norm_backward(
        int is_double, const void *dy, const void *x, const void *weight, const void *rstd, void *dx, void *dweight,
        ptrdiff_t n, ptrdiff_t d
    )
    void mt_rms_norm_heads(
        int is_double, const mt_rows *x, const void *weight, double eps, const mt_rows *y, void *rstd, ptrdiff_t batch,
        ptrdiff_t heads, ptrdiff_t n, ptrdiff_t d
    )


def layer_norm(x, weight, bias, eps, *, out=None):
    """y, mean (N,) float64, rstd (N,); y = (x - mean) * rstd * weight + bias."""
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
    y, mean, rstd = new_like(x) if out is None else out, new_vector(n, cnp.NPY_FLOAT64), new_vector(n, cnp.PyArray_TYPE(x))
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *pb = ptr_or_null(bias)
    cdef void *py = ptr(y)
    cdef void *pm = ptr(mean)
    cdef void *pr = ptr(rstd)
    with nogil:
        mt_layer_norm(wide, px, pw, pb, epsilon, py, pm, pr, n, d)
    note_norm(MT_CALL_LAYER_NORM, x, weight, bias, epsilon, n, d, y, mean, rstd)
    return y, mean, rstd


cdef inline bint plain_norm_backward(dy, x, weight, rstd) noexcept:
    return (
        plain_rows(x) and plain_like(dy, x) and plain_vector(weight, x, last_axis(x)) and plain_vector(rstd, x, n_rows(x))
    )


def layer_norm_backward(dy, x, weight, mean, rstd, *, out=None):
    """dx, dweight (d,), dbias (d,)."""
    cdef int failed
    if not (plain_norm_backward(dy, x, weight, rstd) and plain_double(mean, rstd, 1)):
        dy, x, weight, rstd = _checks.norm_backward(dy, x, weight, rstd)
        mean = _checks.double("mean", mean, shape=rstd.shape)
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    if out is not None:
        _checks.optional_output(out, x, ("dy", dy), ("x", x), ("weight", weight), ("mean", mean), ("rstd", rstd))
    dx, dweight, dbias = new_like(x) if out is None else out, new_like(weight), new_like(weight)
    cdef bint wide = is_double(x)
    cdef void *pdy = ptr(dy)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *pm = ptr(mean)
    cdef void *pr = ptr(rstd)
    cdef void *pdx = ptr(dx)
    cdef void *pdw = ptr(dweight)
    cdef void *pdb = ptr(dbias)
    with nogil:
        failed = mt_layer_norm_backward(wide, pdy, px, pw, pm, pr, pdx, pdw, pdb, n, d)
    raise_if(failed)
    return dx, dweight, dbias


def rms_norm(x, weight, eps, *, out=None):
    """y, rstd (N,); y = x * rstd * weight. Of x (B, H, N, d), rows that lie anywhere, y's heads lie as x's do."""
    if out is None and not plain(x) and plain_heads(x) and plain_vector(weight, x, last_axis(x)) and plain_number(eps, 0.0):
        return rms_norm_heads(x, weight, eps)
    if not (plain_rows(x) and plain_vector(weight, x, last_axis(x)) and plain_number(eps, 0.0)):
        x, weight, eps = _checks.rms_norm(x, weight, eps)
    cdef double epsilon = eps
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    if out is not None:
        _checks.optional_output(out, x, ("x", x), ("weight", weight))
    y, rstd = new_like(x) if out is None else out, new_vector(n, cnp.PyArray_TYPE(x))
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *py = ptr(y)
    cdef void *pr = ptr(rstd)
    with nogil:
        mt_rms_norm(wide, px, pw, epsilon, py, pr, n, d)
    note_norm(MT_CALL_RMS_NORM, x, weight, None, epsilon, n, d, y, None, rstd)
    return y, rstd


cdef tuple rms_norm_heads(x, weight, double eps):
    y, rstd = rows_like(x), new_vector(n_rows(x), cnp.PyArray_TYPE(x))
    cdef bint wide = is_double(x)
    cdef mt_rows px = rows_of(x)
    cdef mt_rows py = rows_of(y)
    cdef void *pw = ptr(weight)
    cdef void *pr = ptr(rstd)
    cdef ptrdiff_t batch = cnp.PyArray_DIM(x, 0)
    cdef ptrdiff_t heads = cnp.PyArray_DIM(x, 1)
    cdef ptrdiff_t n = cnp.PyArray_DIM(x, 2)
    cdef ptrdiff_t d = cnp.PyArray_DIM(x, 3)
    with nogil:
        mt_rms_norm_heads(wide, &px, pw, eps, &py, pr, batch, heads, n, d)
    cdef Calls into = recorder()
    if into is not None:
        note_heads_norm(into, x, weight, eps, y, rstd)
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
    cdef bint wide = is_double(x)
    cdef void *pdy = ptr(dy)
    cdef void *px = ptr(x)
    cdef void *pw = ptr(weight)
    cdef void *pr = ptr(rstd)
    cdef void *pdx = ptr(dx)
    cdef void *pdw = ptr(dweight)
    with nogil:
        failed = mt_rms_norm_backward(wide, pdy, px, pw, pr, pdx, pdw, n, d)
    raise_if(failed)
    return dx, dweight
