# Softmax and its logarithm


cdef extern from "core.h" nogil:
    void mt_softmax(int is_double, const void *x, void *y, ptrdiff_t n, ptrdiff_t d)
    void mt_softmax_backward(int is_double, const void *y, const void *dy, void *dx, ptrdiff_t n, ptrdiff_t d)
    void mt_log_softmax(int is_double, const void *x, void *y, ptrdiff_t n, ptrdiff_t d)


ctypedef enum SoftmaxKind:
    PLAIN
    LOGARITHM


cdef object softmax_rows(x, out, SoftmaxKind kind):
    if not plain_rows(x):
        x = _checks.real("x", x, min_ndim=1)
    y = new_like(x) if out is None else _checks.optional_output(out, x, ("x", x))
    cdef ptrdiff_t n = n_rows(x)
    cdef ptrdiff_t d = last_axis(x)
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    cdef void *py = ptr(y)
    with nogil:
        if kind == PLAIN:
            mt_softmax(wide, px, py, n, d)
        else:
            mt_log_softmax(wide, px, py, n, d)
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
    cdef bint wide = is_double(y)
    cdef void *py = ptr(y)
    cdef void *pdy = ptr(dy)
    cdef void *pdx = ptr(dx)
    with nogil:
        mt_softmax_backward(wide, py, pdy, pdx, n, d)
    return dx
