# AdamW, and the norm for clipping


cdef extern from "core.h" nogil:
    void mt_adamw(
        int is_double, void *param, const void *grad, void *m, void *v, ptrdiff_t n, double lr, double beta1, double beta2,
        double eps, double weight_decay, int64_t step, double grad_scale
    )
    int mt_sum_of_squares(int is_double, const void *x, ptrdiff_t n, double *sum)


cdef bint plain_arenas(param, grad, m, v) noexcept:
    """Flat arrays of one length; those that are written lie apart."""
    if not (plain(param) and cnp.PyArray_NDIM(param) == 1 and plain_like(grad, param) and plain_like(m, param) and plain_like(v, param)):
        return False
    return (
        written_apart(param, grad) and written_apart(m, param) and written_apart(m, grad)
        and written_apart(v, param) and written_apart(v, grad) and written_apart(v, m)
    )


def adamw(param, grad, m, v, *, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0):
    """One AdamW step on flat arrays; param, m and v change in place. `step` counts from 1."""
    cdef int64_t at
    if not (
        plain_arenas(param, grad, m, v) and plain_number(lr, 0.0) and plain_share(beta1) and plain_share(beta2)
        and plain_number(eps, 0.0) and plain_number(weight_decay, 0.0) and plain_integer(step, 1, 2**53, &at)
        and plain_number(grad_scale, -DBL_MAX)
    ):
        given = _checks.adamw(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
        grad, lr, beta1, beta2, eps, weight_decay, at, grad_scale = given
    cdef double rate = lr, b1 = beta1, b2 = beta2, epsilon = eps, decay = weight_decay, scale = grad_scale
    cdef ptrdiff_t n = cnp.PyArray_SIZE(param)
    cdef bint wide = is_double(param)
    cdef void *pp = ptr(param)
    cdef void *pg = ptr(grad)
    cdef void *pm = ptr(m)
    cdef void *pv = ptr(v)
    with nogil:
        mt_adamw(wide, pp, pg, pm, pv, n, rate, b1, b2, epsilon, decay, at, scale)


def sum_of_squares(x):
    """sum(x * x) over everything, accumulated in double: a float."""
    if not plain(x):
        x = _checks.real("x", x)
    cdef ptrdiff_t n = cnp.PyArray_SIZE(x)
    cdef double total = 0.0
    cdef int failed
    cdef bint wide = is_double(x)
    cdef void *px = ptr(x)
    with nogil:
        failed = mt_sum_of_squares(wide, px, n, &total)
    raise_if(failed)
    return total
